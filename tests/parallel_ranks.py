"""What each rank of a parallel test runs: layouts of a model against the same model on one device, in float64.

`launch(ranks, cases)` starts the ranks and returns, case by case, the largest relative error of any of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from q3n_functional import model, optim, packing, params
from q3n_functional.config import Config
from q3n_functional.parallel import mesh, overlap, placement, rules
from q3n_functional.params import named_leaves
from q3n_functional.recompute import Recompute
from tests.configs import perturbed, slower, small, trainable

ROWS, LENGTH, STEPS = 4, 32, 3
OPTIMIZER = optim.OptimizerConfig(clip_norm=0.5)
# Documents begin and end on, before and behind the places where rows are cut; some reach over several, one row is one.
ENDS = ((5, 8, 29, 32), (15, 17, 32), (32,), (1, 16, 16, 18))


UNCHANGED: dict[str, Any] = {}
SHALLOW: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


class Case(NamedTuple):
    """A layout, changes to the small model, and how to run it."""

    mesh: str
    model: dict[str, Any] = UNCHANGED
    packed: bool = True
    sequence: bool = True
    backend: str = ""
    recompute: Recompute = "none"
    steps: int = STEPS


class Batch(NamedTuple):
    """Tokens, labels of which a third is ignored and in a half of a row all, offsets of documents."""

    tokens: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None


class Outcome(NamedTuple):
    """Of training: losses with their parts, norms, the first gradients, and the last parameters, by name."""

    numbers: list[Tensor]
    gradients: dict[str, Tensor]
    leaves: dict[str, Tensor]


def batch(config: Config, packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH), generator=generator)
    labels = tokens.masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.3, packing.IGNORE)
    labels[1, LENGTH // 2 :] = packing.IGNORE
    ends = [row * LENGTH + end for row, row_ends in enumerate(ENDS) for end in row_ends]
    return Batch(tokens, labels, torch.tensor([0, *ends], dtype=torch.int32) if packed else None)


def rows_of(whole: Batch, count: int, index: int) -> Batch:
    """The `index`-th of `count` equal parts of the rows."""
    num = ROWS // count
    rows, cu = slice(index * num, (index + 1) * num), whole.cu_seqlens
    local = None if cu is None else (cu - index * num * LENGTH).clamp(0, num * LENGTH)
    return Batch(whole.tokens[rows], whole.labels[rows], local)


def trained(config: Config, tree: params.Parameters, own: Batch, case: Case, parallel: Any = None) -> Outcome:
    def loss(tree: params.Parameters, tokens: Tensor, labels: Tensor, cu: Tensor | None) -> Any:
        documents = None if cu is None else packing.documents(cu, *tokens.shape)
        options = {"z_loss_coef": 1e-3, "recompute": case.recompute}
        return model.loss(tree, tokens, documents, labels, parallel=parallel, config=config, **options)

    groups = optim.groups(config, OPTIMIZER)
    update = partial(optim.update_, parallel=parallel, groups=groups, optimizer=OPTIMIZER)
    if case.backend:
        torch._dynamo.reset()
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=case.backend)
        if case.backend == "inductor" and overlap.SOUND:
            compiled = partial(compiled, options=overlap.OPTIONS)
        loss, update = compiled(loss), compiled(update)
    leaves, numbers, first = named_leaves(tree), [], {}
    state = optim.init({name: p.detach() for name, p in leaves.items()}, groups)
    # Compiled, AdamW takes powers of it in its dtype; Dynamo loses what is added to a float64 scalar.
    state = state._replace(step=state.step.double()[None])
    for _ in range(case.steps):
        value, parts = loss(tree, *own)
        new = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        first = first or {name: g.clone() for name, g in new.items()}
        views, lr = {name: p.detach() for name, p in leaves.items()}, torch.tensor(1e-2, dtype=torch.float64)
        norm = update(views, new, state, lr)
        numbers += [value.detach(), norm, *parts]
    return Outcome(numbers, first, {name: p.detach() for name, p in leaves.items()})


@cache
def reference(model_options: str, packed: bool, steps: int) -> tuple[Config, params.Parameters, Outcome]:
    """The model, and what eager training on one device makes of it."""
    options = json.loads(model_options)
    config = small(**{name: tuple(x) if isinstance(x, list) else x for name, x in options.items()})
    tree = slower(perturbed(config, dtype=torch.float64))
    return config, tree, trained(config, trainable(tree), batch(config, packed), Case("", steps=steps))


def expected(case: Case) -> tuple[Config, params.Parameters, Outcome]:
    """`reference` of a case."""
    return reference(json.dumps(case.model), case.packed, case.steps)


def errors(case: Case) -> dict[str, float]:
    """This rank's errors, each relative to the largest number of its tensor: "numbers", gradients and parameters."""
    config, tree, on_one = expected(case)
    layout = replace(mesh.parse(case.mesh), sequence=case.sequence)
    mesh.check_batch(layout, config, ROWS, LENGTH)
    where, at = rules.layouts(config, layout), layout.coordinates(dist.get_rank())
    parallel = placement.connect(layout, where, torch.device("cpu"))
    own = rows_of(batch(config, case.packed), layout.rows, at["rows"])
    actual = trained(config, trainable(rules.shard(tree, where, at)), own, case, parallel)
    numbers = zip(on_one.numbers, actual.numbers, strict=True)
    found = {"numbers": max(relative(*pair) for pair in numbers)}
    for kind in ("gradients", "leaves"):
        for name, place in named_leaves(where).items():
            ours, theirs = getattr(actual, kind)[name], getattr(on_one, kind)[name]
            found[f"{kind} {name}"] = relative(place.shard(theirs, at), ours)
    return found


def relative(expected: Tensor, actual: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest number in the first."""
    largest = (expected - actual).abs().max() / expected.abs().max().clamp(min=1e-6)
    return float(largest.nan_to_num(nan=torch.inf))


def error(case: Case) -> float:
    """This rank's largest error."""
    return max(errors(case).values())


def worst(own: float) -> float:
    """The largest error of all ranks."""
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    return max(errors)


def launch(
    ranks: int, cases: Sequence[tuple[Any, ...]], timeout: float = 500, module: str = "tests.parallel_ranks"
) -> list[float]:
    """The errors of the `cases` of `module`, on that many processes; a rank that fails ends them all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", module, folder, str(ranks), json.dumps(cases)]
        processes = [
            subprocess.Popen(
                [*command, str(rank)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/{rank}"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [process.communicate(timeout=timeout)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), "\n".join(said)
        found = json.loads((Path(folder) / "errors.json").read_text())
        return [float(number) for number in found]


def main(folder: str, ranks: str, cases: str, rank: str, error: Callable[[list[Any]], float]) -> None:
    """One rank of `launch`: `error` is that of a case, given as its values."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=300), int(ranks), int(rank))
    errors = [worst(error(values)) for values in json.loads(cases)]
    if rank == "0":
        (Path(folder) / "errors.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:], error=lambda values: error(Case(*values)))
