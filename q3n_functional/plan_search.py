"""`q3n plan --search`: which mesh of so many cards trains fastest.

Three sieves. Meshes that the model or the batch does not allow, and those that another one is never slower than, are
left out; then those whose parameters, gradients and moments alone are too large. The rest run a layer of each kind
(a plan of a model that has nothing else), and the fastest of them the whole step, until enough of them fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import prod

import torch
from tqdm import tqdm

from q3n_functional.config import Config
from q3n_functional.parallel.mesh import Mesh, check, check_batch
from q3n_functional.parallel.rules import named_layouts
from q3n_functional.plan import Plan, plan
from q3n_functional.plan_cards import Card
from q3n_functional.plan_report import GIB, bound, name_of
from q3n_functional.train_config import TrainConfig

ENOUGH, MOST = 3, 8
"""How many fitting meshes a search wants, and how many whole steps it tries for them."""

LARGEST_EP = 64
"""The exchange names the rows for every rank, so that compiling it takes time that grows with the square of ep: seconds
at 64, a minute at 256, over five at 512, for two layers on a CPU."""


def search(config: TrainConfig, gpus: int, card: Card) -> list[Plan]:
    """Plans of the most promising meshes of `gpus` ranks: those that fit first, the fastest first.

    Raises ValueError where no mesh is legal, or none is large enough for what every step keeps.
    """
    legal = list(meshes(config, gpus, card))
    if not legal:
        raise ValueError(f"no mesh of {gpus} ranks can share {config.batch_size} rows of {config.seq_len} tokens")
    small = [mesh for mesh in legal if kept(config, mesh) <= card.usable]
    if not small:
        least = min(kept(config, mesh) for mesh in legal)
        raise ValueError(
            f"parameters, gradients and moments take {least / GIB:.0f} GiB of each of {gpus} ranks at least, one "
            f"{card.name} has {card.usable / GIB:.0f}: use more ranks, or moments in bfloat16"
        )
    shallow = replace(config, model=one_of_each(config.model), compile="none")
    bar = tqdm(small, unit="mesh", desc="a layer of each kind", leave=False)
    order = sorted(bar, key=lambda mesh: -plan(replace(shallow, mesh=mesh), card).tokens_per_s)
    found: list[Plan] = []
    for mesh in tqdm(order[:MOST], unit="mesh", desc="whole steps", leave=False):
        found.append(plan(replace(config, mesh=mesh), card))
        if sum(each.fits for each in found) == ENOUGH:
            break
    return sorted(found, key=lambda each: (not each.fits, -each.tokens_per_s))


def meshes(config: TrainConfig, gpus: int, card: Card) -> Iterator[Mesh]:
    """Legal meshes of `gpus` ranks, tensor parallel inside a host, rows in pieces only where there are too few of them.

    Expert parallel to `LARGEST_EP`.
    """
    divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
    for replicate, cp, ep, tp in product(divisors, repeat=4):
        rest = prod((replicate, cp, ep, tp))
        mesh = Mesh(replicate=replicate, dp=gpus // rest, cp=cp, ep=ep, tp=tp) if gpus % rest == 0 else None
        if mesh is None or tp > card.per_host or ep > LARGEST_EP or not _allowed(config, mesh):
            continue
        # As many tokens a rank, and nothing to hand on.
        if cp == 1 or not _allowed(config, replace(mesh, cp=1, dp=mesh.dp * cp)):
            yield mesh


def _allowed(config: TrainConfig, mesh: Mesh) -> bool:
    try:
        check(mesh, config.model)
        check_batch(mesh, config.model, config.batch_size, config.seq_len)
    except ValueError:
        return False
    return True


def kept(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes of a rank's parameters, gradients and two moments."""
    moments: int = getattr(torch, config.optimizer.state_dtype).itemsize
    numbers = sum(where.num_bytes(torch.float32) // 4 for where in named_layouts(config.model, mesh).values())
    return numbers * (4 + 4 + 2 * moments)


def one_of_each(model: Config) -> Config:
    """A model that has one layer of each kind, and next to nothing behind them."""
    kinds = list(dict.fromkeys((kind, model.is_sparse(i)) for i, kind in enumerate(model.layer_types)))
    return replace(
        model,
        num_hidden_layers=len(kinds),
        layer_types=tuple(kind for kind, _ in kinds),
        mlp_only_layers=tuple(i for i, (_, sparse) in enumerate(kinds) if not sparse),
        decoder_sparse_step=1,
        vocab_size=128,
        num_nextn_predict_layers=0,
    )


def table(plans: list[Plan]) -> Iterator[str]:
    """A line for each plan."""
    yield f"{'mesh':36}{'tokens/s':>12}{'step ms':>10}{'peak GiB':>10}  bound by"
    for each in plans:
        ms, (name, share) = each.seconds.sum() * 1e3, bound(each)
        mark = "" if each.fits else "  does not fit"
        line = f"{name_of(each.config.mesh):36}{each.tokens_per_s:12,.0f}{ms:10.1f}{each.peak / GIB:10.2f}"
        yield f"{line}  {name} ({share:.0%}){mark}"
