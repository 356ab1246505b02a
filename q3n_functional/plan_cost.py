"""What one operator costs: operations, what it takes while it runs, and bytes that a collective sends.

Products of torch are counted by torch.utils.flop_counter; the operators of this package, as `flops` counts them, here.
torch's own estimators (torch.distributed._tools) want modules, and the card they estimate for.

Letters as in the operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from q3n_functional.ops.chunks import STATES_BYTES
from q3n_functional.ops.linear_cross_entropy import CHUNK_BYTES
from q3n_functional.parallel.mesh import AXES, Mesh
from q3n_functional.plan_cards import (
    COPY,
    EXCHANGE,
    FP32_PRODUCT,
    LAUNCH,
    LINK,
    NETWORK_ROUND,
    NVLINK_ROUND,
    OPERATORS,
    POINTWISE,
    PRODUCT,
    Card,
)

if TYPE_CHECKING:
    from q3n_functional.plan_trace import Kernel

Count = Callable[..., float]


def _conv(x: Tensor, weight: Tensor, *rest: Any) -> float:
    return 2.0 * weight.shape[1] * x.numel()


def _delta_rule(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> float:
    return 6.0 * q.shape[3] * v.numel()


def _attention(q: Tensor, k: Tensor, *rest: Any) -> float:
    # The causal half of the keys of a row, also of pieces of rows: a rank's two see as many together.
    return 2.0 * q.numel() * k.shape[1]


def _experts(x: Tensor, slots: Tensor, weights: Tensor, gate: Tensor, *rest: Any) -> float:
    return 6.0 * slots.numel() * gate.shape[1] * gate.shape[2]


def _router(x: Tensor, router: Tensor, *rest: Any) -> float:
    return 2.0 * x.numel() * router.shape[0]


def _head(h: Tensor, head: Tensor, targets: Tensor, z_loss_coef: float, gradients: bool, impl: str) -> float:
    return (6.0 if gradients else 2.0) * h.numel() * head.shape[0]


FLOPS: dict[str, Count] = {
    "causal_conv": _conv,
    "causal_conv_backward": lambda dy, dstate, x, weight, *rest: 2 * _conv(x, weight),
    "causal_conv_qkv_backward": lambda dq, dk, dv, dstate, x, weight, *rest: 2 * _conv(x, weight),
    "gated_delta_rule": _delta_rule,
    "recurrent_gated_delta_rule": _delta_rule,
    "gated_delta_rule_backward": lambda do, dstate, q, k, v, *rest: 2 * _delta_rule(q, k, v),
    "attention": _attention,
    "attention_backward": lambda do, q, k, *rest: 2 * _attention(q, k),
    "piece_attention": _attention,
    "piece_attention_backward": lambda do, q, k, *rest: 2 * _attention(q, k),
    "grouped_swiglu": _experts,
    "grouped_swiglu_backward": lambda dy, x, weights, hidden, order, ends, gate, *rest: (
        2 * _experts(x, weights, weights, gate)
    ),
    "router_logits": _router,
    "router_logits_backward": lambda dlogits, x, router, impl: 2 * _router(x, router),
    "float8_grouped_mm": lambda a, b, *rest: 2 * a.numel() * b.shape[1],
    "linear_cross_entropy": _head,
    "linear_log_partition": _router,
    "linear_log_partition_backward": lambda dpartition, dpicked, partition, logits, h, head, *rest: (
        2 * _router(h, head)
    ),
}
"""Multiplications and additions of an operator of this package, given its arguments."""


def _slots(slots: int, width: int, size: int) -> int:
    # The experts' outputs come in slices of columns on CUDA.
    return min(slots * width * size, max(512 * 2**20, 256 * slots * size))


def _experts_workspace(x: Tensor, slots: Tensor, weights: Tensor, gate: Tensor, *rest: Any) -> int:
    num, (_, inner, width), size = slots.numel(), gate.shape, x.itemsize
    return num * inner * size + _slots(num, width, size)


def _experts_gradient_workspace(
    dy: Tensor, x: Tensor, weights: Tensor, hidden: Tensor, order: Tensor, ends: Tensor, gate: Tensor, *rest: Any
) -> int:
    num, (_, inner, width), size = weights.numel(), gate.shape, x.itemsize
    return num * (3 * inner * size + inner // 8) + _slots(num, width, size)


def _head_workspace(h: Tensor, head: Tensor, targets: Tensor, coef: float, gradients: bool, impl: str) -> int:
    logits = len(h) * len(head) * 4
    return min(CHUNK_BYTES, logits) + 4 * head.numel() * (gradients and logits > CHUNK_BYTES)


def _log_partition_gradient_workspace(
    dpartition: Any, dpicked: Any, partition: Any, logits: Tensor, h: Tensor, *rest: Any
) -> int:
    return min(CHUNK_BYTES, logits.numel() * h.itemsize)


def _delta_rule_gradient_workspace(do: Any, dstate: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> int:
    # States and their gradients in front of every chunk, the corrected values, the rows that the inverse is read into.
    cu_seqlens, gates, inverse = rest[5:8]
    states = 2 * int(gates.shape[0]) * v.shape[2] * q.shape[3] * v.shape[3]
    parts = 2 if states * v.itemsize > STATES_BYTES else 1
    corrected = v.numel() // (parts if cu_seqlens is None else 1)
    return (states // parts + corrected + int(inverse.numel())) * v.itemsize


def _attention_gradient_workspace(do: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    # Flash attention sums dq in fp32, and takes keys and values apart for every query head.
    return q.numel() * 4 + 2 * k.numel() // k.shape[2] * q.shape[2] * q.itemsize


def _piece_attention_workspace(q: Tensor, k: Tensor, *rest: Any) -> int:
    # The output in fp32, and one piece of queries with its output in a block.
    return q.numel() * (4 + q.itemsize)


def _piece_attention_gradient_workspace(do: Tensor, q: Tensor, k: Tensor, *rest: Any) -> int:
    # All gradients in fp32; of one block the piece of do, q, o and dq, this in fp32 too, and cuDNN's gradients of as
    # many keys, apart for every query head.
    return 4 * (q.numel() + 2 * k.numel()) + q.numel() // 2 * (6 * q.itemsize + 4)


WORKSPACE: dict[str, Callable[..., int]] = {
    "grouped_swiglu": _experts_workspace,
    "grouped_swiglu_backward": _experts_gradient_workspace,
    "linear_cross_entropy": _head_workspace,
    "linear_log_partition_backward": _log_partition_gradient_workspace,
    "gated_delta_rule": lambda q, k, v, *rest: v.shape[:3].numel() * rest[-2] * v.itemsize,
    "gated_delta_rule_backward": _delta_rule_gradient_workspace,
    "attention_backward": _attention_gradient_workspace,
    "piece_attention": _piece_attention_workspace,
    "piece_attention_backward": _piece_attention_gradient_workspace,
}
"""Bytes that an operator's kernels take while they run, beside arguments and results; as the operators document it."""


