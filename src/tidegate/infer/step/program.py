"""Writing programs for the step machine: values, instructions, and where everything lies in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tidegate.infer.step.machine import DOUBLE, JOB, OPCODE, OPERANDS, SIZES, WIDTH, Op

SHARED = 1 << 16  # multiplications of a product that is worth a second thread
_ALIGNED = 64
# Operands that may be one number for a whole row.
_SINGLE = {(Op.ADD, 1), (Op.SUB, 1), (Op.MUL, 1), (Op.FMA, 0), (Op.TWO_PRODUCTS, 0), (Op.TWO_PRODUCTS, 2)}
_CONVERSIONS = {Op.TO_DOUBLE, Op.TO_FLOAT, Op.INT_TO_DOUBLE, Op.DOUBLE_TO_INT, Op.BYTE_TO_FLOAT}


class Unsupported(ValueError):
    """The step uses something that the step machine does not know."""


@dataclass(eq=False)
class Storage:
    """Memory that values lie in: a temporary, constant, static tensor, input or output."""

    kind: str
    index: int
    size: int = 0  # bytes
    first: int = -1  # the instructions that use it
    last: int = -1


@dataclass(frozen=True)
class Value:
    """A tensor of the program: where it is, and how it is laid out there (`layout` has strides but no data)."""

    storage: Storage
    layout: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    @property
    def offset(self) -> int:
        """Bytes from the beginning of the storage."""
        return int(self.layout.storage_offset()) * self.layout.element_size()

    def at(self, layout: Tensor) -> Value:
        """The same memory, looked at differently."""
        return Value(self.storage, layout)


@dataclass
class Program:
    """What the machine runs, and what it must be given."""

    code: np.ndarray  # (instructions, WIDTH)
    offered: np.ndarray  # rows of the products that several threads share
    constants: np.ndarray  # 8 bytes each
    workspace: int  # bytes
    outputs: list[tuple[tuple[int, ...], torch.dtype]]
    limits: list[tuple[int, int]]  # inputs that are row numbers, and of how many rows
    work: int  # multiplications in shared products


@dataclass
class _Instruction:
    op: Op
    double: bool
    sizes: tuple[int, ...]
    operands: list[tuple[Storage, int, tuple[int, ...]]]  # storage, byte offset, strides


def numbers(dtype: torch.dtype) -> torch.dtype:
    """How the machine calculates with a dtype: in float64 with float64 and integers, else in float32."""
    return torch.float64 if dtype in (torch.float64, torch.int64, torch.int32) else torch.float32


class Writer:
    """A program being written, instruction by instruction."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._constants: dict[tuple[float, torch.dtype], Value] = {}
        self._outputs: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._limits: list[tuple[int, int]] = []

    # -- values --------------------------------------------------------------------------------------------------------
    def new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Value:
        """A temporary, contiguous."""
        layout = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return Value(Storage("temporary", -1, layout.numel() * layout.element_size()), layout)

    def constant(self, number: float, dtype: torch.dtype) -> Value:
        """A number of a dtype the machine calculates in, of no axes."""
        key = (float(number), dtype)
        if key not in self._constants:
            storage = Storage("constant", len(self._constants))
            self._constants[key] = Value(storage, torch.empty((), dtype=dtype, device="meta"))
        return self._constants[key]

    def cast(self, value: Value | float, dtype: torch.dtype) -> Value:
        """`value` in another of the machine's dtypes; Python numbers become constants."""
        if not isinstance(value, Value):
            return self.constant(value, dtype)
        if value.dtype == dtype or value.dtype.is_complex:
            return value
        if value.storage.kind == "constant":
            number = next(key[0] for key, own in self._constants.items() if own.storage is value.storage)
            constant = self.constant(number, dtype)
            return constant.at(constant.layout.expand(value.shape))
        if value.dtype == torch.int64 and dtype == torch.float32:
            value = self.convert(Op.INT_TO_DOUBLE, value, torch.float64)
        ops = {
            (torch.int64, torch.float64): Op.INT_TO_DOUBLE,
            (torch.float32, torch.float64): Op.TO_DOUBLE,
            (torch.float64, torch.float32): Op.TO_FLOAT,
        }
        return self.convert(ops[value.dtype, dtype], value, dtype)

    # -- instructions --------------------------------------------------------------------------------------------------
    def convert(self, op: Op, value: Value, dtype: torch.dtype) -> Value:
        """A new value by one of the instructions that change the dtype."""
        result = self.new(value.shape, dtype)
        self._apply(op, result, [value])
        return result

    def copy(self, value: Value, target: Value | None = None) -> Value:
        """Into `target`, or into new contiguous memory."""
        if value.dtype.is_complex:
            copied = self.copy(value.at(torch.view_as_real(value.layout)))
            return copied.at(torch.view_as_complex(copied.layout))
        target = target or self.new(value.shape, value.dtype)
        self._apply(Op.COPY, target, [value])
        return target

    def elementwise(self, op: Op, operands: Sequence[Value | float], shape: Sequence[int]) -> Value:
        """One instruction on operands broadcast to `shape`, all in the widest of their dtypes; a contiguous result."""
        dtypes = {numbers(operand.dtype) for operand in operands if isinstance(operand, Value)}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        values = [self.cast(operand, dtype) for operand in operands]
        values = [value.at(value.layout.expand(tuple(shape))) for value in values]
        if op in (Op.ADD, Op.MUL) and _inner(values[0].layout) == 0:
            values.reverse()
        for pair in (0, 2) if op is Op.TWO_PRODUCTS else (0,) if op is Op.FMA else ():
            if _inner(values[pair + 1].layout) == 0:  # a row's one number comes first
                values[pair], values[pair + 1] = values[pair + 1], values[pair]
        if dtype == torch.float32:
            for position, value in enumerate(values):
                stride = _inner(value.layout)
                if stride != 1 and not (stride == 0 and (op, position) in _SINGLE) and value.layout.numel() > 1:
                    values[position] = self.copy(value)
        result = self.new(shape, dtype)
        self._apply(op, result, values)
        return result

    def _apply(self, op: Op, result: Value, operands: Sequence[Value]) -> None:
        """Emit an elementwise instruction, over as few and as long axes as the strides allow."""
        places = [result, *operands]
        sizes, strides = _collapse([value.layout for value in places])
        if strides[0][-1] != 1 and sizes[-1] > 1:  # the machine writes contiguous rows: here of one number each
            sizes, strides = (*sizes, 1), [(*own, 1) for own in strides]
        if len(sizes) > 4:
            raise Unsupported(f"an operation over {len(sizes)} axes of unrelated strides")
        double = op not in _CONVERSIONS and result.dtype == torch.float64
        self._emit(op, sizes, [(v, own) for v, own in zip(places, strides, strict=True)], double)

    def reduce(self, op: Op, value: Value, axes: Sequence[int]) -> Value:
        """SUM, ROW_MAX or ROW_MIN over some axes, which become one of length 1."""
        axes = [axis % value.layout.ndim for axis in axes]
        value = self.cast(value, torch.float32)
        shape = [1 if axis in axes else n for axis, n in enumerate(value.shape)]
        kept = [axis for axis in range(value.layout.ndim) if axis not in axes]
        moved = value.at(value.layout.permute(*kept, *axes))
        flat = (*moved.shape[: len(kept)], -1)
        try:
            rows = moved.at(moved.layout.view(flat))
        except RuntimeError:
            rows = self.copy(moved)
            rows = rows.at(rows.layout.view(flat))
        result = self.new(shape)
        sizes, (out, own) = _collapse([result.layout.view(rows.shape[:-1]), rows.layout[..., 0]])
        if len(sizes) > 3:
            raise Unsupported(f"a sum over {len(sizes)} axes of unrelated strides")
        strides = [(result, (*out, 0)), (rows, (*own, rows.layout.stride(-1)))]
        self._emit(op, (*sizes, rows.shape[-1]), strides)
        return result

    def product(self, a: Value, b: Value) -> Value:
        """(batch, M, J) x (batch, J, N)."""
        (batch, rows, inner), columns = a.shape, b.shape[2]
        if rows == columns == 1 and batch > 1:  # a short convolution: term by term, over all sums at once
            total = self.elementwise(Op.MUL, [a.at(a.layout[:, 0, 0]), b.at(b.layout[:, 0, 0])], (batch,))
            for j in range(1, inner):
                terms = [a.at(a.layout[:, 0, j]), b.at(b.layout[:, j, 0]), total]
                total = self.elementwise(Op.FMA, terms, (batch,))
            return total.at(total.layout.view(batch, 1, 1))
        result = self.new((batch, rows, columns))
        # Either the inner axis of B and of A is contiguous, or the columns of B are.
        dots = b.layout.stride(1) == 1 and (columns == 1 or b.layout.stride(2) != 1) and inner > 1
        if dots and a.layout.stride(2) != 1:
            a = self.copy(a)
        if not dots and b.layout.stride(2) != 1 and columns > 1:
            b = self.copy(b)
        b_strides = b.layout.stride()
        if inner == 1:  # of an axis of one, the machine must not think that it is contiguous
            b_strides = (b_strides[0], 0, b_strides[2])
        places = [
            (result, (*result.layout.stride()[:2], 1, 0)),
            (a, (*a.layout.stride(), 0)),
            (b, (*b_strides, 0)),
        ]
        self._emit(Op.MATMUL, (batch, rows, columns, inner), places)
        return result

    def rows(self, table: Value, indices: Value) -> Value:
        """Rows of a matrix by integer indices, (..., width).

        Indices that are an input are looked at before the program runs. Computed ones are taken to be those of the
        module, which would have refused others: what is outside becomes the first or last row.
        """
        width = table.shape[1]
        if table.layout.stride(1) != 1:
            table = self.copy(table)
        if indices.storage.kind == "input":
            if not indices.layout.is_contiguous() or indices.dtype != torch.int64:
                raise Unsupported("indices that are not contiguous int64")
            self._limits.append((indices.storage.index, table.shape[0]))
        else:
            inside = self.elementwise(Op.MAX, [self.cast(indices, torch.float64), 0.0], indices.shape)
            inside = self.elementwise(Op.MIN, [inside, table.shape[0] - 1.0], indices.shape)
            indices = self.convert(Op.DOUBLE_TO_INT, inside, torch.int64)
        result = self.new((*indices.shape, width))
        places = [
            (result, (0, 0, width, 1)),
            (indices, (0, 0, 1, 0)),
            (table, (0, 0, table.layout.stride(0), 1)),
        ]
        self._emit(Op.ROWS, (1, 1, indices.layout.numel(), width), places)
        return result

    def _emit(
        self, op: Op, sizes: Sequence[int], operands: Sequence[tuple[Value, Sequence[int]]], double: bool = False
    ) -> None:
        for value, _ in operands:
            storage = value.storage
            storage.first = len(self._instructions) if storage.first < 0 else storage.first
            storage.last = len(self._instructions)
        full = (*[1] * (4 - len(sizes)), *sizes)
        places = [(v.storage, v.offset, (*[0] * (4 - len(own)), *own)) for v, own in operands]
        self._instructions.append(_Instruction(op, double, full, places))

    # -- the end -------------------------------------------------------------------------------------------------------
    def output(self, value: Value, dtype: torch.dtype) -> None:
        """Make `value` the next result."""
        if dtype == torch.bool or dtype not in (torch.float32, torch.float64, torch.int64, torch.complex64):
            raise Unsupported(f"a result of {dtype}")
        storage, index = value.storage, len(self._outputs)
        self._outputs.append((tuple(value.shape), dtype))
        if not dtype.is_complex and dtype != torch.int64:
            value = self.cast(value, dtype)
        whole = value.layout.is_contiguous() and storage.size == value.layout.numel() * value.layout.element_size()
        if value.dtype == dtype and storage.kind == "temporary" and whole:
            storage.kind, storage.index = "output", index  # computed where it is wanted
            return
        layout = torch.view_as_real(value.layout) if dtype.is_complex else value.layout
        held = torch.float32 if dtype.is_complex else dtype
        target = Value(Storage("output", index), torch.empty(layout.shape, dtype=held, device="meta"))
        if dtype == torch.int64:
            self._apply(Op.DOUBLE_TO_INT, target, [self.cast(value, torch.float64)])
        else:
            self.copy(value.at(layout), target)

    def finish(self, statics: int, inputs: int) -> Program:
        """Bases in the code: 0 the workspace, 1 the constants, then static tensors, inputs and outputs."""
        bases = {"constant": 1, "static": 2, "input": 2 + statics, "output": 2 + statics + inputs}
        temporaries = {s for i in self._instructions for s, _, _ in i.operands if s.kind == "temporary"}
        places, workspace = _place(temporaries)
        code = np.zeros((len(self._instructions), WIDTH), np.int64)
        offered: list[int] = []
        work = 0
        for line, instruction in enumerate(self._instructions):
            row = code[line]
            row[OPCODE], row[DOUBLE], row[JOB] = instruction.op, instruction.double, -1
            row[SIZES : SIZES + 4] = instruction.sizes
            for position, (storage, offset, strides) in enumerate(instruction.operands):
                if storage.kind == "temporary":
                    base, offset = 0, offset + places[storage]
                elif storage.kind == "constant":
                    base, offset = 1, offset + 8 * storage.index
                else:
                    base = bases[storage.kind] + storage.index
                at = OPERANDS + 6 * position
                row[at], row[at + 1], row[at + 2 : at + 6] = base, offset, strides
            multiplications = int(np.prod(instruction.sizes))
            if instruction.op is Op.MATMUL and multiplications >= SHARED:
                row[JOB] = len(offered)
                offered.append(line)
                work += multiplications
        constants = np.zeros(max(1, len(self._constants)))
        for (number, dtype), value in self._constants.items():
            place = constants[value.storage.index : value.storage.index + 1]
            (place if dtype == torch.float64 else place.view(np.float32))[0] = number
        return Program(code, np.array(offered, np.int64), constants, workspace, self._outputs, self._limits, work)


