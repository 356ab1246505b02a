"""A model's parameters as text, from its configuration alone: works at any size without taking memory for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from q3n_functional.config import Config
from q3n_functional.params import Spec, named_specs


def summary(config: Config) -> str:
    """Every leaf with shape, axes, dtype, parameters and bytes, a line each; layers that are alike stand there once.

    Counted as stored in bf16, but for the leaves that are always fp32.
    """
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


def _under(specs: Mapping[str, Spec], prefix: str) -> dict[str, Spec]:
    return {name.removeprefix(prefix): leaf for name, leaf in specs.items() if name.startswith(prefix)}


def _section(title: str, leaves: Mapping[str, Spec], times: int = 1) -> Iterator[str]:
    yield _total(title, leaves.values(), times)
    yield from (_leaf(f"  {name}", leaf) for name, leaf in leaves.items())


def _alike(layers: list[dict[str, Spec]]) -> list[list[int]]:
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
