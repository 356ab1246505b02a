"""Routed experts in float8: what they compute, what they ask of tensor cores, and that a model learns with them."""

import logging

import pytest
import torch

from q3n_functional import compiled, feed_forward, float8, float8_experts, model, params
from q3n_functional.float8_experts import experts
from q3n_functional.ops import grouped_swiglu
from q3n_functional.ops.kernels import float8_grouped_mm
from tests import runs
from tests.test_float8 import shaped, targets, watched

NAMES = ("y", "dx", "dweights", "dgate", "dup", "ddown")


def operands(tokens=37, per_token=3, num_experts=6, width=64, inner=32, seed=0):
    """Inputs and dy of magnitudes apart, rows too; of the experts the last but one has no token, the last has one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    chosen = torch.rand(tokens, num_experts - 2, generator=generator).topk(per_token).indices
    chosen[0, 0] = num_experts - 1
    weights = draw(tokens, per_token).softmax(-1)
    gate, up = (draw(num_experts, inner, width) * scale for scale in (0.02, 0.01))
    down, dy = draw(num_experts, width, inner), draw(tokens, width) * 1e-6
    down = down * torch.logspace(-2, 2, width)[:, None]
    x = draw(tokens, width) * torch.logspace(0.5, 1.5, tokens)[:, None]
    return x.bfloat16(), chosen, weights, gate.bfloat16(), up.bfloat16(), down.bfloat16(), dy.bfloat16()


def run(function, x, chosen, weights, gate, up, down, dy):
    """The output and the gradients of all but the experts' numbers."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights, gate, up, down)]
    y = function(leaves[0], chosen, *leaves[1:])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def by_row(x):
    """float64 numbers that rows become: the nearest of e4m3 over their scale, times the scale."""
    scale = (x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448).double()
    return (x.double() / scale).to(torch.float8_e4m3fn).double() * scale


def same(x):
    return x


def rounded(x):
    return x.bfloat16().double()


def products(x, chosen, weights, gate, up, down, dy, quantised=by_row, rounded=rounded):
    """What `run` finds in float64, where every operand of a float8 product is `quantised` by row."""
    x, weights, gate, up, down, dy = (t.double() for t in (x, weights, gate, up, down, dy))
    y, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    dgate, dup, ddown = (torch.zeros_like(w) for w in (gate, up, down))
    for e in range(len(gate)):
        token, j = torch.where(chosen == e)
        w = weights[token, j, None]
        a, b = (rounded(quantised(x)[token] @ quantised(matrix[e]).T) for matrix in (gate, up))
        sigmoid = torch.sigmoid(a)
        h = rounded(a * sigmoid * b * w)
        y.index_add_(0, token, rounded(quantised(h) @ quantised(down[e]).T))
        dh = rounded(quantised(dy)[token] @ quantised(down[e].T).T)
        dweights[token, j] = (dh * a * sigmoid * b).sum(-1)
        da, db = rounded(w * dh * b * sigmoid * (1 + a * (1 - sigmoid))), rounded(w * dh * a * sigmoid)
        joined = torch.cat([gate[e], up[e]])
        dx.index_add_(0, token, rounded(quantised(torch.cat([da, db], -1)) @ quantised(joined.T).T))
        dgate[e], dup[e], ddown[e] = da.T @ x[token], db.T @ x[token], dy[token].T @ h
    return y, dx, dweights, dgate, dup, ddown


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def differences(inputs):
    """By name, the errors beside products of quantised operands and beside exact ones."""
    found, exact = run(experts, *inputs), products(*inputs, same, same)
    triples = zip(NAMES, found, products(*inputs), exact, strict=True)
    return {name: (error(ours, emulation), error(ours, wanted)) for name, ours, emulation, wanted in triples}


