"""Sources, tokenizers, splits and batches."""

import json
import os

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from q3n_functional import corpus, data, tokenizer
from q3n_functional.corpus import Corpus
from tests.configs import small

TEXT = "To be, or not to be,\r\nthat is the question: naïve — 字 🙂 <|endoftext|>\n" * 40


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "play.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "plays.jsonl"
    path.write_text("".join(json.dumps({"text": f"play {i} " * i}) + "\n\n" for i in range(12)))
    return path


def counting(n=1000, starts=None):
    """A corpus whose token is its place."""
    return Corpus(np.arange(n, dtype=np.uint16), None if starts is None else np.array(starts, np.int64))


# tokenizers


@pytest.mark.parametrize(("name", "most"), [("bpe", 300), ("byte", 257)])
def test_any_text_survives_encoding_and_decoding(source, name, most):
    words = tokenizer.make(name, lambda: corpus.blocks(source), 300)
    assert words.get_vocab_size() <= most
    (ids,) = tokenizer.encode(words, [TEXT + "unseen Ω\x00"])
    assert words.decode(ids) == TEXT + "unseen Ω\x00"
    assert tokenizer.num_bytes(words, np.array(ids)) == len((TEXT + "unseen Ω\x00").encode())


def test_training_a_bpe_again_gives_the_same_one(source):
    first, second = (tokenizer.make("bpe", lambda: corpus.blocks(source), 300) for _ in range(2))
    assert first.to_str() == second.to_str()


def test_a_tokenizer_file_is_read_back(source, tmp_path):
    words = tokenizer.make("bpe", lambda: corpus.blocks(source), 300)
    words.save(str(tmp_path / "tokenizer.json"))
    again = tokenizer.make(str(tmp_path / "tokenizer.json"), list, 300)
    assert again.to_str() == words.to_str()


def test_transformers_reads_the_same_tokens(tmp_path):
    words = tokenizer.train_bpe(["12345 be, don't "] * 40, 300)
    for name, content in tokenizer.files(words).items():
        (tmp_path / name).write_bytes(content)
    small().to_json(tmp_path / "config.json")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "  To 12345 be,\n\n \t don't — naïve"
    assert theirs(text).input_ids == tokenizer.encode(words, [text])[0]
    assert theirs.decode(theirs(text).input_ids) == text
    assert theirs.eos_token_id == words.token_to_id(tokenizer.END)


def test_tokenizer_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json does not exist.*'byte', 'bpe'"):
        tokenizer.make(str(tmp_path / "nowhere.json"), list, 300)
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json is not a tokenizer\.json"):
        tokenizer.read(bad)
    with pytest.raises(ValueError, match=r"vocab_size is 200.*at least 257"):
        tokenizer.train_bpe([], 200)


def byte_ids(text):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    return words, tokenizer.encode(words, [text])[0]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "naïve 字 end."),
        (("字",), "naïve "),
        (("ïv", "na"), ""),
        (("end!",), "naïve 字 end."),
        (("d.",), "naïve 字 en"),
    ],
)
def test_stream_stops_at_the_first_stop_string_and_loses_nothing_else(stop, expected):
    words, ids = byte_ids("naïve 字 end.")
    assert "".join(tokenizer.stream(words, ids, stop)) == expected


def test_what_a_stream_and_encode_refuse():
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    with pytest.raises(ValueError, match="a stop string is empty, which would end every text at once: leave it out"):
        tokenizer.stream(words, [], ("a", ""))
    with pytest.raises(ValueError, match="the text has bytes that are not UTF-8: write it in UTF-8"):
        tokenizer.encode(words, ["h\udcff"])


def test_stream_gives_text_as_soon_as_it_is_certain():
    words, ids = byte_ids("abcd")
    pieces = tokenizer.stream(words, ids, ("cx",))
    assert [next(pieces), next(pieces), next(pieces)] == ["", "a", "b"]


# sources


def test_a_text_is_one_document_and_bytes_stay_as_they_are(source, tmp_path):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    found = corpus.read(corpus.tokenize(source, words, tmp_path), 257)
    assert found.starts is None
    assert words.decode(found.ids.tolist()).encode() == source.read_bytes()


