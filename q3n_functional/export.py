"""Prefill and decoding as programs of torch.export, which run without the model's Python code: `q3n export`.

The programs are graphs over plain tensors: trees become dicts of leaves by name at their border. Weights are inputs,
in one safetensors file beside the programs: both share one copy of it, on disk and on the device, where programs with
weights inside would each have their own. The cache's tensors are overwritten, as by `decode.in_place`: a program that
returned a new cache would copy all keys each step. `q3n_functional.exported` loads and runs a folder.

Letters: N rows, T time, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from q3n_functional import cache as caches
from q3n_functional import checkpoint
from q3n_functional.cache import Cache
from q3n_functional.config import Config
from q3n_functional.decode import extend, in_place
from q3n_functional.exported import MANIFEST, WEIGHTS, compiled_name, program_name
from q3n_functional.model import forward_cached
from q3n_functional.params import Parameters, named_leaves, path_name, spec
from q3n_functional.shards import Entry, write_file

Tensors = Mapping[str, Tensor]


class _Program(torch.nn.Module):
    """What the two programs share: the trees whose leaves they are given in order."""

    def __init__(self, config: Config, cache: Cache) -> None:
        super().__init__()
        self.config, self.trees = config, (pytree.tree_structure(spec(config)), pytree.tree_structure(cache))

    def state(self, cache: Tensors, weights: Tensors) -> tuple[Parameters, Cache]:
        params, state = (
            pytree.tree_unflatten(list(leaves.values()), tree)
            for leaves, tree in zip((weights, cache), self.trees, strict=True)
        )
        return params, state


class _Prefill(_Program):
    def forward(self, tokens: Tensor, cu_seqlens: Tensor, cache: Tensors, weights: Tensors) -> Tensor:
        """`decode.extend`: logits [N, V] behind packed documents [1, T]."""

        def run(params: Parameters, cache: Cache) -> tuple[Cache, Tensor]:
            logits_NV, after = extend(params, tokens, cu_seqlens, cache, config=self.config)
            return after, logits_NV

        return in_place(run)(*self.state(cache, weights))


class _Decode(_Program):
    def forward(self, tokens: Tensor, active: Tensor, cache: Tensors, weights: Tensors) -> Tensor:
        """Logits [N, V] behind one more token [N] of each active row; the others stay as they are."""

        def run(params: Parameters, cache: Cache) -> tuple[Cache, Tensor]:
            logits_N1V, after = forward_cached(params, tokens[:, None], cache, config=self.config)
            return caches.chosen(active, after, cache), logits_N1V[:, 0]

        return in_place(run)(*self.state(cache, weights))


def export(
    folder: Path,
    out: Path,
    *,
    rows: int,
    capacity: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    aot: bool = False,
) -> None:
    """Write the model in the Hugging Face folder `folder` to `out` as programs of prefill and decoding.

    Written are prefill.pt2 and decode.pt2, with `aot` their AOTInductor packages prefill.aot.pt2 and decode.aot.pt2,
    weights.safetensors, config.json and the tokenizer's files, and last exported.json, which names the programs' inputs
    in order with shapes and dtypes. The prediction module is left out.

    Args:
        folder: as for `checkpoint.load`.
        out: a new folder.
        rows: sequences that run together.
        capacity: tokens that each has room for.
        dtype: of the weights, as for `checkpoint.load`; the cache has that of the embedding.
        device: on which the programs will run; it is part of them.
        aot: compile too, which needs a C++ compiler, and on CUDA the card that is compiled for.

    Raises:
        ValueError: `out` exists, `rows` or `capacity` is out of range, the folder is not one of the model, or
            there is no compiler for `aot`.
    """
    _check(folder, out, rows, capacity)
    if aot:
        _check_compiler()
    found = checkpoint.load(folder, dtype, device)
    if capacity > (limit := found.config.max_position_embeddings):
        raise ValueError(f"capacity is {capacity}, above max_position_embeddings {limit} of {folder}: lower it")
    config, params = replace(found.config, num_nextn_predict_layers=0), found.params._replace(mtp=())
    cache = caches.empty(config, rows, capacity, params.embed_tokens.dtype, device)
    programs = _programs(params, cache, config=config, length=rows * capacity)
    out.mkdir(parents=True)
    for name, program in programs.items():
        if aot:
            logging.info("compiling %s", name)
            torch._inductor.aoti_compile_and_package(program, package_path=str(out / compiled_name(name)))
        program.example_inputs = None  # which would be saved too, and the weights are among them
        torch.export.save(program, out / program_name(name))
    leaves = named_leaves(params)
    entries = {name: Entry(leaf.dtype, tuple(leaf.shape)) for name, leaf in leaves.items()}
    write_file(out / WEIGHTS, entries, leaves.__getitem__)
    for file, content in found.extras.files.items():
        (out / file).write_bytes(content)
    config.to_json(out / "config.json")
    manifest = _manifest(params, cache, programs, config, capacity)
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _check(folder: Path, out: Path, rows: int, capacity: int) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a Hugging Face folder of Qwen3-Next")
    if out.exists():
        raise ValueError(f"{out} exists: choose another folder or remove it")
    if rows < 1:
        raise ValueError(f"rows is {rows}; at least 1 sequence must run")
    if capacity < 2:
        raise ValueError(f"capacity is {capacity}; a sequence needs room for 2 tokens: one is read, one is written")


def _check_compiler() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(f"AOTInductor finds no C++ compiler: install g++ or set CXX to one ({error})") from error


def _programs(
    params: Parameters, cache: Cache, *, config: Config, length: int
) -> dict[str, torch.export.ExportedProgram]:
    """The programs by name; a prefill takes 2 to `length` tokens at once."""
    rows, device = len(cache.lengths_B), cache.lengths_B.device
    state = (_named(cache), named_leaves(params))
    tokens_N = torch.zeros(rows, dtype=torch.int64, device=device)
    tokens_1T = tokens_N.new_zeros(1, length)
    # An example of documents that fill the stream: its values are not part of the graph, its length is a symbol.
    cu_seqlens = torch.arange(rows + 1, dtype=torch.int32, device=device) * (length // rows)
    time = torch.export.Dim("T", min=2, max=length) if length > 2 else None
    static = tuple(dict.fromkeys(leaves) for leaves in state)
    with torch.no_grad():
        return {
            "prefill": torch.export.export(
                _Prefill(config, cache), (tokens_1T, cu_seqlens, *state), dynamic_shapes=({1: time}, None, *static)
            ),
            "decode": torch.export.export(_Decode(config, cache), (tokens_N, tokens_N == 0, *state)),
        }


def _named(cache: Cache) -> dict[str, Tensor]:
    return {path_name(keys): leaf for keys, leaf in pytree.tree_flatten_with_path(cache)[0]}


def _manifest(
    params: Parameters,
    cache: Cache,
    programs: Mapping[str, torch.export.ExportedProgram],
    config: Config,
    capacity: int,
) -> dict[str, Any]:
    """The content of exported.json. An input's dim that may vary has the range of its lengths."""
    rows = len(cache.lengths_B)
    stream = {"tokens": _described("int64", 1, [2, rows * capacity]), "cu_seqlens": _described("int32", rows + 1)}
    step = {"tokens": _described("int64", rows), "active": _described("bool", rows)}
    dtype = str(params.embed_tokens.dtype).removeprefix("torch.")
    return {
        "torch": torch.__version__,
        "device": cache.lengths_B.device.type,
        "rows": rows,
        "capacity": capacity,
        "programs": {name: {"prefill": stream, "decode": step}[name] for name in programs},
        "output": {"logits": _described(dtype, rows, config.vocab_size)},
        "cache": _table(_named(cache)),
        "weights": _table(named_leaves(params)),
    }


def _table(tensors: Tensors) -> dict[str, Any]:
    return {name: _described(str(t.dtype).removeprefix("torch."), *t.shape) for name, t in tensors.items()}


def _described(dtype: str, *shape: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape)}