@pytest.mark.parametrize("tokens", [37, 40, 1])
def test_products_are_those_of_the_quantised_operands(tokens):
    inputs = operands(tokens)
    for name, (emulation, exact) in differences(inputs).items():
        assert emulation < 4e-3, (name, emulation)  # measured at most 2e-3: the results are rounded to bf16
        assert 1e-2 < exact < 0.15, (name, exact)  # measured 4e-2 to 7e-2: 3 bits of mantissa; 5e-3 in bf16
    dtypes = [t.dtype for t in run(experts, *inputs)]
    assert dtypes == [torch.float32 if name == "dweights" else torch.bfloat16 for name in NAMES]


def test_int32_experts_and_bf16_weights():
    x, chosen, weights, *rest = operands()
    inputs = (x, chosen, weights.bfloat16(), *rest)
    found, wanted = run(experts, x, chosen.int(), *inputs[2:]), products(*inputs)
    assert found[2].dtype == torch.bfloat16
    assert max(map(error, found, wanted)) < 4e-3


def test_experts_without_tokens_have_gradients_of_zero():
    for gradient in run(experts, *operands())[3:]:
        assert gradient.flatten(1).any(1).tolist() == [True] * 4 + [False, True]


def test_one_expert_for_all_and_no_tokens():
    x, chosen, *rest, dy = operands()
    inputs = (x, torch.full_like(chosen, 2), *rest, dy)
    assert max(map(error, run(experts, *inputs), products(*inputs))) < 4e-3
    nothing = run(experts, x[:0], chosen[:0], rest[0][:0], *rest[1:], dy[:0])
    assert nothing[0].shape == (0, 64)
    assert not any(gradient.any() for gradient in nothing)


def test_a_scale_left_out_is_noticed(monkeypatch):
    scaled = float8_experts._by_row
    for operand in range(9):
        calls = iter(range(100))

        def without(*parts, operand=operand, calls=calls):
            rows = scaled(*parts)
            return rows._replace(scale=torch.ones_like(rows.scale)) if next(calls) == operand else rows

        monkeypatch.setattr(float8_experts, "_by_row", without)
        assert max(map(error, run(experts, *operands()), products(*operands()))) > 0.5


def test_tokens_are_strangers_and_nan_shows():
    inputs = operands()
    before = run(experts, *inputs)
    for spoilt in (inputs[0], inputs[-1]):
        spoilt[3, 5] = torch.nan
    y, dx, *_ = run(experts, *inputs)
    assert y[3].isnan().all()
    assert dx[3].isnan().all()
    others = torch.arange(37) != 3
    assert torch.equal(y[others], before[0][others])
    assert torch.equal(dx[others], before[1][others])
    x, chosen, weights, gate, *rest = operands()
    gate[1, 0, 0] = torch.nan
    meets = (chosen == 1).any(-1)
    y = run(experts, x, chosen, weights, gate, *rest)[0]
    assert y[meets].isnan().all()
    assert y[~meets].isfinite().all()


def test_zeros_stay_zeros():
    x, *rest, dy = operands()
    assert not run(experts, torch.zeros_like(x), *rest, dy)[0].any()
    assert not any(t.any() for t in run(experts, x, *rest, torch.zeros_like(dy))[1:])
    x[4], dy[5] = 0, 0
    y, dx, *_ = run(experts, x, *rest, dy)
    assert not y[4].any()
    assert not dx[5].any()
    assert y[5].all()


def test_small_gradients_survive():
    *inputs, dy = operands()
    small, usual = run(experts, *inputs, dy * 2.0**-80), run(experts, *inputs, dy)
    for name, a, b in list(zip(NAMES, small, usual, strict=True))[1:]:
        assert error(a.double() * 2.0**80, b.double()) < 2e-2, name


