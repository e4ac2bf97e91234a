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

from tidegate.ops.threads import run as run  # kernels say kernels.run

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
    pieces = -(-torch.get_num_threads() // rows)
    return min(1024, -(-columns // (256 * pieces)) * 256)


def array(tensor: Tensor) -> np.ndarray:
    """A contiguous NumPy view (float32 for half precision) of a CPU tensor."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.contiguous().numpy()


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


@inline
def exp_and_inverse(x):
    """exp(x) and exp(-x) for |x| <= 87 in little more than the time of one: their even and odd parts are the same.

    x = n log 2 + r with |r| <= log(2) / 2. No range is checked; NaN gives NaN. Relative error 2e-7.
    """
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    s = r * r
    even = ((s * np.float32(1.3888889e-3) + np.float32(4.1666667e-2)) * s + np.float32(0.5)) * s + np.float32(1.0)
    odd = ((s * np.float32(1.9841270e-4) + np.float32(8.3333333e-3)) * s + np.float32(1.6666667e-1)) * s
    odd = odd * r + r
    power = np.int32(np.int32(n) << np.int32(23))
    up = np.int32(power + np.int32(127 << 23)).view(np.float32)
    down = np.int32(np.int32(127 << 23) - power).view(np.float32)
    return (even + odd) * up, (even - odd) * down


# -- matrix product ----------------------------------------------------------------------------------------------------
@intrinsic
def wide_vectors(typing_context):
    """Let the function this stands in use the full vector width (LLVM prefers half of it on AVX-512 machines)."""

    def generate(context, builder, signature, arguments):
        # llvmlite knows the common attributes only; its set accepts any other through the base class.
        set.add(builder.function.attributes, f'"prefer-vector-width"="{LANES * 32}"')
        return context.get_dummy_value()

    return types.void(), generate


def _make_tile(rows: int, vectors: int, start: str):
    """An intrinsic for one register tile: O[:rows, :vectors*LANES] = start + A[:rows, :J] @ B[:J, :vectors*LANES].

    `start` says what the sums begin with: "zero", "add" (O itself), "rows" (O, each row times its entry of `factors`)
    or "columns" (O, each column times its entry).

    LLVM cannot prove that rows of scratch arrays do not overlap and re-reads memory after every store; written out in
    vector instructions, the accumulators stay in registers over the whole inner product.
    """

    @intrinsic
    def tile(typing_context, a, a_at, a_row, a_column, b, b_at, b_row, o, o_at, o_row, inner, factors, factor_at):
        counts = (types.intp,)
        signature = types.void(a, *counts * 3, b, *counts * 2, o, *counts * 3, factors, types.intp)

        def generate(context, builder, signature, arguments):
            a_value, a_at, a_row, a_column, b_value, b_at, b_row, o_value, o_at, o_row, inner, *scaling = arguments
            integer, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)

            def number(n):
                return ir.Constant(integer, n)

            def data(kind, value):
                return arrayobj.make_array(kind)(context, builder, value).data

            def pointer(base, offset):
                return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

            def fused(x, y, z):
                return builder.fadd(z, builder.fmul(x, y, flags=("contract",)), flags=("contract",))

            a_data, b_data = data(signature.args[0], a_value), data(signature.args[4], b_value)
            o_data = data(signature.args[7], o_value)
            factors, factor_at = data(signature.args[11], scaling[0]), scaling[1]
            undefined = ir.Constant(vector, ir.Undefined)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)

            def splat(scalar):
                first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
                return builder.shuffle_vector(first, undefined, everywhere)

            cells = [(m, n) for m in range(rows) for n in range(vectors)]
            places = [
                pointer(o_data, builder.add(builder.add(o_at, builder.mul(number(m), o_row)), number(n * LANES)))
                for m, n in cells
            ]
            if start == "zero":
                initial = [ir.Constant(vector, [0.0] * LANES) for _ in cells]
            else:
                initial = [builder.load(place, align=4) for place in places]
            if start == "rows":
                ends = [builder.gep(factors, [builder.add(factor_at, number(m))]) for m in range(rows)]
                scales = [splat(builder.load(end, align=4)) for end in ends]
                initial = [builder.fmul(x, scales[m]) for x, (m, _) in zip(initial, cells, strict=True)]
            elif start == "columns":
                scales = [
                    builder.load(pointer(factors, builder.add(factor_at, number(n * LANES))), align=4)
                    for n in range(vectors)
                ]
                initial = [builder.fmul(x, scales[n]) for x, (_, n) in zip(initial, cells, strict=True)]
            before = builder.block
            loop, done = builder.append_basic_block("inner"), builder.append_basic_block("done")
            builder.cbranch(builder.icmp_signed(">", inner, number(0)), loop, done)

            builder.position_at_end(loop)
            j = builder.phi(integer)
            j.add_incoming(number(0), before)
            sums = [builder.phi(vector) for _ in cells]
            for total, value in zip(sums, initial, strict=True):
                total.add_incoming(value, before)
            b_offset = builder.add(b_at, builder.mul(j, b_row))
            a_offset = builder.add(a_at, builder.mul(j, a_column))
            columns = [
                builder.load(pointer(b_data, builder.add(b_offset, number(n * LANES))), align=4) for n in range(vectors)
            ]
            updated = []
            for m in range(rows):
                scalar = builder.load(
                    builder.gep(a_data, [builder.add(a_offset, builder.mul(number(m), a_row))]), align=4
                )
                broadcast = splat(scalar)
                updated += [fused(broadcast, columns[n], sums[m * vectors + n]) for n in range(vectors)]
            following = builder.add(j, number(1))
            j.add_incoming(following, builder.block)
            for total, new in zip(sums, updated, strict=True):
                total.add_incoming(new, builder.block)
            end = builder.block
            builder.cbranch(builder.icmp_signed("<", following, inner), loop, done)

            builder.position_at_end(done)
            results = []
            for value, new in zip(initial, updated, strict=True):
                result = builder.phi(vector)
                result.add_incoming(value, before)
                result.add_incoming(new, end)
                results.append(result)
            for place, result in zip(places, results, strict=True):
                builder.store(result, place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return tile


_tiles = {
    start: [_make_tile(4, vectors, start) for vectors in (4, 2, 1)] for start in ("zero", "add", "rows", "columns")
}


def _product(start: str, shape: str = "full"):
    """The loop over tiles. `shape` of A: "full", or square "lower" or "upper" triangular, whose zeros are left out."""
    tile4, tile2, tile1 = _tiles[start]
    by_row, by_column = np.int64(start == "rows"), np.int64(start == "columns")
    lower, upper = shape == "lower", shape == "upper"

    @inline
    def product(a, a_row, a_column, b, o, rows, inner, columns, factors):
        b_row = b.shape[1]
        o_row = o.shape[1]
        for m in range(0, rows, 4):
            skip = m if upper else 0
            count = min(inner, m + 4) if lower else inner - skip
            a_at, b_at = m * a_row + skip * a_column, skip * b_row
            n = 0
            while LANES == 16 and n + 4 * LANES <= columns:  # AVX2 has too few registers for the widest tile
                at = m * by_row + n * by_column
                tile4(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += 4 * LANES
            while n + 2 * LANES <= columns:
                at = m * by_row + n * by_column
                tile2(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += 2 * LANES
            while n < columns:
                at = m * by_row + n * by_column
                tile1(a, a_at, a_row, a_column, b, b_at + n, b_row, o, m * o_row + n, o_row, count, factors, at)
                n += LANES

    return product


_zero, _add, _rows, _columns = _product("zero"), _product("add"), _product("rows"), _product("columns")
_lower, _upper = _product("add", "lower"), _product("add", "upper")


@jit_views
def matmul(a, a_row, a_column, b, o, rows, inner, columns):
    """o[:rows, :columns] += A @ b[:inner, :columns], where A[m, j] = a.flat[m * a_row + j * a_column].

    float32, `b` and `o` two-dimensional and contiguous with row lengths that are multiples of LANES; `rows` a multiple
    of 4, `columns` of LANES. `(a, 1, K)` reads a transposed, `(a, K, 1)` plainly. Pad scratch with zeros.
    """
    wide_vectors()
    _add(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_lower(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul` for a square A that is zero above its diagonal."""
    wide_vectors()
    _lower(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_upper(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul` for a square A that is zero below its diagonal, such as a lower one read transposed."""
    wide_vectors()
    _upper(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_into(a, a_row, a_column, b, o, rows, inner, columns):
    """As `matmul`, but o = A @ b: what stood in o does not matter."""
    wide_vectors()
    _zero(a, a_row, a_column, b, o, rows, inner, columns, a)


@jit_views
def matmul_rows(a, a_row, a_column, b, o, rows, inner, columns, factors):
    """As `matmul`, but o = factors[:, None] * o + A @ b."""
    wide_vectors()
    _rows(a, a_row, a_column, b, o, rows, inner, columns, factors)


@jit_views
def matmul_columns(a, a_row, a_column, b, o, rows, inner, columns, factors):
    """As `matmul`, but o = factors * o + A @ b."""
    wide_vectors()
    _columns(a, a_row, a_column, b, o, rows, inner, columns, factors)


@intrinsic
def _transpose_block(typing_context, x, x_at, x_row, o, o_at, o_row):
    """LANES x LANES entries of x, transposed into o, by log2(LANES) rounds of register shuffles."""
    signature = types.void(x, types.intp, types.intp, o, types.intp, types.intp)

    def generate(context, builder, signature, arguments):
        x_value, x_at, x_row, o_value, o_at, o_row = arguments
        vector, integer = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)

        def pointer(kind, value, at, row, m):
            base = arrayobj.make_array(kind)(context, builder, value).data
            offset = builder.add(at, builder.mul(ir.Constant(integer, m), row))
            return builder.bitcast(builder.gep(base, [offset]), vector.as_pointer())

        def pick(first, second, lanes):
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), LANES), lanes))

        lines = [builder.load(pointer(signature.args[0], x_value, x_at, x_row, m), align=4) for m in range(LANES)]
        step = 1
        while step < LANES:
            for i in range(LANES):
                if i & step:
                    continue
                low, high = lines[i], lines[i + step]
                lines[i] = pick(low, high, [LANES + n - step if n & step else n for n in range(LANES)])
                lines[i + step] = pick(low, high, [LANES + n if n & step else n + step for n in range(LANES)])
            step *= 2
        for m, line in enumerate(lines):
            builder.store(line, pointer(signature.args[3], o_value, o_at, o_row, m), align=4)
        return context.get_dummy_value()

    return signature, generate


@jit_views
def transpose(x, rows, columns, o):
    """o[c, m] = x[m, c]; two-dimensional and contiguous, both extents padded to multiples of LANES in memory."""
    wide_vectors()
    x_row, o_row = x.shape[1], o.shape[1]
    for m in range(0, rows, LANES):
        for c in range(0, columns, LANES):
            _transpose_block(x, m * x_row + c, x_row, o, c * o_row + m, o_row)


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
def _prefetch(typing_context, x, at):
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


@jit_views
def prefetch(x, b, begin, end, h):
    """Ask for x[b, begin:end, h] (float32, contiguous) ahead of time.

    Rows of one head lie a stride apart, which the machine's own prefetcher does not follow.
    """
    time, heads, width = x.shape[1], x.shape[2], x.shape[3]
    for t in range(begin, min(end, time)):
        at = ((b * time + t) * heads + h) * width
        for c in range(0, width, 16):  # a cache line
            _prefetch(x, at + c)


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
