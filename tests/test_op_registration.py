"""What every op of the package promises, whatever it computes: each case below goes through the same list."""

import functools
import itertools
import logging
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from q3n_functional.ops import (
    attention,
    causal_conv,
    gated_delta_rule,
    grouped_swiglu,
    linear_cross_entropy,
    linear_log_partition,
    piece_attention,
    recurrent_gated_delta_rule,
    registration,
    rms_norm_gated,
    router_logits,
    top_experts,
)


class Case(NamedTuple):
    """`call(*inputs, where=where)` gives the outputs; `inputs` is all that it is differentiable in.

    `call` takes the op's `impl` too.
    """

    call: Callable[..., Sequence[torch.Tensor]]
    inputs: list[torch.Tensor]
    where: torch.Tensor | None = None


def random(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def documents(extent):
    """An empty document, a repeated last entry, and a token behind it."""
    return torch.tensor([0, 2, 2, extent - 1, extent - 1], dtype=torch.int32)


def conv_case(extent, dtype, packed=False, state=True):
    rows, sequences = (1, 4) if packed else (2, 2)
    inputs = [random(rows, extent, 3, dtype=dtype, seed=0), random(3, 4, dtype=dtype, seed=1)]
    inputs += [random(sequences, 3, 3, dtype=dtype, seed=2)] if state else []

    def call(x, weight, *state, where, **impl):
        return causal_conv(x, weight, *(state or [None]), where, **impl)

    return Case(call, inputs, documents(extent) if packed else None)


def delta_case(extent, dtype, packed=False, options=True, op=gated_delta_rule):
    (rows, sequences), wide = (1, 4) if packed else (2, 2), registration.wide(dtype)
    q, k = (random(rows, extent, 1, 3, dtype=dtype, seed=s) for s in (0, 1))
    v = random(rows, extent, 2, 2, dtype=dtype, seed=2)
    g, beta = (random(rows, extent, 2, dtype=dtype, seed=s) for s in (3, 4))
    chunk = {"chunk_size": 4} if op is gated_delta_rule else {}
    where = documents(extent) if packed else None
    if not options:
        return Case(
            lambda *x, where, **impl: op(*x, None, where, **chunk, **impl), [q, k, v, -g.abs(), beta.sigmoid()], where
        )

    def call(q, k, v, g, beta, state, A_log, dt_bias, *, where, **impl):
        gates = {"A_log": A_log, "dt_bias": dt_bias, "beta_scale": 2.0}
        return op(q, k, v, g, beta, state, where, scale=0.7, qk_l2norm=True, **gates, **chunk, **impl)

    state, A_log, dt_bias = (
        random(sequences, 2, 3, 2, dtype=wide, seed=5),
        *(random(2, dtype=wide, seed=s) for s in (6, 7)),
    )
    return Case(call, [q, k, v, g, beta, state, A_log, dt_bias], where)


def recurrent_case(extent, dtype, packed=False):
    return delta_case(extent, dtype, packed, op=recurrent_gated_delta_rule)


def norm_case(extent, dtype, shape=(2,), width=3):
    inputs = [random(*shape, extent, width, dtype=dtype, seed=s) for s in (0, 1)]
    weight = random(width, dtype=registration.wide(dtype), seed=2)
    return Case(lambda *x, where, **impl: (rms_norm_gated(*x, **impl),), [*inputs, weight])


def norm_vector_case(extent, dtype):
    inputs = [random(extent, dtype=dtype, seed=s) for s in (0, 1, 2)]
    return Case(lambda *x, where, **impl: (rms_norm_gated(*x, **impl),), inputs)


def swiglu_case(extent, dtype, shared=False):
    wide, experts = registration.wide(dtype), torch.tensor([[0, 2], [2, 3], [3, 0]]).repeat(extent, 1)[:extent]
    shapes = [(3 if shared else extent, 3), (4, 2, 3), (4, 2, 3), (4, 3, 2)]
    x, *matrices = (random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))
    weights = random(extent, 2, dtype=wide, seed=4)

    def call(x, weights, *matrices, where, **impl):
        num = where.shape[0]
        rows = torch.arange(num, dtype=torch.int32) * 3 // num if shared else None
        return (grouped_swiglu(x, where, weights, *matrices, rows, **impl),)

    return Case(call, [x, weights, *matrices], experts)


