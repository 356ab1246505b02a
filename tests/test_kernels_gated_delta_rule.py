"""The Triton kernels of the gated delta rule against a float64 recurrence: interpreted here, on the device there."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import library

from q3n_functional.ops.chunks import saved_shapes
from tests.device import DEVICE, INTERPRETED

runs_here = [
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="runs in test_in_the_interpreter"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]  # fmt: skip

DOCUMENTS = {"documents": [0, 0, 17, 17, 18, 50, 66], "length": 70}
GATES = {"gate": True, "beta_scale": 1.0, "l2norm": True}
CASES = {
    "one token": {"length": 1, **GATES},
    "a short chunk": {"length": 15, **GATES},
    "a chunk and one": {"length": 17, "batch": 3, **GATES},
    "whole chunks": {"length": 32, **GATES},
    "nothing fused": {"batch": 2, "length": 35},
    "no states": {"length": 35, "state": False, "d_state": False, **GATES},
    "only the final state is used": {"length": 35, "d_out": False, **GATES},
    "documents": {**DOCUMENTS, **GATES},
    "documents over rows": {**DOCUMENTS, "batch": 2, "length": 35, "beta_scale": 2.0, "l2norm": True},
    "documents, no states": {**DOCUMENTS, "state": False, "d_state": False},
    "nothing but a tail": {"documents": [0, 0, 0], "length": 20, **GATES},
    "equal heads": {"heads": 2, "key_heads": 2, "length": 20, **GATES},
    "three value heads a key head": {"heads": 3, "length": 20, **GATES},
    "narrow keys": {"key_dim": 16, "value_dim": 40, "length": 20, **GATES},
    "odd head dims": {"key_dim": 20, "value_dim": 18, **DOCUMENTS, **GATES},
    "wide keys": {"key_dim": 96, "value_dim": 16, "length": 20, **GATES},
    "chunks of 32": {"chunk_size": 32, **DOCUMENTS, **GATES},
    "chunks of 64": {"chunk_size": 64, "batch": 2, "length": 65, **GATES},
    "strong decay": {"decay": 8.0, "length": 40, "l2norm": True},
    "overwhelming decay": {"decay": 80.0, "length": 40, "l2norm": True},
    "alike keys, beta to 2": {"alike": 3.0, "length": 40, **GATES, "beta_scale": 2.0},
    "keys longer than one": {"norm": 1.2, "length": 40, "decay": 0.1},
    "strided": {"strided": True, "batch": 2, "length": 20, **GATES},
    "expanded gradient": {"expanded": True, "length": 20, **GATES},
}
NAMES = ("o", "final_state", "q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
HEAD_DIMS = [(16, 16), (64, 64), (100, 60), (128, 128), (128, 32), (32, 128), (192, 96), (256, 256), (48, 256)]


def kernels():
    from q3n_functional.ops.kernels import gated_delta_rule

    return gated_delta_rule


def recurrent_kernel():
    from q3n_functional.ops.kernels import recurrent_gated_delta_rule

    return recurrent_gated_delta_rule


def build(
    batch=1, length=20, heads=2, key_heads=1, key_dim=16, value_dim=16, chunk_size=16, documents=None, gate=False,
    beta_scale=0.0, l2norm=False, state=True, d_state=True, d_out=True, decay=1.0, alike=0.5, norm=1.0, strided=False,
    expanded=False, dtype=torch.float32,
):  # fmt: skip
    """(do, d_final_state), the tensors of a call, its scalars; what lies behind the documents is NaN."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    num = batch if documents is None else len(documents) - 1
    q = random(batch, length, key_heads, key_dim)
    k = random(batch, length, key_heads, key_dim) + alike * random(1, 1, key_heads, key_dim)
    v = random(batch, length, heads, value_dim)
    if not l2norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) * norm for x in (q, k))
    g = random(batch, length, heads)
    g = g if gate else -decay * torch.sigmoid(2 * g)
    beta = random(batch, length, heads)
    if not beta_scale:
        beta = torch.sigmoid(beta)
        beta[:, 1::5] = 0
    A_log, dt_bias = (torch.linspace(-3, 1, heads, device=DEVICE), random(heads)) if gate else (None, None)
    initial = random(num, heads, key_dim, value_dim) if state else None
    do, d_final = random(batch, length, heads, value_dim), random(num, heads, key_dim, value_dim)
    if expanded:
        do = do[:1, :1, :1, :1].expand(do.shape)
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    if documents is not None:
        for x in (q, k, v, g, beta, do):
            x.view(-1, *x.shape[2:])[documents[-1] :] = float("nan")
    if strided:
        flat = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        split = flat.split([x[0, 0].numel() for x in (q, k, v)], -1)
        q, k, v = (x.unflatten(-1, (-1, width)) for x, width in zip(split, (key_dim, key_dim, value_dim), strict=True))
    cu = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=DEVICE)
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial, cu)
    return (
        (do if d_out else None, d_final if d_state else None),
        tensors,
        (key_dim**-0.5, l2norm, beta_scale, chunk_size),
    )


