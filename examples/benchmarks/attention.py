"""Time, memory and error of full attention on one card: what torch offers for packed documents and a head dim of 256.

    python examples/benchmarks/attention.py [--commit HASH] [--out FOLDER] [--only NAME ...]

Prints a table and writes results/attention.json. bf16, 16 query heads, 2 key/value heads of 256, causal; times are
medians of forward alone and of forward plus backward to q, k and v. Cases are rows x tokens and documents ("of 256":
as many offsets, the last repeated). TFLOP/s count the triangles of the documents: 2 H K L^2 forward, 3.5 times that
with backward; the limit is a matrix product of 8192. Peak is what forward plus backward allocate. Errors are relative
to float64, on documents in 1024 tokens; "repeats" is 1 where three backward runs agree bit by bit.

Implementations: q3n, given offsets, and q3n rows, given none; deterministic, the former under
torch.use_deterministic_algorithms; flash_dense and cudnn_dense, scaled_dot_product_attention's kernels where rows are
documents; flex, FlexAttention compiled with a document mask; masked, what q3n ran before: a [T, T] mask. (cuDNN's own
form for documents is left out: its gradients were wrong, and at 32768 tokens it ended in an illegal access.)
"""

import functools
import random
import time
from collections.abc import Callable
from itertools import pairwise

import report
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from q3n_functional.ops import attention

HEADS, GROUPS, DIM = 16, 2, 256
CASES = {  # rows, tokens of a row, documents of a row, offsets in all
    "2x4096": (2, 4096, 1, 2),
    "1x32768": (1, 32768, 1, 1),
    "1x32768 32": (1, 32768, 32, 32),
    "1x32768 32 of 256": (1, 32768, 32, 256),
}
NAMES = ("o", "dq", "dk", "dv")
Function = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def offsets(rows: int, tokens: int, documents: int, total: int) -> list[int]:
    """Documents of random lengths in each row, the last offset repeated."""
    draw = random.Random(0)
    bounds = [0]
    for row in range(rows):
        cuts = sorted(draw.sample(range(1, tokens), documents - 1))
        bounds += [row * tokens + x for x in (*cuts, tokens)]
    return bounds + [bounds[-1]] * (total + 1 - len(bounds))


def inputs(rows: int, tokens: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(rows, tokens, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]


def ids(cu: Tensor, length: int) -> Tensor:
    """int32: each token's document."""
    return torch.searchsorted(cu, torch.arange(length, device=cu.device, dtype=torch.int32), right=True)


def q3n(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return attention(q, k, v, cu, impl="triton")


def check_rows(q: Tensor, cu: Tensor) -> None:
    if len(cu) - 1 > q.shape[0]:
        raise NotImplementedError("rows only")


def q3n_rows(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    check_rows(q, cu)
    return attention(q, k, v, impl="triton")


def dense(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, backend: SDPBackend) -> Tensor:
    check_rows(q, cu)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    document = ids(cu, q.shape[0] * q.shape[1]).view(q.shape[0], 1, -1)
    time = torch.arange(q.shape[1], device=q.device)
    mask = (document[..., :, None] == document[..., None, :]) & (time[:, None] >= time)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@functools.partial(torch.compile, dynamic=False)
def compiled_flex(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[b, i] == document[b, j])

    mask = create_block_mask(visible, q.shape[0], None, q.shape[1], q.shape[1], device=q.device)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(*heads, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flex(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
    return compiled_flex(q, k, v, ids(cu, q.shape[0] * q.shape[1]).view(q.shape[:2]))


IMPLEMENTATIONS: dict[str, Function] = {
    "q3n": q3n,
    "q3n rows": q3n_rows,
    "deterministic": q3n,
    "flash_dense": functools.partial(dense, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn_dense": functools.partial(dense, backend=SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "masked": masked,
}


def gradients(function: Function, tensors: list[Tensor], cu: Tensor, do: Tensor) -> tuple[Tensor, ...]:
    o = function(*tensors, cu)
    return o.detach(), *torch.autograd.grad(o, tensors, do)


def errors(function: Function) -> dict[str, float]:
    tensors, cu = inputs(1, 1024), torch.tensor(offsets(1, 1024, 3, 4), dtype=torch.int32, device="cuda")
    if isinstance(function, functools.partial) or function is q3n_rows:  # for rows alone
        cu = cu[[0, -1]].contiguous()
    do = torch.randn_like(tensors[0])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradients(masked, exact, cu, do.double())
    found, *again = (gradients(function, tensors, cu, do) for _ in range(3))
    repeats = all(torch.equal(a, b) for run in again for a, b in zip(run, found, strict=True))
    pairs = zip(NAMES, found, wanted, strict=True)
    return {f"error_{n}": float((a.double() - b).norm() / b.norm()) for n, a, b in pairs} | {"repeats": float(repeats)}


def measure(function: Function, tensors: list[Tensor], bounds: list[int]) -> dict[str, float]:
    cu, do = torch.tensor(bounds, dtype=torch.int32, device="cuda"), torch.randn_like(tensors[0])
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    gradients(function, tensors, cu, do)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    gradients(function, tensors, cu, do)
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: function(*tensors, cu), warmup=10, rep=100, return_mode="median")
    both = do_bench(lambda: gradients(function, tensors, cu, do), warmup=10, rep=200, return_mode="median")
    flops = sum(2 * HEADS * DIM * (b - a) ** 2 for a, b in pairwise(bounds))
    return {
        "fwd_ms": forward, "fwd_bwd_ms": both, "fwd_tflops": flops / forward / 1e9,
        "fwd_bwd_tflops": 3.5 * flops / both / 1e9, "peak_mib": peak / 2**20, "first_s": first,
    }  # fmt: skip


def limit() -> dict[str, float]:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * 8192**3 / do_bench(lambda: a @ b, warmup=20, rep=100, return_mode="median") / 1e9}


def found(case: str, implementation: str, run: Callable[[], dict[str, float]]) -> report.Rows:
    """`report.measured`, with torch's deterministic algorithms for the implementation of that name."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(implementation == "deterministic")
    try:
        return report.measured(case, implementation, run)
    finally:
        torch.use_deterministic_algorithms(False)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--only", nargs="*", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    options = parser.parse_args()
    chosen = {name: IMPLEMENTATIONS[name] for name in options.only}
    rows = found("8192x8192x8192", "limit", limit)
    for name, function in chosen.items():
        rows += found("documents in 1024", name, lambda f=function: errors(f))
    for case, shape in CASES.items():
        tensors = inputs(*shape[:2])
        for name, function in chosen.items():
            rows += found(case, name, lambda f=function, x=tensors, s=shape: measure(f, x, offsets(*s)))
            report.write(rows, "attention", options.commit, options.out)


if __name__ == "__main__":
    main()