def attention_case(extent, dtype, packed=False, cached=False):
    (rows, sequences, where) = (1, 4, documents(extent)) if packed else (2, 2, None)
    sizes = (sequences, extent + 3) if cached else (rows, extent)
    inputs = [random(*shape, 3, dtype=dtype, seed=i) for i, shape in enumerate([(rows, extent, 4), *[(*sizes, 2)] * 2])]
    lengths = torch.tensor([3, 0, 1, 2][:sequences], dtype=torch.int32) if cached else None
    return Case(lambda *x, where, **impl: (attention(*x, where, lengths, **impl),), inputs, where)


def piece_attention_case(extent, dtype):
    sizes = ((2 * extent, 4), (4 * extent, 2), (4 * extent, 2))
    inputs = [random(2, *size, 3, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    return Case(lambda *x, where, **impl: (piece_attention(*x, where, **impl),), inputs, torch.tensor([1]))


def cross_entropy_case(extent, dtype):
    inputs = [random(2, extent, 3, dtype=dtype, seed=0), random(5, 3, dtype=dtype, seed=1)]
    targets = torch.tensor([0, 3, -100, 4, 1]).repeat(2 * extent)[: 2 * extent].view(2, extent)
    return Case(lambda *x, where, **impl: linear_cross_entropy(*x, where, 0.1, **impl)[:1], inputs, targets)


def log_partition_case(extent, dtype):
    inputs = [random(2, extent, 3, dtype=dtype, seed=0), random(5, 3, dtype=dtype, seed=1)]
    targets = torch.tensor([0, -1, -100, 4, 1]).repeat(2 * extent)[: 2 * extent].view(2, extent)
    return Case(lambda *x, where, **impl: linear_log_partition(*x, where, **impl), inputs, targets)


def router_case(extent, dtype):
    inputs = [random(extent, 3, dtype=dtype, seed=0), random(4, 3, dtype=dtype, seed=1)]
    return Case(lambda *x, where, **impl: (router_logits(*x, **impl),), inputs)


def top_experts_case(extent, dtype):
    inputs = [random(extent, 5, dtype=dtype, seed=0)]
    return Case(lambda *x, where, **impl: top_experts(*x, 3, **impl)[:1], inputs)


CASES = {
    "attention": attention_case,
    "attention, packed": lambda *size: attention_case(*size, packed=True),
    "attention, cached": lambda *size: attention_case(*size, cached=True),
    "attention, packed, cached": lambda *size: attention_case(*size, packed=True, cached=True),
    "piece_attention": piece_attention_case,
    "causal_conv": conv_case,
    "causal_conv, packed": lambda *size: conv_case(*size, packed=True),
    "causal_conv, no state": lambda *size: conv_case(*size, state=False),
    "gated_delta_rule": delta_case,
    "gated_delta_rule, packed": lambda *size: delta_case(*size, packed=True),
    "gated_delta_rule, no options": lambda *size: delta_case(*size, options=False),
    "recurrent_gated_delta_rule": recurrent_case,
    "recurrent_gated_delta_rule, packed": lambda *size: recurrent_case(*size, packed=True),
    "rms_norm_gated": norm_case,
    "rms_norm_gated, one vector": norm_vector_case,
    "grouped_swiglu": swiglu_case,
    "grouped_swiglu, rows of tokens": lambda *size: swiglu_case(*size, shared=True),
    "router_logits": router_case,
    "top_experts": top_experts_case,
    "linear_cross_entropy": cross_entropy_case,
    "linear_log_partition": log_partition_case,
}
each_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
RICHEST = [name for name in CASES if f"{name}, packed" not in CASES and "no " not in name and "vector" not in name]
each_op = pytest.mark.parametrize("make", [CASES[name] for name in RICHEST], ids=RICHEST)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def build(make, extent=6, dtype=torch.float64):
    case = make(extent, dtype)
    return case._replace(inputs=[x.requires_grad_() for x in case.inputs])


def cotangents(outputs):
    return [random(*y.shape, dtype=y.dtype, seed=10 + i) for i, y in enumerate(outputs)]


def derivatives(case, inputs=None, **options):
    """Outputs, and gradients from random ones of theirs."""
    inputs = case.inputs if inputs is None else inputs
    outputs = case.call(*inputs, where=case.where)
    return *outputs, *torch.autograd.grad(outputs, inputs, cotangents(outputs), **options)


def loss(case):
    def weighed(*inputs, where=case.where):
        outputs = case.call(*inputs, where=where)
        return sum((y.sin() + y.square()).sum() for y in outputs)

    return weighed


def close(actual, expected):
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-10, atol=1e-12)


def equal(actual, expected):
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=0, atol=0)


