"""Batches: a pure function of (index, seed), so that a run resumes from a number.

An epoch visits every window of `length` tokens once, in a random order, with the cuts at a random phase. Documents
that meet in a window are kept apart by cu_seqlens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from q3n_functional.corpus import Corpus, split
from q3n_functional.tokenizer import num_bytes


class Batch(NamedTuple):
    """tokens_BT int64; cu_seqlens int32 of a length that never changes, or None where each row is one document."""

    tokens_BT: Tensor
    cu_seqlens: Tensor | None


class Reader(NamedTuple):
    """How a corpus is cut into batches of `rows` windows of `length` tokens; `documents` a row may begin inside it."""

    corpus: Corpus
    rows: int
    length: int
    documents: int | None


def reader(corpus: Corpus, rows: int, length: int, name: str) -> Reader:
    """A reader of `corpus`; ValueError, saying that it is the `name` part, where that is shorter than one batch."""
    needed = rows * length
    if len(corpus.ids) < needed:
        raise ValueError(
            f"the {name} part has {len(corpus.ids)} tokens, one batch of {rows} rows x {length} needs {needed}: "
            "use more text, another validation_fraction, or a smaller batch_size or seq_len"
        )
    return Reader(corpus, rows, length, None if corpus.starts is None else _most_starts(corpus.starts, length))


def readers(corpus: Corpus, fraction: float, rows: int, length: int) -> tuple[Reader, Reader | None]:
    """Readers of the training part and of the last `fraction`, None for no fraction.

    Their cu_seqlens have one length, so that one compiled graph serves both.
    """
    first, last = split(corpus, fraction)
    training = reader(first, rows, length, "training")
    if not fraction:
        return training, None
    validation = reader(last, rows, length, "validation")
    if training.documents is None or validation.documents is None:
        return training, validation
    most = max(training.documents, validation.documents)
    return training._replace(documents=most), validation._replace(documents=most)


def _most_starts(starts: NDArray[np.int64], length: int) -> int:
    """The most documents that begin inside one window, its first token aside, wherever the window lies."""
    # The fullest window begins one token before some document, which cannot be the first.
    inner = starts[1:]
    return int((np.searchsorted(inner, inner + length - 1) - np.arange(len(inner))).max(initial=0))


def batch(reader: Reader, index: int, seed: int) -> Batch:
    """Training batch number `index`, counted from 0 over all epochs; the same for the same `seed` everywhere."""
    return _cut(reader, window_starts(reader, index, seed))


def window_starts(reader: Reader, index: int, seed: int) -> NDArray[np.int64]:
    """int64 [rows]: where each row of training batch `index` starts in the reader's corpus."""
    count = (len(reader.corpus.ids) + 1) // reader.length - 1 or 1
    room = len(reader.corpus.ids) - count * reader.length
    visits = index * reader.rows + np.arange(reader.rows)
    return np.array([_visit(int(i), count, min(room, reader.length - 1), reader.length, seed) for i in visits])


def _visit(visit: int, count: int, most_phase: int, length: int, seed: int) -> int:
    phase, order = _epoch(count, most_phase, seed, visit // count)
    return phase + int(order[visit % count]) * length


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch(count: int, most_phase: int, seed: int, epoch: int) -> tuple[int, NDArray[np.int64]]:
    # RandomState rather than Generator: NumPy promises never to change its streams, and resume depends on them.
    random = np.random.RandomState([seed, epoch])
    return int(random.randint(most_phase + 1)), random.permutation(count)


def validation_batches(reader: Reader, most: int) -> Iterator[Batch]:
    """The first `most` batches of the corpus in order; consecutive windows share a token, so each is a target once."""
    stride = reader.length - 1
    for index in range(num_validation_batches(reader, most)):
        yield _cut(reader, (index * reader.rows + np.arange(reader.rows)) * stride)


def num_validation_batches(reader: Reader, most: int) -> int:
    """How many batches `validation_batches` gives."""
    return min(most, (len(reader.corpus.ids) - 1) // (reader.length - 1) // reader.rows)


def bytes_per_token(reader: Reader, most: int, tokenizer: Tokenizer) -> float:
    """UTF-8 bytes per token of the text that `validation_batches` asks the model to predict."""
    num_targets = num_validation_batches(reader, most) * reader.rows * (reader.length - 1)
    return num_bytes(tokenizer, reader.corpus.ids[1 : num_targets + 1]) / num_targets


def _cut(reader: Reader, starts: NDArray[np.int64]) -> Batch:
    rows = [reader.corpus.ids[i : i + reader.length] for i in starts]
    tokens_BT = torch.from_numpy(np.stack(rows).astype(np.int64))
    if reader.corpus.starts is None or reader.documents is None:
        return Batch(tokens_BT, None)
    length = reader.length
    begins = [_begins(reader.corpus.starts, int(i), length) + row * length for row, i in enumerate(starts)]
    size = 1 + reader.rows * (1 + reader.documents)
    cu_seqlens = torch.full((size,), reader.rows * length, dtype=torch.int32)
    flat = torch.from_numpy(np.concatenate(begins))
    cu_seqlens[: len(flat)] = flat
    return Batch(tokens_BT, cu_seqlens)


def _begins(starts: NDArray[np.int64], begin: int, length: int) -> NDArray[np.int64]:
    """Where documents begin in the window at `begin`, relative to it; the window itself begins one."""
    first, last = np.searchsorted(starts, [begin + 1, begin + length])
    return np.concatenate([np.zeros(1, np.int64), starts[first:last] - begin])


def rows(batch: Batch, count: int, index: int) -> Batch:
    """The `index`-th of `count` equal parts of a batch's rows, with as many offsets: others' documents are empty."""
    num, length = len(batch.tokens_BT) // count, batch.tokens_BT.shape[1]
    first, cu = index * num, batch.cu_seqlens
    own = None if cu is None else (cu - first * length).clamp(0, num * length)
    return Batch(batch.tokens_BT[first : first + num], own)


def describe(reader: Reader, index: int, seed: int) -> str:
    """Where each row of training batch `index` lies in the source: its tokens and its documents, a line a row."""
    return "\n".join(
        f"  row {row}: tokens {reader.corpus.offset + i}..{reader.corpus.offset + i + reader.length - 1}"
        + _documents(reader, int(i))
        for row, i in enumerate(window_starts(reader, index, seed))
    )


def _documents(reader: Reader, begin: int) -> str:
    if reader.corpus.starts is None:
        return ""
    first, last = np.searchsorted(reader.corpus.starts, [begin, begin + reader.length - 1], side="right") - 1
    return f", documents {first}..{last}"
