"""Long convolutions as CPU kernels, forward and backward.

Where a token has few others to look at (short documents, few new tokens), sums are formed term by term. Other documents
are turned into rows of one channel each, with zeros behind them, for PyTorch's FFT: all of about the same length in one
call, and what is long cut into channels that fit a cache.

Here filters are (taps, D), the taps of the lags -front, ..., 0, 1, ... one below the other. See terms.py for the loops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tidegate.ops import kernels
from tidegate.ops.kernels import LANES
from tidegate.ops.long_convolution import parallel, terms
from tidegate.ops.long_convolution.terms import BLOCK, EDGE, TILE
from tidegate.ops.slots import append
from tidegate.segments import Segments

FEW = 128  # terms per token, on average, up to which an FFT takes longer than adding them up
CHUNK = 1 << 20  # numbers in one FFT call


def long_convolution(x: Tensor, past: Tensor, length: Tensor, taps: Tensor, segments: Segments | None) -> Tensor:
    """`ops.long_convolution` after its checks."""
    return _forward_op(x, past, length, taps.t(), 0, None if segments is None else segments.codes())


def two_sided_convolution(x: Tensor, filter: Tensor, future: Tensor) -> Tensor:
    """`ops.two_sided_convolution` after its checks."""
    taps = torch.cat([future.flip(1), filter], dim=1).t()
    length = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return _forward_op(x, x.new_zeros(x.shape[0], 0, x.shape[2]), length, taps, future.shape[1], None)


# -- documents ---------------------------------------------------------------------------------------------------------
class Documents(NamedTuple):
    """Their tokens one after the other as row numbers, ~row for one of the past; where each document begins and ends
    among them, and at which of its tokens those of this call begin."""

    source: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    firsts: np.ndarray

    def of(self, chosen: np.ndarray) -> Documents:
        return Documents(self.source, self.begins[chosen], self.ends[chosen], self.firsts[chosen])

    def compact(self) -> Documents:
        """With a list of tokens of its own."""
        pieces = [self.source[low:high] for low, high in zip(self.begins, self.ends, strict=True)]
        lengths = self.ends - self.begins
        ends = lengths.cumsum()
        source = np.concatenate(pieces) if pieces else self.source[:0]
        return Documents(source, ends - lengths, ends, self.firsts)


def _documents(x: Tensor, past: Tensor, length: Tensor, codes: Tensor | None) -> Documents:
    (batch, time), slots = x.shape[:2], past.shape[1]
    slot, row = np.arange(slots), np.arange(batch)[:, None]
    code = np.zeros((batch, time), np.uint8) if codes is None else codes.numpy()
    held = slot < length.numpy()[:, None]
    source = np.concatenate([~(row * slots + slot), row * time + np.arange(time)], axis=1)
    real = np.concatenate([held, code != 2], axis=1)
    fresh = np.concatenate([np.broadcast_to(slot == 0, held.shape), code == 1], axis=1)[real]
    index = np.flatnonzero(real)
    fresh[1:] |= np.diff(index // (slots + time)) > 0  # another row is another document
    fresh[:1] = True
    begins = np.flatnonzero(fresh)
    source = source.reshape(-1)[index]
    ends = np.append(begins[1:], len(source))
    before = np.append(0, (source < 0).cumsum())
    firsts = before[ends] - before[begins]
    return Documents(source, begins, ends, firsts).of(firsts < ends - begins)  # of the past alone nothing is asked


def _few(documents: Documents, front: int) -> np.ndarray:
    """Which documents are summed up term by term."""
    lengths = documents.ends - documents.begins
    asked = lengths - documents.firsts
    terms = asked * lengths if front else asked * (lengths - (asked - 1) / 2)
    return terms <= FEW * lengths


def _compact(documents: Documents) -> Documents:
    """With a list of tokens that holds no others."""
    lengths = documents.ends - documents.begins
    ends = lengths.cumsum()
    index = np.arange(lengths.sum()) + np.repeat(documents.begins - (ends - lengths), lengths)
    return Documents(documents.source[index], ends - lengths, ends, documents.firsts)


# -- by FFT ------------------------------------------------------------------------------------------------------------
def _size(least: int) -> int:
    """The next number that is at most sixteen times a power of two: those have FFTs that are quick."""
    step = 1 << max(1, (least - 1).bit_length() - 4)
    return -(-least // step) * step


def _pieces(documents: Documents, dim: int) -> Iterator[tuple[int, int, int, list[Documents]]]:
    """The size of the FFT, some channels (low, high), and documents for it, CHUNK numbers at a time."""
    sizes = np.array([_size(int(2 * n - 1)) for n in documents.ends - documents.begins], np.int64)
    for size in map(int, np.unique(sizes)):
        chosen = np.flatnonzero(sizes == size)
        width = min(dim, max(1, CHUNK // size // LANES) * LANES)
        count = max(1, CHUNK // (width * size))
        groups = [documents.of(chosen[begin : begin + count]) for begin in range(0, len(chosen), count)]
        for low in range(0, dim, width):
            yield size, low, min(low + width, dim), groups


def _columns(documents: Documents, x: np.ndarray, past: np.ndarray, low: int, high: int, size: int) -> Tensor:
    """The documents' tokens, channels `low` to `high`: (documents, channels, size), zeros behind them."""
    out, (source, begins, ends, _) = torch.empty(len(documents.ends), high - low, size), documents
    problems = len(ends) * -(-(high - low) // LANES)
    kernels.run(terms.to_columns, problems, x, past, source, begins, ends, low, out.numpy(), scratch=TILE * LANES)
    return out


def _rows(columns: Tensor, documents: Documents, low: int, y: np.ndarray, past: np.ndarray) -> None:
    """The way back, for the tokens from `firsts` on."""
    problems = len(documents.ends) * -(-columns.shape[1] // LANES)
    kernels.run(terms.to_rows, problems, columns.numpy(), *documents, low, y, past, scratch=TILE * LANES)


def _reach(taps: np.ndarray, front: int, groups: list[Documents]) -> tuple[int, int]:
    """How many taps of lags from 0 on, and of those before, the longest document needs."""
    longest = max(int((group.ends - group.begins).max()) for group in groups)
    return min(len(taps) - front, longest), min(front, longest - 1)


def _spectrum(taps: np.ndarray, front: int, reach: tuple[int, int], low: int, high: int, size: int) -> Tensor:
    """What the filters become, (channels, size / 2 + 1); the taps of negative lags lie at the end of the circle."""
    after, before = reach
    lags = np.arange(front, front + after)
    circle = _columns(Documents(lags, *(np.array([n]) for n in (0, after, 0))), taps, taps, low, high, size)[0]
    if before:
        circle[:, size - before :] = torch.from_numpy(taps[front - before : front, low:high].T)
    return torch.fft.rfft(circle)


# -- operators ---------------------------------------------------------------------------------------------------------
def _prepare(x: Tensor, past: Tensor, length: Tensor, taps: Tensor, codes: Tensor | None) -> tuple[Any, ...]:
    """Arrays of rows, and the documents."""
    dim = x.shape[2]
    rows = [kernels.array(t).reshape(-1, dim) for t in (x, past, taps)]
    return *rows, _documents(x, past, length, codes)


@torch.library.custom_op("tidegate::long_convolution", mutates_args=(), device_types="cpu")
def _forward_op(x: Tensor, past: Tensor, length: Tensor, taps: Tensor, front: int, codes: Tensor | None) -> Tensor:
    y, dim = torch.zeros(x.shape), x.shape[2]
    rows, past_rows, filters, documents = _prepare(x, past, length, taps, codes)
    out, few = y.numpy().reshape(-1, dim), _few(documents, front)
    steps = (documents.ends - documents.begins - documents.firsts < BLOCK) & (front == 0)
    if steps.any():
        chosen, block = documents.of(steps), kernels.block(dim, int(steps.sum()))
        problems = len(chosen.ends) * -(-dim // block)
        kernels.run(terms.steps, problems, block, rows, past_rows, filters, *chosen, out)
    few &= ~steps
    if few.any():
        source, begins, ends, firsts = _compact(documents.of(few))
        longest = int((ends - begins).max())
        given = (rows, past_rows, filters, front, longest, source, ends, firsts, out)
        scratch = 5 * EDGE + 3 * longest * LANES
        kernels.run(terms.forward, -(-dim // LANES), *given, scratch=scratch)
    for size, low, high, groups in _pieces(documents.of(~few & ~steps), dim):
        spectrum = _spectrum(filters, front, _reach(filters, front, groups), low, high, size)
        for group in groups:
            found = torch.fft.rfft(_columns(group, rows, past_rows, low, high, size)).mul_(spectrum)
            _rows(torch.fft.irfft(found, n=size), group, low, out, out)
    return y


@torch.library.custom_op("tidegate::long_convolution_backward", mutates_args=(), device_types="cpu")
def _backward_op(
    x: Tensor, past: Tensor, length: Tensor, taps: Tensor, front: int, codes: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dpast, dtaps, dim = torch.zeros(x.shape), torch.zeros(past.shape), torch.zeros(taps.shape), x.shape[2]
    rows, past_rows, filters, documents = _prepare(x, past, length, taps, codes)
    flow = kernels.array(dy).reshape(-1, dim)
    nothing = np.zeros_like(past_rows)  # the gradient of the outputs at past tokens
    out, past_out = dx.numpy().reshape(-1, dim), dpast.numpy().reshape(-1, dim)
    few = _few(documents, front)
    if few.any():
        source, begins, ends, firsts = _compact(documents.of(few))
        longest = int((ends - begins).max())
        given = (rows, past_rows, filters, front, longest, source, ends, firsts, flow, out, past_out, dtaps.numpy())
        scratch = 9 * EDGE + 7 * longest * LANES
        kernels.run(terms.backward, -(-dim // LANES), *given, scratch=scratch)
    for size, low, high, groups in _pieces(documents.of(~few), dim):
        after, before = _reach(filters, front, groups)
        spectrum = _spectrum(filters, front, (after, before), low, high, size).conj_physical_()
        total = torch.zeros_like(spectrum)
        for group in groups:
            given = torch.fft.rfft(_columns(group, flow, nothing, low, high, size))
            # Conjugated in fact: inside an operator that a compiled program calls, a mark that it is would be lost.
            seen = torch.fft.rfft(_columns(group, rows, past_rows, low, high, size)).conj_physical_()
            for one, other in zip(seen, given, strict=True):
                total.addcmul_(one, other)
            found = torch.fft.irfft(given.mul_(spectrum), n=size)
            _rows(found, group._replace(firsts=np.zeros_like(group.firsts)), low, out, past_out)
        circle = torch.fft.irfft(total, n=size)
        dtaps[front : front + after, low:high] += circle[:, :after].t()
        dtaps[front - before : front, low:high] += circle[:, size - before :].t()
    return dx, dpast, dtaps


@_forward_op.register_fake
def _(x, past, length, taps, front, codes):
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(x, past, length, taps, front, codes, dy):
    return x.new_empty(x.shape), past.new_empty(past.shape), taps.new_empty(taps.shape)


def _setup_context(ctx, inputs, output):
    x, past, length, taps, ctx.front, codes = inputs
    ctx.save_for_backward(x, past, length, taps, codes)


def _backward_formula(ctx, dy):
    x, past, length, taps, codes = ctx.saved_tensors
    if not torch.is_grad_enabled():
        dx, dpast, dtaps = _backward_op(x, past, length, taps, ctx.front, codes, dy)
        return dx, dpast, None, dtaps, None, None

    def form(x, past, taps):
        filters = taps.t()
        if ctx.front:
            future, filter = filters.split([ctx.front, filters.shape[1] - ctx.front], dim=1)
            return (parallel.two_sided_convolution(x, filter, future.flip(1)),)
        if codes is not None:
            return (parallel.among_documents(x, past, length, filters, Segments(codes == 1, codes != 2)),)
        (inputs,), _ = append((x,), (past,), length, None)
        return (parallel.along_positions(inputs, filters, length, x.shape[1]),)

    dx, dpast, dtaps = kernels.differentiable_gradients(form, [x, past, taps], (dy,))
    return dx, dpast, None, dtaps, None, None


_forward_op.register_autograd(_backward_formula, setup_context=_setup_context)
