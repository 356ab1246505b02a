"""A model's parameters as text, from its configuration alone: works at any size without taking memory for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from q3n_functional.config import Config
from q3n_functional.parallel.mesh import AXES, Mesh
from q3n_functional.parallel.rules import Layout, named_layouts
from q3n_functional.params import Spec, named_specs

T = TypeVar("T")


def summary(config: Config, mesh: Mesh | None = None) -> str:
    """Every leaf with shape, axes, dtype, parameters and bytes, a line each; layers that are alike stand there once.

    Counted as stored in bf16, but for the leaves that are always fp32. With `mesh`, each rank's placement and bytes.

    Raises:
        ValueError: the model does not fit the mesh.
    """
    if mesh is not None:
        return _placements(config, mesh)
    specs = named_specs(config)
    head = _line("parameter", "shape", "axes", "dtype", "parameters", "bytes")
    return "\n".join([head, *_body(specs, config.num_hidden_layers), _total("total", specs.values())])


def _body(specs: Mapping[str, Spec], num_layers: int) -> Iterator[str]:
    yield _leaf("embed_tokens", specs["embed_tokens"])
    layers = [_under(specs, f"layers.{number}.") for number in range(num_layers)]
    for numbers in _alike(layers):
        title = f"layer{'s' * (len(numbers) > 1)} {_ranges(numbers)}"
        yield from _section(title, layers[numbers[0]], len(numbers))
    yield from (_leaf(name, specs[name]) for name in ("norm", "lm_head") if name in specs)
    if prediction := _under(specs, "mtp."):
        yield from _section("mtp", prediction)


def _under(leaves: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}


def _section(title: str, leaves: Mapping[str, Spec], times: int = 1) -> Iterator[str]:
    yield _total(title, leaves.values(), times)
    yield from (_leaf(f"  {name}", leaf) for name, leaf in leaves.items())


def _placements(config: Config, mesh: Mesh) -> str:
    places = named_layouts(config, mesh)
    lines = [_place("parameter", "placement", "shape per rank", "copies", "bytes per rank")]
    outer = {name: where for name, where in places.items() if not name.startswith("layers.")}
    lines += [_placed(name, outer[name]) for name in ("embed_tokens",)]
    layers = [_under(places, f"layers.{number}.") for number in range(config.num_hidden_layers)]
    for numbers in _alike(layers):
        lines.append(f"layer{'s' * (len(numbers) > 1)} {_ranges(numbers)}")
        lines += [_placed(f"  {name}", where) for name, where in layers[numbers[0]].items()]
    lines += [_placed(name, where) for name, where in outer.items() if name != "embed_tokens"]
    stored, trained = (_per_rank(places.values(), kind) for kind in (torch.bfloat16, torch.float32))
    ranks = " x ".join(f"{axis} {mesh.degree(axis)}" for axis in AXES if mesh.degree(axis) > 1)
    lines.append(f"{mesh.size} ranks: {ranks or 'one device'}")
    lines.append(f"parameters per rank: {_bytes(stored)} in bf16")
    # Training keeps fp32 parameters, gradients and two moments of AdamW.
    lines.append(f"parameters, gradients and AdamW per rank: {_bytes(4 * trained)} in fp32")
    return "\n".join(lines)


def _placed(name: str, where: Layout) -> str:
    size = _bytes(where.num_bytes(torch.bfloat16))
    return _place(name, str(where), str(list(where.local_shape)), str(where.copies), size)


def _place(name: str, where: str, shape: str, copies: str, size: str) -> str:
    return f"{name:{_NAME}} {where:16} {shape:18} {copies:>6} {size:>14}"


def _per_rank(places: Collection[Layout], dtype: torch.dtype) -> int:
    return sum(where.num_bytes(dtype) for where in places)


def _alike(layers: Sequence[Mapping[str, object]]) -> list[list[int]]:
    """The numbers of the layers with the same leaves, in the order of their first."""
    groups: dict[object, list[int]] = {}
    for number, leaves in enumerate(layers):
        groups.setdefault(tuple(leaves.items()), []).append(number)
    return list(groups.values())


def _ranges(numbers: list[int]) -> str:
    """`0-2 4-6` for 0, 1, 2, 4, 5, 6."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return " ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))


def _total(title: str, leaves: Collection[Spec], times: int = 1) -> str:
    count, size = times * sum(leaf.numel for leaf in leaves), times * sum(_num_bytes(leaf) for leaf in leaves)
    numbers = _line("", f"{times} alike" if times > 1 else "", "", "", f"{count:,}", _bytes(size))
    # A title too long for its column stands alone, so that the numbers stay in theirs.
    return f"{title}\n{numbers}" if len(title) > _NAME else title + numbers[len(title) :]


def _leaf(name: str, leaf: Spec) -> str:
    dtype = str(leaf.dtype or torch.bfloat16).removeprefix("torch.")
    return _line(name, str(list(leaf.shape)), leaf.axes, dtype, f"{leaf.numel:,}", _bytes(_num_bytes(leaf)))


def _num_bytes(leaf: Spec) -> int:
    return leaf.numel * (leaf.dtype or torch.bfloat16).itemsize


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


_NAME = 32


def _line(name: str, shape: str, axes: str, dtype: str, count: str, size: str) -> str:
    return f"{name:{_NAME}} {shape:16} {axes:4} {dtype:8} {count:>14} {size:>10}"
