"""A training step as a CUDA graph: recorded once, then launched as one, without the host's part of every kernel.

What is recorded keeps the addresses of its tensors and the values of its host's numbers for ever. So parameters and
moments must be written where they are, and what changes from step to step must be a tensor, which is copied into one of
the graph's own. (torch.compile's mode "reduce-overhead" makes graphs too, but of each layer's forward and backward by
itself, and copies their inputs; `decode.Captured` is for steps that may be run in vain before they are recorded.)
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Steps that run as they are before one is recorded: they compile and load kernels, which cannot be recorded."""


class _Graph(NamedTuple):
    """inputs: leaves of its own, which `replay` reads."""

    inputs: list[Any]
    replay: Callable[[], Tensor]


def check_device(device: torch.device) -> None:
    """Raise ValueError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, the run's is {device.type}: set cuda_graph to false")


class CapturedStep:
    """`run(*state, inputs)`, which writes `state` in place and returns a tensor: a CUDA graph for each shape of inputs.

    The first calls of new shapes, `WARM_UP` of them, run it plainly and are steps like the others. The next one records
    it; from then on the memory of a step is the graphs' own, all of which share it. RuntimeError where it cannot be
    recorded, as something in it waits for the device.
    """

    def __init__(self, run: Callable[..., Tensor], *state: Any) -> None:
        self._run, self._state = run, state
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._calls = Counter[Any]()
        self._graphs: dict[Any, _Graph] = {}

    def __call__(self, inputs: Any) -> Tensor:
        """One step. `inputs` is a tree of tensors on the device; what else is in it is part of its shape."""
        leaves, tree = pytree.tree_flatten(inputs)
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves)
        self._calls[shapes] += 1
        if self._calls[shapes] <= WARM_UP:
            return _beside(self._stream, self._run, *self._state, inputs)
        if shapes not in self._graphs:
            own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            arguments = *self._state, pytree.tree_unflatten(own, tree)
            self._graphs[shapes] = _Graph(own, _captured(self._stream, self._pool, self._run, *arguments))
            logger.info("steps are a CUDA graph from here on")
        graph = self._graphs[shapes]
        for old, new in zip(graph.inputs, leaves, strict=True):
            if isinstance(new, Tensor):
                old.copy_(new)
        return graph.replay().clone()


def _beside(stream: torch.cuda.Stream, run: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Runs on the stream that will be recorded, as libraries keep what they allocate by stream."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = run(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    return out


def _captured(
    stream: torch.cuda.Stream, pool: Any, run: Callable[..., Tensor], *arguments: Any
) -> Callable[[], Tensor]:
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread may be writing a checkpoint, whose calls are none of the graph's.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = run(*arguments)
    except RuntimeError as error:
        raise RuntimeError(f"the step cannot be recorded as a CUDA graph, set cuda_graph to false: {error}") from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
