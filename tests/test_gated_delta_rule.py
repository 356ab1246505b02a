"""The gated delta rule against a loop over tokens in float64, and where other implementations went wrong."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional.ops import gated_delta_rule, recurrent_gated_delta_rule


def one_sequence(q, k, v, g, beta, state, scale):
    """The rule as it is defined, for q, k [T, H, K], v [T, H, V], g, beta [T, H], state [H, K, V]."""
    outputs = []
    for t in range(len(q)):
        state = torch.exp(g[t])[:, None, None] * state
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("h,hk,hv->hkv", beta[t], k[t], error)
        outputs.append(scale * torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs) if outputs else v, state


def reference(
    q,
    k,
    v,
    g,
    beta,
    initial_state=None,
    cu_seqlens=None,
    *,
    scale=None,
    qk_l2norm=False,
    A_log=None,
    dt_bias=None,
    beta_scale=0.0,
):
    """`gated_delta_rule` in float64, one sequence after the other; zeros behind the last."""
    (batch, length, heads), K, V, dtype = g.shape, q.shape[-1], v.shape[-1], torch.float64
    repeats = heads // q.shape[2]
    q, k, v, g, beta = (x.to(dtype).flatten(0, 1) for x in (q, k, v, g, beta))
    if qk_l2norm:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if A_log is not None:
        g = -A_log.to(dtype).exp() * torch.logaddexp(g + dt_bias.to(dtype), torch.zeros((), dtype=dtype))
    if beta_scale:
        beta = beta_scale / (1 + torch.exp(-beta))
    q, k = (torch.stack([x[:, h // repeats] for h in range(heads)], 1) for x in (q, k))
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else [length * b for b in range(batch + 1)]
    results = []
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        state = torch.zeros(heads, K, V, dtype=dtype) if initial_state is None else initial_state[s].to(dtype)
        tokens = (x[start:end] for x in (q, k, v, g, beta))
        results.append(one_sequence(*tokens, state, K**-0.5 if scale is None else scale))
    o = torch.cat([*(o for o, _ in results), torch.zeros(batch * length - bounds[-1], heads, V, dtype=dtype)])
    return o.view(batch, length, heads, V), torch.stack([state for _, state in results])


def draw(shape, *, seed=0, dtype=torch.float64, sequences=None, state=True, gates=True):
    """Inputs by name. `shape` is B, T, key heads, value heads, K, V; values are exact in bf16."""
    B, T, N, H, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(torch.bfloat16).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    x = {"q": normal(B, T, N, K), "k": normal(B, T, N, K), "v": normal(B, T, H, V), "beta": normal(B, T, H)}
    x["g"] = normal(B, T, H) if gates else -normal(B, T, H).abs()
    if not gates:
        x |= {name: torch.nn.functional.normalize(x[name], dim=-1) for name in "qk"}
        x["beta"] = x["beta"].sigmoid()
    if state:
        x["initial_state"] = normal(sequences or B, H, K, V).to(wide)
    if gates:
        x |= {"A_log": normal(H).to(wide), "dt_bias": normal(H).to(wide)}
    return x


GATES = {"qk_l2norm": True, "beta_scale": 1.0}
OPS = pytest.mark.parametrize("op", [gated_delta_rule, recurrent_gated_delta_rule], ids=["chunked", "recurrent"])


def apply(op, x, cu_seqlens=None, **options):
    tensors = [x.get(name) for name in ("q", "k", "v", "g", "beta", "initial_state")]
    return op(*tensors, cu_seqlens, A_log=x.get("A_log"), dt_bias=x.get("dt_bias"), **options)


def draw_like(outputs):
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype) for y in outputs]


def run(op, x, cu_seqlens=None, dy=None, **options):
    """Outputs and gradients, by name, of `op` on the inputs `x` by name; `dy` are those of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    outputs = apply(op, leaves, cu_seqlens, **options)
    dy = draw_like(outputs) if dy is None else dy
    gradients = torch.autograd.grad(outputs, list(leaves.values()), dy, materialize_grads=True)
    names = ["o", "state", *(f"d{name}" for name in leaves)]
    return dict(zip(names, [*(y.detach() for y in outputs), *gradients], strict=True))


def expected(x, cu_seqlens=None, **options):
    return run(reference, {name: value.double() for name, value in x.items()}, cu_seqlens, **options)


