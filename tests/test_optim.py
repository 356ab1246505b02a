"""Optimizers against torch.optim's classes, schedules, and the state on disk."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import AdamW, Muon

from q3n_functional import compiled, optim, params
from q3n_functional.optim import OptimizerConfig
from q3n_functional.parallel import rules
from q3n_functional.parallel.mesh import Mesh
from tests.configs import small

CONFIG = small(num_hidden_layers=2, layer_types=("linear_attention", "full_attention"), num_nextn_predict_layers=0)


def tree(seed=0):
    return params.named_leaves(params.init(CONFIG, seed))


def gradients(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in tree().items()}


def moved(optimizer, steps=3, scale=1.0, update=optim.update_):
    groups, leaves = optim.groups(CONFIG, optimizer), tree()
    state = optim.init(leaves, groups)
    for step in range(steps):
        lr = torch.tensor(optimizer.lr / (step + 1))
        norm = update(leaves, gradients(step, scale), state, lr, groups=groups, optimizer=optimizer)
    return leaves, state, norm


def stack(p):
    """A matrix, or experts, as [E, M, N]."""
    return p.reshape(-1, *p.shape[-2:])


def reference(optimizer, steps=3, scale=1.0):
    """torch.optim's classes on the same gradients, experts as one matrix each."""
    groups, leaves = optim.groups(CONFIG, optimizer), tree()
    matrices = {
        n: [m.clone().requires_grad_() for m in leaves[n].reshape(-1, *leaves[n].shape[-2:])] for n in groups.muon
    }
    own = {n: leaves[n].clone().requires_grad_() for n in groups.decayed + groups.plain}
    o = optimizer
    adamw = AdamW(
        [
            {"params": [own[n] for n in groups.decayed], "weight_decay": o.weight_decay},
            {"params": [own[n] for n in groups.plain], "weight_decay": 0.0},
        ],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
    )
    every = [m for ms in matrices.values() for m in ms]
    muon = (
        Muon(every, weight_decay=o.weight_decay, momentum=o.momentum, adjust_lr_fn="match_rms_adamw") if every else None
    )
    for step in range(steps):
        new = gradients(step, scale)
        for n, p in own.items():
            p.grad = new[n]
        for n, ms in matrices.items():
            for m, g in zip(ms, stack(new[n]), strict=True):
                m.grad = g.clone()
        torch.nn.utils.clip_grad_norm_([*own.values(), *every], o.clip_norm)
        for which in filter(None, (adamw, muon)):
            for group in which.param_groups:
                group["lr"] = o.lr / (step + 1)
            which.step()
    return {n: own[n] if n in own else torch.stack(matrices[n]).view(leaves[n].shape) for n in leaves}


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_those_of_torch_optim(name, scale):
    optimizer = OptimizerConfig(name=name, lr=1e-2, clip_norm=0.5)
    ours, _, _ = moved(optimizer, scale=scale)
    theirs = reference(optimizer, scale=scale)
    for leaf, before in tree().items():
        moves = (theirs[leaf] - before).abs().max()
        assert moves > 1e-4, leaf
        # Muon orthogonalises in bf16, so the last bits of a batched product can show: 1/256 each.
        tolerance = 0.02 * moves if name == "muon" else 1e-6
        assert (ours[leaf] - theirs[leaf]).abs().max() <= tolerance, leaf


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_compiled_update_is_the_eager_one(name):
    optimizer = OptimizerConfig(name=name, lr=1e-2)
    torch.compiler.reset()
    update = torch.compile(optim.update_, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        ours, state, norm = moved(optimizer, update=update)
    expected, expected_state, expected_norm = moved(optimizer)
    torch.testing.assert_close(norm, expected_norm)
    for leaf in expected:
        torch.testing.assert_close(ours[leaf], expected[leaf], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.momentum[leaf], expected_state.momentum[leaf])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_large_parameters_moved_one_by_one_end_where_all_do(monkeypatch, name, backend):
    """Compiled once for all sizes; what is no multiple of a row goes with the small ones."""
    monkeypatch.setattr(compiled, "LARGE", 2 * compiled.ROW)
    optimizer = OptimizerConfig(name=name, lr=1e-2)
    large = [n for n, p in tree().items() if p.numel() >= compiled.LARGE and p.numel() % compiled.ROW == 0]
    assert 5 < len(large) < len(tree())
    torch.compiler.reset()
    moves = compiled.moves(backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=name == "adamw"):
        ours, state, norm = moved(optimizer, update=partial(optim.update_, moves=moves))
    expected, expected_state, expected_norm = moved(optimizer)
    assert torch.equal(norm, expected_norm)
    for leaf in expected:
        torch.testing.assert_close(ours[leaf], expected[leaf], rtol=1e-5, atol=1e-6 if name == "adamw" else 5e-4)
        torch.testing.assert_close(state.momentum[leaf], expected_state.momentum[leaf])


def test_clipping_is_by_the_global_norm():
    _, _, norm = moved(OptimizerConfig(), steps=1)
    assert norm.item() == pytest.approx(
        math.sqrt(sum(g.square().sum().item() for g in gradients(0).values())), rel=1e-5
    )
    # AdamW's momentum after one step is (1 - beta1) times the clipped gradient.
    for clip, expected in ((0.5, 0.5), (math.inf, norm.item())):
        _, state, _ = moved(OptimizerConfig(clip_norm=clip), steps=1)
        total = math.sqrt(sum(m.square().sum().item() for m in state.momentum.values())) / 0.1
        assert total == pytest.approx(expected, rel=1e-4)


def test_groups_follow_the_axes():
    adamw, muon = (optim.groups(CONFIG, OptimizerConfig(name=name)) for name in ("adamw", "muon"))
    assert adamw.muon == ()
    assert set(adamw.decayed) == set(muon.decayed + muon.muon)
    assert {n.split(".")[-1] for n in muon.decayed} == {"embed_tokens", "lm_head", "shared_expert_gate"}
    names = {n.split(".")[-1] for n in adamw.plain}
    assert {"A_log", "dt_bias", "norm", "q_norm", "input_layernorm", "conv_q"} <= names
    assert not names & {"q", "router", "gate", "out", "embed_tokens"}
    assert sorted(muon.muon + muon.decayed + muon.plain) == sorted(tree())


def test_decay_alone_shrinks_matrices_only():
    optimizer = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.5)
    groups, leaves = optim.groups(CONFIG, optimizer), tree()
    zeros = {n: torch.zeros_like(p) for n, p in leaves.items()}
    optim.update_(leaves, zeros, optim.init(leaves, groups), torch.tensor(0.1), groups=groups, optimizer=optimizer)
    for name, before in tree().items():
        torch.testing.assert_close(leaves[name], before * (1.0 if name in groups.plain else 0.95))


