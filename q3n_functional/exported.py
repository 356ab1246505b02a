"""Running what `q3n export` wrote: nothing of the model's code is imported, only the operators that programs call.

Letters: N rows, T time, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import q3n_functional.ops  # noqa: F401  # registers the operators

MANIFEST, WEIGHTS = "exported.json", "weights.safetensors"


class Exported(NamedTuple):
    """The programs of a folder, their weights by name, and the content of exported.json."""

    programs: Mapping[str, Callable[..., Tensor]]
    weights: dict[str, Tensor]
    manifest: Mapping[str, Any]


def program_name(program: str) -> str:
    """The file of a program of torch.export."""
    return f"{program}.pt2"


def compiled_name(program: str) -> str:
    """The file of a program's AOTInductor package."""
    return f"{program}.aot.pt2"


def load(folder: Path | str, *, aot: bool = False) -> Exported:
    """Read a folder that `q3n export` wrote; with `aot` its AOTInductor packages, made for one kind of processor.

    Raises ValueError for a folder that is not whole, has no packages, or is for a device that is not here.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder / MANIFEST} is missing; give a folder that `q3n export` wrote to its end")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    paths = {name: folder / (compiled_name if aot else program_name)(name) for name in manifest["programs"]}
    if missing := [path for path in paths.values() if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing; `q3n export`{' with --aot' if aot else ''} writes it")
    if manifest["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{folder} was exported for cuda, which is not here; export it again with --device cpu")
    weights = load_file(folder / WEIGHTS, manifest["device"])
    programs = {name: _program(path, aot) for name, path in paths.items()}
    return Exported(programs, {name: weights[name] for name in manifest["weights"]}, manifest)


def _program(path: Path, aot: bool) -> Callable[..., Tensor]:
    if aot:
        return torch._inductor.aoti_load_package(str(path))
    return torch.export.load(path).module()


def empty_cache(exported: Exported) -> dict[str, Tensor]:
    """The cache of rows without tokens, by name; `lengths_B` (int32 [N]) is how many tokens each row has in it."""
    return {
        name: torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"]), device=exported.manifest["device"])
        for name, leaf in exported.manifest["cache"].items()
    }


def prefill(exported: Exported, tokens_1T: Tensor, cu_seqlens: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """Logits [N, V] behind N packed documents, document n continuing row n of `cache`, which is overwritten.

    tokens_1T: int64 [1, T]. cu_seqlens: int32 [N+1], where documents begin and the last one ends; an empty one leaves
    its row as it is, and its logits mean nothing. No row may come to have more tokens than the capacity.
    Raises ValueError for other shapes or dtypes.
    """
    if tokens_1T.shape[1] == 1:  # the program takes two at least; what lies behind the last document is padding
        tokens_1T = torch.nn.functional.pad(tokens_1T, (0, 1))
    return _run(exported, "prefill", {"tokens": tokens_1T, "cu_seqlens": cu_seqlens}, cache)


def decode(exported: Exported, tokens_N: Tensor, active_N: Tensor, cache: dict[str, Tensor]) -> Tensor:
    """Logits [N, V] behind one more token of each active row; `cache` is overwritten.

    tokens_N: int64 [N]. active_N: bool [N]; the other rows stay as they are, and their logits mean nothing. Every row,
    active or not, must have fewer tokens than the capacity. Raises ValueError for other shapes or dtypes.
    """
    return _run(exported, "decode", {"tokens": tokens_N, "active": active_N}, cache)


def _run(exported: Exported, name: str, inputs: Mapping[str, Tensor], cache: dict[str, Tensor]) -> Tensor:
    for wanted, given in ((exported.manifest["programs"][name], inputs), (exported.manifest["cache"], cache)):
        _check(name, wanted, given)
    cache = {leaf: cache[leaf] for leaf in exported.manifest["cache"]}
    return exported.programs[name](*inputs.values(), cache, exported.weights)


def _check(program: str, wanted: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
    if wanted.keys() != given.keys():
        raise ValueError(f"{program} got the tensors {sorted(given)}; it takes {sorted(wanted)}")
    for name, tensor in given.items():
        shape, dtype = wanted[name]["shape"], wanted[name]["dtype"]
        if not (str(tensor.dtype) == f"torch.{dtype}" and _fits(tensor.shape, shape)):
            raise ValueError(
                f"{program}: {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
                f"the program was exported for {dtype} {shape}, where a pair is a range"
            )


def _fits(shape: torch.Size, wanted: list[Any]) -> bool:
    if len(shape) != len(wanted):
        return False
    pairs = (size if isinstance(size, list) else [size, size] for size in wanted)
    return all(low <= size <= high for size, (low, high) in zip(shape, pairs, strict=True))
