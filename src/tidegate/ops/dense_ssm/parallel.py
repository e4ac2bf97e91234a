"""State space models with full matrices in plain PyTorch.

Without segments, as a convolution by FFT: the memory is that of the kernel's making, (D, N, T), whatever the batch.
With them, as a scan over all states, (B, T, D, N), that doubles its reach in each of log2 T passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.segments import Segments, reorder, zero_padding


def dense_ssm(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    if segments is None and u.shape[0]:  # the FFT refuses an empty batch
        return _convolve(u, a, b, c, state)
    return _scan(u, a, b, c, state, segments)


def _convolve(u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    time = u.shape[1]
    written = krylov(a, b[..., None], time)[..., 0]  # (D, N, T): what a token has become, by its age
    read = krylov(a.mT, (c @ a).mT, time)  # (D, N, T, M): what the state from before is read with
    kernel = torch.einsum("dmn,dnt->tdm", c, written)
    size = 2 * time  # so that the end does not come round to the beginning
    spectrum = torch.fft.rfft(u, n=size, dim=1)[..., None] * torch.fft.rfft(kernel, n=size, dim=0)
    y = torch.fft.irfft(spectrum, n=size, dim=1)[:, :time] + torch.einsum("bdn,dntm->btdm", state, read)
    last = torch.einsum("dij,bdj->bdi", torch.linalg.matrix_power(a, time), state)
    return y, last + torch.einsum("dnt,btd->bdn", written.flip(-1), u)


def krylov(a: Tensor, x: Tensor, count: int) -> Tensor:
    """x, a x, ..., a^(count - 1) x along a new axis: a (D, N, N), x (D, N, M), the result (D, N, count, M)."""
    found, power = x[:, :, None], a
    while found.shape[2] < count:
        found = torch.cat([found, (power @ found.flatten(2)).unflatten(2, found.shape[2:])], 2)
        if found.shape[2] < count:
            power = power @ power
    return found[:, :, :count]


def _scan(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """The real tokens moved together, behind the state from before, as if that were one; then h_t += a^n h_{t-n} for
    n = 1, 2, 4, ... where n tokens back is the same document."""
    batch, time = u.shape[:2]
    if segments is None:
        segments = Segments.padded(torch.ones(batch, time, dtype=torch.bool, device=u.device))
    moved, order, place = segments.compacted()
    written = reorder(zero_padding(u, segments), order)[..., None] * b
    h = torch.cat([state[:, None], written], 1)  # (B, 1 + T, D, N)
    reach = torch.nn.functional.pad(moved.positions() + (moved.documents == 0), (1, 0))[..., None, None]
    shift, power = 1, a
    while shift <= time:
        earlier = torch.einsum("dij,btdj->btdi", power, h[:, :-shift])
        h = h + torch.where(reach >= shift, torch.cat([torch.zeros_like(h[:, :shift]), earlier], 1), 0)
        shift, power = 2 * shift, power @ power
    last = reorder(h, moved.lengths()[:, None])[:, 0]
    y = reorder(torch.einsum("dmn,btdn->btdm", c, h[:, 1:]), place)
    return zero_padding(y, segments), last
