"""Writing on a mesh: tp ranks share heads, widths and vocabulary, ep ranks the experts, and all have the same rows.

Unlike in training, no rank has tokens of its own: a step has one token a row, too few to share out. So sequences are
not cut between blocks, and a step's tokens do not travel to their experts. Caches are of the rank's heads alone. Every
rank has all logits, of the last tokens only, and draws the same tokens from the same seeds.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from q3n_functional import checkpoint
from q3n_functional.checkpoint import Checkpoint
from q3n_functional.config import Config
from q3n_functional.parallel.collectives import Axis
from q3n_functional.parallel.launch import World, together
from q3n_functional.parallel.mesh import Mesh, check_size
from q3n_functional.parallel.placement import Parallel, own_groups
from q3n_functional.parallel.placement import connect as connect_training
from q3n_functional.parallel.rules import layouts
from q3n_functional.params import DecoderLayer, FullAttention, Parameters


def check(mesh: Mesh) -> None:
    """Raise ValueError where `mesh` shares out rows or their tokens."""
    for axis in ("replicate", "dp", "cp"):
        if mesh.degree(axis) != 1:
            raise ValueError(
                f"mesh.{axis} is {mesh.degree(axis)}, but writing shares out neither rows nor their tokens: use tp and "
                "ep, and launch each group of rows by itself"
            )


def connect(mesh: Mesh, config: Config, device: torch.device, timeout: timedelta | None = None) -> Parallel:
    """This rank's `Parallel` for `decode` and `generate`; otherwise as `placement.connect`.

    Raises ValueError, naming the degrees that would do, where `mesh` cannot hold a model of `config`, has other degrees
    than tp and ep, or not as many ranks as there are.
    """
    check(mesh)
    mesh = replace(mesh, sequence=False)
    parallel = connect_training(mesh, layouts(config, mesh), device, timeout)
    return parallel._replace(tokens=Axis(1, "", torch.zeros(1, dtype=torch.int64, device=device)))


def load(
    folder: Path, mesh: Mesh, device: torch.device, where: World, dtype: torch.dtype | None = None
) -> tuple[Checkpoint, Parallel | None]:
    """The rank's part of the model in a Hugging Face folder, and its place; None for a mesh of one rank.

    All ranks of `launch.joined` call it, and each reads no more than its part. Raises ValueError, on all of them and
    before weights are read, as `connect` and `checkpoint.load` do.
    """
    check(mesh)
    check_size(mesh, where.size)
    model = together(lambda: checkpoint.load(folder, dtype, device, mesh, where.rank))
    if where.size == 1:
        return model, None
    parallel = connect(mesh, model.config, device)
    return model._replace(params=only_own_heads(model.params, parallel, config=model.config)), parallel


def only_own_heads(params: Parameters, parallel: Parallel, *, config: Config) -> Parameters:
    """The rank's parameters without the key/value heads that others read: a step then need not pick its own.

    They differ where there are fewer of these heads than ranks, which all have them as training does.
    """

    def cut(layer: DecoderLayer) -> DecoderLayer:
        if not isinstance(layer.mixer, FullAttention):
            return layer
        k, v = (own_groups(w, config, parallel) for w in (layer.mixer.k, layer.mixer.v))
        return layer._replace(mixer=layer.mixer._replace(k=k, v=v))

    return params._replace(layers=tuple(map(cut, params.layers)))


def own_heads(config: Config, parallel: Parallel | None) -> Config:
    """A model with the rank's heads alone, so that `cache.empty(own_heads(config, parallel), ...)` is the rank's cache.

    Query heads, of which a cache knows nothing, are all there. Fewer key/value heads than ranks: each rank has the one
    that its query heads read. Raises ValueError for the `Parallel` of a training.
    """
    if parallel is None:
        return config
    if parallel.mesh.sequence or parallel.tokens.size > 1:
        raise ValueError(
            "parallel shares out tokens, as for training: make it with q3n_functional.parallel.decode.connect"
        )
    # At least one, also where the model has no layers with such heads.
    heads = max(config.num_key_value_heads // parallel.tp.size, 1)
    keys = max(config.linear_num_key_heads // parallel.tp.size, 1)
    values = keys * (config.linear_num_value_heads // config.linear_num_key_heads)
    return replace(config, num_key_value_heads=heads, linear_num_key_heads=keys, linear_num_value_heads=values)
