"""Tokenizers: a tokenizer.json, plain bytes, or a byte-level BPE trained on the corpus itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
"""The token written after a document, where the tokenizer knows it; Qwen's own tokenizers do."""

BYTES = 257
"""Size of the smallest vocabulary that spells any text: 256 bytes and `END`."""


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, so that any text survives encode and decode.

    With no texts, or `vocab_size` of `BYTES`, a token is a byte. Raises ValueError for a smaller size.
    """
    if vocab_size < BYTES:
        raise ValueError(f"vocab_size is {vocab_size}, a byte-level tokenizer needs at least {BYTES}: raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make(name: str, texts: Callable[[], Iterable[str]], vocab_size: int) -> Tokenizer:
    """The tokenizer called `name`: "byte", "bpe" (trained on `texts()`), or the path of a tokenizer.json."""
    if name == "byte":
        return train_bpe([], BYTES)
    return train_bpe(texts(), vocab_size) if name == "bpe" else read(Path(name))


def read(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises ValueError, naming the file, where it is none."""
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist: give 'byte', 'bpe' or the path of a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from error


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. A special token that is spelt out in a text is text, not a token.

    Raises ValueError for halves of characters, as Python reads bytes of the command line that are not UTF-8.
    """
    tokenizer.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except TypeError as error:  # the library's, of what it cannot make UTF-8 of
        raise ValueError("the text has bytes that are not UTF-8: write it in UTF-8") from error


def num_bytes(tokenizer: Tokenizer, ids: NDArray[np.integer]) -> int:
    """UTF-8 bytes that `ids` spell; special tokens spell nothing."""
    block = 1 << 20  # bounds the memory that a long text takes as Python integers
    texts = (tokenizer.decode(ids[i : i + block].tolist()) for i in range(0, len(ids), block))
    return sum(len(text.encode()) for text in texts)


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer as files of a Hugging Face folder."""
    # Without the class, transformers takes Qwen's own, whose splitting of words overrides tokenizer.json's.
    about: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if tokenizer.token_to_id(END) is not None:
        about["eos_token"] = END
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(about, indent=2).encode(),
    }


class Stream:
    """The text of tokens that come one by one, as far as it is certain, up to the first of the `stop` strings.

    `stopped` says whether one has come; what is pushed then gives no text. Raises ValueError for an empty one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty, which would end every text at once: leave it out")
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder = decoders.DecodeStream(skip_special_tokens=True)
        self._held, self._longest = "", max(map(len, stop), default=1)

    def push(self, token: int) -> str:
        """The text that has become certain. A character's first bytes wait for the others."""
        if self.stopped:
            return ""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        if ends := [self._held.index(s) for s in self._stop if s in self._held]:
            self.stopped = True
            return self._cut(min(ends))
        # Its end could be the beginning of a stop string.
        return self._cut(max(len(self._held) - self._longest + 1, 0))

    def end(self) -> str:
        """The rest, when no more tokens come."""
        return "" if self.stopped else self._cut(len(self._held))

    def _cut(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


def stream(tokenizer: Tokenizer, ids: Iterable[int], stop: Sequence[str] = ()) -> Iterator[str]:
    """The text of `ids`, piece by piece as it is certain, up to the first of the `stop` strings.

    Raises ValueError, at once, for one that is empty.
    """
    return _texts(Stream(tokenizer, stop), ids)


def _texts(pieces: Stream, ids: Iterable[int]) -> Iterator[str]:
    for i in ids:
        yield pieces.push(i)
        if pieces.stopped:
            return
    yield pieces.end()
