"""What two cards make of a step in bf16, held to one card's in fp32: `torchrun --nproc-per-node 2 -m tests.card_ranks`.

Arguments choose among the modes, none, layers and graph; launches of one each may run side by side, as compiling takes
most of their time. Prints a line a layout and ends with an error where a rank strays twice as far from fp32 as one
card's own bf16 does. Every token goes to all experts, so that no choice of them turns on a rounding; head dims are
those that the kernels for Hopper take. Without cards it runs on gloo.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import compiled, cuda_graph, model, packing, params
from q3n_functional.config import Config
from q3n_functional.parallel import launch, mesh, placement, rules
from q3n_functional.params import named_leaves
from tests.configs import perturbed, slower, small, trainable

CARDS = torch.cuda.is_available()
ROWS, LENGTH = 4, 512 if CARDS else 64
ENDS = (
    (5, 40, LENGTH - 3, LENGTH),
    (LENGTH // 2 - 1, LENGTH // 2 + 1, LENGTH),
    (LENGTH,),
    (1, LENGTH // 2, LENGTH - 20),
)
REAL: dict[str, Any] = {
    "hidden_size": 256, "head_dim": 256, "num_attention_heads": 4, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_attention_chunk_size": 64, "vocab_size": 512, "num_experts_per_tok": 8, "num_hidden_layers": 2,
    "layer_types": ("linear_attention", "full_attention"), "moe_intermediate_size": 128, "initializer_range": 0.04,
}  # fmt: skip
LAYOUTS = {
    "none": ("dp=2", "replicate=2", "tp=2", "tp=2 without sequence", "cp=2", "cp=2 in whole rows", "ep=2"),
    "layers": ("dp=2", "tp=2", "cp=2 in whole rows", "ep=2") if CARDS else (),
    "graph": ("dp=2", "tp=2", "cp=2") if CARDS else (),
}
"""By mode: eager, compiled by layers, in a CUDA graph."""


Batch = tuple[Tensor, Tensor, Tensor | None]
Mode = Literal["none", "layers", "graph"]


def batch(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels of which a third is ignored, offsets of documents."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator)
    labels = tokens.masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.3, packing.IGNORE)
    ends = [row * LENGTH + end for row, row_ends in enumerate(ENDS) for end in row_ends]
    return tokens, labels, torch.tensor([0, *ends], dtype=torch.int32)


def rows_of(whole: Batch, count: int, index: int) -> Batch:
    num = ROWS // count
    rows, cu = slice(index * num, (index + 1) * num), whole[2]
    own = None if cu is None else (cu - index * num * LENGTH).clamp(0, num * LENGTH)
    return whole[0][rows], whole[1][rows], own


def results(
    config: Config,
    tree: params.Parameters,
    own: Batch,
    mode: Mode,
    parallel: Any = None,
) -> dict[str, Tensor]:
    """The loss and every gradient, by name; in mode "graph" what a recorded step gives when it is launched again."""

    def loss(tree: params.Parameters, tokens: Tensor, labels: Tensor, cu: Tensor | None, **options: Any) -> Any:
        documents = None if cu is None else packing.documents(cu, *tokens.shape)
        return model.loss(tree, tokens, documents, labels, parallel=parallel, config=config, **options)

    leaves = named_leaves(tree)
    found: dict[str, Tensor] = {}
    function = loss if mode == "graph" else compiled.compiled(loss, mode)

    def step(inputs: Batch) -> Tensor:
        value, _ = function(tree, *inputs)
        found.update(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        return value.detach()

    if mode != "graph":
        return {"loss": step(own), **found}
    captured = cuda_graph.CapturedStep(step)
    for _ in range(cuda_graph.WARM_UP + 1):
        captured(own)
    for gradient in found.values():
        gradient.zero_()
    return {"loss": captured(own), **found}


def distance(expected: Tensor, actual: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def strays(
    config: Config, exact: dict[str, Tensor], narrow: dict[str, Tensor], layout: mesh.Mesh, device: torch.device,
    tree: params.Parameters, whole: Batch, mode: Mode,
) -> Iterator[tuple[float, str]]:  # fmt: skip
    """How far this rank's results are from fp32, over what one card's bf16 results are; at least half a percent."""
    where, at = rules.layouts(config, layout), layout.coordinates(dist.get_rank())
    parallel = placement.connect(layout, where, device)
    own = rows_of(whole, layout.rows, at["rows"])
    actual = results(config, trainable(rules.shard(tree, where, at)), own, mode, parallel)
    for name, place in {"loss": None, **named_leaves(where)}.items():
        cut = (lambda x: x) if place is None else partial(place.shard, at=at)
        expected = cut(exact[name])
        floor = max(distance(expected, cut(narrow[name])), 5e-3)
        yield distance(expected, actual[name]) / floor, name


def main() -> None:
    device = launch.own_device(torch.device("cuda" if CARDS else "cpu"), launch.world())
    with launch.joined(launch.world(), device):
        config = small(**REAL)
        tree = pytree.tree_map(lambda p: p.to(device), slower(perturbed(config)))
        tokens, labels, cu = (x.to(device) for x in batch(config))
        dtypes = pytree.tree_map(lambda leaf: leaf.dtype or torch.bfloat16, params.spec(config))
        copies = pytree.tree_map(lambda p, dtype: p.to(dtype), tree, dtypes)
        wanted: dict[bool, Any] = {}
        for in_rows in (False, True):
            whole: Batch = tokens, labels, None if in_rows else cu
            wanted[in_rows] = whole, *(results(config, trainable(x), whole, "none") for x in (tree, copies))
        failed = False
        cases = [(mode, name) for mode in sys.argv[1:] or LAYOUTS for name in LAYOUTS[mode]]
        for mode, name in cases:
            layout = replace(mesh.parse(name.split()[0]), sequence="without" not in name)
            whole, exact, narrow = wanted["in whole rows" in name]
            worst = max(strays(config, exact, narrow, layout, device, copies, whole, cast(Mode, mode)))
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, worst)
            failed |= not 0.1 < max(everyone)[0] < 2  # nothing in bf16 is nearer
            if launch.world().lead:
                told = f"{max(everyone)[0]:.2f} of one card's distance ({max(everyone)[1]})"
                print(f"{name:24}{mode:8}{told}", flush=True)
        assert not failed


if __name__ == "__main__":
    main()
