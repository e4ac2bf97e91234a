"""What every Numba kernel is built from: compilation, threads, exp, and a small matrix product.

Import this (and so Numba) only from a `numba_cpu.py`, which is itself imported on the first call that needs it.

Kernels take `(begin, end, ...)`, the range of independent problems they are to solve, release the GIL, and are spread
over PyTorch's threads by `run` (threads.py). Each problem is computed the same way whoever computes it, so results do
not depend on the number of threads, and any thread may call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj
from torch import Tensor

from tidegate.ops.threads import memory as memory
from tidegate.ops.threads import run as run  # kernels say kernels.run
from tidegate.ops.threads import run_here as run_here
from tidegate.ops.threads import together as together

# Everything of fastmath but the licence to assume that there are no NaN and no infinities.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

# float32 lanes of the widest vector register. Scratch matrices have rows that are a multiple of this.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8


def jit(function: Callable[..., Any]) -> Any:
    """Compile on first call, without the GIL, cached on disk.

    The cache looks at the kernel's own file only: after an edit of this one, `make clean` (see CONTRIBUTING).
    """
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", cache=True)(function)


def jit_views(function: Callable[..., Any]) -> Any:
    """As `jit`, for functions that allocate nothing: their views of arrays are not counted.

    Counting a reference is an atomic operation, several of which cost more than a loop over one row.
    """
    options: dict[str, Any] = {
        "nogil": True,
        "fastmath": FASTMATH,
        "error_model": "numpy",
        "cache": True,
        "_nrt": False,
    }
    return numba.njit(**options)(function)


def jit_inside(function: Callable[..., Any]) -> Any:
    """As `jit_views`, for functions called from kernels only: Python's way in takes longer to compile than many."""
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "cache": True, "_nrt": False}
    options |= {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}
    return numba.njit(**options)(function)


def inline(function: Callable[..., Any]) -> Any:
    """A scalar helper that becomes part of the loop it is called from, so that the loop still vectorises."""
    return numba.njit(nogil=True, fastmath=FASTMATH, error_model="numpy", inline="always")(function)


def pad(columns: int) -> int:
    """The next multiple of the vector length, at least one."""
    return max(LANES, -(-columns // LANES) * LANES)


# -- work ------------------------------------------------------------------------------------------------------------
def block(columns: int, rows: int) -> int:
    """How many of `columns` one problem takes, where columns are independent: long rows, but work for every thread.

    A multiple of 256, so that it makes no difference to any column's arithmetic where the blocks end.
    """
    pieces = -(-torch.get_num_threads() // max(1, rows))
    return min(1024, -(-max(1, columns) // (256 * pieces)) * 256)


def array(tensor: Tensor) -> np.ndarray:
    """A contiguous NumPy view (float32 for half precision) of a CPU tensor."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def rows(tensor: Tensor, width: int) -> tuple[np.ndarray, int]:
    """A CPU tensor as rows of `width` numbers: the memory from its first to its last, and where the next row begins.

    A slice of a wider projection is read where it stands; what is no such thing is copied.
    """
    tensor = tensor.detach()
    count = tensor.numel() // width
    if tensor.dtype == torch.float32 and not tensor.is_neg():
        try:
            view = tensor.view(count, width)
            if width == 1 or view.stride(1) == 1:
                stride = view.stride(0)
                return view.as_strided(((count - 1) * stride + width,), (1,)).numpy(), stride
        except RuntimeError:  # rows that lie at irregular distances
            pass
    return array(tensor).reshape(-1), width


def flat(tensor: Tensor) -> np.ndarray:
    """As `array`, with one axis."""
    return array(tensor).reshape(-1)


# -- elementwise -------------------------------------------------------------------------------------------------------
@inline
def exp32(x):
    """float32 exp that vectorises: range reduction, a polynomial, the exponent put in by its bits; error 1.2e-7.

    Zero below -87, never infinite: above 88 it stays at exp(88), so that a product with zero is zero. NaN stays NaN.
    """
    clamped = np.float32(min(max(x, np.float32(-87.0)), np.float32(88.0)))
    n = np.floor(clamped * np.float32(1.44269504) + np.float32(0.5))
    r = clamped - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = (p * r * r + r + np.float32(1.0)) * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = np.float32(0.0) if x < np.float32(-87.0) else y
    return x if x != x else y


# -- vectors and memory ------------------------------------------------------------------------------------------------
@intrinsic
def wide_vectors(typing_context):
    """Let the function this stands in use the full vector width (LLVM prefers half of it on AVX-512 machines)."""

    def generate(context, builder, signature, arguments):
        # llvmlite knows the common attributes only; its set accepts any other through the base class.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{LANES * 32}"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def copy_floats(typing_context, source, source_at, target, target_at, count):
    """target.flat[target_at : target_at + count] = source.flat[source_at : ...], contiguous arrays of equal dtype.

    One memcpy. A loop over two views first proves, for every row anew, that they do not overlap.
    """
    signature = types.void(source, types.intp, target, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        source_value, source_at, target_value, target_at, count = arguments

        def place(kind, value, at):
            return builder.gep(arrayobj.make_array(kind)(context, builder, value).data, [at])

        size = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        destination = place(signature.args[2], target_value, target_at)
        cgutils.raw_memcpy(builder, destination, place(signature.args[0], source_value, source_at), count, size)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch_line(typing_context, x, at):
    """Ask for the cache line of x.flat[at], a contiguous array, ahead of time."""
    signature = types.void(x, types.intp)

    def generate(context, builder, signature, arguments):
        base = arrayobj.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(base, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(0), number(2), number(1)])  # to read, into the second-level cache, data
        return context.get_dummy_value()

    return signature, generate


# -- autograd ----------------------------------------------------------------------------------------------------------
def differentiable_gradients(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor | None], gradients: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can be differentiated again; None where an input wants none.

    What a kernel's backward returns under `create_graph=True`, with `function` the parallel form of the same op.
    """
    with torch.enable_grad():
        # New views, so that the graph between these inputs and the function's outputs is this one alone.
        copies = [x.view_as(x) if x is not None and x.requires_grad else x for x in inputs]
        wanted = [x for x in copies if x is not None and x.requires_grad]
        outputs = function(*copies)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in copies]


def direct(
    op: Any, setup: Callable[..., None] | None = None, backward: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Call a custom operator without PyTorch's dispatcher where that has nothing to do.

    A call through the dispatcher takes some 50 us more, half of what a layer's norm takes on 1,024 tokens. Plain
    tensors outside of compilation and of dispatch modes need none of it: the operator's body is called as it is, or in
    an autograd function of the same `setup` and `backward`.
    """
    body = op._init_fn
    recorded = body
    if setup is not None:
        parts = {"forward": body, "setup_context": setup, "backward": backward}
        methods = {name: staticmethod(part) for name, part in parts.items()}
        recorded = type(op._name, (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not all(map(_plain, arguments)):
            return op(*arguments)
        return (recorded if torch.is_grad_enabled() else body)(*arguments)

    return call


def _plain(argument: Any) -> bool:
    return not isinstance(argument, Tensor) or type(argument) in (Tensor, torch.nn.Parameter)
