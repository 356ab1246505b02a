# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Log-partitions of a linear head on CUDA: products by cuBLAS, what is between them in Triton.

With logits x of one token and log Z = log sum exp x, which forward takes as the fused loss does,

    dx = exp(x - log Z) dlog Z + onehot(target) dx[target]

in the inputs' dtype, a chunk of tokens at a time; the head's gradient adds up over chunks in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.linear_cross_entropy import check_dtype, product, softmax, summed
from q3n_functional.ops.linear_cross_entropy import IGNORE, chunks
from q3n_functional.ops.linear_log_partition import OTHER

BLOCK = 4096


@triton.jit(do_not_specialize_on_alignment=["dpartition", "dpicked", "partition", "targets"])
def _gradient_kernel(
    dpartition, dpicked, partition, logits, targets, gradient,
    V: tl.constexpr, BV: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    parts: tl.constexpr = (V + BV - 1) // BV
    row = (tl.program_id(0) // parts).to(tl.int64)
    v = tl.program_id(0) % parts * BV + tl.arange(0, BV)
    target = tl.load(targets + row)
    dx = tl.zeros([BV], tl.float32)
    if target != IGNORE:
        x = tl.load(logits + row * V + v, mask=v < V, other=0.0)
        dx = tl.exp(x - tl.load(partition + row)) * tl.load(dpartition + row)
        dx += tl.where(v == target, tl.load(dpicked + row), 0.0)
    tl.store(gradient + row * V + v, dx.to(gradient.dtype.element_ty), mask=v < V)


def forward(h: Tensor, head: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-partitions, targets' logits and all logits, as `q3n_functional.ops.linear_log_partition` says."""
    check_dtype(h)
    valid = (targets == IGNORE) | ((targets >= OTHER) & (targets < len(head)))
    torch._assert_async(valid.all(), "a target is no row of the head, -1 or -100")
    logits = product(h.contiguous(), head.contiguous().mT)
    partition, picked = (torch.empty(len(h), dtype=torch.float32, device=h.device) for _ in range(2))
    if logits.numel():
        softmax(logits, targets.contiguous(), partition, picked)
    return partition, picked, logits


def backward(
    dpartition: Tensor, dpicked: Tensor, partition: Tensor, logits: Tensor, h: Tensor, head: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of h and head."""
    check_dtype(h)
    (num, vocabulary), h, head = logits.shape, h.contiguous(), head.contiguous()
    each = [x.contiguous() for x in (dpartition, dpicked, partition)]
    logits, targets, dh, dhead = logits.contiguous(), targets.contiguous(), torch.empty_like(h), None
    parts = list(chunks(num, vocabulary, h.element_size()))
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    for rows in parts:
        dlogits = torch.empty(logits[rows].shape, dtype=h.dtype, device=h.device)
        launch(_gradient_kernel, len(dlogits) * triton.cdiv(vocabulary, block))(
            *(x[rows] for x in each), logits[rows], targets[rows], dlogits, V=vocabulary, BV=block, IGNORE=IGNORE,
            num_warps=8,
        )  # fmt: skip
        torch.mm(dlogits, head, out=dh[rows])
        dhead = dlogits.mT @ h[rows] if len(parts) == 1 else summed(dhead, dlogits.mT, h[rows])
    return dh, torch.zeros_like(head) if dhead is None else dhead.to(head.dtype)