# What the compiler and torch's registration see.


class Recorder(TorchDispatchMode):
    """The calls of this package's ops as the dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "q3n":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(make, dtype=torch.float64):
    with Recorder() as recorder:
        derivatives(build(make, dtype=dtype))
    calls = {op: tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args) for op, args in recorder.calls}
    assert {op._schema.name.endswith("_backward") for op in calls} == {False, True}
    return calls


def test_schemas():
    names = [n.removeprefix("q3n::") for n in torch._C._dispatch_get_all_op_names() if re.match("q3n::(?!toy)", n)]
    schemas = [str(getattr(torch.ops.q3n, name).default._schema) for name in sorted(names)]
    assert_expected_inline(
        "\n".join(textwrap.fill(schema, 110, subsequent_indent="    ") for schema in schemas),
        """\
q3n::attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? lengths, Tensor? keys, float scale,
    str impl) -> (Tensor, Tensor)
q3n::attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? cu_seqlens,
    Tensor? lengths, Tensor? keys, float scale, str impl) -> (Tensor, Tensor, Tensor)
q3n::causal_conv(Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, str impl) -> (Tensor,
    Tensor)
q3n::causal_conv_backward(Tensor? dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? initial_state,
    Tensor? cu_seqlens, str impl) -> (Tensor, Tensor, Tensor)
q3n::causal_conv_qkv(Tensor x, Tensor weight, Tensor? initial_state, Tensor? cu_seqlens, int[] channels, str
    impl) -> (Tensor, Tensor, Tensor, Tensor)
q3n::causal_conv_qkv_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? dfinal_state, Tensor x, Tensor weight,
    Tensor? initial_state, Tensor? cu_seqlens, str impl) -> (Tensor, Tensor, Tensor)
q3n::embedding(Tensor tokens, Tensor table, Tensor? kept, str impl) -> Tensor
q3n::embedding_backward(Tensor dx, Tensor rows, int num, str impl) -> Tensor
q3n::float8_experts(Tensor x, Tensor experts, Tensor weights, Tensor gate, Tensor up, Tensor down) -> (Tensor,
    Tensor, Tensor, Tensor)
q3n::float8_grouped_mm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor ends, str impl) -> Tensor
q3n::float8_product(Tensor x, Tensor w) -> Tensor
q3n::gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias,
    Tensor? initial_state, Tensor? cu_seqlens, float scale, bool qk_l2norm, float beta_scale, int chunk_size,
    str impl) -> (Tensor, Tensor, Tensor, Tensor)
q3n::gated_delta_rule_backward(Tensor? do, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor g,
    Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor gates,
    Tensor inverse, float scale, bool qk_l2norm, float beta_scale, int chunk_size, str impl) -> (Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)
q3n::grouped_swiglu(Tensor x, Tensor experts, Tensor weights, Tensor gate, Tensor up, Tensor down, Tensor?
    rows, str impl) -> (Tensor, Tensor, Tensor, Tensor)
