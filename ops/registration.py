"""How every op of this package is registered: a schema, a fake, an implementation, a gradient and a vmap rule.

An op is functional: no argument is written and no output aliases an input. Its gradient is an op of its own, so that
torch.compile, opcheck and DTensor see both. The schema's last argument, `impl`, chooses the implementation: "auto"
takes the Triton kernel on CUDA where it fits the arguments and the PyTorch reference elsewhere, and says so once;
"reference" and "triton" ask for one and fail where it cannot run.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, library
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from q3n_functional.ops import precompile

Impl = Literal["auto", "reference", "triton"]
IMPLS = get_args(Impl)
Outputs = Tensor | tuple[Tensor, ...]

logger = logging.getLogger("q3n_functional.ops")
_library = library.Library("q3n", "DEF")


class UnsupportedError(ValueError):
    """What a launcher raises, before it launches anything, for arguments that its kernel is not made for."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def check_documents(cu_seqlens: Tensor | None, tokens: int, name: str = "cu_seqlens", from_first: bool = True) -> None:
    """Raise ValueError where `cu_seqlens` are not offsets of documents in so many tokens, `from_first` on or later.

    Their values are looked at where `is_readable`, elsewhere their dtype and shape alone.
    """
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
        raise ValueError(f"{name} must be int32 [S+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if not is_readable(cu_seqlens):
        return
    begins = cu_seqlens[0] == 0 if from_first else cu_seqlens[0] >= 0
    if not begins or cu_seqlens[-1] > tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"{name} must be offsets into {tokens} tokens, from 0 on, that never fall, got {_shown(cu_seqlens)}"
        )


