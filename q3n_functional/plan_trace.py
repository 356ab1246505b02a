"""Everything that a program does, noted operator by operator: operations, bytes moved and sent, memory that lives.

It sees real tensors and fake ones alike. (torch.distributed._tools.mem_tracker does the memory of modules and
optimizers; functions over trees have neither.)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from q3n_functional import plan_cost

KINDS = ("parameters", "optimizer", "gradients", "activations", "temporary")
"""What memory is for; activations are what forward leaves for backward."""
FUSED = "fused"
"""The name of a kernel of several operators."""


@dataclass(eq=False)
class Block:
    """A storage: its bytes, what for, and the operators before which it came and went (None where it stayed).

    exchange: the collective that wrote it last.
    """

    bytes: int
    kind: str
    born: int
    died: int | None = None
    exchange: int | None = None


class Op(NamedTuple):
    """An operator that ran. wide: in fp32. reads, writes: blocks with bytes. group, size: of a collective, with the
    bytes of its tensor where that is whole."""

    name: str
    phase: str
    ours: bool
    flops: float
    wide: bool
    fused: bool
    reads: list[tuple[Block, int]]
    writes: list[tuple[Block, int]]
    workspace: int = 0
    group: str = ""
    size: int = 0


class Kernel(NamedTuple):
    """What runs as one: an operator, or neighbours that a compiler fuses. op: the index of its last operator. ours:
    of this package."""

    name: str
    phase: str
    ours: bool
    op: int
    flops: float
    wide: bool
    bytes: int
    group: str = ""
    size: int = 0


FAKES: dict[Any, Any] = {
    # What a device would have to be asked for.
    torch.ops.aten._local_scalar_dense.default: lambda answers, x: next(answers),
    # The tensor as it is; torch's fake makes another.
    torch.ops._c10d_functional.wait_tensor.default: lambda answers, x: x,
    # torch has no fake, and would make the tensors real.
    torch.ops.aten._fused_adamw_.default: lambda answers, *tensors: None,
    torch.ops.aten._fused_adamw_.tensor_lr: lambda answers, *tensors: None,
}
"""What stands for operators where tensors are fake."""


class Tracker(TorchDispatchMode):
    """Notes what runs inside it, in `ops` and `blocks`, and in `waits` before which operators it waits for which.

    answers: what the program reads from the device, in order; needed where tensors are fake.
    """

    def __init__(self, answers: Iterator[int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.blocks: list[Block] = []
        self.waits: list[tuple[int, int]] = []
        self.phase = "forward"
        self._answers = answers
        self._open = True
        self._of = WeakIdKeyDictionary()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What the compiler does with its own fakes is not the program's; what it made is seen."""
        return True

    def own(self, tree: Any, kind: str) -> None:
        """Says what the tensors of `tree` are."""
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._block(leaf).kind = kind

    def turn(self) -> None:
        """Says that forward is over: what it made and is still there waits for backward."""
        for block in self.blocks:
            if block.died is None and block.kind == "temporary":
                block.kind = "activations"
        self.phase = "backward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and notes one operator."""
        if func is torch.ops.prim.device.default:  # of fakes, and often
            return func(*args)
        if self._answers is not None and func in FAKES:
            out = FAKES[func](self._answers, *args)
        else:
            out = func(*args, **(kwargs or {}))
        if func is torch.ops._c10d_functional.wait_tensor.default:
            self._wait(args[0])
        self._note(func, args, kwargs or {}, out)
        return out

    def __exit__(self, *error: Any) -> None:
        """What is there now has stayed, whatever becomes of it."""
        self._open = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _wait(self, x: Tensor) -> None:
        exchange = self._block(x).exchange
        if exchange is not None:
            self.waits.append((len(self.ops), exchange))

    def _note(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        read = [(self._block(x), _num_bytes(x)) for x in inputs]
        written = [(self._block(x), _num_bytes(x)) for x in _mutated(op, args, kwargs)]
        for i, x in enumerate(outputs):
            if x.untyped_storage() not in self._of:
                size = plan_cost.stored(op, args, i, _num_bytes(x))
                written.append((self._block(x, size), size))
        if not written:  # a view
            return
        wide = any(x.dtype in (torch.float32, torch.float64) for x in inputs)
        costs = plan_cost.count(op, args, kwargs, out), wide, plan_cost.is_fused(op)
        group, size = _collective(op, args, outputs)
        for block, _ in written if group else ():
            block.exchange = len(self.ops)
        rest = plan_cost.workspace(op, args), group, size
        self.ops.append(Op(plan_cost.name(op), self.phase, plan_cost.is_ours(op), *costs, read, written, *rest))

    def _block(self, x: Tensor, num_bytes: int | None = None) -> Block:
        storage = x.untyped_storage()
        if storage not in self._of:
            block = Block(storage.nbytes() if num_bytes is None else num_bytes, "temporary", len(self.ops))
            self._of[storage] = block
            self.blocks.append(block)
            weakref.finalize(storage, self._free, block).atexit = False
        found: Block = self._of[storage]
        return found

    def _free(self, block: Block) -> None:
        if self._open:
            block.died = len(self.ops)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _num_bytes(x: Tensor) -> int:
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())