q3n::grouped_swiglu_backward(Tensor dy, Tensor x, Tensor weights, Tensor hidden, Tensor order, Tensor ends,
    Tensor gate, Tensor up, Tensor down, Tensor? rows, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
q3n::linear_cross_entropy(Tensor h, Tensor head, Tensor targets, float z_loss_coef, bool gradients, str impl)
    -> (Tensor, Tensor, Tensor, Tensor, Tensor)
q3n::linear_cross_entropy_backward(Tensor dtotal, Tensor dh, Tensor dhead, Tensor h, Tensor head, str impl) ->
    (Tensor, Tensor)
q3n::linear_log_partition(Tensor h, Tensor head, Tensor targets, str impl) -> (Tensor, Tensor, Tensor)
q3n::linear_log_partition_backward(Tensor dpartition, Tensor dpicked, Tensor partition, Tensor logits, Tensor
    h, Tensor head, Tensor targets, str impl) -> (Tensor, Tensor)
q3n::piece_attention(Tensor q, Tensor k, Tensor v, Tensor rank, float scale, str impl) -> (Tensor, Tensor)
q3n::piece_attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor rank,
    float scale, str impl) -> (Tensor, Tensor, Tensor)
q3n::pre_norm(Tensor x, Tensor weight, float eps, str impl) -> (Tensor, Tensor)
q3n::pre_norm_backward(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, float eps, str impl) -> (Tensor,
    Tensor)
q3n::recurrent_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor?
    dt_bias, Tensor? initial_state, Tensor? cu_seqlens, float scale, bool qk_l2norm, float beta_scale, str
    impl) -> (Tensor, Tensor)
q3n::recurrent_gated_delta_rule_every_state(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor?
    A_log, Tensor? dt_bias, Tensor? initial_state, float scale, bool qk_l2norm, float beta_scale, str impl) ->
    (Tensor, Tensor)
q3n::rms_norm_gated(Tensor x, Tensor gate, Tensor weight, float eps, str impl) -> Tensor
q3n::rms_norm_gated_backward(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps, str impl) -> (Tensor,
    Tensor, Tensor)
q3n::router_logits(Tensor x, Tensor router, str impl) -> Tensor
q3n::router_logits_backward(Tensor dlogits, Tensor x, Tensor router, str impl) -> (Tensor, Tensor)
q3n::top_experts(Tensor probabilities, int num, str impl) -> (Tensor, Tensor)
q3n::top_experts_backward(Tensor dweights, Tensor experts, Tensor probabilities, str impl) -> Tensor""",
    )


@each_case
def test_opcheck(make):
    # In bf16, where dtypes differ the most.
    for op, args in recorded(make, torch.bfloat16).items():
        if not op._schema.name.endswith("_backward"):
            args = [a.clone().requires_grad_() if _floating(a) else a for a in args]
        library.opcheck(op, tuple(args))


@pytest.fixture
def compiled_once():
    """Compiles, whole and for all lengths, a function that may then be compiled only once."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@each_case
def test_compiles_once_for_all_lengths(make, compiled_once):
    compiled = compiled_once(make(6, torch.float64).call)
    for extent in (6, 9, 14):
        case = build(make, extent)
        equal(derivatives(case._replace(call=compiled)), derivatives(case))


