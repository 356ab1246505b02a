# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Cross-entropy of a linear head on CUDA: matrix products by cuBLAS a chunk of tokens at a time, the rest in Triton.

With logits x of one token and log Z = log sum exp x,

    cross-entropy = log Z - x[target]        z = (log Z)^2
    dx = exp(x - log Z) (1 + 2 c log Z) - onehot(target)

A row fits no multiprocessor. Several programs hold a part of it each, in registers, and wait for one another's largest
logit and sum, so that the row is read once; dx goes over x, in the inputs' dtype to the front of the row, which all
have read by then. The products take and give that dtype
but for the logits and the sum of the head's gradient over several chunks, fp32 both. Chunks depend on shapes alone and
are added in their order, so repeated runs agree bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.linear_cross_entropy import IGNORE, chunks
from q3n_functional.ops.registration import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 8192
"""Logits that a program holds."""
WARPS, REGISTERS = 8, 64


@triton.jit
def _sums_of_row(tops, totals, arrived, row, part, top, total, PARTS: tl.constexpr):
    """The largest logit of a row and the sum of exp of what the others lack to it, once all its programs have told."""
    tl.store(tops + row * PARTS + part, top)
    tl.store(totals + row * PARTS + part, total)
    told = tl.atomic_add(arrived + row, 1, sem="acq_rel") + 1
    while told < PARTS:
        told = tl.atomic_add(arrived + row, 0, sem="acquire")
    n = tl.arange(0, triton.next_power_of_2(PARTS))
    all_tops = tl.load(tops + row * PARTS + n, mask=n < PARTS, other=-float("inf"))
    all_totals = tl.load(totals + row * PARTS + n, mask=n < PARTS, other=0.0)
    top = tl.max(all_tops, 0)
    return top, tl.sum(all_totals * tl.exp(all_tops - top), 0)


@triton.jit(do_not_specialize_on_alignment=["targets", "partitions", "picked"])
def _row_kernel(
    logits, targets, partitions, picked, gradient, coef, tops, totals, arrived,
    V: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, IGNORE: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    # A program that waits for others of its row began after those before it: numbers are drawn, not the launch's.
    turn = tl.program_id(0) if PARTS == 1 else tl.atomic_add(arrived + tl.num_programs(0) // PARTS, 1, sem="relaxed")
    row, part = (turn // PARTS).to(tl.int64), turn % PARTS
    v = part * BV + tl.arange(0, BV)
    logits += row * V
    gradient += row * STRIDE
    target = tl.load(targets + row)
    if target == IGNORE:
        if part == 0:
            tl.store(partitions + row, 0.0)
            tl.store(picked + row, 0.0)
        if GRADIENT:
            tl.store(gradient + v, tl.zeros([BV], gradient.dtype.element_ty), mask=v < V)
    else:
        at_target = tl.load(logits + target, mask=target >= 0, other=0.0)
        x = tl.load(logits + v, mask=v < V, other=-float("inf"))
        largest = tl.max(x, 0)
        x = tl.exp(x - largest)
        top, total = largest, tl.sum(x, 0)
        if PARTS > 1:
            top, total = _sums_of_row(tops, totals, arrived, row, part, top, total, PARTS)
        else:
            tl.debug_barrier()  # all have read what lies where dx goes
        partition = top + tl.log(total)
        if part == 0:
            tl.store(partitions + row, partition)
            tl.store(picked + row, at_target)
        if GRADIENT:
            factor = (1.0 + 2.0 * coef * partition) * tl.exp(largest - partition)
            dx = x * factor - (v == target).to(tl.float32)
            tl.store(gradient + v, dx.to(gradient.dtype.element_ty), mask=v < V)


@triton.jit
def _scale_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, scaled.to(out.dtype.element_ty), mask=i < size)


def check_dtype(h: Tensor) -> None:
    """Raise UnsupportedError for a dtype that the kernels do not take."""
    if h.dtype not in DTYPES:
        raise UnsupportedError(f"h is {h.dtype}: the Triton kernel takes bf16, fp16 and fp32")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    valid = (targets == IGNORE) | ((targets >= 0) & (targets < vocabulary))
    torch._assert_async(valid.all(), "a target is neither a token nor -100")


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def summed(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in fp32, in place."""
    if total is None:
        return product(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def softmax(
    logits: Tensor, targets: Tensor, partitions: Tensor, picked: Tensor, dlogits: Tensor | None = None,
    coef: float = 0.0,
) -> None:  # fmt: skip
    """Write log Z and x[target], zeros where there is none; and dx to `dlogits`, which lies where `logits` does."""
    num, vocabulary = logits.shape
    block = triton.next_power_of_2(vocabulary)
    block = min(block, BLOCK) if logits.is_cuda else block  # programs that wait for each other need to run side by side
    parts = triton.cdiv(vocabulary, block)
    told = torch.empty(2, num, parts, dtype=torch.float32, device=logits.device)
    arrived = torch.zeros(num + 1, dtype=torch.int32, device=logits.device)
    launch(_row_kernel, num * parts)(
        logits, targets, partitions, picked, logits if dlogits is None else dlogits, coef, *told, arrived,
        V=vocabulary, BV=block, PARTS=parts, STRIDE=vocabulary if dlogits is None else dlogits.shape[1], IGNORE=IGNORE,
        GRADIENT=dlogits is not None, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


def forward(
    h: Tensor, head: Tensor, targets: Tensor, z_loss_coef: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sums and, where asked for, the gradients, as `q3n_functional.ops.linear_cross_entropy` says."""
    (num, _), vocabulary, h, head, targets = h.shape, len(head), h.contiguous(), head.contiguous(), targets.contiguous()
    check_dtype(h)
    _check_targets(targets, vocabulary)
    partitions, picked = (torch.empty(num, dtype=torch.float32, device=h.device) for _ in range(2))
    dh, dhead = torch.empty_like(h) if gradients else h.new_empty(0), None
    parts = list(chunks(num, vocabulary))
    for rows in parts:
        logits = product(h[rows], head.mT)
        dlogits = logits.view(h.dtype)  # [M, V], or twice as wide
        to = dlogits if gradients else None
        softmax(logits, targets[rows], partitions[rows], picked[rows], to, z_loss_coef)
        if gradients:
            dlogits = dlogits[:, :vocabulary]
            torch.mm(dlogits, head, out=dh[rows])
            dhead = dlogits.mT @ h[rows] if len(parts) == 1 else summed(dhead, dlogits.mT, h[rows])
    cross_entropy, z_loss = (partitions - picked).sum(), partitions.square().sum()
    if dhead is None:
        dhead = torch.zeros_like(head) if gradients else head.new_empty(0)
    return cross_entropy + z_loss_coef * z_loss, cross_entropy, z_loss, dh, dhead.to(head.dtype)


def backward(dtotal: Tensor, dh: Tensor, dhead: Tensor, h: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return both gradients times the 0-d `dtotal`. By torch's product with a number on the device it takes three times
    as long: that reads element by element."""
    check_dtype(dh)
    return _scaled(dh, dtotal), _scaled(dhead, dtotal)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        launch(_scale_kernel, triton.cdiv(x.numel(), 4096))(x, factor, out, x.numel(), BLOCK=4096, num_warps=8)
    return out