def _mutated(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    if not op._schema.is_mutable:
        return []
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given.get(name) for name in names])


def _collective(op: OpOverload, args: tuple[Any, ...], outputs: list[Tensor]) -> tuple[str, int]:
    """The group of a collective and the bytes of its tensor where that is whole."""
    if op.namespace != "_c10d_functional" or not outputs:
        return "", 0
    group = next(arg for arg in reversed(args) if isinstance(arg, str))
    return group, max(sum(map(_num_bytes, tensors)) for tensors in (_tensors(args), outputs))


def kernels(tracker: Tracker) -> list[Kernel]:
    """What ran as a compiler would run it: neighbours that it fuses are one kernel.

    What such a kernel makes for itself alone never comes to memory: those blocks are taken off the tracker's too.
    """
    last_read = {block: i for i, op in enumerate(tracker.ops) for block, _ in op.reads}
    found: list[Kernel] = []
    for run in _runs(tracker.ops):
        for i in run if len(run) > 1 else ():
            for block, _ in tracker.ops[i].writes:
                if block.born >= run.start and block.died is not None and last_read.get(block, 0) < run.stop:
                    block.bytes = 0
        found.append(_kernel(tracker.ops, run))
    return found


def _runs(ops: list[Op]) -> Iterator[range]:
    start = 0
    for i, op in enumerate(ops):
        if i and not (op.fused and ops[i - 1].fused and op.phase == ops[i - 1].phase):
            yield range(start, i)
            start = i
    yield range(start, len(ops))


def _kernel(ops: list[Op], run: range) -> Kernel:
    """One kernel of the operators in `run`; blocks that stay inside it have no bytes any more."""
    reads, writes = Counter[Block](), Counter[Block]()
    for op in ops[run.start : run.stop]:
        for block, size in op.reads:
            reads[block] += 0 if block in writes else size
        for block, size in op.writes:
            writes[block] += size
    moved = sum(min(size, block.bytes) for sizes in (reads, writes) for block, size in sizes.items())
    last = ops[run[-1]]
    name = last.name if len(run) == 1 else FUSED
    flops = sum(ops[i].flops for i in run)
    return Kernel(name, last.phase, last.ours, run[-1], flops, last.wide, moved, last.group, last.size)


def memory(tracker: Tracker) -> NDArray[np.float64]:
    """[kinds, operators]: the bytes of each of `KINDS` while each operator runs."""
    num = len(tracker.ops)
    changes = np.zeros((len(KINDS), num + 1))
    for block in tracker.blocks:
        kind = KINDS.index(block.kind)
        changes[kind, min(block.born, num)] += block.bytes
        if block.died is not None:
            changes[kind, min(block.died, num)] -= block.bytes
    living = changes.cumsum(1)[:, :-1]
    living[KINDS.index("temporary")] += [op.workspace for op in tracker.ops]
    return living
