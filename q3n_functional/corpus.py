"""A corpus on disk: text or JSON lines turned into token ids once, or token ids as they come.

A corpus is one long array of token ids, memory-mapped, and the places where its documents start.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from q3n_functional.tokenizer import END, encode

Ids = NDArray[np.integer]
_BLOCK = 1 << 20


class Corpus(NamedTuple):
    """Token ids [N], the start of each document (None where the text is one document), and where ids[0] stood."""

    ids: Ids
    starts: NDArray[np.int64] | None = None
    offset: int = 0


def texts(source: Path) -> Iterator[list[str]]:
    """The documents of a .txt or .jsonl file, each as blocks of about a megabyte that join to its text.

    Raises ValueError, with the line number, for a line that is not a JSON object with a string "text".
    """
    try:
        yield from _lines(source) if source.suffix == ".jsonl" else [list(_text_blocks(source))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text ({error}): convert it first") from error


def blocks(source: Path) -> Iterator[str]:
    """All blocks of all documents."""
    return (block for document in texts(source) for block in document)


def _text_blocks(source: Path) -> Iterator[str]:
    # newline="": a carriage return is a byte of the text, or bits per byte would count bytes that nobody predicts.
    with source.open(encoding="utf-8", newline="") as file:
        while lines := file.readlines(_BLOCK):
            yield "".join(lines)


def _lines(source: Path) -> Iterator[list[str]]:
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield [_text(source, number, line)]


def _text(source: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # JSON can spell half of a surrogate pair, which is no text
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(f'{source} line {number} is not a JSON object with a string "text": {error!r}') from error
    return str(text)


def tokenize(source: Path, tokenizer: Tokenizer, folder: Path) -> Path:
    """Path of `source` as token ids in `folder`, made once for this text and this tokenizer.

    Writes tokens.npy and, for documents, tokens.documents.npy. A tokens.json written last says what they were made
    from, so neither an interrupted nor an outdated file is ever used.
    """
    path, seal = folder / "tokens.npy", folder / "tokens.json"
    key = {"source": _digest(source), "tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}
    if _is_whole(path, seal, key, documents=source.suffix == ".jsonl"):
        return path
    seal.unlink(missing_ok=True)
    ids, starts = _encode(source, tokenizer)
    _write(path, ids)
    if source.suffix == ".jsonl":
        _write(_documents_path(path), starts)
    else:
        _documents_path(path).unlink(missing_ok=True)
    seal.write_text(json.dumps(key))
    return path


def _is_whole(path: Path, seal: Path, key: dict[str, str], documents: bool) -> bool:
    """Whether the tokens of `key` are there, with document starts if they are `documents`."""
    try:
        sealed = json.loads(seal.read_text()) == key
    except (FileNotFoundError, ValueError):
        return False
    return sealed and path.exists() and _documents_path(path).exists() == documents


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


BLOCK, BLOCKS = 1 << 20, 64


def signature(source: Path) -> str:
    """What tells a source from another, without reading all of a large one.

    SHA-256 of its size and of at most 64 MiB spread evenly over it; of token ids, of the document starts beside it too.
    """
    found, beside = hashlib.sha256(), _documents_path(source)
    for path in (source, beside) if source.suffix == ".npy" and beside.exists() else (source,):
        size = path.stat().st_size
        found.update(size.to_bytes(8, "little"))
        blocks = min(-(-size // BLOCK), BLOCKS)
        with path.open("rb") as file:
            for i in range(blocks):
                file.seek(max(size - BLOCK, 0) * i // max(blocks - 1, 1))
                found.update(file.read(BLOCK))
    return found.hexdigest()


def _encode(source: Path, tokenizer: Tokenizer) -> tuple[Ids, NDArray[np.int64]]:
    end = tokenizer.token_to_id(END) if source.suffix == ".jsonl" else None
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    pieces: list[Ids] = []
    lengths: list[int] = []
    for document in texts(source):
        ids = [i for piece in encode(tokenizer, document) for i in piece] + [end] * (end is not None)
        pieces.append(np.array(ids, dtype))
        lengths.append(len(ids))
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    return np.concatenate([*pieces, np.array([], dtype)]), starts


def _write(path: Path, array: NDArray[np.generic]) -> None:
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written ({error}): make room for it, or choose another --run") from error
    partial.replace(path)


def _documents_path(path: Path) -> Path:
    return path.with_suffix(".documents.npy")


def read(path: Path, vocab_size: int) -> Corpus:
    """The corpus of an .npy of token ids, with the document starts of NAME.documents.npy beside it if that exists.

    Raises ValueError for an array that is not 1-D and integer, for an id outside [0, vocab_size), and for document
    starts that do not begin at 0 and rise within the ids.
    """
    ids = _load(path)
    if not len(ids):
        raise ValueError(f"{path} holds no tokens: is its source empty?")
    for i in range(0, len(ids), _BLOCK):
        _check_ids(path, ids[i : i + _BLOCK], i, vocab_size)
    beside = _documents_path(path)
    if not beside.exists():
        return Corpus(ids)
    starts = _load(beside).astype(np.int64)
    # An empty document starts where the next one does, so starts may repeat.
    if not len(starts) or starts[0] != 0 or (np.diff(starts) < 0).any() or starts[-1] > len(ids):
        raise ValueError(f"{beside} must hold document starts that begin at 0 and rise within {len(ids)} tokens")
    return Corpus(ids, np.unique(starts[starts < len(ids)]))


def _load(path: Path) -> Ids:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a NumPy .npy file of numbers: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {array.dtype} {list(array.shape)}, it must be one row of integers")
    return cast(Ids, array)


def _check_ids(path: Path, ids: Ids, offset: int, vocab_size: int) -> None:
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(
            f"{path} has token id {ids[at]} at {offset + at}, model.vocab_size is {vocab_size}: "
            "raise it or use the tokenizer that the model belongs to"
        )


def split(corpus: Corpus, fraction: float) -> tuple[Corpus, Corpus]:
    """The corpus without its last `fraction`, and that last part: cut where a document starts, if there are several."""
    cut = len(corpus.ids) - round(len(corpus.ids) * fraction)
    if corpus.starts is None or len(corpus.starts) < 2 or not fraction:
        return _part(corpus, 0, cut), _part(corpus, cut, len(corpus.ids))
    inner = corpus.starts[1:]
    cut = int(inner[np.abs(inner - cut).argmin()])
    return _part(corpus, 0, cut), _part(corpus, cut, len(corpus.ids))


def _part(corpus: Corpus, begin: int, end: int) -> Corpus:
    starts = corpus.starts
    if starts is not None:
        inside = starts[(starts > begin) & (starts < end)]
        starts = np.concatenate([np.zeros(1, np.int64), inside - begin])
    return Corpus(corpus.ids[begin:end], starts, corpus.offset + begin)
