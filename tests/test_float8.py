"""Products in float8: what they compute, where they may run, and that a model learns with them."""

import logging

import pytest
import torch

from q3n_functional import compiled, float8, model, params
from q3n_functional.feed_forward import swiglu
from q3n_functional.float8 import projection
from tests import runs
from tests.configs import perturbed, small, trainable

WIDE = {
    "head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_key_head_dim": 16,
    "hidden_size": 64,
    "shared_expert_intermediate_size": 32,
}
"""Changes of `small` after which every product fits."""


def operands(rows=40, outputs=48, inputs=64, seed=0):
    """x, w and dy of magnitudes apart, with outliers, so that a scale left out or swapped shows."""
    generator = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(*s, generator=generator) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    x[2, 5], w[7, 9] = 30.0, 9.0
    return (x * 20).bfloat16(), (w * 0.02).bfloat16(), (dy * 1e-6).bfloat16()


def emulated(x, kind):
    """float64 numbers that `x` becomes: the nearest of the format's after scaling, times the scale."""
    # The factor in fp32, or many numbers that lie half-way between two would go the other way.
    factor = torch.finfo(kind).max / x.float().abs().max()
    return (x.double() * factor.double()).to(kind).double() / factor.double()


def products(x, w, dy):
    """The product and both gradients of quantised operands, in float64."""
    x, w, dy = emulated(x, torch.float8_e4m3fn), emulated(w, torch.float8_e4m3fn), emulated(dy, torch.float8_e5m2)
    return x @ w.T, dy @ w, dy.T @ x


def differences(rows=40):
    x, w, dy = operands(rows)
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    y = projection(*leaves, "linears")
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    assert all(t.dtype == torch.bfloat16 for t in found)
    exact = x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double()
    pairs = zip(found, products(x, w, dy), exact, strict=True)
    return [[float((a.double() - b).norm() / b.norm()) for b in wanted] for a, *wanted in pairs]


@pytest.mark.parametrize("rows", [40, 37, 3])
def test_products_are_those_of_the_quantised_operands(rows):
    for emulation, exact in differences(rows):
        assert emulation < 4e-3  # measured 2e-3: the result is rounded to bf16
        assert 1e-2 < exact < 1e-1  # measured 3e-2 to 6e-2: 3 bits of mantissa, 2 in gradients


def test_a_scale_left_out_is_noticed(monkeypatch):
    scaled = float8._scaled
    monkeypatch.setattr(float8, "_scaled", lambda x, kind: scaled(x, kind)._replace(scale=torch.ones(())))
    assert min(emulation for emulation, _ in differences()) > 1
    monkeypatch.setattr(float8, "_scaled", lambda x, kind: float8._Scaled(x.to(kind), torch.ones(())))
    assert not all(emulation < 0.1 for emulation, _ in differences())  # NaN where the conversion does not saturate


def test_zeros_stay_zeros_and_nan_shows():
    x, w, _ = operands()
    assert not projection(torch.zeros_like(x), w, "linears").any()
    x[0, 0] = torch.nan
    assert projection(x, w, "linears").isnan().all()


def test_small_gradients_survive():
    x, w, dy = operands()
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(projection(leaf, w, "linears"), leaf, dy * 1e-24)
    assert dx.abs().max() > 0


def test_matrices_that_do_not_fit_stay_in_bf16_and_are_named_once(caplog):
    caplog.set_level(logging.INFO)
    x, w, _ = operands(outputs=40)
    float8._say_once.cache_clear()
    for run in (projection, projection, torch.compile(projection, fullgraph=True, backend="aot_eager")):
        assert torch.equal(run(x, w, "linears"), torch.nn.functional.linear(x, w))
    assert caplog.text.count("matrices of 40 x 64 stay in bfloat16: float8 needs multiples of 16") == 1


