"""How two ranks agree, and a compiled step and exchange; prints how often the step's code came from a cache."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from q3n_functional.parallel import expert, launch, mesh, placement, rules
from q3n_functional.params import SwiGLU
from tests import parallel_ranks
from tests.configs import small
from tests.parallel_ranks import Case

SMALLEST = {"num_hidden_layers": 1, "layer_types": ["linear_attention"], "num_experts": 0, "intermediate_size": 24}
STEP = Case("tp=2", {**SMALLEST, "num_nextn_predict_layers": 0}, backend="inductor")


def fails(text: str) -> None:
    raise ValueError(text)


def agree(rank: int, file: Path) -> None:
    with pytest.raises(launch.AgreedError, match=r"^rank 1: no such file 1$"):
        launch.together(lambda: rank and fails("no such file 1"))
    with pytest.raises(launch.AgreedError, match=r"^a mistake of all$"):
        launch.together(lambda: fails("a mistake of all"))
    assert launch.together(lambda: rank) == rank
    assert launch.from_lead(lambda: f"of rank {rank}") == "of rank 0"
    with pytest.raises(launch.AgreedError, match=r"^rank 0: only the first$"):
        launch.from_lead(lambda: fails("only the first"))
    assert launch.in_turn(lambda: file.write_text("0") if rank == 0 else int(file.read_text())) == (rank == 0)
    assert launch.same(3, "a number") == 3
    with pytest.raises(launch.AgreedError, match=r"^a number is 0 for rank 0 and 1 for rank 1: all ranks must see one"):
        launch.same(rank, "a number")
    where = launch.world()
    assert launch.told_by(launch.AgreedError(), where) == (rank == 0)
    assert launch.told_by(ValueError(), where)


def compiled(rank: int) -> None:
    """Three whole steps (loss, gradients, update) equal one device's eager ones."""
    assert parallel_ranks.error(STEP) < 1e-10
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    print(f"rank {rank}: {hits} from the cache", flush=True)
    dist.barrier()


def exchange(rank: int) -> None:
    """Experts of two ranks, compiled for numbers of slots that are data, give what they give eagerly."""
    layout, config = mesh.parse("ep=2"), small()
    parallel = placement.connect(layout, rules.layouts(config, layout), torch.device("cpu"))
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(rank), dtype=torch.float64, requires_grad=True)
    p, x, weights = SwiGLU(draw(4, 6, 8), draw(4, 6, 8), draw(4, 8, 6)), draw(12, 8), draw(12, 2)

    def results(function: Callable[..., Tensor], experts: Tensor) -> tuple[Tensor, ...]:
        y = function(p, x, experts, weights, parallel)
        return y, *torch.autograd.grad(y.square().sum(), (x, weights, *p))

    compiled = torch.compile(expert.routed, fullgraph=True, dynamic=False)
    everywhere = torch.arange(24).view(12, 2) % 8
    for experts in (everywhere, everywhere % 4, everywhere % 4 + 4 * rank):  # even, all on one rank, all at home
        torch.testing.assert_close(results(compiled, experts), results(expert.routed, experts), rtol=1e-10, atol=1e-10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launch.joined(launch.world(), torch.device("cpu")):
        agree(launch.world().rank, Path(sys.argv[1]) / "file")
        compiled(launch.world().rank)
        exchange(launch.world().rank)
