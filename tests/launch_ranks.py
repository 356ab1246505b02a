"""How two ranks agree, and compiled code that depends on the rank; prints how often it came from a cache."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from q3n_functional.parallel import launch, mesh, placement, rules
from q3n_functional.parallel.collectives import pick
from tests.configs import perturbed, small

CONFIG = small(num_hidden_layers=1, layer_types=("full_attention",), num_experts=0, intermediate_size=24)


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
    layout = mesh.parse("tp=2")
    places = rules.layouts(CONFIG, layout)
    parallel = placement.connect(layout, places, torch.float32, torch.device("cpu"))
    table, tokens = perturbed(CONFIG).embed_tokens, torch.arange(64).view(2, 32)
    shard = rules.named_layouts(CONFIG, layout)["embed_tokens"].shard(table, layout.coordinates(rank))
    embed = torch.compile(lambda tokens, table: placement.embed(tokens, table, parallel) * 2, fullgraph=True)
    expected = pick(table[tokens] * 2, parallel.tp, 1)
    torch.testing.assert_close(embed(tokens, shard.clone().requires_grad_()), expected)
    hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
    print(f"rank {rank}: {hits} from the cache", flush=True)
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launch.joined(launch.world(), torch.device("cpu")):
        agree(launch.world().rank, Path(sys.argv[1]) / "file")
        compiled(launch.world().rank)
