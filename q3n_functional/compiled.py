"""Compiling a training step: every kind of layer once, or the whole model as one graph; and what moves a parameter.

Static: the model's configuration, all shapes of parameters, the number of offsets in cu_seqlens, rows of a batch. The
length of the rows is static too (code for one length is the fastest) unless `any_length` asks for one graph for all.
Where documents lie and how many there are is data, for which nothing is ever compiled again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from q3n_functional import model, optim
from q3n_functional.model import Metrics, Stages
from q3n_functional.ops import precompile
from q3n_functional.params import DecoderLayer, LinearAttention, SwiGLU

Mode = Literal["none", "layers", "model"]
"""layers: a graph for each kind of layer and one for the loss behind them; model: one graph of everything."""


def inductor(graph: Any, inputs: Sequence[Any]) -> Any:
    """torch.compile's own backend, which meanwhile compiles the Triton kernels of the ops of this package.

    By the string "inductor" they are compiled when the graph first runs, one after the other.
    """
    from torch._inductor.compile_fx import compile_fx

    device = next((x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda), None)
    with contextlib.nullcontext() if device is None else precompile.kernels(device):
        return compile_fx(graph, list(inputs))


BACKEND = {"backend": inductor}


# A function each: Dynamo keeps what it compiled by the code of the outermost function, and so none of these is ever
# compiled a second time (in a model whose layers are one function, the second kind of layer is a recompilation).


def linear_sparse(*arguments: Any, **options: Any) -> Any:
    """A layer of linear attention and experts."""
    return model.layer(*arguments, **options)


def linear_dense(*arguments: Any, **options: Any) -> Any:
    """A layer of linear attention and one SwiGLU."""
    return model.layer(*arguments, **options)


def full_sparse(*arguments: Any, **options: Any) -> Any:
    """A layer of softmax attention and experts."""
    return model.layer(*arguments, **options)


def full_dense(*arguments: Any, **options: Any) -> Any:
    """A layer of softmax attention and one SwiGLU."""
    return model.layer(*arguments, **options)


def stages(any_length: bool = False, ahead: bool = False, reshard_after_forward: bool = True, **options: Any) -> Stages:
    """The parts of `model.loss`, each compiled with `options` of torch.compile (`inductor` without), as its `stages`.

    A step is then one graph for each kind of layer, forward and backward, and one for what stands behind them. `ahead`
    and `reshard_after_forward` are those of `Stages`.
    """
    compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=False, **(options or BACKEND))
    kinds = {
        (linear, dense): compile_(function)
        for (linear, dense), function in zip(
            ((True, False), (True, True), (False, False), (False, True)),
            (linear_sparse, linear_dense, full_sparse, full_dense),
            strict=True,
        )
    }
    finish = compile_(model.finish)

    def layer(p: DecoderLayer, x_BTD: Tensor, shared: Any, *rest: Any, **named: Any) -> Any:
        if any_length:
            mark_length((x_BTD, shared.cos_BTR, shared.sin_BTR, shared.valid_BT, shared.documents), x_BTD.shape[1])
        return kinds[isinstance(p.mixer, LinearAttention), isinstance(p.mlp, SwiGLU)](p, x_BTD, shared, *rest, **named)

    def finished(params: Any, x_BTD: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Metrics]:
        if any_length:
            mark_length((x_BTD, rest), x_BTD.shape[1])
        result: tuple[Tensor, Metrics] = finish(params, x_BTD, *rest, **named)
        return result

    return Stages(layer, finished, ahead, reshard_after_forward)


def mark_length(tree: Any, length: int) -> None:
    """Makes dim 1 of the tree's tensors, where it is the `length` of the rows, any size in what is compiled next."""
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[1] == length:
            torch._dynamo.mark_dynamic(leaf, 1)


def compiled(
    loss: Callable[..., Any], mode: Mode, ahead: bool = False, reshard_after_forward: bool = True, **options: Any
) -> Callable[..., Any]:
    """`loss`, a function that takes `stages` as `model.loss` does, compiled as `mode` says.

    `ahead` and `reshard_after_forward` are those of `Stages`. Raises ValueError for `ahead` in one graph of everything,
    which has no outside to send from.
    """
    if mode == "model" and ahead:
        raise ValueError("ahead with mode 'model': what is sent ahead is between graphs, so compile layers")
    if mode == "none":
        eager = Stages(ahead=ahead, reshard_after_forward=reshard_after_forward)
        return functools.partial(loss, stages=eager) if ahead else loss
    if mode == "layers":
        compiled_ = stages(ahead=ahead, reshard_after_forward=reshard_after_forward, **options)
        return functools.partial(loss, stages=compiled_)
    whole: Callable[..., Any] = torch.compile(loss, fullgraph=True, dynamic=False, **(options or BACKEND))
    return whole


ROW, LARGE = 1024, 2**22


def moves(**options: Any) -> optim.Moves:
    """What moves a parameter, compiled with `options` of torch.compile for any size, as `optim.update_`'s `moves`.

    Small parameters are moved eagerly and together, which launches fewer kernels.
    """
    decayed, plain, muon = (torch.compile(move, fullgraph=True, dynamic=True, **options) for move in optim.MOVES)
    return optim.Moves(
        functools.partial(_apart, decayed, optim.decayed_), functools.partial(_apart, plain, optim.plain_), muon
    )


def _apart(compiled_: Callable[..., None], eager: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Moves large parameters one by one, the others at once."""
    small: list[tuple[Tensor, ...]] = []
    for tensors in zip(*arguments[:4], strict=True):
        if tensors[0].numel() >= LARGE and tensors[0].numel() % ROW == 0 and all(x.is_contiguous() for x in tensors):
            compiled_(*([_rows(x)] for x in tensors), *arguments[4:], **options)
        else:
            small.append(tensors)
    if small:
        eager(*(list(kind) for kind in zip(*small, strict=True)), *arguments[4:], **options)


def _rows(x: Tensor) -> Tensor:
    """The memory of x as rows, which can be read in whole vectors whatever their number.

    Not a view: of one Dynamo asks what it is a view of, and compiles for every kind.
    """
    rows = torch.empty(0, dtype=x.dtype, device=x.device)
    return rows.set_(x.untyped_storage(), x.storage_offset(), (x.numel() // ROW, ROW), (ROW, 1))
