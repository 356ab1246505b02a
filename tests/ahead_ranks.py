"""What each rank runs whose parameters are sent for ahead: steps held to one device's and to those without."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from q3n_functional import compiled, model
from q3n_functional.parallel import ahead as ahead_module
from q3n_functional.parallel import mesh, placement, rules
from q3n_functional.params import named_leaves
from tests import parallel_ranks
from tests.parallel_ranks import Case


def error(backend: str, case: Case, reshard: bool = True) -> float:
    """This rank's largest error in three steps, every kind of layer compiled once; eager where no backend is named."""
    parallel_ranks.expected(case)  # on one device, with the loss as it is
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": backend} if backend else {}
    loss = compiled.compiled(model.loss, "layers" if backend else "none", True, reshard, **options)
    with patch.object(model, "loss", loss), torch._dynamo.config.patch(error_on_recompile=True):
        return parallel_ranks.error(case)


def narrow(case: Case) -> float:
    """The largest difference that sending ahead makes to this rank's gradients, of shards in bf16."""
    config, tree, _ = parallel_ranks.expected(case)
    layout = mesh.parse(case.mesh)
    where, at = rules.layouts(config, layout), layout.coordinates(dist.get_rank())
    parallel = placement.connect(layout, where, torch.device("cpu"))
    shards = pytree.tree_map(lambda p: p.bfloat16().requires_grad_(), rules.shard(tree, where, at))
    own = parallel_ranks.rows_of(parallel_ranks.batch(config, False), layout.rows, at["rows"])
    found = []
    for ahead in (False, True):
        loss = compiled.compiled(model.loss, "none", ahead=ahead)
        value, _ = loss(shards, own.tokens, None, own.labels, parallel=parallel, config=config)
        found.append(torch.autograd.grad(value, list(named_leaves(shards).values())))
    assert all(x.dtype == torch.bfloat16 for x in found[1])
    return max(parallel_ranks.relative(*pair) for pair in zip(*found, strict=True))


def measured(kind: str, case: Case) -> float:
    # So that some gradients of a small model go by themselves, and others together.
    with patch.object(ahead_module, "LARGE", 1000):
        return narrow(case) if kind == "narrow" else error(kind.removeprefix("kept "), case, "kept" not in kind)


if __name__ == "__main__":
    parallel_ranks.main(*sys.argv[1:], error=lambda values: measured(values[0], Case(*values[1:])))