def test_other_dtypes_are_refused():
    x, w, _ = operands()
    with pytest.raises(ValueError, match=r"got torch\.float32 and torch\.bfloat16: set bfloat16"):
        projection(x.float(), w, "linears")


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_products_are_the_eager_ones_at_any_length(dynamic):
    torch.compiler.reset()
    function = torch.compile(projection, fullgraph=True, dynamic=bool(dynamic), backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (40,) if dynamic is False else (40, 37, 31, 64):
            x, w, dy = operands(rows)
            x, w = x.requires_grad_(), w.requires_grad_()
            if dynamic is None:
                torch._dynamo.mark_dynamic(x, 0)
            ours, theirs = function(x, w, "linears"), projection(x, w, "linears")
            assert torch.equal(ours, theirs)
            pairs = zip(*(torch.autograd.grad(y, [x, w], dy) for y in (ours, theirs)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def targets(function, *arguments):
    """What the graph of `function` calls."""
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compiler.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments)
    return seen


def test_compiled_graphs_hold_nothing_that_a_cache_refuses():
    seen = targets(projection, *operands()[:2], "linears")
    assert torch.ops.q3n.float8_product in seen or torch.ops.q3n.float8_product.default in seen
    assert not [target for target in seen if "Function" in repr(target) or "float8.py" in repr(target)]


def test_function_transforms():
    x, w, dy = operands()
    square = lambda x, w: (projection(x, w, "linears") * dy[: len(x)]).float().sum()  # noqa: E731
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    expected = torch.autograd.grad(square(*leaves), leaves)
    gradient = torch.func.grad(square, (0, 1))
    for run in (gradient, torch.compile(gradient, fullgraph=True, backend="aot_eager")):
        assert all(torch.equal(a, b) for a, b in zip(run(x, w), expected, strict=True))
    each = torch.func.vmap(gradient, (0, None))(torch.stack([x, 2 * x]), w)[0]
    assert torch.equal(each[1], torch.func.grad(square)(2 * x, w))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(square, (x, w), (x, w))
    first = torch.autograd.grad(square(*leaves), leaves, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="_scaled_mm is not implemented"):
        first.float().sum().backward()


def shaped(**changes):
    config = small(**WIDE, **changes)
    return config, trainable(perturbed(config, dtype=torch.bfloat16)), torch.randint(64, (2, 24))


def watched(function, *ops):
    """For each of `ops`, the arguments and options that `function` calls it with."""
    seen = {op: [] for op in ops}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op in seen:
                seen[op].append((args, kwargs or {}))
            return op(*args, **(kwargs or {}))

    with Watch():
        function()
    return list(seen.values())


def calls(function):
    """The operands of the float8 products that `function` does."""
    (seen,) = watched(function, torch.ops.aten._scaled_mm.default)
    return [args[:2] for args, _ in seen]


def test_which_products_are_in_float8():
    config, tree, tokens = shaped(mlp_only_layers=(0,), intermediate_size=48)
    assert not calls(lambda: model.loss(tree, tokens, config=config))
    seen = [tuple(b.t().shape) for _, b in calls(lambda: model.loss(tree, tokens, config=config, float8="linears"))]
    expected = []
    for layer in [*tree.layers, tree.mtp.layer]:
        m, mlp = layer.mixer, layer.mlp
        linear = isinstance(m, params.LinearAttention)
        matrices = [torch.cat([m.q, m.k, m.v]), m.z, m.out] if linear else [m.q, m.gate, m.k, m.v, m.out]
        ffn = mlp if isinstance(mlp, params.SwiGLU) else mlp.shared_expert
        expected += [tuple(w.shape) for w in (*matrices, torch.cat([ffn.gate, ffn.up]), ffn.down)]
    assert seen == expected


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_compiled_model_has_the_eager_gradients(recompute):
    config, tree, tokens = shaped(num_hidden_layers=2, layer_types=runs.LAYERS, num_nextn_predict_layers=0)
    leaves = list(params.named_leaves(tree).values())
    options = {"config": config, "float8": "linears", "recompute": recompute}
    torch.compiler.reset()
    found = []
    for run in (model.loss, compiled.compiled(model.loss, "layers", backend="aot_eager")):
        value, _ = run(tree, tokens, **options)
        found.append([value, *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_operands_are_what_tensor_cores_take():
    x, w, dy = operands(37)
    x.requires_grad_(), w.requires_grad_()
    seen = calls(lambda: torch.autograd.grad(projection(x, w, "linears"), [x, w], dy))
    assert len(seen) == 3
    for a, b in seen:
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert not any(size % 16 for size in (a.shape[1], *b.shape))
        assert b.dtype == torch.float8_e4m3fn
    assert [a.dtype for a, _ in seen] == [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2]


def test_gradients_of_a_layer_are_within_the_error_of_the_formats():
    p = shaped()[1].layers[0].mlp.shared_expert
    x, dy = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    x.requires_grad_()
    found = [torch.autograd.grad(swiglu(p, x, policy), [x, *p], dy) for policy in ("none", "linears")]
    for name, exact, ours in zip(("x", *p._fields), *found, strict=True):
        error = (ours.float() - exact.float()).norm() / exact.float().norm()
        assert 0.01 < error < 0.15, (name, error)


@pytest.mark.parametrize("float8_", ["linears", "linears_and_experts"])
def test_a_model_learns_in_float8_as_in_bf16(tmp_path, float8_):
    shape = {**WIDE, "vocab_size": 304}
    losses = {}
    for policy in ("none", float8_):
        folder = tmp_path / policy
        folder.mkdir()
        runs.run(folder, "--dtype=bfloat16", f"--float8={policy}", "--steps=20", "--seq-len=64", **shape)
        losses[policy] = torch.tensor(runs.rows(folder, "cross_entropy"))
    apart = losses[float8_] - losses["none"]
    # Measured: 0.02 before the first update, at most 0.11 later, 0.02 in the mean of the last ten.
    assert 0 < apart[0].abs() < 0.06
    assert apart.abs().max() < 0.25
    assert apart[10:].mean().abs() < 0.06
    assert losses[float8_][10:].mean() < losses[float8_][0] - 1.5


def test_cards_without_float8_are_refused_before_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(params, "init", None)
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, A100 has 8\.0: set float8 to none"):
        runs.run(tmp_path, "--device=cuda", "--dtype=bfloat16", "--float8=linears")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.check_device(torch.device("cuda"), "linears_and_experts")
    for capability in ((8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, has=capability: has)
        float8.check_device(torch.device("cuda"))
        with pytest.raises(ValueError, match=r"capability 9 or 10, A100 has \d+\.\d: set float8 to linears"):
            float8.check_device(torch.device("cuda"), "linears_and_experts")
