"""The named points of the model where tokens or parameters change place; without a mesh each is the identity.

Between blocks a rank has a piece of the sequence (with tp and `Mesh.sequence`), inside a block all tokens of its cp
piece and a part of the heads, of the width or of the vocabulary (Shoeybi et al. 2019, Megatron-LM; Korthikanti et al.
2022, sequence parallelism). Everything is a local tensor; what the ranks compute adds up as
`q3n_functional.parallel.collectives` says.

Letters: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn.functional import linear

from q3n_functional.config import Config
from q3n_functional.ops import embedding, linear_cross_entropy, linear_log_partition
from q3n_functional.ops.linear_cross_entropy import Sums
from q3n_functional.ops.linear_log_partition import OTHER
from q3n_functional.ops.registration import wide
from q3n_functional.packing import IGNORE
from q3n_functional.parallel.collectives import Axis, all_gather, all_reduce, maximum, parameter, reduce_scatter
from q3n_functional.parallel.mesh import AXES, Mesh, check_size
from q3n_functional.parallel.rules import Layout
from q3n_functional.params import Parameters, named_leaves

GROUPS = {
    "fsdp": ("dp", "cp"),
    "replicate": ("replicate",),
    "cp": ("cp",),
    "ep": ("ep",),
    "ep_copies": ("ep",),
    "tp": ("tp",),
    "tokens": ("replicate", "dp", "cp", "ep"),
    "world": AXES,
}
"""The groups of ranks that something is exchanged in, by the axes of the mesh that they span.