def test_orthogonalised_matrices_have_singular_values_near_one():
    x = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for matrix in (x, x.mT):
        values = torch.linalg.svdvals(optim.orthogonalised(matrix))
        assert 0.6 < values.min() < values.max() < 1.3


def test_warm_up_then_cosine():
    rate = partial(optim.learning_rate, steps=110, optimizer=OptimizerConfig(lr=2.0, warmup_steps=10, final_lr=0.1))
    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert rate(59) == pytest.approx(2.0 * 0.55)
    assert rate(109) == pytest.approx(0.2)
    assert all(rate(step) >= rate(step + 1) for step in range(9, 109))


def test_warm_up_then_constant_then_linear():
    optimizer = OptimizerConfig(lr=2.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr=0.0)
    rate = partial(optim.learning_rate, steps=100, optimizer=optimizer)
    assert rate(9) == rate(50) == rate(79) == 2.0
    assert rate(89) == pytest.approx(1.0)
    assert rate(99) == 0.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_as_tensors_is_the_state_itself(name):
    optimizer = OptimizerConfig(name=name)
    _, state, _ = moved(optimizer)
    groups, tensors = optim.groups(CONFIG, optimizer), optim.to_tensors(state)
    assert tensors["step"] is state.step
    assert set(state.variance) == set(groups.decayed + groups.plain)
    for kind in ("momentum", "variance"):
        assert all(tensors[f"{kind}.{name}"] is moment for name, moment in getattr(state, kind).items())
    assert len(tensors) == 1 + len(state.momentum) + len(state.variance)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bf16_are_the_fp32_ones_rounded(name):
    # One update from equal states: whatever is wider than the rounding of what is stored is another update.
    optimizer = OptimizerConfig(name=name, lr=1e-2, state_dtype="bfloat16")
    groups, leaves, wanted = optim.groups(CONFIG, optimizer), tree(), tree()
    narrow, wide = (optim.init(leaves, groups, dtype) for dtype in (torch.bfloat16, None))
    for kind in ("momentum", "variance"):
        for leaf, moment in getattr(narrow, kind).items():
            moment.copy_(torch.rand(moment.shape, generator=torch.Generator().manual_seed(3)) * 1e-2)
            getattr(wide, kind)[leaf].copy_(moment)
    for state, moving in ((narrow, leaves), (wide, wanted)):
        optim.update_(moving, gradients(0), state, torch.tensor(1e-2), groups=groups, optimizer=optimizer)
    for leaf, p in leaves.items():
        assert torch.equal(p, wanted[leaf]), leaf
        assert narrow.momentum[leaf].dtype == torch.bfloat16
        assert torch.equal(narrow.momentum[leaf], wide.momentum[leaf].bfloat16()), leaf
    for leaf, moment in narrow.variance.items():
        assert torch.equal(moment, wide.variance[leaf].bfloat16()), leaf


def test_bf16_gradients_move_parameters_as_their_values_in_fp32_do():
    optimizer, (ours, theirs) = OptimizerConfig(lr=1e-2, clip_norm=0.5), (tree(), tree())
    groups, rounded = optim.groups(CONFIG, optimizer), {n: g.bfloat16() for n, g in gradients(0).items()}
    norms = [
        optim.update_(leaves, grads, optim.init(leaves, groups), torch.tensor(1e-2), groups=groups, optimizer=optimizer)
        for leaves, grads in ((ours, rounded), (theirs, {n: g.float() for n, g in rounded.items()}))
    ]
    assert torch.equal(*norms)
    assert norms[0].dtype == torch.float32
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_muon_refuses_parts_of_matrices():
    """Stacked experts cut by expert stay whole matrices, rows shared out over dp do not."""
    optimizer = OptimizerConfig(name="muon")
    groups = optim.groups(CONFIG, optimizer)
    for mesh, refused in ((Mesh(dp=2), True), (Mesh(tp=2), True), (Mesh(replicate=2), False)):
        parallel = SimpleNamespace(layouts=rules.layouts(CONFIG, mesh))
        if refused:
            with pytest.raises(ValueError, match="Muon needs whole matrices"):
                optim.check_whole(groups, parallel)
        else:
            optim.check_whole(groups, parallel)
