"""Hugging Face folders in and out: config.json, model*.safetensors, and what else belongs to the model.

Tensors stream: besides the model's own leaves, one tensor of the folder exists in memory at a time, in either
direction. What this package does not know is carried along, so that a folder can be read and written without loss.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional.config import Config
from q3n_functional.names import Source, sources
from q3n_functional.parallel.mesh import Mesh
from q3n_functional.parallel.rules import Layout, named_layouts
from q3n_functional.params import Parameters, named_leaves, named_specs, path_name, spec
from q3n_functional.shards import (
    INDEX,
    SINGLE,
    Entry,
    Stored,
    and_more,
    entry_point,
    open_file,
    partition,
    stored_tensors,
    write_bytes,
    write_file,
)

HEAD = "lm_head.weight"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CARRIED_FILES = (
    *("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)
MAX_SHARD_BYTES = 5_000_000_000


class Extras(NamedTuple):
    """What a folder holds beside the model: tensors with other names, and tokenizer files by name."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, bytes]


class Checkpoint(NamedTuple):
    """A folder's content. `dtypes` are those of the tensors on disk, by their names there."""

    params: Parameters
    config: Config
    dtypes: Mapping[str, torch.dtype]
    extras: Extras


def load(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mesh: Mesh | None = None,
    rank: int = 0,
) -> Checkpoint:
    """Read a Hugging Face folder of Qwen3-Next.

    Everything is checked against the headers of the files before memory is taken for the model. Files are never
    unpickled. If config.json does not say whether there is a module for multi-token prediction, the presence of
    `mtp.*` tensors does.

    Args:
        folder: holds config.json and model.safetensors, or an index and its shards.
        dtype: of the leaves; None keeps each as it is stored. A_log, dt_bias and the gated norm's weight are fp32
            whatever is asked.
        device: where the leaves are made.
        mesh: with it, the leaves are the shards of its `rank`, and no more than these is read of the model.
        rank: of this process on `mesh`.

    Raises:
        ValueError: a mesh that cannot hold the model; a configuration that `Config.from_json` refuses; a tensor that
            is missing, not one of this model's, or of another shape or kind of number; a file that is missing or
            truncated; an index that is wrong.
    """
    folder = Path(folder)
    stored = stored_tensors(folder)
    config = _read_config(folder, stored)
    _check_experts(folder, config, stored)
    wanted = sources(config, tied_head=HEAD in stored)
    _check_names(folder, config, wanted, stored)
    _check_entries(wanted, stored)
    _check_tied_head(config, stored)
    mesh = mesh or Mesh()
    places, at = named_layouts(config, mesh), mesh.coordinates(rank)
    leaves = _empty_leaves(places, wanted, stored, dtype, device)
    tensors = _fill(leaves, {name: place.offsets(at) for name, place in places.items()}, wanted, stored)
    dtypes = {name: stored[name].entry.dtype for name in wanted}
    return Checkpoint(_tree(config, leaves), config, dtypes, Extras(tensors, _carried_files(folder)))


def read_config(folder: Path) -> Config:
    """The configuration that `load` would give, of a folder whose headers alone are read; raises as `load` does."""
    return _read_config(folder, stored_tensors(folder))


