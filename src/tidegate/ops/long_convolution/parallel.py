"""Long convolutions in plain PyTorch: by FFT, zeros behind the sequence so that its end does not come round.

With documents, of any number and length, the real tokens are moved together and halves are put together to wholes:
within each block of 2, 4, 8 ... tokens its left half adds to its right one, where both belong to the document that lies
across the middle. That is log2 T convolutions of T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.segments import Segments


def along_positions(inputs: Tensor, taps: Tensor, length: Tensor | None, time: int) -> Tensor:
    """Rows of one document each, (B, S, D) with every token at its position; y of the last `time` tokens.

    `length` (B,): where those begin, if not with the first.
    """
    y = _convolve(inputs, taps, 2 * inputs.shape[1])[:, : inputs.shape[1]]
    if length is None:
        return y
    at = length[:, None] + torch.arange(time, device=y.device)
    return y.gather(1, at[..., None].expand(*at.shape, y.shape[2]))


def among_documents(x: Tensor, past: Tensor, length: Tensor, taps: Tensor, segments: Segments) -> Tensor:
    """Any documents and padding; the padding of x is zero."""
    batch, time, dim = x.shape
    slots = past.shape[1]
    # 1. Past and present in one row, the real tokens moved to its front.
    real = torch.cat([torch.arange(slots, device=x.device) < length[:, None], segments.valid], dim=1)
    document = torch.cat([segments.starts.new_zeros(batch, slots).long(), segments.documents], dim=1)
    order = real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    size = 1 << (slots + time - 1).bit_length()
    fill = size - slots - time
    values = torch.cat([past, x], dim=1).gather(1, order[..., None].expand(-1, -1, dim))
    values, taps = pad(values, (0, 0, 0, fill)), pad(taps, (0, fill))
    count = real.sum(1, keepdim=True)
    document = document.gather(1, order)
    document = torch.where(torch.arange(slots + time, device=x.device) < count, document, -1)
    document = pad(document, (0, fill), value=-1)
    # 2. Each token itself, and in blocks of twice the size each time, the left half into the right one.
    y, half = taps[:, 0] * values, 1
    while half < size:
        left, right = document.unflatten(1, (-1, 2, half)).unbind(2)
        across = left[..., -1:]
        given = values.unflatten(1, (-1, 2, half)).select(2, 0)
        given = torch.where((left == across)[..., None], given, 0).flatten(0, 1)
        found = _convolve(given, taps[:, : 2 * half], 2 * half)[:, half:].unflatten(0, (batch, -1))
        found = torch.where((right == across)[..., None], found, 0)
        y = y + torch.stack([torch.zeros_like(found), found], dim=2).flatten(1, 3)
        half *= 2
    # 3. Back to where they came from.
    back = (real.cumsum(1) - 1)[:, slots:].clamp(min=0)
    return y.gather(1, back[..., None].expand(-1, -1, dim))


def two_sided_convolution(x: Tensor, filter: Tensor, future: Tensor) -> Tensor:
    time = x.shape[1]
    # Of lag -1 is the last tap of a circle, of lag 1 - T the one after the zero.
    taps = torch.cat([filter, torch.zeros_like(filter[:, :1]), future.flip(1)], dim=1)
    return _convolve(x, taps, 2 * time)[:, :time]


def _convolve(x: Tensor, taps: Tensor, size: int) -> Tensor:
    """Around a circle of `size`; x (B, T, D), taps (D, S) -> (B, size, D)."""
    if x.shape[0] == 0:  # the FFT refuses an empty batch
        return pad(x * taps.sum(1), (0, 0, 0, size - x.shape[1]))
    spectrum = torch.fft.rfft(x, n=size, dim=1) * torch.fft.rfft(taps.t(), n=size, dim=0)
    return torch.fft.irfft(spectrum, n=size, dim=1)