@each_op
def test_compiler_sees_the_op(make):
    """And not a Python function around it, which none of its passes and policies knows."""
    torch._dynamo.reset()
    targets = []

    def backend(graph, example_inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    case = build(make)
    torch.compile(case.call, fullgraph=True, backend=backend)(*case.inputs, where=case.where)
    assert [target for target in targets if getattr(target, "namespace", "") == "q3n"]


@each_op
def test_compiles_under_torch_func(make, compiled_once):
    case = make(6, torch.float64)
    gradient = torch.func.grad_and_value(loss(case), argnums=tuple(range(len(case.inputs))))
    compiled = compiled_once(gradient)
    for extent in (6, 9, 14):
        case = make(extent, torch.float64)
        gradients, value = compiled(*case.inputs, where=case.where)
        expected, expected_value = gradient(*case.inputs, where=case.where)
        close([value, *gradients], [expected_value, *expected])


def test_compiles_gradients_per_example(compiled_once):
    case = norm_case(6, torch.float64)
    examples = [torch.stack([x, 2 * x]) for x in case.inputs]
    gradient = torch.vmap(torch.func.grad(loss(case), argnums=tuple(range(len(examples)))))
    close(compiled_once(gradient)(*examples), gradient(*examples))


@each_case
def test_saved_under_a_recompute_policy(make):
    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op.namespace == "q3n" else CheckpointPolicy.PREFER_RECOMPUTE

    case, expected = build(make), derivatives(build(make))

    def recomputed(*inputs, where):
        return checkpoint(
            lambda *x: case.call(*(2 * y for y in x), where=where),
            *inputs,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )

    halves = [(x.detach() / 2).requires_grad_() for x in case.inputs]
    with Recorder() as recorder:
        actual = derivatives(case._replace(call=recomputed), halves)
    num = len(actual) - len(halves)
    close([*actual[:num], *(d / 2 for d in actual[num:])], expected)
    assert len({op for op, _ in recorder.calls}) == len(recorder.calls)


# First derivatives, and the refusal of others.


@each_case
def test_gradcheck(make):
    case = build(make, extent=5)
    assert torch.autograd.gradcheck(lambda *x: case.call(*x, where=case.where), case.inputs)


@each_case
def test_only_what_is_asked_for(make):
    """Any one input's gradient alone, and any one output's, which leaves the other without a gradient."""
    case = build(make)
    num = len(derivatives(case)) - len(case.inputs)
    for i in range(len(case.inputs)):
        inputs = [x.detach().requires_grad_(i == j) for j, x in enumerate(case.inputs)]
        outputs = case.call(*inputs, where=case.where)
        equal(torch.autograd.grad(outputs, inputs[i], cotangents(outputs)), [derivatives(case)[num + i]])
    for i in range(num):
        outputs = case.call(*case.inputs, where=case.where)
        dy = cotangents(outputs)
        alone = torch.autograd.grad(outputs[i], case.inputs, dy[i], retain_graph=True, materialize_grads=True)
        others_zero = [d if i == j else torch.zeros_like(d) for j, d in enumerate(dy)]
        equal(alone, torch.autograd.grad(outputs, case.inputs, others_zero))


class Ignore(torch.autograd.Function):
    """The identity whose gradient is None."""

    @staticmethod
    def forward(ctx, *inputs):
        return tuple(x.clone() for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        return (None,) * len(gradients)


@each_case
def test_no_output_used(make):
    case = build(make)
    ignored = Ignore.apply(*case.call(*case.inputs, where=case.where))
    gradients = torch.autograd.grad(ignored, case.inputs, cotangents(ignored), allow_unused=True)
    assert gradients == (None,) * len(case.inputs)


@each_case
@pytest.mark.parametrize("transform", [False, True], ids=["autograd", "torch.func"])
def test_same_tensor_twice(make, transform):
    case = build(make)
    for i, j in itertools.combinations(range(len(case.inputs)), 2):
        if case.inputs[i].shape != case.inputs[j].shape:
            continue
        apart = [x.detach().clone().requires_grad_() for x in case.inputs]
        apart[j] = apart[i].detach().clone().requires_grad_()
        expected = torch.autograd.grad(loss(case)(*apart), [apart[i], apart[j]])

        def shared(x, i=i, j=j, apart=apart):
            return loss(case)(*(x if n in (i, j) else y for n, y in enumerate(apart)))

        x = apart[i].detach().requires_grad_(not transform)
        actual = torch.func.grad(shared)(x) if transform else torch.autograd.grad(shared(x), x)[0]
        close([actual], [sum(expected)])


@each_case
def test_torch_func(make):
    """grad, and vjp, agree with autograd; and autograd agrees with itself where it could go on."""
    case = build(make)
    num, expected = len(case.inputs), derivatives(case)
    detached = [x.detach() for x in case.inputs]
    outputs, pullback = torch.func.vjp(lambda *x: case.call(*x, where=case.where), *detached)
    equal([*outputs, *pullback(tuple(cotangents(outputs)))], expected)
    gradients = torch.autograd.grad(loss(case)(*case.inputs), case.inputs)
    equal(torch.func.grad(loss(case), argnums=tuple(range(num)))(*detached), gradients)
    equal([d.detach() for d in derivatives(case, create_graph=True)], [d.detach() for d in expected])


@each_case
def test_second_derivatives_raise(make):
    case = build(make)
    first = derivatives(case, create_graph=True)[-len(case.inputs) :]
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        sum(d.square().sum() for d in first).backward()
    gradient = torch.func.grad(loss(case))
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        torch.func.grad(lambda *x: gradient(*x).square().sum())(*(x.detach() for x in case.inputs))


@each_case
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_raises(make):
    case = make(6, torch.float64)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(loss(case), tuple(case.inputs), tuple(case.inputs))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        loss(case)(*(torch.autograd.forward_ad.make_dual(x, x) for x in case.inputs))


# vmap.

SIZE = 3


def batches(case, which):
    """Stacks of different values for the inputs in `which`, batch dim first and last by turns, and their in_dims."""
    inputs, in_dims = list(case.inputs), [None] * len(case.inputs)
    for i in which:
        in_dims[i] = 0 if i % 2 else -1
        x = inputs[i].detach()
        inputs[i] = torch.stack([x * (1 - 0.3 * n) for n in range(SIZE)], in_dims[i]).requires_grad_()
    return inputs, tuple(in_dims)


def picked(inputs, in_dims, n):
    return [x if dim is None else x.select(dim, n) for x, dim in zip(inputs, in_dims, strict=True)]


def stacked(results):
    return [torch.stack(each) for each in zip(*results, strict=True)]


@each_case
def test_vmap(make):
    """Over any one input and over all: outputs, gradients of a sum over the batch, gradients per example."""
    case = build(make)
    num = len(case.inputs)
    for which in [*((i,) for i in range(num)), range(num)]:
        inputs, in_dims = batches(case, which)
        each = [picked(inputs, in_dims, n) for n in range(SIZE)]
        mapped = torch.vmap(functools.partial(case.call, where=case.where), in_dims)
        close(mapped(*inputs), stacked(case.call(*x, where=case.where) for x in each))

        def total(*inputs, in_dims=in_dims):
            return torch.vmap(loss(case), in_dims)(*inputs).sum()

        expected = torch.autograd.grad(sum(loss(case)(*x) for x in each), inputs)
        close(torch.autograd.grad(total(*inputs), inputs), expected)
        close(torch.func.grad(total, argnums=tuple(range(num)))(*inputs), expected)

        apart = [[x.detach().requires_grad_() for x in example] for example in each]
        per_example = torch.vmap(torch.func.grad(loss(case), argnums=tuple(range(num))), in_dims)(*inputs)
        close(per_example, stacked(torch.autograd.grad(loss(case)(*x), x) for x in apart))


@each_case
def test_vmap_of_vmap(make):
    case = make(6, torch.float64)
    inputs = [
        torch.stack([torch.stack([x * (1 + m - 0.3 * n) for n in range(3)]) for m in range(2)]) for x in case.inputs
    ]
    looped = [torch.stack([loss(case)(*(x[m, n] for x in inputs)) for n in range(3)]) for m in range(2)]
    close([torch.vmap(torch.vmap(loss(case)))(*inputs)], [torch.stack(looped)])


@pytest.mark.parametrize(
    ("name", "rows"),
    [("attention", range(3)), ("causal_conv", [0, 2]), ("gated_delta_rule", range(6)), ("rms_norm_gated", [0, 1])],
)
def test_vmap_over_rows_is_one_call(name, rows):
    """Of the public function, and of the op that it calls."""
    case = CASES[name](6, torch.float64)
    inputs, in_dims = batches(case, rows)
    with Recorder() as recorder:
        mapped = torch.vmap(functools.partial(case.call, where=None), in_dims)(*inputs)
    ((op, folded),) = recorder.calls
    raw_dims = tuple(0 if _floating(x) and len(x) == 2 * SIZE else None for x in folded)
    stacks = [x.unflatten(0, (SIZE, 2)) if dim == 0 else x for x, dim in zip(folded, raw_dims, strict=True)]
    with Recorder() as recorder:
        raw = torch.vmap(op, raw_dims)(*stacks)
    assert len(recorder.calls) == 1
    equal([raw] if isinstance(raw, torch.Tensor) else raw[: len(mapped)], mapped)


def test_recurrent_with_every_state(compiled_once):
    """An op without a gradient: what else holds for the others."""
    op = functools.partial(recurrent_gated_delta_rule, every_state=True)
    cases = [delta_case(extent, torch.float64, op=op) for extent in (6, 9, 14)]
    compiled = compiled_once(cases[0].call)
    for case in cases:
        equal(compiled(*case.inputs, where=None), case.call(*case.inputs, where=None))
    with Recorder() as recorder:
        delta_case(6, torch.bfloat16, op=op).call(*delta_case(6, torch.bfloat16, op=op).inputs, where=None)
    ((op, args),) = recorder.calls
    library.opcheck(op, args)
    for which in (range(6), range(8)):
        inputs, in_dims = batches(cases[0], which)
        call = functools.partial(cases[0].call, where=None)
        with Recorder() as recorder:
            mapped = torch.vmap(call, in_dims)(*inputs)
        assert len(recorder.calls) == (1 if len(which) == 6 else SIZE)
        close(mapped, stacked(call(*picked(inputs, in_dims, n)) for n in range(SIZE)))


def test_vmap_over_documents():
    case = delta_case(6, torch.float64, packed=True)
    wheres = torch.stack([case.where, torch.tensor([0, 1, 3, 6, 6], dtype=torch.int32)])
    actual = torch.vmap(lambda where: loss(case)(*case.inputs, where=where))(wheres)
    close([actual], [torch.stack([loss(case)(*case.inputs, where=where) for where in wheres])])


@each_case
def test_vmap_of_the_raw_ops(make):
    for op, args in recorded(make).items():
        stacks = [torch.stack([a, a * 0.5, a * 0.1]) if _floating(a) else a for a in args]
        in_dims = tuple(0 if _floating(a) else None for a in args)
        actual = torch.vmap(op, in_dims)(*stacks)
        looped = [op(*picked(stacks, in_dims, n)) for n in range(SIZE)]
        if isinstance(actual, torch.Tensor):
            actual, looped = (actual,), [(y,) for y in looped]
        close(actual, stacked(looped))


def _floating(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


# Memory: how inputs lie in it, and what it held before.


@each_case
@each_dtype
def test_strided_inputs_and_gradients(make, dtype):
    case = build(make, dtype=dtype)
    expected = derivatives(case)
    strided = [
        torch.stack([torch.full_like(x, torch.nan), x], -1).detach()[..., 1].requires_grad_() for x in case.inputs
    ]
    assert not any(x.is_contiguous() for x in strided)
    torch.testing.assert_close(derivatives(case, strided), expected)

    outputs = case.call(*case.inputs, where=case.where)
    ones = torch.autograd.grad(outputs, case.inputs, [torch.ones_like(y) for y in outputs], retain_graph=True)
    expanded = [torch.ones((), dtype=y.dtype).expand(y.shape) for y in outputs]
    torch.testing.assert_close(torch.autograd.grad(outputs, case.inputs, expanded), ones)


@pytest.fixture
def dirty_memory():
    """Fresh tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_case
@each_dtype
def test_reads_no_fresh_memory(make, dtype, request):
    case = build(make, dtype=dtype)
    expected = derivatives(case)
    request.getfixturevalue("dirty_memory")
    assert torch.empty(3).isnan().all()
    actual = derivatives(case)
    equal(actual, expected)
    assert all(x.isfinite().all() for x in actual)


@each_case
@each_dtype
def test_repeats_bit_by_bit(make, dtype):
    equal(derivatives(build(make, 50, dtype)), derivatives(build(make, 50, dtype)))


@each_case
def test_autocast_changes_nothing(make):
    """The arithmetic's precision follows from the inputs' dtypes alone."""
    case = build(make, dtype=torch.float32)
    expected = derivatives(case)
    with torch.autocast("cpu", torch.bfloat16):
        actual = derivatives(case)
    equal(actual, expected)


# Which implementation runs.


@each_case
@pytest.mark.parametrize("transform", [False, True], ids=["autograd", "torch.func"])
def test_forward_and_backward_take_impl(make, transform):
    case = build(make)
    asked = functools.partial(case.call, where=case.where, impl="reference")
    with Recorder() as recorder:
        if transform:
            outputs, pullback = torch.func.vjp(asked, *(x.detach() for x in case.inputs))
            pullback(tuple(cotangents(outputs)))
        else:
            outputs = asked(*case.inputs)
            torch.autograd.grad(outputs, case.inputs, cotangents(outputs))
    assert len(recorder.calls) >= 2
    assert {args[-1] for _, args in recorder.calls} == {"reference"}


# Toy ops, so that the rest holds whatever kernels there are.

TOY = {
    name: registration.define(
        name,
        "(Tensor x, str impl) -> Tensor",
        reference=lambda x: 2 * x,
        fake=lambda x: torch.empty_like(x),
        kernel=kernel,
    )
    for name, kernel in (("toy_plain", None), ("toy_fast", "toy:launch"))
}


@pytest.fixture
def said(caplog, monkeypatch):
    kernels = types.ModuleType("q3n_functional.ops.kernels.toy")
    kernels.launch = lambda x: 3 * x
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    registration._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="q3n_functional.ops"):
        yield caplog


def test_says_once_what_runs_and_why(said):
    x = torch.ones(2)
    results = [TOY[name](x, impl)[0].item() for name in TOY for impl in ("auto", "reference", "auto", "reference")]
    assert results == [2.0] * 8
    assert TOY["toy_fast"](x, "triton")[0].item() == TOY["toy_fast"](x, "triton")[0].item() == 3.0
    lines = [record.getMessage() for record in said.records if record.name == "q3n_functional.ops"]
    assert_expected_inline(
        "\n".join(lines),
        """\
q3n::toy_plain on cpu runs the PyTorch reference (no Triton kernel)
q3n::toy_plain on cpu runs the PyTorch reference (as asked)
q3n::toy_fast on cpu runs the PyTorch reference (Triton needs CUDA, not cpu)
q3n::toy_fast on cpu runs the PyTorch reference (as asked)
q3n::toy_fast on cpu runs its kernel""",
    )


@pytest.mark.parametrize(
    ("name", "impl", "error"), [("toy_plain", "triton", NotImplementedError), ("toy_fast", "trition", ValueError)]
)
def test_never_falls_back(said, name, impl, error):
    with pytest.raises(error) as raised:
        TOY[name](torch.ones(2), impl)
    said_instead = {
        "triton": "q3n::toy_plain has no Triton kernel: ask for impl='reference' or 'auto'",
        "trition": "impl must be 'auto', 'reference' or 'triton', got 'trition'",
    }
    assert str(raised.value) == said_instead[impl]
    assert not said.records


def test_what_a_kernel_is_not_made_for_runs_the_reference_and_says_so(said, monkeypatch):
    def refuse(x):
        raise registration.UnsupportedError("width 3: at most 2")

    monkeypatch.setattr(registration, "_load", lambda kernel: refuse)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda")
    assert registration._run("toy_fast", lambda x: "the reference", "toy:launch", x, "auto") == "the reference"
    with pytest.raises(ValueError, match="width 3: at most 2"):
        registration._run("toy_fast", lambda x: x, "toy:launch", x, "triton")
    assert [record.getMessage() for record in said.records] == [
        "q3n::toy_fast on cuda runs the PyTorch reference (width 3: at most 2)"
    ]


def test_runs_without_triton():
    program = """
import sys
sys.modules["triton"] = None  # not to be imported
import torch
from q3n_functional.ops import rms_norm_gated
x = torch.ones(2, 3, requires_grad=True)
rms_norm_gated(x, x, torch.ones(3)).sum().backward()
print([name for name in sys.modules if "ops.kernels" in name])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
