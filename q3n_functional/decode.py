"""Writing text step by step on the device: a batch of running sequences is a value, and a step is one graph.

Every leaf of `Running` has the batch for its first dim and a shape that no step changes, so rows are selected, placed
and joined as those of a cache are, and sequences enter and leave a batch without another compilation. A row that is
finished, or waits for the rest of its prompt, stays as it is; what its place computes meanwhile is thrown away.

Letters: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import cache as caches
from q3n_functional import sampling
from q3n_functional.cache import Cache
from q3n_functional.config import Config
from q3n_functional.model import head, hidden_states
from q3n_functional.packing import Documents, documents
from q3n_functional.parallel.placement import Parallel, logits
from q3n_functional.params import Parameters
from q3n_functional.sampling import Drawn, History, Options, Settings, noted


class Running(NamedTuple):
    """Sequences that are being written.

    cache: of all tokens but the last, with a place left: a sequence of `limit` tokens needs a capacity of `limit`.
    token_B: int64, the last token. ends_BV: bool, the tokens that end a sequence. limit_B: int32, the tokens, those of
    the prompt among them, at which it ends anyway. finished_B: bool, whether it has ended, or not begun.
    """

    cache: Cache
    token_B: Tensor
    history: History
    settings: Settings
    ends_BV: Tensor
    limit_B: Tensor
    finished_B: Tensor


def waiting(
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Options],
    stop_tokens: Sequence[Collection[int]],
    limits: Sequence[int],
    *,
    config: Config,
) -> Running:
    """Rows whose prompts `join` is to read, as far as they are not in `cache` already.

    Stop tokens outside the vocabulary end nothing. Raises ValueError for a logit bias of one.
    """
    device, batch, size = cache.lengths_B.device, len(prompts), config.vocab_size
    ends_BV = torch.zeros(batch, size, dtype=torch.bool)
    for row, tokens in enumerate(stop_tokens):
        ends_BV[row, [token for token in tokens if 0 <= token < size]] = True
    return Running(
        cache,
        torch.zeros(batch, dtype=torch.int64, device=device),
        sampling.history(prompts, size, device),
        sampling.settings(options, size, device),
        ends_BV.to(device),
        torch.tensor(limits, dtype=torch.int32, device=device),
        torch.ones(batch, dtype=torch.bool, device=device),
    )


def extend(
    params: Parameters,
    tokens_1T: Tensor,
    cu_seqlens: Tensor,
    cache: Cache,
    parallel: Parallel | None = None,
    *,
    config: Config,
    fresh: bool = False,
) -> tuple[Tensor, Cache]:
    """Logits [B, V] behind the last token of each document of a packed stream, which continues `cache`.

    Document n continues sequence n. The logits of an empty one mean nothing, and its sequence stays as it is.
    `parallel` and `fresh` are as for `hidden`; every rank has all the logits.
    """
    docs = among(tokens_1T, cu_seqlens, fresh)
    h_1TD, after = hidden(params, tokens_1T, docs, cache, parallel, config=config, fresh=fresh)
    return logits(last(h_1TD, cu_seqlens), head(params), parallel), after


def among(tokens_1T: Tensor, cu_seqlens: Tensor, fresh: bool) -> Documents | None:
    """The documents of a packed stream; None of one that is a single prompt from its beginning, and so a whole row."""
    return None if fresh and len(cu_seqlens) == 2 else documents(cu_seqlens, *tokens_1T.shape)


def hidden(
    params: Parameters,
    tokens_BT: Tensor,
    documents: Documents | None,
    cache: Cache,
    parallel: Parallel | None = None,
    *,
    config: Config,
    fresh: bool = False,
) -> tuple[Tensor, Cache]:
    """Hidden states [B, T, D] of tokens that continue `cache`, and the cache behind them.

    `fresh`, for a cache that has nothing yet, is faster. With `parallel`, that of `q3n_functional.parallel.decode`,
    `params` and `cache` are the rank's parts, tokens and hidden states those of all ranks.
    """
    h_BTD, _, after = hidden_states(params, tokens_BT, documents, cache, parallel, config=config, fresh=fresh)
    assert after is not None
    return h_BTD, after


def last(h_1TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Those [B, D] of each document's last token; something, where it is empty."""
    return h_1TD[0, (cu_seqlens[1:].long() - 1).clamp(min=0)]


