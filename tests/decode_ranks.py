"""What each rank of a test of writing on a mesh runs: a layout against the same model on one device, in float64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import cache as caches
from q3n_functional import decode
from q3n_functional.cache import Cache, KeyValues, LinearState
from q3n_functional.config import Config
from q3n_functional.generate import generate, pieces, prefill
from q3n_functional.parallel import decode as on_mesh
from q3n_functional.parallel import expert, mesh, placement, rules
from q3n_functional.params import FullAttention, Parameters
from tests.configs import perturbed, slower, small
from tests.parallel_ranks import UNCHANGED, main
from tests.test_decode import FULL, LINEAR, OPTIONS, PROMPTS

CAPACITY, STEPS = 20, 6
NEW = (12, 12, 4, 6)  # some rows end before the others


class Case(NamedTuple):
    """A layout, changes to the small model, whether the step is compiled, what is done wrong, how many are few."""

    mesh: str
    model: dict[str, Any] = UNCHANGED
    compiled: bool = False
    mutation: str = ""
    few: int = 1024


class Written(NamedTuple):
    """By a batch: every token drawn, its log-probability, the cache behind them; by `generate` and `prefill`."""

    tokens: list[list[int]]
    logprobs: Tensor
    cache: Cache
    texts: list[list[int]]
    logits: Tensor
    prefilled: Cache


def written(config: Config, tree: Parameters, parallel: Any = None, compiled: bool = False) -> Written:
    own, step = on_mesh.own_heads(config, parallel), partial(decode.step, parallel=parallel, config=config)
    empty = caches.empty(own, len(PROMPTS), CAPACITY, torch.float64)
    limits = [len(prompt) + new for prompt, new in zip(PROMPTS, NEW, strict=True)]
    running = decode.waiting(empty, PROMPTS, OPTIONS, [()] * len(PROMPTS), limits, config=config)
    draws = []
    for piece in pieces(PROMPTS, 5):
        running, drawn = decode.join(tree, running, *piece, parallel, config=config)
        draws.append(drawn)
    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(STEPS):
            running, drawn = step(tree, running)
            draws.append(drawn)
    texts = [
        list(generate(tree, prompt, parallel, config=config, max_new_tokens=4, options=options, chunk_length=3))
        for prompt, options in zip(PROMPTS[:2], OPTIONS[:2], strict=True)
    ]
    logits, prefilled = prefill(tree, PROMPTS, empty, parallel, config=config, chunk_length=4)
    tokens = torch.stack([d.token_B for d in draws]).tolist()
    return Written(tokens, torch.stack([d.logprob_B for d in draws]), running.cache, texts, logits, prefilled)


@cache
def reference(model: str) -> tuple[Config, Parameters, Written]:
    options = {"num_hidden_layers": 2, "layer_types": (LINEAR, FULL), "initializer_range": 0.2, **json.loads(model)}
    config = small(**{name: tuple(x) if isinstance(x, list) else x for name, x in options.items()})
    tree = slower(perturbed(config, dtype=torch.float64))
    return config, tree, written(config, tree)


def cut(whole: Cache, config: Config, tp: int, rank: int) -> Cache:
    """The part of one device's cache that a rank should have."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim

    def state(x: Any) -> Any:
        if isinstance(x, LinearState):
            q, k, v = (part.chunk(tp, 1)[rank] for part in x.conv.tensor_split((keys, 2 * keys), 1))
            return LinearState(torch.cat([q, k, v], 1), x.recurrent.chunk(tp, 1)[rank])
        # Each of the heads as often as ranks read it.
        return KeyValues(*(y.repeat_interleave(max(tp // y.shape[2], 1), 2).chunk(tp, 2)[rank] for y in x))

    return Cache(tuple(state(x) for x in whole.layers), whole.lengths_B)


@torch.no_grad()
def error(case: Case) -> float:
    """The largest error of this rank relative to the largest number of each tensor, infinite for other texts."""
    config, tree, expected = reference(json.dumps(case.model))
    layout = mesh.parse(case.mesh)
    at = layout.coordinates(dist.get_rank())
    parallel = on_mesh.connect(layout, config, torch.device("cpu"))
    shards = on_mesh.only_own_heads(rules.shard(tree, parallel.layouts, at), parallel, config=config)
    rows = on_mesh.own_heads(config, parallel).num_key_value_heads * config.head_dim
    assert all(len(p.mixer.k) == rows for p in shards.layers if isinstance(p.mixer, FullAttention))
    undo = MUTATIONS[case.mutation]() if case.mutation else lambda: None
    expert.FEW = case.few
    actual = written(config, shards, parallel, case.compiled)
    undo()
    if actual.tokens != expected.tokens or actual.texts != expected.texts:
        return float("inf")
    wanted = expected._replace(
        cache=cut(expected.cache, config, layout.tp, at["tp"]),
        prefilled=cut(expected.prefilled, config, layout.tp, at["tp"]),
    )
    pairs = list(zip(*(pytree.tree_leaves(w._replace(tokens=(), texts=())) for w in (wanted, actual)), strict=True))
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs), case
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)


def _replaced(owner: Any, name: str, function: Any) -> Callable[[], Callable[[], None]]:
    def replace() -> Callable[[], None]:
        original = getattr(owner, name)
        setattr(owner, name, function)
        return lambda: setattr(owner, name, original)

    return replace


MUTATIONS = {
    "parts of blocks and rows are not summed": _replaced(placement, "all_reduce", lambda x, axis: x),
    "experts are not summed": _replaced(expert, "all_reduce", lambda x, axis: x),
}

if __name__ == "__main__":
    main(*sys.argv[1:], error=lambda values: error(Case(*values)))
