"""Writing on a mesh: one device's tokens, caches that are slices of its caches; what is refused."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from q3n_functional import cache as caches
from q3n_functional import checkpoint, cli
from q3n_functional.decode import step, waiting
from q3n_functional.generate import generate
from q3n_functional.parallel import decode, mesh, rules
from q3n_functional.parallel import launch as ranks_of
from q3n_functional.parallel.collectives import Axis
from q3n_functional.parallel.launch import World
from q3n_functional.sampling import Options
from tests.configs import perturbed, small
from tests.decode_ranks import FULL, LINEAR, MUTATIONS, Case
from tests.parallel_ranks import launch
from tests.runs import torchrun

MODULE = "tests.decode_ranks"
TWO = [
    Case("tp=2"),
    Case("tp=2", {"num_experts": 0, "intermediate_size": 24, "tie_word_embeddings": True}),
    Case("tp=2", compiled=True),
    Case("ep=2", {"num_hidden_layers": 1, "layer_types": [FULL]}, compiled=True),
]
# Three value heads to a key head, half as many key/value heads as ranks.
MANY_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 12}
FOUR = [
    Case("ep=2,tp=2"),
    Case("ep=2,tp=2", few=3),
    Case("ep=4"),
    Case("tp=4", MANY_HEADS),
    Case("tp=4", {"layer_types": [FULL, FULL]}),
]
SUMMED, EXPERTS = MUTATIONS
WRONG = [Case("tp=2", mutation=SUMMED), Case("ep=2", mutation=EXPERTS)]


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO + WRONG), (4, FOUR)], ids=["two", "four"])
def test_a_mesh_writes_what_one_device_writes(ranks, cases):
    errors = launch(ranks, cases, module=MODULE)
    wrong = {str(case): value for case, value in zip(cases, errors, strict=True) if not value < 1e-10}
    assert wrong.keys() == {str(case) for case in cases if case.mutation}, wrong


def test_collectives_of_a_step():
    """Every block and the embedding are summed over tp, experts over ep; logits are gathered, and agreed on over ep."""
    config = small(num_hidden_layers=2, layer_types=(LINEAR, FULL))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        parallel = decode.connect(mesh.parse("ep=2,tp=2"), config, torch.device("cpu"))
        shards = rules.shard(perturbed(config), parallel.layouts, parallel.mesh.coordinates(1))
        cache = caches.empty(decode.own_heads(config, parallel), 1, 2, torch.float32)
        running = waiting(cache, [[5]], [Options()], [()], [2], config=config)
        with CommDebugMode() as counted:
            step(shards, running, parallel, config=config)
    finally:
        dist.destroy_process_group()
    counts = {kind.__name__: number for kind, number in counted.get_comm_counts().items()}
    assert counts == {"all_reduce": 2 * 3 + 2, "all_gather_into_tensor": 1}


def options(folder):
    return ("generate", folder / "run", "DUKE.", "--max-new-tokens=12", "--seed=4", "--mesh.tp=2")


def test_generate_under_torchrun_prints_the_text_of_one_device_once(finished, capsys):
    cli.main([*map(str, options(finished)[:-1])])
    done = torchrun(2, "q3n_functional", *options(finished))
    assert (done.returncode, done.stdout) == (0, capsys.readouterr().out), done.stderr
    assert "rank 1" not in done.stderr


def test_the_loss_of_a_rank_reaches_the_terminal(finished):
    lost = torchrun(2, "tests.dying_rank", *options(finished), die="1:decode.drawn:3")
    assert lost.returncode == 1
    assert re.search(r"q3n: rank 0: another rank is gone or silent \(.*\); launch it again\n", lost.stderr), lost.stderr
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", lost.stderr), lost.stderr


def test_drafts_are_refused_before_weights_are_read(finished, capsys, monkeypatch):
    monkeypatch.setattr(decode, "load", None)
    monkeypatch.setattr(ranks_of, "world", lambda: World(0, 2, 0))
    with pytest.raises(SystemExit, match="2"):
        cli.main([*map(str, options(finished)), "--draft-tokens=1"])
    said = "draft_tokens is 1, but 2 ranks make no drafts: leave them out"
    assert capsys.readouterr().err == f"q3n: rank 0: {said}\n"
    parallel = SimpleNamespace(world=Axis(2, "", None))
    with pytest.raises(ValueError, match=said):
        generate(None, [1], parallel, config=small(), max_new_tokens=1, draft_tokens=1)


def test_the_ranks_of_a_training_are_refused():
    for layout, tokens in ((mesh.Mesh(tp=2), 1), (mesh.Mesh(ep=2, sequence=False), 2)):
        parallel = SimpleNamespace(mesh=layout, tokens=Axis(tokens, "", None))
        with pytest.raises(ValueError, match=r"parallel shares out tokens, as for training: make it with q3n"):
            decode.own_heads(small(), parallel)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("tp=8", "mesh.tp is 8, but vocab_size is 300, not a multiple of it; this model allows tp 1, 2"),
        ("ep=3", "mesh.ep is 3, but num_experts is 8, not a multiple of it; this model allows ep 1, 2, 4, 8"),
        ("dp=2,tp=2", "mesh.dp is 2, but writing shares out neither rows nor their tokens: use tp and ep"),
        ("cp=2", "mesh.cp is 2, but writing shares out neither rows nor their tokens: use tp and ep"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_weights_are_read(layout, said, finished, monkeypatch):
    monkeypatch.setattr(checkpoint, "_fill", None)
    layout = mesh.parse(layout)
    with pytest.raises(ValueError, match=re.escape(said)):
        decode.load(finished / "run/step-10/model", layout, torch.device("cpu"), World(0, layout.size, 0))


def test_a_mesh_needs_torchrun(finished, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([*map(str, options(finished))])
    said = "q3n: the mesh (tp 2) needs torchrun with hosts x --nproc-per-node = 2, but 1 was launched\n"
    assert capsys.readouterr().err == said