def assert_close(actual, wanted, tolerance, **tolerances):
    """Relative errors in the 2-norm, of each result by its name; all must be finite."""
    assert actual.keys() == wanted.keys()
    for name, a in actual.items():
        w, limit = wanted[name].double(), tolerances.get(name, tolerance)
        assert a.shape == w.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - w).norm()
        assert error <= limit * w.norm() + 1e-30, f"{name}: relative error {error / w.norm():.1e} exceeds {limit:.0e}"


def assert_equal(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, a in actual.items():
        assert torch.equal(a, wanted[name]), name


# What it computes.


@OPS
@pytest.mark.parametrize("length", [0, 1, 3, 63, 64, 65, 130])
def test_lengths(op, length):
    x = draw((2, length, 1, 2, 4, 3))
    assert_close(run(op, x, **GATES), expected(x, **GATES), 1e-11)


@OPS
@pytest.mark.parametrize(
    "shape", [(2, 9, 1, 1, 4, 4), (1, 9, 2, 4, 5, 3), (3, 9, 2, 6, 2, 7), (1, 9, 1, 8, 2, 1)], ids=str
)
@pytest.mark.parametrize("options", [{}, GATES, {"beta_scale": 2.0, "scale": 0.3}], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_heads_and_options(op, shape, options, state):
    x = draw(shape, gates=bool(options), state=state)
    assert_close(run(op, x, **options), expected(x, **options), 1e-11)


@pytest.mark.parametrize("length", [5, 64, 70])
@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64, 100])
def test_chunk_size_changes_nothing(length, chunk_size):
    x = draw((1, length, 1, 2, 4, 3))
    one_by_one = run(recurrent_gated_delta_rule, x, **GATES)
    assert_close(run(gated_delta_rule, x, chunk_size=chunk_size, **GATES), one_by_one, 1e-11)


def test_no_rows():
    o, state = apply(gated_delta_rule, draw((0, 5, 1, 2, 4, 3)), **GATES)
    assert o.shape == (0, 5, 2, 3)
    assert state.shape == (0, 2, 4, 3)


# How precisely.


@OPS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)], ids=str)
def test_precision(op, dtype, tolerance):
    """What is not rounded to bf16 in the end is not rounded on the way either."""
    x = draw((2, 150, 2, 4, 16, 12), dtype=dtype)
    actual = run(op, x, **GATES)
    assert {name for name, value in actual.items() if value.dtype != dtype} <= {"state", *WIDE}
    assert_close(actual, expected(x, **GATES), tolerance, state=1e-6, **dict.fromkeys(WIDE, 1e-6))


WIDE = ("dinitial_state", "dA_log", "ddt_bias")
LENGTH, KEY = 130, 16
HARD = {}


def hard(tolerance=2e-6, **options):
    """Register a change to drawn inputs as a case, with the options that the op is to be called with."""

    def register(change):
        HARD[change.__name__.replace("_", " ")] = (change, options, tolerance)
        return change

    return register


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(3))


@hard()
def no_decay(x):
    x["g"] = torch.zeros_like(x["g"])


@hard()
def decay_to_80(x):
    x["g"] = uniform(-80, 0, *x["g"].shape)


@hard()
def decay_by_80_or_none(x):
    x["g"] = -80.0 * (uniform(0, 1, *x["g"].shape) < 0.3)


@hard()
def decay_by_80_and_then_little(x):
    x["g"] = torch.where(torch.arange(LENGTH) % 64 < 32, -80.0, -0.02)[None, :, None].expand(x["g"].shape)


@hard()
def strong_decay(x):
    x["g"] = uniform(-8, -3, *x["g"].shape)


@hard(**GATES)
def strong_decay_from_both_gates(x):
    x["A_log"], x["dt_bias"] = torch.tensor([1.5, 2.0]), torch.tensor([0.7, 0.1])
    x["g"] = uniform(-0.5, 1, *x["g"].shape)


@hard(**GATES)
def softplus_far_out(x):
    x["g"] = torch.linspace(-100, 100, LENGTH)[None, :, None].expand(x["g"].shape)


@hard(**GATES)
def sigmoid_far_out(x):
    x["beta"] = torch.linspace(-100, 100, LENGTH)[None, :, None].expand(x["beta"].shape)


@hard()
def beta_from_0_to_2(x):
    x["beta"] = uniform(0, 2, *x["beta"].shape)


@hard(qk_l2norm=True, beta_scale=2.0)
def beta_of_2(x):
    x["beta"] = uniform(20, 30, *x["beta"].shape)