def join(
    params: Parameters,
    running: Running,
    tokens_1T: Tensor,
    cu_seqlens: Tensor,
    complete_B: Tensor,
    parallel: Parallel | None = None,
    *,
    config: Config,
    filtered: bool = True,
    fresh: bool = False,
) -> tuple[Running, Drawn]:
    """Rows read parts of their prompts, packed as for `extend`; those in `complete_B` (bool) draw a first token."""
    logits_BV, cache = extend(params, tokens_1T, cu_seqlens, running.cache, parallel, config=config, fresh=fresh)
    return drawn(running, cache, logits_BV, complete_B, filtered=filtered)


def step(
    params: Parameters,
    running: Running,
    parallel: Parallel | None = None,
    *,
    config: Config,
    filtered: bool = True,
) -> tuple[Running, Drawn]:
    """Every row that is not finished takes its last token in and draws the next one, the same on all ranks.

    `filtered` False leaves out top_k, top_p and min_p, for a batch none of whose rows asks for them. Nothing waits for
    the device, and shapes are those of `running`. `parallel` is as for `hidden`.
    """
    h_B1D, cache = hidden(params, running.token_B[:, None], None, running.cache, parallel, config=config)
    active_B = ~running.finished_B
    cache = caches.chosen(active_B, cache, running.cache)
    return drawn(running, cache, logits(h_B1D[:, 0], head(params), parallel), active_B, filtered=filtered)


def drawn(
    running: Running, cache: Cache, logits_BV: Tensor, active_B: Tensor, *, filtered: bool = True
) -> tuple[Running, Drawn]:
    """The rows of `active_B` draw what stands behind `cache`; for the others it is -1, with a log-probability of 0."""
    _, token_B, history, settings, ends_BV, limit_B, finished_B = running
    token_B, logprob_B = sampling.sample(logits_BV, settings, history, cache.lengths_B, filtered=filtered)
    ended_B = ends_BV.gather(1, token_B[:, None])[:, 0] | (cache.lengths_B + 1 >= limit_B)
    # Not `_replace`, whose result Dynamo of torch 2.11 cannot return from a graph.
    after = Running(
        cache,
        torch.where(active_B, token_B, running.token_B),
        noted(history, token_B, active_B),
        settings,
        ends_BV,
        limit_B,
        torch.where(active_B, ended_B, finished_B),
    )
    return after, Drawn(token_B.masked_fill(~active_B, -1), logprob_B.masked_fill(~active_B, 0.0))


State = TypeVar("State")
Out = TypeVar("Out")


def in_place(function: Callable[..., tuple[State, Out]], *, compile: bool = False) -> Callable[..., Out]:
    """`(params, state, ...) -> (state, out)` as one that writes the new state into the old one's tensors.

    With `compile` it is one graph, in which Inductor writes a token's keys and values into their place and copies no
    cache: a pure step has to.
    """

    def run(params: Parameters, state: State, *inputs: Any) -> Out:
        new, out = function(params, state, *inputs)
        for old_leaf, new_leaf in zip(pytree.tree_leaves(state), pytree.tree_leaves(new), strict=True):
            if new_leaf is not old_leaf:
                old_leaf.copy_(new_leaf)
        return out

    return torch.compile(run, fullgraph=True) if compile else run


def place_(state: State, row: int, one: State) -> None:
    """Let the sequence of `one` [1], whose cache may have less room, take the place of a row, in its tensors."""
    for leaf, new in zip(pytree.tree_leaves(state), pytree.tree_leaves(one), strict=True):
        place = leaf[row : row + 1]
        (place[:, : new.shape[1]] if new.ndim > 1 else place).copy_(new)


class Captured(Generic[Out]):
    """A call of an `in_place` function as a CUDA graph: calling this replays it on the tensors that it was given.

    Capture it while every row is finished: the calls before it, which compile and choose kernels, then change nothing.
    The result lies in tensors that the next call overwrites.
    """

    def __init__(self, run: Callable[..., Out], params: Parameters, state: Any) -> None:
        self.arguments = params, state  # the graph has their addresses alone
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(params, state)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = run(params, state)

    def __call__(self) -> Out:
        """Replay."""
        self.graph.replay()
        return self.out


def repeated(
    function: Callable[..., tuple[State, Out]], params: Parameters, state: State, *, compile: bool = False
) -> Callable[[], Out]:
    """`function(params, state)` in place, to be called again and again; on CUDA as a graph.

    No row of `state` may run yet; see `Captured`.
    """
    run = in_place(function, compile=compile)
    if params.embed_tokens.device.type == "cuda":
        return Captured(run, params, state)
    return functools.partial(run, params, state)
