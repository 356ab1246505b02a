"""Prints the collectives of a step on two ranks, layout by layout, and how many gathered parameters forward keeps."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from q3n_functional import model, optim, params
from q3n_functional.parallel import launch, mesh, placement, rules
from tests.configs import perturbed, small, trainable
from tests.parallel_ranks import OPTIMIZER, batch, rows_of

LAYOUTS = ("dp=2", "replicate=2", "tp=2", "tp=2 without sequence", "cp=2", "ep=2")
CONFIG = small(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
KINDS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single")


class Collectives(TorchDispatchMode):
    """Counts them by axis, and watches the memory of what is gathered from `fsdp` ranks."""

    def __init__(self, axes: dict[str, str], fsdp: str) -> None:
        super().__init__()
        self.axes, self.fsdp = axes, fsdp
        self.counts: Counter[tuple[str, str]] = Counter()
        self.gathered: dict[StorageWeakRef, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in KINDS:
            self.counts[name, self.axes[args[-1]]] += 1
        if (name == KINDS[0] and args[-1] == self.fsdp) or (name in ("cat", "clone") and self._watched(args)):
            self.gathered[StorageWeakRef(result.untyped_storage())] = None
        return result

    def _watched(self, args: Any) -> bool:
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        return any(StorageWeakRef(x.untyped_storage()) in self.gathered for x in tensors)

    def alive(self) -> int:
        """How many gathered parameters are in memory."""
        return sum(not reference.expired() for reference in self.gathered)


def lines(text: str) -> list[str]:
    layout = replace(mesh.parse(text.split()[0]), sequence="without" not in text)
    places, at = rules.layouts(CONFIG, layout), layout.coordinates(dist.get_rank())
    parallel = placement.connect(layout, places, torch.device("cpu"))
    axes = {getattr(parallel, name).group: name for name in placement.GROUPS if getattr(parallel, name).size > 1}
    tree = trainable(rules.shard(perturbed(CONFIG, dtype=torch.float64), places, at))
    leaves, groups = params.named_leaves(tree), optim.groups(CONFIG, OPTIMIZER)
    own = rows_of(batch(CONFIG, packed=False), layout.rows, at["rows"])
    with Collectives(axes, parallel.fsdp.group or "none") as forward:
        value, _ = model.loss(tree, own.tokens, None, own.labels, parallel=parallel, config=CONFIG)
    kept = forward.alive()
    with Collectives(axes, "none") as backward:
        gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    masters = {name: leaf.detach() for name, leaf in leaves.items()}
    update = partial(optim.update_, parallel=parallel, groups=groups, optimizer=OPTIMIZER)
    with Collectives(axes, "none") as updating:
        update(masters, gradients, optim.init(masters, groups), torch.tensor(0.1))
    phases = [forward.counts, backward.counts, updating.counts]
    kinds = sorted(set().union(*phases), key=lambda kind: (KINDS.index(kind[0]), kind[1]))
    rows = [f"  {name:22} {axis:10}" + "".join(f"{phase[name, axis]:5}" for phase in phases) for name, axis in kinds]
    return [text, *rows, *([f"  kept of what was gathered {kept}"] if forward.gathered else [])]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launch.joined(launch.world(), torch.device("cpu")):
        found = [line for text in LAYOUTS for line in lines(text)]
        everyone: list[Any] = [None, None]
        dist.all_gather_object(everyone, found)
        assert everyone[0] == everyone[1]
        if launch.world().lead:
            sys.stdout.write("\n".join(found) + "\n")