def correlate(x, beta):
    base, noise = x["k"][:, :1], x["k"]
    x["k"] = torch.nn.functional.normalize(base + 0.1 * noise, dim=-1)
    cosine = (x["k"][:, 1:] * x["k"][:, :-1]).sum(-1).mean()
    assert 0.985 < cosine < 0.995
    x["beta"] = uniform(beta - 0.02, beta, *x["beta"].shape)
    x["g"] = -0.001 * uniform(0, 1, *x["g"].shape)


@hard()
def correlated_keys_with_beta_of_1(x):
    correlate(x, 1)


# Each update undoes twice the last one: the inverse's terms cancel.
@hard(tolerance=3e-4)
def correlated_keys_with_beta_of_2(x):
    correlate(x, 2)


@hard()
def long_keys(x):
    x["k"] = 4 * x["k"]
    x["beta"] = 0.1 * x["beta"]


@hard(**GATES)
def zero_queries_and_keys(x):
    x["q"][:, ::3] = 0
    x["k"][:, ::2] = 0


@hard(**GATES)
def nothing_but_zeros(x):
    for name in ("q", "k", "v", "initial_state"):
        x[name].zero_()


@hard(**GATES)
def tiny_queries_and_keys(x):
    x["q"], x["k"] = 1e-3 * x["q"], 1e-4 * x["k"]


@OPS
@pytest.mark.parametrize("case", HARD)
def test_hard_inputs_in_fp32(op, case):
    change, options, tolerance = HARD[case]
    x = draw((2, LENGTH, 1, 2, KEY, 12), gates=bool(options), dtype=torch.float32)
    change(x)
    assert_close(run(op, x, **options), expected(x, **options), tolerance)


def test_bf16_gates_lose_nothing_more():
    x = draw((1, 70, 1, 2, 4, 3))
    rounded = x | {name: x[name].bfloat16() for name in ("A_log", "dt_bias")}
    exact = x | {name: rounded[name].double() for name in ("A_log", "dt_bias")}
    actual, wanted = run(gated_delta_rule, rounded, **GATES), run(gated_delta_rule, exact, **GATES)
    assert_equal(actual, wanted | {name: wanted[name].bfloat16() for name in ("dA_log", "ddt_bias")})


# Documents.

SHAPE = (1, 100, 1, 2, 4, 3)
BOUNDS = [0, 5, 5, 38, 90, 90]  # one empty, the last repeated, then padding
INPUTS = ("q", "k", "v", "g", "beta")
PER_TOKEN = {"o", *INPUTS, *(f"d{name}" for name in INPUTS)}


