# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Cross-entropy of a linear head on CUDA: matrix products by cuBLAS a chunk of tokens at a time, the rest in Triton.

With logits x of one token and log Z = log sum exp x, a program takes the row twice:

    cross-entropy = log Z - x[target]        z = (log Z)^2
    dx = exp(x - log Z) (1 + 2 c log Z) - onehot(target)

The second time it writes dx over x, in the inputs' dtype to the front of the row. The products take and give that dtype
but for the logits and the sum of the head's gradient over several chunks, fp32 both. Chunks depend on shapes alone and
are added in their order, so repeated runs agree bit by bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.linear_cross_entropy import IGNORE, chunks
from q3n_functional.ops.registration import UnsupportedError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 4096
WARPS = 8


@triton.jit(do_not_specialize_on_alignment=["targets", "cross_entropy", "z_loss"])
def _row_kernel(
    logits, targets, cross_entropy, z_loss, gradient, coef,
    V: tl.constexpr, BV: tl.constexpr, STRIDE: tl.constexpr, IGNORE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BV)
    logits += row * V
    gradient += row * STRIDE
    target = tl.load(targets + row)
    if target == IGNORE:
        tl.store(cross_entropy + row, 0.0)
        tl.store(z_loss + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BV):
                tl.store(gradient + start + v, tl.zeros([BV], gradient.dtype.element_ty), mask=start + v < V)
    else:
        largest = tl.full([BV], -1e30, tl.float32)  # finite, so that differences are numbers
        total = tl.zeros([BV], tl.float32)
        for start in range(0, V, BV):
            x = tl.load(logits + start + v, mask=start + v < V, other=-float("inf"))
            above = tl.maximum(largest, x)
            total = total * tl.exp(largest - above) + tl.exp(x - above)
            largest = above
        top = tl.max(largest, 0)
        partition = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
        tl.store(cross_entropy + row, partition - tl.load(logits + target))
        tl.store(z_loss + row, partition * partition)
        if GRADIENT:
            factor = 1.0 + 2.0 * coef * partition
            for start in range(0, V, BV):
                x = tl.load(logits + start + v, mask=start + v < V, other=-float("inf"))
                dx = tl.exp(x - partition) * factor - (start + v == target).to(tl.float32)
                tl.debug_barrier()  # all have read what lies where dx goes
                tl.store(gradient + start + v, dx.to(gradient.dtype.element_ty), mask=start + v < V)


@triton.jit
def _scale_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scaled = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, scaled.to(out.dtype.element_ty), mask=i < size)


def _check_dtype(h: Tensor) -> None:
    if h.dtype not in DTYPES:
        raise UnsupportedError(f"h is {h.dtype}: the Triton kernel takes bf16, fp16 and fp32")


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    valid = (targets == IGNORE) | ((targets >= 0) & (targets < vocabulary))
    torch._assert_async(valid.all(), "a target is neither a token nor -100")


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32."""
    return torch.mm(a, b) if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in fp32, in place."""
    if total is None:
        return _product(a, b)
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def forward(
    h: Tensor, head: Tensor, targets: Tensor, z_loss_coef: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sums and, where asked for, the gradients, as `q3n_functional.ops.linear_cross_entropy` says."""
    (num, _), vocabulary, h, head, targets = h.shape, len(head), h.contiguous(), head.contiguous(), targets.contiguous()
    _check_dtype(h)
    _check_targets(targets, vocabulary)
    terms = torch.empty(2, num, dtype=torch.float32, device=h.device)
    dh, dhead = torch.empty_like(h) if gradients else h.new_empty(0), None
    parts = list(chunks(num, vocabulary))
    for rows in parts:
        logits = _product(h[rows], head.mT)
        dlogits = logits.view(h.dtype)  # [M, V], or twice as wide
        _row_kernel[(len(logits),)](
            logits, targets[rows], terms[0, rows], terms[1, rows], dlogits, z_loss_coef,
            V=vocabulary, BV=min(BLOCK, triton.next_power_of_2(vocabulary)), STRIDE=dlogits.shape[1], IGNORE=IGNORE,
            GRADIENT=gradients, num_warps=WARPS,
        )  # fmt: skip
        if gradients:
            dlogits = dlogits[:, :vocabulary]
            torch.mm(dlogits, head, out=dh[rows])
            dhead = dlogits.mT @ h[rows] if len(parts) == 1 else _added(dhead, dlogits.mT, h[rows])
    cross_entropy, z_loss = terms.sum(1)
    if dhead is None:
        dhead = torch.zeros_like(head) if gradients else head.new_empty(0)
    return cross_entropy + z_loss_coef * z_loss, cross_entropy.clone(), z_loss.clone(), dh, dhead.to(head.dtype)


def backward(dtotal: Tensor, dh: Tensor, dhead: Tensor, h: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Return both gradients times the 0-d `dtotal`. By torch's product with a number on the device it takes three times
    as long: that reads element by element."""
    _check_dtype(dh)
    return _scaled(dh, dtotal), _scaled(dhead, dtotal)


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out