In ep_copies gradients of parameters that ep ranks have alike are summed, which takes a while: the exchanges of tokens
in ep, for which everything waits, would queue behind them in one group. On cards ep's stream goes before all others.
"""

T = TypeVar("T")


class Parallel(NamedTuple):
    """Where this rank stands in every group, and how the parameters lie."""

    mesh: Mesh
    layouts: Parameters
    fsdp: Axis
    replicate: Axis
    cp: Axis
    ep: Axis
    ep_copies: Axis
    tp: Axis
    tokens: Axis
    world: Axis
    gathered: bool = False
    """Whether parameters come whole to where they are used, as `q3n_functional.parallel.ahead` brings them."""


class Place(NamedTuple):
    """A parameter where it is used: along which dim it is gathered, and which ranks hold copies."""

    dim: int | None
    copies: list[Axis]


def connect(mesh: Mesh, layouts: Parameters, device: torch.device, timeout: timedelta | None = None) -> Parallel:
    """This rank's `Parallel`. Every rank of an initialised torch.distributed calls it once; it makes the groups.

    An exchange that takes longer than `timeout` (torch.distributed's own where None) is an error. Raises ValueError
    where the mesh does not have as many ranks as there are.
    """
    check_size(mesh, dist.get_world_size())
    axes: dict[str, Any] = {
        name: _axis(mesh, spanned, device, timeout, urgent=name == "ep") for name, spanned in GROUPS.items()
    }
    return Parallel(mesh, layouts, **axes)


def _axis(
    mesh: Mesh, axes: tuple[str, ...], device: torch.device, timeout: timedelta | None, urgent: bool = False
) -> Axis:
    """The group that spans `axes`. Each rank makes all groups, as torch.distributed wants."""
    ranks = torch.arange(mesh.size).view([mesh.degree(axis) for axis in AXES])
    inside = [AXES.index(axis) for axis in axes]
    outside = [i for i in range(len(AXES)) if i not in inside]
    lists = ranks.permute(*outside, *inside).reshape(-1, ranks.numel() // _outer(mesh, outside)).tolist()
    mine = next(members for members in lists if dist.get_rank() in members)
    place = torch.tensor([mine.index(dist.get_rank())], device=device)
    if len(mine) == 1:
        return Axis(1, "", place)
    options = _urgent(timeout) if urgent and device.type == "cuda" else None
    group, _ = dist.new_subgroups_by_enumeration(lists, timeout, pg_options=options)
    return Axis(len(mine), group.group_name, place)


def _urgent(timeout: timedelta | None) -> Any:
    """Options of a group whose kernels go before what else waits for the card."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    if timeout is not None:
        options._timeout = timeout  # torch warns where it is another than the group's
    return options


def _outer(mesh: Mesh, outside: list[int]) -> int:
    product = 1
    for i in outside:
        product *= mesh.degree(AXES[i])
    return product


def whole(shards: T, layouts: Any, parallel: Parallel | None) -> T:
    """Parameters as a block uses them: gathered from the ranks that share them out, still cut over tp and ep."""
    if parallel is None or parallel.gathered:
        return shards
    return cast(T, pytree.tree_map(lambda p, where: _used(p, where, parallel), shards, layouts))


def _used(p: Tensor, where: Layout, parallel: Parallel) -> Tensor:
    dim, copies = place(where, parallel)
    return parameter(p, parallel.fsdp, dim, copies)


def place(where: Layout, parallel: Parallel) -> Place:
    """How a parameter that lies so is used."""
    axes = (parallel.replicate, parallel.ep_copies, parallel.tp)
    dims = (None, where.ep, where.tp)
    copies = [axis for axis, dim in zip(axes, dims, strict=True) if dim is None]
    return Place(where.fsdp, copies)


def enter_block(x_BTD: Tensor, parallel: Parallel | None) -> Tensor:
    """The rank's piece of the sequence between blocks to all tokens that its block works on."""
    if parallel is None or not parallel.mesh.sequence:
        return x_BTD
    return all_gather(x_BTD, parallel.tp, 1)


def leave_block(y_BTD: Tensor, parallel: Parallel | None) -> Tensor:
    """The part of the result that the rank's heads or columns add, to the rank's piece of the sum."""
    if parallel is None:
        return y_BTD
    return reduce_scatter(y_BTD, parallel.tp, 1) if parallel.mesh.sequence else all_reduce(y_BTD, parallel.tp)


def embed(tokens_BT: Tensor, table_VD: Tensor, parallel: Parallel | None) -> Tensor:
    """The tokens' rows of a table whose rows tp ranks share out, as they lie between blocks."""
    if parallel is None or parallel.tp.size == 1:
        return embedding(tokens_BT, table_VD)
    rows_BT, mine_BT = _own(tokens_BT, table_VD, parallel)
    return leave_block(embedding(rows_BT, table_VD, mine_BT), parallel)


def _own(tokens_BT: Tensor, table_VD: Tensor, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """The tokens' places in the rank's part of the vocabulary, 0 for others, and which are in it."""
    rows_BT = tokens_BT - parallel.tp.rank * table_VD.shape[0]
    mine_BT = (rows_BT >= 0) & (rows_BT < table_VD.shape[0])
    return rows_BT.where(mine_BT, 0), mine_BT


def cross_entropy(
    h_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, z_loss_coef: float, parallel: Parallel | None
) -> Sums:
    """`q3n_functional.ops.linear_cross_entropy` with the rows of the head shared out over tp.

    Only maxima, sums of exponentials and the targets' logits, a number a token each, are exchanged.
    """
    if parallel is None or parallel.tp.size == 1:
        return linear_cross_entropy(h_BTD, head_VD, targets_BT, z_loss_coef)
    rows_BT, mine_BT = _own(targets_BT, head_VD, parallel)
    rows_BT = rows_BT.where(mine_BT, OTHER).masked_fill(targets_BT == IGNORE, IGNORE)
    part_BT, picked_BT = linear_log_partition(enter_block(h_BTD, parallel), head_VD, rows_BT)
    highest_BT = maximum(part_BT, parallel.tp)
    sums_BT = all_reduce((part_BT - highest_BT).exp(), parallel.tp)
    partition_BT = (sums_BT.log() + highest_BT).masked_fill(targets_BT == IGNORE, 0)
    # The log-partitions are the same on every rank: each counts its share of them.
    entropy = partition_BT.sum() / parallel.tp.size - picked_BT.sum()
    z_loss = partition_BT.square().sum() / parallel.tp.size
    return Sums(entropy + z_loss_coef * z_loss, entropy.detach(), z_loss.detach())


def logits(h_BD: Tensor, head_VD: Tensor, parallel: Parallel | None) -> Tensor:
    """Logits [B, V] of hidden states that all ranks have, from a head whose rows tp shares out: the same bits on each.

    ep ranks make them alike. Where their kernels round differently they would go on to write different texts, and wait
    for each other for ever: the largest of theirs counts.
    """
    logits_BV = linear(h_BD, head_VD)
    if parallel is None:
        return logits_BV
    return maximum(all_gather(logits_BV, parallel.tp, -1), parallel.ep)


def summed(x: Tensor, axis: str, parallel: Parallel | None) -> Tensor:
    """The sum of the ranks' x over `axis`, one of `GROUPS`."""
    return x if parallel is None else all_reduce(x, getattr(parallel, axis))


def worth(local: Tensor, parallel: Parallel | None) -> Tensor:
    """What the rank differentiates: a scalar with the value of the ranks' sum and the gradient of its own part."""
    if parallel is None:
        return local
    own = local.detach()
    return local + (all_reduce(own, parallel.world) - own)


def total_norm(gradients: Mapping[str, Tensor], parallel: Parallel | None) -> Tensor:
    """The global norm of gradients by name, each number counted once however many ranks hold it."""
    norms = {name: torch.linalg.vector_norm(g, dtype=wide(g.dtype)) for name, g in gradients.items()}
    if parallel is None:
        norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        return norm
    where = cast(dict[str, Layout], named_leaves(parallel.layouts))
    squares = [norm.square() / where[name].copies for name, norm in norms.items()]
    return all_reduce(torch.stack(squares).sum(), parallel.world).sqrt()


def own_groups(weight_GD: Tensor, config: Config, parallel: Parallel | None) -> Tensor:
    """The rows of the key/value heads that the rank's query heads read; all rows where it has no others."""
    groups, head_dim = config.num_key_value_heads, config.head_dim
    if parallel is None or weight_GD.shape[0] == max(groups // parallel.tp.size, 1) * head_dim:
        return weight_GD
    # Fewer heads than ranks: several ranks read the same one.
    head = parallel.tp.rank // (parallel.tp.size // groups)
    weight_GKD: Tensor = weight_GD.unflatten(0, (groups, head_dim))
    return weight_GKD.index_select(0, head)[0]