def recurrence(q, k, v, g, beta, A_log, dt_bias, initial, cu, scale, l2norm, beta_scale, chunk_size):
    """The rule as its definition reads, token by token."""
    batch, length, key_heads, _ = q.shape
    heads = v.shape[2]
    if A_log is not None:
        g = -A_log.exp() * torch.nn.functional.softplus(g + dt_bias)
    if beta_scale:
        beta = beta_scale * beta.sigmoid()
    if l2norm:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    q, k = (x.repeat_interleave(heads // key_heads, 2) for x in (q, k))
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    bounds = [n * length for n in range(batch + 1)] if cu is None else cu.tolist()
    out, states = [], []
    for n, (first, end) in enumerate(itertools.pairwise(bounds)):
        S = q.new_zeros(heads, q.shape[2], v.shape[2]) if initial is None else initial[n]
        for t in range(first, end):
            S = S * g[t].exp()[:, None, None]
            u = beta[t][:, None] * (v[t] - (k[t][:, :, None] * S).sum(1))
            S = S + k[t][:, :, None] * u[:, None, :]
            out.append(scale * (q[t][:, :, None] * S).sum(1))
        states.append(S)
    out = torch.stack(out) if out else v[:0]
    return torch.cat([out, torch.zeros_like(v[bounds[-1] :])]).unflatten(0, (batch, length)), torch.stack(states)


def expected(gradients, tensors, scalars):
    leaves = [x if x is None else x.nan_to_num().double().requires_grad_() for x in tensors[:8]]
    outputs = recurrence(*leaves, tensors[8], *scalars)
    pairs = [(y, dy.nan_to_num().double()) for y, dy in zip(outputs, gradients, strict=True) if dy is not None]
    wanted = torch.autograd.grad(sum((y * dy).sum() for y, dy in pairs), [x for x in leaves if x is not None],
                                 allow_unused=True, materialize_grads=True)  # fmt: skip
    names = [name for name, x in zip(NAMES[2:], leaves, strict=True) if x is not None]
    return dict(zip(NAMES, outputs, strict=False)) | dict(zip(names, wanted, strict=True))


def kernel_outputs(gradients, tensors, scalars):
    o, final, *saved = kernels().forward(*tensors, *scalars)
    found = (o, final, *kernels().backward(*gradients, *tensors, *saved, *scalars))
    return {name: x for name, x in zip(NAMES, found, strict=True) if x.numel()}


def assert_matches(found, wanted, bound):
    for name, x in wanted.items():
        error = (found[name].double() - x).norm() / x.norm().clamp(min=1e-2 if x.abs().max() < 1e-6 else 0)
        # The sums over all tokens cancel, and so does fp32's sum of decays of thousands.
        loose = 30 if name in ("A_log", "dt_bias") else 10 if name == "g" else 1
        assert error <= bound * loose, f"{name} is off by {error:.1e}"


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**30)

    monkeypatch.setattr(torch, "empty", poisoned)

    def poisoned_like(x, dtype=None, memory_format=None):
        return poisoned(x.shape, dtype=dtype or x.dtype, device=x.device)

    monkeypatch.setattr(torch, "empty_like", poisoned_like)


class TestKernels:
    pytestmark = runs_here

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", CASES.values(), ids=CASES)
    def test_matches_the_recurrence(self, options, dtype):
        if not INTERPRETED and options.get("chunk_size", 16) == 16:
            options = {"chunk_size": 64, "key_dim": 128, "value_dim": 64} | options
        case = build(**options, dtype=dtype)
        # The inverse for alike keys and beta to 2 loses a digit where it is stored in 16 bits.
        loose = 2 if options.get("alike", 0) > 1 and dtype != torch.float32 else 1
        assert_matches(kernel_outputs(*case), expected(*case), BOUNDS[dtype] * loose)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "options",
        [
            {"length": 70, "batch": 2, **GATES},
            {"length": 48, "state": False, "d_state": False, **GATES},
            {"documents": [0, 0, 40, 41, 41, 120, 120], "length": 130, **GATES},
            {"documents": [0, 100], "length": 110, "d_out": False, "key_dim": 20, "value_dim": 40, **GATES},
        ],
        ids=["rows", "no states", "documents", "one document"],
    )
    def test_in_pieces(self, monkeypatch, options, dtype):
        monkeypatch.setattr(kernels(), "_num_pieces", lambda p: 3)
        if not INTERPRETED:
            options = {"chunk_size": 16, "key_dim": 128, "value_dim": 128} | options
        case = build(**options, dtype=dtype)
        assert_matches(kernel_outputs(*case), expected(*case), BOUNDS[dtype])

    @pytest.mark.parametrize(
        ("batch", "length", "heads", "pieces"),
        [(1, 32768, 8, 8), (1, 32768, 4, 16), (1, 32768, 16, 1), (1, 4096, 8, 1)],
    )
    def test_few_heads_and_long_sequences_are_cut(self, batch, length, heads, pieces):
        q, v = (torch.empty(1, 1, 1, 128, device=DEVICE).expand(batch, length, n, 128) for n in (1, heads))
        g = torch.empty(1, 1, 1, device=DEVICE).expand(batch, length, heads)
        assert kernels()._num_pieces(kernels()._problem(q, q, v, g, g, None, 64)) == pieces

    @pytest.mark.parametrize(
        ("batch", "documents", "length"),
        [(1, None, 205), (2, None, 96), (1, [0, 0, 90, 91, 91, 300], 310), (1, [0, 0], 20)],
    )
    @pytest.mark.parametrize("more", [0, 1])
    def test_walks_begin_where_the_decay_is_enough(self, batch, documents, length, more):
        """Tokens before its own, sequence to begin with and sequence to leave, both ways, of each piece and head."""
        _, tensors, scalars = build(batch=batch, documents=documents, length=length, heads=3, l2norm=True)
        p = kernels()._problem(*tensors[:5], tensors[8], scalars[3])
        sums = torch.tensor([[-1.0, -20.0, 0.0]], device=DEVICE) * torch.rand(p.num_chunks, 1, device=DEVICE)
        gates = torch.zeros(p.num_chunks, 3, 7, 16, device=DEVICE)
        gates[:, :, 0, -1] = sums
        found = kernels().walks(p, 5, gates, more)
        bounds = [n * length for n in range(batch + 1)] if documents is None else documents
        total = batch * length - p.num_sequences * more * 16
        size, piece, chunk = -(-total // (p.num_sequences * 5 * 16)), 0, 0
        for n, (start, end) in enumerate(itertools.pairwise(bounds)):
            chunks = -(-(end - start) // 16)
            last = max(-(-(chunks - more) // size), 1) - 1
            for i in range(last + 1):
                first = i * size + more * (i > 0)
                for head in range(3):
                    mine, after = sums[chunk : chunk + chunks, head], min(i * size + size + more, chunks)
                    behind = max(end - start - after * 16, 0)
                    wanted = []
                    for decays, most, is_last in (
                        (mine[:first].flip(0), first * 16, i == last), (mine[after:], behind, i == 0)
                    ):  # fmt: skip
                        below = (decays.cumsum(0) < -64).nonzero()
                        lead = len(decays) if len(below) == 0 else int(below[0]) + 1
                        wanted += [min(lead * 16, most), -1 if len(below) else n, n if is_last else -1]
                    assert found.walks[piece, head].tolist() == wanted
                assert int(found.cu[piece]) == start + first * 16
                assert int(found.first_chunk[piece]) == chunk + first
                piece += 1
            chunk += chunks
        assert (found.walks[piece:] == torch.tensor([0, -1, -1, 0, -1, -1], device=DEVICE)).all()

    @pytest.mark.parametrize(
        "documents",
        [[0, 0, 90, 91, 91, 300, 300], [0, 300], [0, 20, 40, 160, 170, 300], [0, 30], [0, 0, 0], [0, 144, 304]],
    )
    def test_halves_of_documents(self, documents):
        """Each half has its chunks of a document, and of the other half as many as the decay asks for."""
        _, tensors, scalars = build(documents=documents, length=310, heads=3, l2norm=True)
        p = kernels()._problem(*tensors[:5], tensors[8], scalars[3])
        sums = torch.tensor([[-1.0, -20.0, 0.0]], device=DEVICE) * torch.rand(p.num_chunks, 1, device=DEVICE)
        gates = torch.zeros(p.num_chunks, 3, 7, 16, device=DEVICE)
        gates[:, :, 0, -1] = sums
        halves, middle = kernels().halves(p, gates), p.num_chunks // 2
        assert [(x.origin, x.num_chunks) for x in halves] == [(0, middle), (middle, p.num_chunks - middle)]
        assert torch.equal(torch.cat([x.table for x in halves]), p.table)
        for x, given in ((p, tensors[8]), *((x, x.cu) for x in halves)):
            lengths = given.diff()
            assert torch.equal(x.order[: len(lengths)], lengths.argsort(descending=True, stable=True).int())
        chunk = 0
        for n, (start, end) in enumerate(itertools.pairwise(documents)):
            last = chunk + -(-(end - start) // 16)
            cut = min(max(start + (middle - chunk) * 16, start), end)
            for half, begin, until in zip(halves, (start, cut), (cut, end), strict=True):
                assert int(half.cu[n + 1] - half.cu[n]) == until - begin
                assert begin == until or int(half.cu[n]) == begin
            if cut < end:
                assert int(halves[1].first_chunk[n]) == max(chunk, middle)
            opens, closes = chunk < middle, last > middle or chunk >= middle
            for head in range(3):
                walks, needed = [x.walks[n, head].tolist() for x in halves], []
                for decays in (sums[chunk:middle, head].flip(0), sums[max(chunk, middle) : last, head]):
                    below = (decays.cumsum(0) < -64).nonzero()
                    needed.append((len(decays) if len(below) == 0 else int(below[0]) + 1, len(below) > 0))
                (lead, cut_off), (reverse_lead, reverse_cut_off) = needed if opens and closes else [(0, False)] * 2
                assert walks[0][:2] == [0, n if opens else -1]
                own = n if opens else -1
                assert walks[0][3:] == [min(reverse_lead * 16, end - cut), -1 if reverse_cut_off else own, own]
                own = n if closes else -1
                assert walks[1][:2] == [lead * 16, -1 if cut_off else own]
                assert walks[1][3:] == [0, own, -1 if opens else n]
            chunk = last

    def test_tma_descriptors(self):
        """16 bits and whole tiles: the scans then read through descriptors, but for the last chunk."""
        documents = {"documents": [0, 64, 64, 130, 140], "length": 150}
        case = build(key_dim=64, value_dim=64, chunk_size=64, dtype=torch.float16, **documents, **GATES)
        assert_matches(kernel_outputs(*case), expected(*case), BOUNDS[torch.float16])

    @pytest.mark.skipif(INTERPRETED, reason="too slow there")
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
    def test_head_dims(self, dims, dtype):
        documents = {"documents": [0, 0, 64, 129, 200, 329], "length": 340}
        case = build(key_dim=dims[0], value_dim=dims[1], chunk_size=64, dtype=dtype, **documents, **GATES)
        assert_matches(kernel_outputs(*case), expected(*case), BOUNDS[dtype])

    @pytest.mark.skipif(INTERPRETED, reason="too slow there")
    @pytest.mark.parametrize("batch", [1, 8])  # each picks another configuration of the scans
    def test_many_heads_and_bits_that_repeat(self, batch):
        case = build(batch=batch, length=200, heads=32, key_heads=16, key_dim=128, value_dim=128, chunk_size=64,
                     dtype=torch.bfloat16, **GATES)  # fmt: skip
        found = kernel_outputs(*case)
        assert_matches(found, expected(*case), BOUNDS[torch.bfloat16])
        for _ in range(5):
            again = kernel_outputs(*case)
            assert all(torch.equal(x, again[name]) for name, x in found.items())

    def test_a_row_alone_gives_the_bits_of_the_row_in_a_batch(self):
        _, tensors, scalars = build(batch=3, length=19, **GATES)
        together, states, *_ = kernels().forward(*tensors, *scalars)
        alone = tuple(x if x is None or x.ndim == 1 else x[1:2] for x in tensors)
        o, state, *_ = kernels().forward(*alone, *scalars)
        assert torch.equal(together[1:2], o)
        assert torch.equal(states[1:2], state)

    def test_saved_shapes(self):
        for options in (CASES["documents"], CASES["a chunk and one"]):
            _, tensors, scalars = build(**options)
            *_, gates, Y = kernels().forward(*tensors, *scalars)
            assert (gates.shape, Y.shape) == saved_shapes(tensors[2], tensors[8], scalars[3])
            assert torch.isfinite(gates).all()
            assert torch.isfinite(Y).all()

    @pytest.mark.parametrize("options", ["whole chunks", "documents", "no states"])
    def test_through_the_op(self, options):
        """Fakes, shapes of what is saved, and gradients are right for the kernels as for the reference."""
        _, tensors, scalars = build(**CASES[options])
        leaves = [x if x is None or not x.is_floating_point() else x.nan_to_num().requires_grad_() for x in tensors]
        for op, arguments in (
            (torch.ops.q3n.gated_delta_rule.default, (*leaves, *scalars)),
            (torch.ops.q3n.recurrent_gated_delta_rule.default, (*leaves, *scalars[:3])),
        ):
            library.opcheck(op, (*arguments, "triton"))
            found, wanted = (self.gradients(op, leaves, (*arguments, impl)) for impl in ("triton", "reference"))
            for x, y in zip(found, wanted, strict=True):
                assert (x - y).norm() <= 1e-4 * y.norm()
        if options != "documents":
            op = torch.ops.q3n.recurrent_gated_delta_rule_every_state.default
            library.opcheck(op, (*tensors[:8], *scalars[:3], "triton"))

    @staticmethod
    def gradients(op, leaves, arguments):
        o, state, *_ = op(*arguments)
        return torch.autograd.grad(
            o.square().sum() + state.sum(), [x for x in leaves if x is not None and x.requires_grad]
        )

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"chunk_size": 48}, "chunk_size 48"), ({"key_dim": 272, "value_dim": 16}, "272 and 16.*256")],
    )
    def test_errors(self, options, text):
        _, tensors, scalars = build(**options)
        with pytest.raises(ValueError, match=text):
            kernels().forward(*tensors, *scalars)

    @pytest.mark.parametrize("options", ["a short chunk", "nothing fused", "documents", "odd head dims", "no states"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_recurrent_kernel(self, options, dtype):
        _, tensors, scalars = build(**CASES[options], dtype=dtype)
        found = recurrent_kernel().recurrent_forward(*tensors, *scalars[:3])
        wanted = expected((torch.zeros_like(found[0]), None), tensors, scalars)
        assert_matches(dict(zip(NAMES, found, strict=False)), {n: wanted[n] for n in NAMES[:2]}, BOUNDS[dtype])

    @pytest.mark.parametrize("options", ["a chunk and one", "nothing fused", "no states", "narrow keys", "strided"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_state(self, options, dtype):
        """Bit for bit those of as many tokens by themselves."""
        _, tensors, scalars = build(**CASES[options], dtype=dtype)
        rows = tensors[:8]
        o, states = recurrent_kernel().recurrent_every_state(*rows, *scalars[:3])
        for t in (1, 2, rows[0].shape[1]):
            first = [x[:, :t] for x in rows[:5]]
            alone, state = recurrent_kernel().recurrent_forward(*first, *tensors[5:], *scalars[:3])
            assert torch.equal(alone, o[:, :t])
            assert torch.equal(state, states[:, t - 1])

    @pytest.mark.parametrize("options", ["whole chunks", "documents", "odd head dims", "keys longer than one"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_transition(self, options, dtype):
        """It takes any state to what the state adds to the final one."""
        _, (q, k, v, g, beta, A_log, dt_bias, initial, cu), scalars = build(**CASES[options], dtype=dtype)
        M = kernels().transition(k, g, beta, A_log, dt_bias, cu, *scalars[1:])
        plain = [x if x is None else x.nan_to_num().double() for x in (q, k, v, g, beta, A_log, dt_bias)]
        with_state = recurrence(*plain, initial.double(), cu, *scalars)[1]
        wanted = with_state - recurrence(*plain, None, cu, *scalars)[1]
        assert (M.double() @ initial.double() - wanted).norm() <= BOUNDS[dtype] * wanted.norm()

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter has no CUDA graphs")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_in_a_cuda_graph_with_other_documents(self):
        _, tensors, _ = case = build(documents=[0, 7, 7, 130], length=140, chunk_size=64, **GATES)
        kernel_outputs(*case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernel_outputs(*case)
        tensors[8].copy_(torch.tensor([0, 0, 65, 130]))
        graph.replay()
        assert_matches(captured, expected(*case), BOUNDS[torch.float32])

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_no_new_compilation_for_other_lengths_and_document_counts(self):
        compiled = []
        for length, documents in ((20, [0, 20]), (33, [0, 1, 33]), (1, [0, 1]), (64, [0, 16, 32, 64])):
            case = build(length=length, documents=documents, chunk_size=64, **GATES)
            with_sync = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
            kernel_outputs(*case)
            torch.cuda.set_sync_debug_mode(with_sync)
            module = kernels()
            compiled.append([len(getattr(module, n).device_caches[0][0]) for n in dir(module) if n.endswith("_kernel")])
        assert all(counts == compiled[0] for counts in compiled)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests above run as they are")
def test_in_the_interpreter():
    """The mode is read when triton is imported, and any module may have done that: hence another process."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