def offsets(bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def options(op):
    return {**GATES, "chunk_size": 16} if op is gated_delta_rule else GATES


def share(values, start, end, document):
    """What of inputs or results by name belongs to one document."""
    tokens = {name: x[:, start:end] for name, x in values.items() if name in PER_TOKEN}
    return tokens | {name: x[document][None] for name, x in values.items() if "state" in name}


@OPS
@pytest.mark.parametrize(
    ("rows", "bounds"), [(1, BOUNDS), (1, [0, 0, 100]), (1, [0, 0]), (2, [0, 20, 100, 100, 131, 200])], ids=str
)
def test_documents(op, rows, bounds):
    x = draw((rows, *SHAPE[1:]), sequences=len(bounds) - 1)
    assert_close(run(op, x, offsets(bounds), **options(op)), expected(x, offsets(bounds), **GATES), 1e-11)


@OPS
def test_no_documents(op):
    o, state = apply(op, draw(SHAPE, state=False), offsets([0]), **options(op))
    assert not o.any()
    assert state.shape == (0, 2, 4, 3)


@OPS
def test_documents_equal_separate_calls(op):
    x = draw(SHAPE, sequences=5)
    dy = draw_like(apply(op, x, offsets(BOUNDS), **options(op)))
    packed = run(op, x, offsets(BOUNDS), dy, **options(op))
    for i, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        its_dy = (dy[0][:, start:end], dy[1][i][None])
        alone = run(op, x | share(x, start, end, i), None, its_dy, **options(op))
        assert_close(share(packed, start, end, i), share(alone, 0, end - start, 0), 1e-14)


@OPS
def test_documents_are_strangers(op):
    """Values and gradients of other documents, and of what lies behind the last, do not change one by a bit."""
    x = draw(SHAPE, sequences=5)
    dy = draw_like(apply(op, x, offsets(BOUNDS), **options(op)))
    before = run(op, x, offsets(BOUNDS), dy, **options(op))
    for i, (start, end) in enumerate(itertools.pairwise(BOUNDS)):
        inside = torch.zeros(SHAPE[1], dtype=torch.bool)
        inside[start:end] = True
        other = x | {name: x[name].clone() for name in (*INPUTS, "initial_state")}
        other_dy = [d.clone() for d in dy]
        for value in [*(other[name] for name in INPUTS), other_dy[0]]:
            value[:, ~inside] = torch.nan
        for value in (other["initial_state"], other_dy[1]):
            value[torch.arange(len(value)) != i] = torch.nan
        after = run(op, other, offsets(BOUNDS), other_dy, **options(op))
        assert_equal(share(after, start, end, i), share(before, start, end, i))


@OPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_behind_the_last_document(op, dtype):
    """Whatever lies there changes no result, and its own results are zero."""
    x = draw(SHAPE, sequences=5, dtype=dtype)
    dy = draw_like(apply(op, x, offsets(BOUNDS), **options(op)))
    clean = run(op, x, offsets(BOUNDS), dy, **options(op))
    for value in [*(x[name] for name in INPUTS), dy[0]]:
        value[:, BOUNDS[-1] :] = torch.nan
    dirty = run(op, x, offsets(BOUNDS), dy, **options(op))
    assert_equal(dirty, clean)
    assert not any(value[:, BOUNDS[-1] :].any() for name, value in dirty.items() if name in PER_TOKEN)


@OPS
def test_permuted_documents(op):
    bounds, order = [0, 5, 38, 90, 100], [2, 0, 3, 1]
    spans = [range(bounds[i], bounds[i + 1]) for i in order]
    tokens = [t for span in spans for t in span]
    x = draw(SHAPE, sequences=4)
    permuted = x | {name: x[name][:, tokens] for name in INPUTS} | {"initial_state": x["initial_state"][order]}
    moved = [0, *itertools.accumulate(len(span) for span in spans)]
    o, state = apply(op, x, offsets(bounds), **options(op))
    moved_o, moved_state = apply(op, permuted, offsets(moved), **options(op))
    assert_close({"o": moved_o, "state": moved_state}, {"o": o[:, tokens], "state": state[order]}, 1e-14)


# States.


@pytest.mark.parametrize("first", [gated_delta_rule, recurrent_gated_delta_rule], ids=["chunked", "recurrent"])
@OPS
@pytest.mark.parametrize("split", [0, 1, 16, 23])
def test_halves_make_a_whole(first, op, split):
    def halves(q, k, v, g, beta, state, cu_seqlens, **options):
        left, state = first(*(x[:, :split] for x in (q, k, v, g, beta)), state, **options)
        right, state = op(*(x[:, split:] for x in (q, k, v, g, beta)), state, **options)
        return torch.cat([left, right], 1), state

    x = draw((2, 40, 1, 2, 4, 3))
    assert_close(run(halves, x, **GATES), run(op, x, **GATES), 1e-11)


def test_token_by_token_after_a_prompt():
    x = draw((2, 30, 1, 2, 4, 3))
    o, final = apply(gated_delta_rule, x, **GATES)
    prompt, state = apply(gated_delta_rule, x | {name: x[name][:, :20] for name in INPUTS}, **GATES)
    outputs = [prompt]
    for t in range(20, 30):
        token = x | {name: x[name][:, t : t + 1] for name in INPUTS}
        y, state = apply(recurrent_gated_delta_rule, token | {"initial_state": state}, **GATES)
        outputs.append(y)
    assert_close({"o": torch.cat(outputs, 1), "state": state}, {"o": o, "state": final}, 1e-11)


@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_every_state_is_the_final_one_of_so_many_tokens(state):
    x = draw((2, 6, 1, 2, 4, 3), state=state)
    o, states = apply(recurrent_gated_delta_rule, x, **GATES, every_state=True)
    assert states.shape == (2, 6, 2, 4, 3)
    for t in range(6):
        first = x | {name: x[name][:, : t + 1] for name in INPUTS}
        wanted = apply(recurrent_gated_delta_rule, first, **GATES)
        assert_close({"o": o[:, : t + 1], "state": states[:, t]}, dict(zip(("o", "state"), wanted, strict=True)), 1e-14)
    nothing = apply(recurrent_gated_delta_rule, x | {name: x[name][:, :0] for name in INPUTS}, every_state=True)
    assert [y.shape for y in nothing] == [(2, 0, 2, 3), (2, 0, 2, 4, 3)]


def test_every_state_has_no_gradient_and_no_documents():
    x = {name: value.requires_grad_() for name, value in draw((1, 5, 1, 2, 4, 3)).items()}
    with pytest.raises(NotImplementedError, match="no gradient with every_state: take the last state alone"):
        apply(recurrent_gated_delta_rule, x, every_state=True)[1].sum().backward()
    with pytest.raises(ValueError, match="is given for rows: every_state takes no cu_seqlens"):
        apply(recurrent_gated_delta_rule, x, offsets([0, 5]), every_state=True)


# Memory.


@OPS
def test_views_of_one_projection(op):
    N, H, K, V = 2, 4, 4, 3
    heads = {"q": (N, K), "k": (N, K), "v": (H, V), "g": (H,), "beta": (H,)}
    sizes = [torch.Size(shape).numel() for shape in heads.values()]
    projection = torch.randn(2, 20, sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def views(projection):
        pieces = projection.split(sizes, -1)
        return {name: x.unflatten(2, shape) for (name, shape), x in zip(heads.items(), pieces, strict=True)}

    gates = {"A_log": torch.zeros(H, dtype=torch.float64), "dt_bias": torch.ones(H, dtype=torch.float64)}
    apart = {name: x.clone(memory_format=torch.contiguous_format) for name, x in views(projection).items()} | gates
    outputs = apply(op, views(projection.requires_grad_()) | gates, **GATES)
    dy = draw_like(outputs)
    (dprojection,) = torch.autograd.grad(outputs, projection, dy)
    wanted = run(op, apart, None, dy, **GATES)
    actual = {"o": outputs[0], "state": outputs[1]} | {f"d{name}": d for name, d in views(dprojection).items()}
    assert_close(actual, {name: wanted[name] for name in actual}, 1e-13)


def test_saves_what_it_says():
    x = {name: value.requires_grad_() for name, value in draw((2, 70, 1, 2, 4, 3)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        apply(gated_delta_rule, x, **GATES, chunk_size=16)
    inputs = {value.data_ptr() for value in x.values()}
    assert [tuple(y.shape) for y in saved if y.data_ptr() not in inputs] == [(10, 2, 7, 16), (10, 2, 16, 16)]


# Errors.


def test_errors():
    good = draw((2, 5, 2, 4, 3, 3), dtype=torch.float32)
    half = {name: good[name].half() for name in "qkv"}
    wrong = [
        {"q": good["q"][0]},
        {"k": good["k"][:, :4]},
        {"q": half["q"]},
        {"v": good["v"][:, :, :3]},
        {"beta": good["beta"][..., :2]},
        {"initial_state": good["initial_state"][:1]},
        half | {"initial_state": good["initial_state"].half()},
        {"cu_seqlens": torch.tensor([0, 10])},
        {"cu_seqlens": offsets([[0, 10]])},
        {"cu_seqlens": offsets([])},
        {"cu_seqlens": offsets([0, 10])},
        {"A_log": None},
        {"dt_bias": good["dt_bias"][:2]},
    ]
    messages = []
    for change in wrong:
        for op in (gated_delta_rule, recurrent_gated_delta_rule):
            with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
                apply(op, good | change, change.get("cu_seqlens"))
            messages.append(str(raised.value))
        assert messages.pop() == messages[-1]
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        apply(gated_delta_rule, good, chunk_size=0)
    assert_expected_inline(
        "\n".join([*messages, str(raised.value)]),
        """\
q and k must be [B, T, N, K] and v [B, T, H, V], got (5, 2, 3), (2, 5, 2, 3), (2, 5, 4, 3)
q and k must be [B, T, N, K] and v [B, T, H, V], got (2, 5, 2, 3), (2, 4, 2, 3), (2, 5, 4, 3)
q, k and v must share a dtype, got torch.float16, torch.float32, torch.float32
3 value heads are not a multiple of 2 key heads
g and beta must be (2, 5, 4), got (2, 5, 4) and (2, 5, 2)
initial_state must be (2, 4, 3, 3) torch.float32, got (1, 4, 3, 3) torch.float32
initial_state must be (2, 4, 3, 3) torch.float32, got (2, 4, 3, 3) torch.float16
cu_seqlens must be int32 [S+1], got torch.int64 (2,)
cu_seqlens must be int32 [S+1], got torch.int32 (1, 2)
cu_seqlens must be int32 [S+1], got torch.int32 (0,)
initial_state must be (1, 4, 3, 3) torch.float32, got (2, 4, 3, 3) torch.float32
A_log and dt_bias must both be given, as (4,), or neither; dt_bias is (4,)
A_log and dt_bias must both be given, as (4,), or neither; dt_bias is (2,)
chunk_size must be positive, got 0; 64 suits most sizes""",
    )