def test_matrices_that_do_not_fit_stay_in_bf16_and_are_named_once(caplog):
    caplog.set_level(logging.INFO)
    float8._say_once.cache_clear()
    for sizes in ({"inner": 24}, {"width": 72}):
        inputs = operands(**sizes)[:-1]
        for function in (experts, experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
            assert torch.equal(function(*inputs), grouped_swiglu(*inputs))
    assert caplog.text.count("matrices of 24 x 64 stay in bfloat16: float8 needs multiples of 16") == 1
    assert caplog.text.count("matrices of 32 x 72 stay in bfloat16: float8 needs multiples of 16") == 1


def test_what_is_refused():
    x, chosen, weights, gate, up, down, _ = operands()
    with pytest.raises(ValueError, match=r"got torch\.float32: set bfloat16"):
        experts(x.float(), chosen, weights, gate.float(), up.float(), down.float())
    with pytest.raises(ValueError, match="x, gate, up and down must share a dtype"):
        experts(x.float(), chosen, weights, gate, up, down)
    with pytest.raises(ValueError, match=r"x must be \[T, D\]"):
        experts(x, chosen, weights, gate, up, down.mT)


@pytest.mark.parametrize("dynamic", [False, True, None])
def test_compiled_experts_are_the_eager_ones_at_any_length(dynamic):
    torch.compiler.reset()
    function = torch.compile(experts, fullgraph=True, dynamic=bool(dynamic), backend="aot_eager")

    def marked(*arguments):
        for tensor in arguments[:3] if dynamic is None else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        return function(*arguments)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (40,) if dynamic is False else (40, 37, 31, 64):
            inputs = operands(tokens)
            assert all(map(torch.equal, run(marked, *inputs), run(experts, *inputs)))


def test_inductor_writes_what_the_products_can_read():
    # 111 slots: rows of so many numbers would begin at no multiple of 16 bytes.
    torch.compiler.reset()
    function = torch.compile(experts, fullgraph=True, dynamic=False)
    # A cache knows a composite op by its name alone, whatever it does now.
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(fx_graph_cache=False):
        found = run(function, *operands(37))
    assert max(map(error, found, products(*operands(37)))) < 4e-3


def test_compiled_graphs_hold_nothing_that_a_cache_refuses():
    seen = targets(experts, *operands()[:-1])
    assert torch.ops.q3n.float8_experts in seen or torch.ops.q3n.float8_experts.default in seen
    assert not [target for target in seen if "Function" in repr(target) or "float8_experts.py" in repr(target)]


def test_function_transforms():
    x, chosen, weights, *matrices, dy = operands()
    total = lambda x, weights: (experts(x, chosen, weights, *matrices) * dy).float().sum()  # noqa: E731
    expected = tuple(run(experts, x, chosen, weights, *matrices, dy)[1:3])
    gradient = torch.func.grad(total, (0, 1))
    for function in (gradient, torch.compile(gradient, fullgraph=True, backend="aot_eager")):
        assert all(map(torch.equal, function(x, weights), expected))
    each = torch.func.vmap(gradient, (0, None))(torch.stack([x, 2 * x]), weights)
    for of_each, alone in zip(each, gradient(2 * x, weights), strict=True):
        assert torch.equal(of_each[1], alone)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(total, (x, weights), (x, weights))


def test_second_derivatives_raise():
    x, chosen, weights, gate, *rest, dy = operands()
    for leaf in (x, gate):
        leaf.requires_grad_()
        (first,) = torch.autograd.grad(experts(x, chosen, weights, gate, *rest), leaf, dy, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            first.float().sum().backward()
        leaf.requires_grad_(False)


def calls(function):
    """The arguments of grouped products that `function` does, in float8 and in bf16."""
    return watched(function, torch.ops.q3n.float8_grouped_mm.default, torch.ops.aten._grouped_mm.default)


def on_meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if torch.is_tensor(x) else x


@pytest.mark.parametrize("order", ["contiguous", "transposed"])
def test_operands_are_what_tensor_cores_take(order):
    x, chosen, weights, *matrices, dy = operands()
    if order == "transposed":
        x, dy, *matrices = (t.mT.contiguous().mT for t in (x, dy, *matrices))
    scaled, plain = calls(lambda: run(experts, x, chosen, weights, *matrices, dy))
    assert [len(scaled), len(plain)] == [4, 3]
    for (a, b, scale_a, scale_b, ends, *_), _ in scaled:
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert not any(size % 16 for size in (a.shape[1], *b.shape[1:]))
        assert all(scale.is_contiguous() and scale.dtype == torch.float32 for scale in (scale_a, scale_b))
        assert ends.dtype == torch.int32
    for (a, b, *_), _ in plain:
        assert a.dtype == b.dtype == torch.bfloat16
        # Experts without tokens are for torch only where both are read across the rows of the sum.
        assert a.t().is_contiguous()
        assert b.is_contiguous()
    # torch's own checks of what it launches.
    for arguments, _ in scaled:
        # Its other checks add numbers of float8, which torch cannot.
        op = torch.ops.q3n.float8_grouped_mm.default
        torch.library.opcheck(op, arguments, test_utils=("test_faketensor", "test_autograd_registration"))
        float8_grouped_mm.forward(*map(on_meta, arguments[:5]))
    for arguments, options in plain:
        torch._grouped_mm(*map(on_meta, arguments), **{name: on_meta(value) for name, value in options.items()})


def test_which_products_are_in_float8():
    config, tree, tokens = shaped()
    loss = lambda policy: calls(lambda: model.loss(tree, tokens, config=config, float8=policy))[0]  # noqa: E731
    assert not loss("none")
    assert not loss("linears")
    found = [tuple(b.shape) for (_, b, *_), _ in loss("linears_and_experts")]
    assert found == [(8, 32, 64), (8, 64, 16)] * 5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_compiled_model_has_the_eager_gradients(recompute):
    config, tree, tokens = shaped(num_hidden_layers=2, layer_types=runs.LAYERS, num_nextn_predict_layers=0)
    leaves = list(params.named_leaves(tree).values())
    options = {"config": config, "float8": "linears_and_experts", "recompute": recompute}
    torch.compiler.reset()
    found = []

    def gradients(function):
        value, _ = function(tree, tokens, **options)
        found.append([value, *torch.autograd.grad(value, leaves)])

    scaled, _ = calls(lambda: gradients(model.loss))
    # Two in each direction; selective keeps the pre-activations, not the experts' outputs.
    assert len(scaled) == 2 * {"none": 4, "selective": 5, "full": 6}[recompute]
    gradients(compiled.compiled(model.loss, "layers", backend="aot_eager"))
    assert all(map(torch.equal, *found))


def test_experts_on_a_mesh_are_refused():
    config, tree, _ = shaped()
    x, mlp = torch.zeros(1, 4, 64, dtype=torch.bfloat16), tree.layers[0].mlp
    with pytest.raises(ValueError, match="routed experts in float8 are for one device: set float8 to none"):
        feed_forward.mixture_of_experts(mlp, x, None, object(), config=config, float8="linears_and_experts")


SIZES = {
    "T300": {"tokens": 300, "per_token": 4, "num_experts": 8, "width": 256, "inner": 128},
    "T1001": {"tokens": 1001, "per_token": 8, "num_experts": 66, "width": 1024, "inner": 512},
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("inductor", [False, True])
def test_tensor_cores_compute_what_the_cpu_emulates(sizes, inductor):
    torch.compiler.reset()
    inputs = operands(**sizes)
    function = torch.compile(experts, fullgraph=True, dynamic=False) if inductor else experts
    found = run(function, *(t.cuda() for t in inputs))
    for name, ours, emulation in zip(NAMES, found, run(experts, *inputs), strict=True):
        assert error(ours.cpu(), emulation.double()) < 1e-2, name
        assert torch.isfinite(ours).all(), name
    for gradient in found[3:]:
        assert not gradient[-2].any()
