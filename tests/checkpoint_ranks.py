"""What each rank of the checkpoint test runs: every mesh writes, every mesh and one device read, bit by bit."""

import functools
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from q3n_functional import checkpoint, optim, params, train_state
from q3n_functional.checkpoint import Checkpoint, Extras
from q3n_functional.parallel import distributed_checkpoint, launch, rules
from q3n_functional.parallel.mesh import Mesh
from q3n_functional.train_state import Saver, TrainState
from tests import runs
from tests.configs import perturbed, small

CONFIG = small(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))
PLACES = [Mesh(dp=2, tp=2), Mesh(cp=2, ep=2), Mesh(replicate=2, tp=2), Mesh(dp=4)]
GROUPS = optim.groups(CONFIG, optim.OptimizerConfig())
EXTRAS = Extras({"visual.weight": torch.arange(6.0).view(2, 3)}, {"tokenizer.json": b"{}"})


def whole(step: int) -> TrainState:
    """A state whose every number tells the step, the tensor and the place."""
    tree = perturbed(CONFIG, seed=step)
    state = optim.init(params.named_leaves(tree), GROUPS, torch.bfloat16)
    for number, moment in enumerate((*state.momentum.values(), *state.variance.values())):
        moment.copy_(torch.arange(moment.numel()).view(moment.shape) % 251 + number + step)
    state.step.fill_(step)
    return TrainState(step, Checkpoint(tree, CONFIG, {}, EXTRAS), state)


def sharded(state: TrainState, mesh: Mesh, rank: int) -> TrainState:
    """The rank's part of it."""
    at, places = mesh.coordinates(rank), rules.named_layouts(CONFIG, mesh)
    moments = ({n: places[n].shard(t, at) for n, t in kind.items()} for kind in state.optimizer[1:])
    tree = rules.shard(state.model.params, rules.layouts(CONFIG, mesh), at)
    return TrainState(state.step, state.model._replace(params=tree), optim.State(state.optimizer.step, *moments))


def assert_equal(ours: TrainState, theirs: TrainState, text: str) -> None:
    assert ours.step == theirs.step, text
    assert ours.model.extras.files == EXTRAS.files, text
    assert torch.equal(ours.model.extras.tensors["visual.weight"], EXTRAS.tensors["visual.weight"]), text
    for a, b in ((params.named_leaves(ours.model.params), params.named_leaves(theirs.model.params)),
                 (optim.to_tensors(ours.optimizer), optim.to_tensors(theirs.optimizer))):  # fmt: skip
        assert a.keys() == b.keys(), text
        for name, tensor in a.items():
            assert tensor.dtype == b[name].dtype, (text, name)
            assert torch.equal(tensor, b[name]), (text, name)


def read(folder: Path, mesh: Mesh, rank: int, storage: distributed_checkpoint.Storage | None) -> TrainState:
    model = checkpoint.load(folder / "model", torch.float32, "cpu", mesh, rank)
    fresh = optim.init(params.named_leaves(model.params), GROUPS, torch.bfloat16)
    return train_state.load(folder, model, fresh, storage)


def main(folder: Path) -> None:
    where = launch.world()
    checkpoint.save_part = functools.partial(checkpoint.save_part, max_shard_bytes=20_000)
    asked, original = [], distributed_checkpoint.whole
    distributed_checkpoint.whole = lambda path, names, layouts: asked.append(names) or original(path, names, layouts)
    with launch.joined(where, torch.device("cpu")):
        layouts = {mesh: rules.named_layouts(CONFIG, mesh) for mesh in PLACES}
        storages = {m: distributed_checkpoint.storage(layouts[m], m, timedelta(seconds=60)) for m in PLACES}
        for number, mesh in enumerate([*PLACES, None]):
            run = folder / str(number)
            launch.in_turn(functools.partial(run.mkdir, exist_ok=True))
            state, config = whole(number + 1), runs.config(folder / f"rank{where.rank}")
            if mesh is not None:
                with Saver(run, config, "", storages[mesh]) as saver:
                    saver.save(sharded(state, mesh, where.rank))
            elif where.lead:
                with Saver(run, config, "") as saver:
                    saver.save(state)
            dist.barrier()
            (written,) = train_state.complete(run)
            assert sorted(path.name for path in written.iterdir()) == ["model", "optimizer", "train_state.json"]
            for other in PLACES:
                found = read(written, other, where.rank, storages[other])
                assert_equal(found, sharded(state, other, where.rank), f"{mesh} to {other}")
            assert_equal(read(written, Mesh(), 0, None), state, f"{mesh} to one device")
            dist.barrier()
    # Each rank wrote several files of the folder, and never had more than a part of the model whole.
    sizes = {name: leaf.numel for name, leaf in params.named_specs(CONFIG).items()}
    assert len(asked) > 2 * len(PLACES)
    assert max(sum(sizes[name] for name in names) for names in asked) < params.count(CONFIG) / 3


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = Path(sys.argv[1]) / f"rank{launch.world().rank}"
    own.mkdir()
    main(Path(sys.argv[1]))