def is_readable(x: Tensor) -> bool:
    """Whether the values of x are on the host, and those that a program runs with: not a device's, not a tracer's."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and get_proxy_mode() is None
    )


def _shown(offsets: Tensor) -> str:
    first = ", ".join(map(str, offsets[:8].tolist()))
    return f"[{first}{', ...' if len(offsets) > 8 else ''}]"


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Outputs],
    fake: Callable[..., Outputs],
    kernel: str | None,
    layout: torch.Tag = torch.Tag.needs_fixed_stride_order,
) -> OpOverload:
    """Register the op `q3n::name` and return it.

    `reference` takes the schema's arguments but `impl`, runs on any device and returns fresh contiguous tensors;
    `fake` does the same for fake tensors. `kernel` is "module:function" below `q3n_functional.ops.kernels`, imported
    when it first runs, or None while the op has none. `layout` says which strides a compiler may give the arguments.
    """
    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, layout))
    run = functools.partial(_run, name, reference, kernel)
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    library.register_fake(f"q3n::{name}", functools.partial(_fake, name, fake, kernel), lib=_library)
    overload: OpOverload = getattr(torch.ops.q3n, name).default
    return overload


def composite(schema: str, function: Callable[..., Any]) -> OpOverload:
    """Register an op that is only a name for `function`, which applies an autograd.Function; return it.

    AOTAutograd never finds a graph with an autograd.Function in its cache, and finds one with such an op.
    """
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    name = schema.split("(")[0]
    _library.impl(name, function, "CompositeImplicitAutograd")
    overload: OpOverload = getattr(torch.ops.q3n, name).default
    return overload


def _run(name: str, reference: Callable[..., Outputs], kernel: str | None, *args: Any) -> Outputs:
    *arguments, impl = args
    if impl not in IMPLS:
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', got {impl!r}")
    device = next(a.device.type for a in arguments if isinstance(a, Tensor))
    why = (
        "as asked" if impl == "reference" else "no Triton kernel" if not kernel else f"Triton needs CUDA, not {device}"
    )
    if impl == "triton" or (impl == "auto" and kernel and device == "cuda"):
        if kernel is None:
            raise NotImplementedError(f"q3n::{name} has no Triton kernel: ask for impl='reference' or 'auto'")
        try:
            outputs = _load(kernel)(*arguments)
            _say_once(f"q3n::{name} on {device} runs its kernel")
            return outputs
        except UnsupportedError as error:
            if impl == "triton":
                raise
            why = str(error)
    _say_once(f"q3n::{name} on {device} runs the PyTorch reference ({why})")
    # Under autocast the reference's own products would be rounded too.
    with torch.autocast(device, enabled=False):
        return reference(*arguments)


def _fake(name: str, fake: Callable[..., Outputs], kernel: str | None, *args: Any) -> Outputs:
    *arguments, impl = args
    if kernel and impl != "reference" and precompile.begin_walk(name, arguments):
        try:
            precompile.walk(_load(kernel), arguments)
        except UnsupportedError:
            pass
        except Exception as error:
            _say_once(f"q3n::{name} is compiled when it first runs, not beside others: {error!r}")
    return fake(*arguments)


@functools.cache
def _say_once(line: str) -> None:
    logger.info(line)


@functools.cache
def _load(kernel: str) -> Callable[..., Outputs]:
    if torch.cuda.is_available():
        # What Inductor sets when it compiles a kernel of its own. A second run, which finds its graphs compiled, would
        # otherwise look for ours in another place than where the first put them.
        os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(torch.cuda.current_device()))
    module, function = kernel.split(":")
    launcher: Callable[..., Outputs] = getattr(
        importlib.import_module(f"q3n_functional.ops.kernels.{module}"), function
    )
    return launcher


def differentiable(
    op: OpOverload,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Sequence[Tensor | None]],
    rows: Sequence[str] = (),
    registered: bool = True,
) -> Callable[..., Any]:
    """Attach a gradient and a vmap rule to `op` and return what public functions call.

    `backward(ctx, *gradients)` returns a gradient or None for each argument; a gradient that it is not given is None.
    `rows` names the arguments whose first dim is a batch of independent rows, as the outputs' first dim then is: vmap
    over these alone, without `cu_seqlens`, is one call with the dims folded; over anything else it is a loop.

    The gradient is `registered` with the op, which compilers need; torch.func cannot differentiate such ops
    (pytorch#168393), so under its transforms the same functions make an `autograd.Function` instead. So they do in
    eager mode: torch's own looks the whole schema up for every argument, which takes as long as two kernels.
    """

    def sparse_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # Zeros made up for an output that nobody used would be plain tensors even among DTensors.
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    names = [argument.name for argument in op._schema.arguments]
    transformable = _transformable(op, sparse_context, backward, names, rows)
    eager = _eager(op, sparse_context, backward)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _vmap(op, dict(zip(names, args, strict=True)), rows, info.batch_size, in_dims)

    if registered:
        library.register_autograd(op._schema.name, backward, setup_context=sparse_context, lib=_library)
    library.register_vmap(op._schema.name, vmap, lib=_library)

    def call(*args: Any) -> Any:
        if transform_is_active():
            return transformable(*args)
        return eager(*args) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else op(*args)

    return call


def _transformable(
    op: OpOverload, context: Callable[..., None], gradients: Callable[..., Any], names: Sequence[str],
    rows: Sequence[str],
) -> Callable[..., Any]:  # fmt: skip
    """The op for torch.func's transforms."""

    class Transformable(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *given: Tensor | None) -> Any:
            return gradients(ctx, *given)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            return _vmap(apply, dict(zip(names, args, strict=True)), rows, info.batch_size, in_dims)

    # Under torch.func.grad Dynamo would trace `forward` alone and lose the gradient: it must not look inside.
    torch.compiler.allow_in_graph(Transformable)
    apply: Callable[..., Any] = Transformable.apply
    return apply


def _eager(op: OpOverload, context: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """The op for autograd alone: in this form torch does not look `forward`'s signature up at every call."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            # What is registered for autograd is Python, and would do no more than call on.
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx: Any, *given: Tensor | None) -> Any:
            return gradients(ctx, *given)

    apply: Callable[..., Any] = Eager.apply
    return apply


def gradient(op: OpOverload) -> Callable[..., Any]:
    """`differentiable` for an op that is itself a gradient: a derivative of it is refused in so many words.

    Compilers do not differentiate it, and nothing registered is the shortest way to its kernel.
    """

    def refuse(ctx: Any, *gradients: Tensor | None) -> Sequence[Tensor | None]:
        raise NotImplementedError(f"{op._schema.name}: second derivatives are not implemented")

    return differentiable(op, lambda ctx, inputs, output: None, refuse, registered=False)


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these, with no transform of torch.func around."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    return wanted and not transform_is_active()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def transform_is_active() -> bool:
    """Whether a torch.func transform, or forward mode, surrounds the call being traced."""
    # Forward-mode levels count too: a custom op would silently give them a zero, the autograd.Function raises.
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._functorch.peek_interpreter_stack() is not None


def _vmap(
    call: Callable[..., Any], arguments: dict[str, Any], rows: Sequence[str], size: int, in_dims: Sequence[int | None]
) -> tuple[Any, Any]:
    dims = dict(zip(arguments, in_dims, strict=True))
    batched = {name for name, dim in dims.items() if dim is not None}
    if batched <= set(rows) and arguments.get("cu_seqlens") is None:
        folded = call(*(_fold(x, dims[name], size) if name in rows else x for name, x in arguments.items()))
        outputs = pytree.tree_map(lambda y: y.unflatten(0, (size, y.shape[0] // size)), folded)
    else:
        each = [call(*(_pick(x, dims[name], i) for name, x in arguments.items())) for i in range(size)]
        outputs = pytree.tree_map(lambda *ys: torch.stack(ys), *each)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _pick(x: Any, dim: int | None, index: int) -> Any:
    return x if dim is None else x.select(dim, index)