def test_each_json_line_is_a_document_that_ends_in_the_end_token(lines, tmp_path):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    found = corpus.read(corpus.tokenize(lines, words, tmp_path), 257)
    pieces = np.split(found.ids, found.starts[1:])
    assert [words.decode(p.tolist()) for p in pieces] == [f"play {i} " * i for i in range(12)]
    assert all(p[-1] == words.token_to_id(tokenizer.END) for p in pieces)


def test_tokens_are_made_once_for_a_text_and_a_tokenizer(source, tmp_path, monkeypatch):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    path = corpus.tokenize(source, words, tmp_path)
    encode, calls = corpus.encode, []
    monkeypatch.setattr(corpus, "encode", lambda *a: calls.append(a) or encode(*a))
    corpus.tokenize(source, words, tmp_path)
    assert not calls
    corpus.tokenize(source, tokenizer.train_bpe([TEXT], 300), tmp_path)
    assert len(calls) == 1
    source.write_text("another text")
    corpus.tokenize(source, words, tmp_path)
    assert len(calls) == 2
    assert words.decode(np.load(path).tolist()) == "another text"


@pytest.mark.parametrize("lost", ["tokens.npy", "tokens.documents.npy", "tokens.json"])
def test_tokens_of_which_a_file_is_lost_are_made_again(lines, tmp_path, lost):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    whole = corpus.read(corpus.tokenize(lines, words, tmp_path), 257)
    if lost == "tokens.json":
        (tmp_path / lost).write_text("")  # as a crash may leave it
    else:
        (tmp_path / lost).unlink()
    again = corpus.read(corpus.tokenize(lines, words, tmp_path), 257)
    assert again.ids.tolist() == whole.ids.tolist()
    assert again.starts.tolist() == whole.starts.tolist()


def test_document_starts_belong_to_what_a_source_is_known_by(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(9))
    found = [corpus.signature(tmp_path / "ids.npy")]
    for starts in ([0, 3], [0, 4]):
        np.save(tmp_path / "ids.documents.npy", np.array(starts))
        found.append(corpus.signature(tmp_path / "ids.npy"))
    assert len(set(found)) == 3


def test_tokens_that_cannot_be_written_leave_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: os.open(tmp_path, os.O_WRONLY))  # raises, as a full disk does
    with pytest.raises(OSError, match=r"tokens\.npy cannot be written \(.*make room for it, or choose another --run"):
        corpus.tokenize(source, tokenizer.train_bpe([], tokenizer.BYTES), tmp_path)
    assert list(tmp_path.iterdir()) == [source]