def is_ours(op: OpOverload) -> bool:
    """Whether `op` is of this package."""
    return op.namespace == "q3n"


def name(op: OpOverload) -> str:
    """Such as `mm`, without namespace and overload."""
    return str(op._schema.name.split("::")[-1])


def count(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Multiplications and additions; 0 for what moves more than it computes."""
    found = FLOPS.get(name(op)) if is_ours(op) else flop_registry.get(op._overloadpacket)
    formula = cast(Count | None, found)
    if formula is None:
        return 0.0
    return formula(*args) if is_ours(op) else float(formula(*args, **kwargs, out_val=out))


def workspace(op: OpOverload, args: tuple[Any, ...]) -> int:
    """Bytes that are taken only while `op` runs."""
    return WORKSPACE[name(op)](*args) if is_ours(op) and name(op) in WORKSPACE else 0


def stored(op: OpOverload, args: tuple[Any, ...], output: int, num_bytes: int) -> int:
    """The bytes of an output as a card has it: the delta rule's inverse is in v's dtype there, wider on a CPU."""
    if is_ours(op) and name(op) == "gated_delta_rule" and output == 3:
        size: int = args[2].itemsize
        return num_bytes * size // max(size, torch.float32.itemsize)
    return num_bytes


FALLBACKS = {"topk", "sort", "cumsum", "nonzero"}
"""Operators of torch for which Inductor calls a kernel of torch's."""


def is_fused(op: OpOverload) -> bool:
    """Whether a compiler fuses `op` with its neighbours, as it does pointwise operators, reductions and copies."""
    return op.namespace in ("aten", "prims") and op._overloadpacket not in flop_registry and name(op) not in FALLBACKS


class Link(NamedTuple):
    """How the ranks of a group are connected: how many, how many of them on one host, and by what."""

    size: int
    in_host: int
    name: str


def link(mesh: Mesh, axes: tuple[str, ...], card: Card) -> Link:
    """The link of rank 0's group over `axes`; hosts have consecutive ranks."""
    first = mesh.coordinates(0)
    others = [axis for axis in AXES if axis not in axes]
    places = ((rank, mesh.coordinates(rank)) for rank in range(mesh.size))
    members = [rank for rank, at in places if all(at[axis] == first[axis] for axis in others)]
    in_host = sum(rank < card.per_host for rank in members)
    return Link(len(members), in_host, "NVLink" if in_host == len(members) else "network")


def sent(kernel: Kernel, group: Link) -> float:
    """Bytes that each rank sends for a collective, in rings."""
    rounds = 2 if kernel.name.startswith("all_reduce") else 1
    return rounds * kernel.size * (group.size - 1) / group.size


def time(kernel: Kernel, card: Card, group: Link | None) -> tuple[float, str]:
    """Seconds, and what they are spent on: the longest of arithmetic, memory traffic, launch; or the link it takes."""
    if group is not None:
        return EXCHANGE + _exchange(kernel, card, group), group.name
    share = OPERATORS.get(kernel.name, PRODUCT)
    rate = card.fp32_flops * FP32_PRODUCT if kernel.wide and not kernel.ours else card.flops * share
    reached = COPY if kernel.ours or kernel.flops else POINTWISE
    limits = {"arithmetic": kernel.flops / rate, "memory": kernel.bytes / (card.bandwidth * reached), "launch": LAUNCH}
    longest = max(limits, key=limits.__getitem__)
    return limits[longest], longest


def _exchange(kernel: Kernel, card: Card, group: Link) -> float:
    rounds = math.log2(group.size)
    if group.name == "NVLink":
        return rounds * NVLINK_ROUND + sent(kernel, group) / (card.nvlink * LINK)
    if kernel.name == "all_to_all_single":
        # Only what goes to other hosts takes the network.
        away = kernel.size * (group.size - group.in_host) / group.size
        return rounds * NETWORK_ROUND + away / (card.network * LINK)
    # Rings enter a host by one card and leave it by another: all members' adapters work for the group.
    bandwidth = min(card.nvlink, group.in_host * card.network)
    return rounds * NETWORK_ROUND + sent(kernel, group) / (bandwidth * LINK)
