"""How many ranks share what: the degrees of a layout, which of them fit a model, and where a rank stands.

Ranks are numbered with `AXES` from the outermost to the innermost, so that tensor parallel ranks are neighbours.
Rows of a batch are cut over replicate x dp x ep, their tokens over cp, and over tp between blocks. Parameters and
optimizer states are cut over dp x cp (fully sharded data parallel, Zhao et al. 2023), experts over ep as well, heads
and widths over tp; replicate holds whole copies (hybrid sharding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from q3n_functional.config import Config

AXES = ("replicate", "dp", "cp", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The degree of every kind of parallelism; their product is the number of ranks."""

    dp: int = 1
    """The number of data parallel ranks, which also share out parameters and optimizer state (FSDP)."""
    replicate: int = 1
    """The number of copies of all that (HSDP)."""
    cp: int = 1
    """The number of ranks that share the tokens of a row."""
    ep: int = 1
    """The number of ranks that share the experts; each has rows of its own."""
    tp: int = 1
    """The number of ranks that share heads, widths and vocabulary."""
    sequence: bool = True
    """Whether tp ranks also share the tokens between blocks (sequence parallel)."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.degree(axis) for axis in AXES)

    def degree(self, axis: str) -> int:
        """The number of ranks along `axis`; one of `AXES`."""
        return int(getattr(self, axis))

    @property
    def fsdp(self) -> int:
        """How many ranks share out parameters: dp x cp."""
        return self.dp * self.cp

    @property
    def rows(self) -> int:
        """How many ranks have rows of their own: replicate x dp x ep."""
        return self.replicate * self.dp * self.ep

    @property
    def sequence_shards(self) -> int:
        """Into how many pieces the tokens of a row are cut between blocks; with cp a rank has two of them or more."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence else 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each of `AXES`, and on "fsdp" and "rows"."""
        at: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, at[axis] = divmod(rank, self.degree(axis))
        at["fsdp"] = at["dp"] * self.cp + at["cp"]
        at["rows"] = (at["replicate"] * self.dp + at["dp"]) * self.ep + at["ep"]
        return at


def parse(text: str) -> Mesh:
    """The mesh that `dp=2,tp=4` means; ValueError for anything else."""
    known = {field.name for field in fields(Mesh)} - {"sequence"}
    mesh = Mesh()
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value.isdecimal():
            raise ValueError(f"mesh part {part!r} must be one of {', '.join(sorted(known))} with a degree, as in dp=2")
        mesh = replace(mesh, **cast(dict[str, Any], {name: int(value)}))
    return mesh


def check_size(mesh: Mesh, launched: int) -> None:
    """Raise ValueError where `mesh` is not one of as many ranks as were `launched`."""
    if launched == mesh.size:
        return
    degrees = " x ".join(f"{axis} {mesh.degree(axis)}" for axis in AXES if mesh.degree(axis) > 1) or "one device"
    raise ValueError(
        f"the mesh ({degrees}) needs torchrun with hosts x --nproc-per-node = {mesh.size}, but {launched} "
        f"{'were' if launched > 1 else 'was'} launched"
    )


def check(mesh: Mesh, config: Config) -> None:
    """Raise ValueError, naming sizes and the degrees that would do, where `mesh` cannot hold a model of `config`."""
    for axis in AXES:
        if mesh.degree(axis) < 1:
            raise ValueError(f"mesh.{axis} is {mesh.degree(axis)}, it must be at least 1")
    for axis in ("tp", "ep"):
        degree = mesh.degree(axis)
        if wrong := next(_unfit(axis, degree, config), None):
            most = max(config.num_attention_heads, config.num_experts, 1)
            legal = [d for d in range(1, most + 1) if not any(_unfit(axis, d, config))]
            raise ValueError(
                f"mesh.{axis} is {degree}, but {wrong}; this model allows {axis} {', '.join(map(str, legal))}"
            )


def _unfit(axis: str, degree: int, c: Config) -> Iterator[str]:
    """What does not divide, in words."""
    for name in _divided(c)[axis]:
        if getattr(c, name) % degree:
            yield f"{name} is {getattr(c, name)}, not a multiple of it"
    if axis == "tp" and c.num_key_value_heads % degree and degree % c.num_key_value_heads:
        yield f"num_key_value_heads is {c.num_key_value_heads}, neither a multiple nor a divisor of it"


def _divided(c: Config) -> dict[str, list[str]]:
    linear, full = ("linear_attention" in c.layer_types), ("full_attention" in c.layer_types)
    sparse = [c.is_sparse(i) for i in range(c.num_hidden_layers)]
    mtp = c.num_nextn_predict_layers > 0
    names = ["vocab_size"]
    names += ["linear_num_key_heads"] * linear + ["num_attention_heads"] * (full or mtp)
    if any(sparse) or (mtp and c.num_experts):
        names += ["moe_intermediate_size", "shared_expert_intermediate_size"]
    if not all(sparse) or (mtp and not c.num_experts):
        names.append("intermediate_size")
    return {"tp": names, "ep": ["num_experts"]}


def check_batch(mesh: Mesh, config: Config, rows: int, length: int) -> None:
    """Raise ValueError where `mesh` cannot share out a batch of `rows` x `length` tokens."""
    if rows % mesh.rows:
        raise ValueError(
            f"a batch has {rows} rows, which replicate x dp x ep = {mesh.rows} ranks cannot share: use a multiple"
        )
    if length % mesh.sequence_shards:
        raise ValueError(
            f"a row has {length} tokens, which are cut into {'2 x ' * (mesh.cp > 1)}cp{' x tp' * mesh.sequence} = "
            f"{mesh.sequence_shards} "
            "pieces: use a multiple"
        )
    taps = config.linear_conv_kernel_dim
    if mesh.cp > 1 and length // (2 * mesh.cp) < taps - 1:
        raise ValueError(
            f"mesh.cp is {mesh.cp}, but {2 * mesh.cp} pieces of a row of {length} tokens are below the {taps - 1} that "
            "the convolution looks back on: use a smaller cp"
        )