def test_an_interrupted_tokenisation_is_not_used(source, tmp_path, monkeypatch):
    words = tokenizer.train_bpe([], tokenizer.BYTES)
    path = corpus.tokenize(source, words, tmp_path)
    source.write_text("another text")
    monkeypatch.setattr(corpus.np, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.tokenize(source, words, tmp_path)
    monkeypatch.undo()
    source.write_text(TEXT, encoding="utf-8", newline="")  # as before: a seal left in place would vouch for it
    assert words.decode(np.load(corpus.tokenize(source, words, tmp_path)).tolist()) == TEXT
    assert path.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not a JSON object"),
        ('{"txt": "a"}', "line 2 .*KeyError"),
        ('["a"]', "line 2 is not a JSON object"),
        ('{"text": 3}', "line 2 is not a JSON object with a string"),
        (r'{"text": "\ud800"}', "line 2 .*surrogates"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(corpus.texts(path))


def test_text_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        list(corpus.texts(path))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([], np.int64), "holds no tokens"),
        (np.zeros((2, 2), np.int64), r"int64 \[2, 2\], it must be one row of integers"),
        (np.zeros(4), "float64"),
        (np.array([0, 5, 99, 3]), r"token id 99 at 2, model\.vocab_size is 64"),
        (np.array([0, -1]), "token id -1 at 1"),
    ],
)
def test_token_files_are_checked(tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    with pytest.raises(ValueError, match=message):
        corpus.read(tmp_path / "ids.npy", 64)


def test_a_pickle_is_refused(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"ids\.npy is not a NumPy \.npy file of numbers"):
        corpus.read(tmp_path / "ids.npy", 64)


def test_document_starts_beside_token_ids(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(10))
    np.save(tmp_path / "ids.documents.npy", np.array([0, 4, 4, 10]))
    assert corpus.read(tmp_path / "ids.npy", 64).starts.tolist() == [0, 4]
    for bad in ([1, 4], [0, 5, 4], [0, 11], []):
        np.save(tmp_path / "ids.documents.npy", np.array(bad, np.int64))
        with pytest.raises(ValueError, match=r"ids\.documents\.npy must hold document starts"):
            corpus.read(tmp_path / "ids.npy", 64)


# splits


def test_split_keeps_order_and_remembers_the_offset():
    first, last = corpus.split(counting(), 0.1)
    assert (len(first.ids), len(last.ids), last.offset) == (900, 100, 900)
    assert last.ids[0] == 900


def test_split_cuts_between_documents():
    first, last = corpus.split(counting(starts=[0, 300, 850, 990]), 0.1)
    assert first.starts.tolist() == [0, 300]
    assert last.starts.tolist() == [0, 140]
    assert (last.offset, last.ids[0]) == (850, 850)


def test_no_validation_takes_everything_for_training():
    first, last = corpus.split(counting(starts=[0, 300]), 0.0)
    assert (len(first.ids), len(last.ids), first.starts.tolist()) == (1000, 0, [0, 300])


# batches


def test_a_batch_is_a_function_of_index_and_seed():
    reader = data.reader(counting(), 4, 16, "training")
    a, b = data.batch(reader, 7, 1), data.batch(reader, 7, 1)
    assert torch.equal(a.tokens_BT, b.tokens_BT)
    assert a.tokens_BT.shape == (4, 16)
    assert a.tokens_BT.dtype == torch.int64
    assert a.cu_seqlens is None
    assert not torch.equal(a.tokens_BT, data.batch(reader, 7, 2).tokens_BT)
    assert not torch.equal(a.tokens_BT, data.batch(reader, 8, 1).tokens_BT)


def test_batches_never_change():
    # A resumed run must see what the first one would have seen, under any version of anything.
    reader = data.reader(counting(), 2, 16, "training")
    assert [data.window_starts(reader, i, 5).tolist() for i in (0, 29, 30, 61)] == [
        [528, 864],
        [960, 768],
        [544, 259],
        [223, 895],
    ]


def test_an_epoch_visits_every_window_once_and_the_next_one_cuts_elsewhere():
    reader = data.reader(counting(1000), 3, 16, "training")
    visits = np.concatenate([data.window_starts(reader, i, 0) for i in range(41)])[:122]
    first, second = visits[:61], visits[61:122]
    assert len(set(first)) == len(set(second)) == 61
    assert len(set(first % 16)) == len(set(second % 16)) == 1
    assert first[0] % 16 != second[0] % 16
    assert (np.diff(first) != 16).any()
    assert visits.max() + 16 <= 1000


@pytest.mark.parametrize("tokens", [64, 65, 79, 80])
def test_the_shortest_corpus_fills_its_batches(tokens):
    reader = data.reader(counting(tokens), 4, 16, "training")
    for index in range(9):
        batch = data.batch(reader, index, 0)
        assert torch.equal(batch.tokens_BT.diff(dim=1), torch.ones(4, 15, dtype=torch.int64))


def test_too_short_a_part_is_named():
    with pytest.raises(ValueError, match=r"validation part has 63 tokens.*4 rows x 16 needs 64"):
        data.reader(counting(63), 4, 16, "validation")


def test_documents_become_offsets_of_a_fixed_length():
    starts = [0, 5, 7, 8, 9, 40, 41, 200, 300, 301, 302, 303, 500]
    reader = data.reader(counting(600, starts), 2, 16, "training")
    assert reader.documents == 4
    sizes = set()
    for index in range(60):
        tokens, cu = data.batch(reader, index, 0)
        sizes.add(len(cu))
        bounds = set(cu.tolist())
        where = tokens.flatten().tolist()
        assert bounds - {32} == {0, 16} | {i for i, place in enumerate(where) if place in starts}
        assert cu.dtype == torch.int32
        assert (cu.diff() >= 0).all()
        assert cu[-1] == 32
    assert sizes == {1 + 2 * 5}


def test_the_fullest_window_sets_the_length():
    for starts in ([0, 10, 25], [0, 1, 15, 16], [0, *range(3, 50)], [0]):
        every = [sum(begin < s < begin + 16 for s in starts) for begin in range(100)]
        assert data.reader(counting(200, starts), 1, 16, "training").documents == max(every)


def test_both_parts_have_offsets_of_one_length():
    crowded = [0, 300, 600, *range(900, 950)]
    for starts in (crowded, [0, *(1000 - s for s in crowded if s)]):
        training, validation = data.readers(counting(1000, sorted(starts)), 0.1, 2, 16)
        (validated,) = data.validation_batches(validation, 1)
        assert len(data.batch(training, 0, 0).cu_seqlens) == len(validated.cu_seqlens)
    assert data.readers(counting(1000), 0.0, 2, 16)[1] is None


def test_validation_asks_for_every_token_once():
    reader = data.reader(counting(1000), 3, 16, "validation")
    asked = [b.tokens_BT[:, 1:].flatten() for b in data.validation_batches(reader, 1000)]
    assert torch.cat(asked).tolist() == list(range(1, 22 * 45 + 1))
    assert data.num_validation_batches(reader, 5) == len(list(data.validation_batches(reader, 5))) == 5


def test_bytes_per_token_are_those_of_the_validation_targets():
    words = tokenizer.train_bpe(["aaaa bb"] * 9, 300)
    ids = np.array(tokenizer.encode(words, ["aaaa bb aaaa bb é"])[0] * 40)
    reader = data.reader(Corpus(ids), 2, 8, "validation")
    targets = 2 * 7 * data.num_validation_batches(reader, 3)
    expected = len(words.decode(ids[1 : targets + 1].tolist()).encode()) / targets
    assert data.bytes_per_token(reader, 3, words) == expected


def test_a_batch_can_be_traced_to_its_source():
    first, _ = corpus.split(counting(1000, [0, 10, 500, 960]), 0.05)
    reader = data.reader(first, 2, 16, "training")
    starts = data.window_starts(reader, 3, 0)
    lines = data.describe(reader, 3, 0).splitlines()
    assert [line.split(",")[0] for line in lines] == [f"  row {r}: tokens {s}..{s + 15}" for r, s in enumerate(starts)]
    for line, start in zip(lines, starts, strict=True):
        documents = [sum(begin <= place for begin in [0, 10, 500, 960]) - 1 for place in (start, start + 15)]
        assert line.endswith(f"documents {documents[0]}..{documents[1]}")


def test_a_plain_tokenizers_file_without_an_end_token_adds_none(lines, tmp_path):
    words = Tokenizer.from_str(tokenizer.train_bpe([], tokenizer.BYTES).to_str().replace(tokenizer.END, "<other>"))
    found = corpus.read(corpus.tokenize(lines, words, tmp_path), 257)
    assert words.decode(found.ids.tolist()) == "".join(f"play {i} " * i for i in range(12))


def test_ranks_share_the_rows_of_a_batch_with_their_documents():
    reader = data.reader(counting(400, [0, 3, 50, 51, 52, 111, 190, 260]), 4, 32, "training")
    whole = data.batch(reader, 1, seed=0)
    for index in range(2):
        own = data.rows(whole, 2, index)
        assert torch.equal(own.tokens_BT, whole.tokens_BT[2 * index : 2 * index + 2])
        assert len(own.cu_seqlens) == len(whole.cu_seqlens)  # or ranks would compile anew
        inside = (whole.cu_seqlens >= 64 * index) & (whole.cu_seqlens <= 64 * index + 64)
        assert set(own.cu_seqlens.tolist()) == set((whole.cu_seqlens[inside] - 64 * index).tolist())
    assert data.rows(whole._replace(cu_seqlens=None), 4, 3).cu_seqlens is None