def save(
    folder: Path | str,
    params: Parameters,
    config: Config,
    dtypes: Mapping[str, torch.dtype] | None = None,
    extras: Extras | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder that transformers, vLLM, SGLang and `load` read.

    Files are written under temporary names and renamed when all are complete, the one that a reader starts from last:
    an interrupted save leaves the old checkpoint, or none, and never a mixture.

    Args:
        folder: made if absent; a checkpoint in it is replaced, other files stay.
        params: the leaves of `config`'s tree, on any device.
        config: of the model.
        dtypes: of the tensors on disk by their names there, such as `load` returned; where absent, that of the leaf.
        extras: tensors and files to write as they are.
        max_shard_bytes: a model beyond this size is cut into several files and an index.

    Raises:
        ValueError: `params` is not the tree of `config`, or an extra tensor has a name of the model's.
    """
    folder, leaves = Path(folder), named_leaves(params)
    _check_leaves(config, leaves)
    plan = _plan(config, {name: leaf.dtype for name, leaf in leaves.items()}, dtypes, extras, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file in plan.shards:
            _write_shard(_temporary(folder, file), plan, file, leaves)
        for file, text in plan.texts.items():
            write_bytes(_temporary(folder, file), text)
        _publish(folder, [*plan.shards, *plan.texts])
    finally:
        for file in (*plan.shards, *plan.texts):
            _temporary(folder, file).unlink(missing_ok=True)


def save_part(
    folder: Path,
    whole: Callable[[list[str]], Mapping[str, Tensor]],
    config: Config,
    dtypes: Mapping[str, torch.dtype],
    extras: Extras,
    part: tuple[int, int],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the files that are this rank's, `part` = (rank, ranks), of a folder that all of them write together.

    The folder is whole when all have returned; until then nobody must read it. `whole` gives leaves of the model by
    name, those of one file at a time; `dtypes` are those of all leaves; the rest is as for `save`.
    """
    plan, (rank, ranks) = _plan(config, dtypes, None, extras, max_shard_bytes), part
    folder.mkdir(parents=True, exist_ok=True)
    for file in list(plan.shards)[rank::ranks]:
        needed = {leaf for name in plan.shards[file] if name in plan.wanted for leaf in plan.wanted[name].leaves}
        _write_shard(folder / file, plan, file, whole(sorted(needed)))
    if rank == 0:
        for file, text in plan.texts.items():
            write_bytes(folder / file, text)


class _Plan(NamedTuple):
    """A folder to be written: its tensors as they come from the model, how they are cut into files, its other files."""

    wanted: Mapping[str, Source]
    extras: Extras
    entries: Mapping[str, Entry]
    shards: Mapping[str, list[str]]
    texts: Mapping[str, bytes]


def _plan(
    config: Config,
    leaf_dtypes: Mapping[str, torch.dtype],
    dtypes: Mapping[str, torch.dtype] | None,
    extras: Extras | None,
    max_shard_bytes: int,
) -> _Plan:
    extras, dtypes = extras or Extras({}, {}), dtypes or {}
    wanted = sources(config, tied_head=HEAD in dtypes)
    if clash := sorted(wanted.keys() & extras.tensors.keys()):
        raise ValueError(f"extras holds {clash[0]}, which is a tensor of the model; remove it{and_more(clash)}")
    entries = {name: Entry(_disk_dtype(source, leaf_dtypes, dtypes), source.shape) for name, source in wanted.items()}
    entries |= {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in extras.tensors.items()}
    parts = partition(entries, max_shard_bytes)
    shards = dict(zip(_shard_names(len(parts)), parts, strict=True))
    texts = {**extras.files, "config.json": _config_text(config, extras)}
    if len(shards) > 1:
        texts[INDEX] = _index_text(shards, entries)
    return _Plan(wanted, extras, entries, shards, texts)


def _write_shard(path: Path, plan: _Plan, file: str, leaves: Mapping[str, Tensor]) -> None:
    def tensor(name: str) -> Tensor:
        if name in plan.wanted:
            return _assemble(plan.wanted[name], leaves, plan.entries[name])
        return plan.extras.tensors[name]

    write_file(path, {name: plan.entries[name] for name in plan.shards[file]}, tensor)


def _read_config(folder: Path, stored: Mapping[str, Stored]) -> Config:
    path = folder / "config.json"
    try:
        config = Config.from_json(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; a folder of weights needs it") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    says = "num_nextn_predict_layers" in json.loads(path.read_text(encoding="utf-8"))
    if not says and any(name.startswith("mtp.") for name in stored):
        return replace(config, num_nextn_predict_layers=1)
    return config


def _check_experts(folder: Path, config: Config, stored: Mapping[str, Stored]) -> None:
    # Before each gets its names, which for a number without meaning would take hours.
    sparse = config.num_nextn_predict_layers or any(map(config.is_sparse, range(config.num_hidden_layers)))
    if sparse and config.num_experts > len(stored):
        raise ValueError(
            f"{entry_point(folder)}: num_experts is {config.num_experts} in config.json, but there are only "
            f"{len(stored)} tensors; the weights are incomplete or config.json is of another model"
        )


def _check_names(folder: Path, config: Config, wanted: Iterable[str], stored: Mapping[str, Stored]) -> None:
    start, prefixes = entry_point(folder), ["model.", "lm_head."]
    if config.num_nextn_predict_layers:
        prefixes.append("mtp.")
    if missing := [name for name in wanted if name not in stored]:
        remedy = "; the weights are incomplete or config.json is of another model"
        if missing[0].startswith("mtp."):
            remedy = "; set num_nextn_predict_layers to 0 in config.json to do without multi-token prediction"
        raise ValueError(f"{start}: {missing[0]} is missing{and_more(missing)}{remedy}")
    wanted = set(wanted)
    if surplus := [name for name in stored if name not in wanted and name.startswith(tuple(prefixes))]:
        raise ValueError(
            f"{stored[surplus[0]].file}: {surplus[0]} is no tensor of the model that config.json describes"
            f"{and_more(surplus)}; correct config.json or remove it"
        )


def _check_entries(wanted: Mapping[str, Source], stored: Mapping[str, Stored]) -> None:
    for name, source in wanted.items():
        file, (dtype, shape) = stored[name]
        if shape != source.shape:
            raise ValueError(
                f"{file}: {name} has shape {list(shape)}, but config.json makes it {list(source.shape)}; "
                "one of the two is of another model"
            )
        if dtype not in FLOATS:
            allowed = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
            raise ValueError(f"{file}: {name} is {dtype}; it must be one of {allowed}, so convert quantised weights")


def _check_tied_head(config: Config, stored: Mapping[str, Stored]) -> None:
    if not config.tie_word_embeddings or HEAD not in stored:
        return
    head, embedding = (_read_one(stored[name].file, name) for name in (HEAD, "model.embed_tokens.weight"))
    if not bool((head == embedding).all()):
        raise ValueError(
            f"{stored[HEAD].file}: {HEAD} differs from model.embed_tokens.weight, but config.json ties them; "
            "set tie_word_embeddings to false to keep both"
        )


def _read_one(path: Path, name: str) -> Tensor:
    with open_file(path) as file:
        return cast(Tensor, file.get_tensor(name))


def _empty_leaves(
    places: Mapping[str, Layout],
    wanted: Mapping[str, Source],
    stored: Mapping[str, Stored],
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> dict[str, Tensor]:
    kept: dict[str, torch.dtype] = {}
    for name, source in wanted.items():
        for leaf in source.leaves:
            own = stored[name].entry.dtype
            kept[leaf] = torch.promote_types(own, kept.get(leaf, own))  # experts may differ; none may lose bits
    return {
        name: torch.empty(place.local_shape, dtype=place.spec.dtype or dtype or kept[name], device=device)
        for name, place in places.items()
    }


def _fill(
    leaves: Mapping[str, Tensor],
    offsets: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Source],
    stored: Mapping[str, Stored],
) -> dict[str, Tensor]:
    """Copy every wanted tensor into the leaves' shards, file by file, and return the others."""
    others: dict[str, Tensor] = {}
    files: dict[Path, list[str]] = defaultdict(list)
    for name, (path, _) in stored.items():
        files[path].append(name)
    for path, names in files.items():
        with open_file(path) as file:
            for name in names:
                tensor = file.get_tensor(name)
                if name not in wanted:
                    others[name] = tensor.clone()  # of the file's mapping, which must not outlive a later save
                    continue
                wanted[name].read(tensor, leaves, offsets)
    return others


def _tree(config: Config, leaves: Mapping[str, Tensor]) -> Parameters:
    return cast(Parameters, pytree.tree_map_with_path(lambda path, _: leaves[path_name(path)], spec(config)))


def _carried_files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: path.read_bytes() for path in paths if any(fnmatch(path.name, p) for p in CARRIED_FILES)}


def _check_leaves(config: Config, leaves: Mapping[str, Tensor]) -> None:
    specs = named_specs(config)
    if other := sorted(specs.keys() ^ leaves.keys()):
        where = "config" if other[0] in specs else "params"
        raise ValueError(f"{other[0]} is only in {where}; params must be the tree of config{and_more(other)}")
    for name, leaf in leaves.items():
        if tuple(leaf.shape) != specs[name].shape:
            raise ValueError(f"{name} has shape {list(leaf.shape)}, but config makes it {list(specs[name].shape)}")


def _disk_dtype(
    source: Source, leaf_dtypes: Mapping[str, torch.dtype], dtypes: Mapping[str, torch.dtype]
) -> torch.dtype:
    if source.name in dtypes:
        return dtypes[source.name]
    own = [leaf_dtypes[name] for name in source.leaves]
    return max(own, key=lambda dtype: dtype.itemsize)


def _assemble(source: Source, leaves: Mapping[str, Tensor], entry: Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    for part, leaf in source.pieces(tensor, leaves):
        part.copy_(leaf.detach())
    return tensor


def _config_text(config: Config, extras: Extras) -> bytes:
    content = config.to_json()
    if any(name.startswith("mtp.") for name in extras.tensors):
        # Said aloud, because the presence of these tensors alone would mean that the model uses them.
        content["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return (json.dumps(content, indent=2) + "\n").encode()


def _shard_names(num: int) -> list[str]:
    if num == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{num:05}.safetensors" for i in range(1, num + 1)]


def _index_text(shards: Mapping[str, Iterable[str]], entries: Mapping[str, Entry]) -> bytes:
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(entry.nbytes for entry in entries.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _temporary(folder: Path, file: str) -> Path:
    return folder / f".{file}.tmp"


def _publish(folder: Path, files: Iterable[str]) -> None:
    """Give complete files their names. What a reader starts from goes first and comes last."""
    starts = (SINGLE, INDEX)
    for stale in (*(folder / name for name in starts), *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)
    for file in sorted(files, key=lambda name: name in starts):
        _temporary(folder, file).rename(folder / file)