# -- layouts -----------------------------------------------------------------------------------------------------------
def _inner(layout: Tensor) -> int:
    """Stride of the innermost axis that is longer than one."""
    for size, stride in zip(reversed(layout.shape), reversed(layout.stride()), strict=True):
        if size > 1:
            return stride
    return 1


def _collapse(layouts: Sequence[Tensor]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Common sizes and each layout's strides, without axes of one, neighbours joined where all layouts allow it."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in layouts]
    for axis, size in enumerate(layouts[0].shape):
        if size == 1:
            continue
        own = [layout.stride(axis) for layout in layouts]
        if sizes and all(before[-1] == size * stride for before, stride in zip(strides, own, strict=True)):
            sizes[-1] *= size
            for before, stride in zip(strides, own, strict=True):
                before[-1] = stride
        else:
            sizes.append(size)
            for before, stride in zip(strides, own, strict=True):
                before.append(stride)
    if not sizes:
        return (1,), [(1,) for _ in layouts]
    return tuple(sizes), [tuple(own) for own in strides]


def _place(storages: set[Storage]) -> tuple[dict[Storage, int], int]:
    """Byte offsets in one workspace, memory used again after a value's last use; and the workspace's size."""
    places: dict[Storage, int] = {}
    live: list[Storage] = []
    total = 0
    for storage in sorted(storages, key=lambda s: (s.first, -s.size)):
        live = [other for other in live if other.last >= storage.first]
        begin = 0
        for other in sorted(live, key=lambda s: places[s]):
            if begin + storage.size <= places[other]:
                break
            begin = max(begin, -(-(places[other] + other.size) // _ALIGNED) * _ALIGNED)
        places[storage] = begin
        live.append(storage)
        total = max(total, begin + storage.size)
    return places, total
