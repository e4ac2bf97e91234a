"""Diagonal state space models in plain PyTorch.

Without segments, as a convolution by FFT: the memory is that of the powers of the decays, (D, N, T), whatever the
batch. With them, as a scan over all states, (B, T, D, N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.scan.parallel import scan
from tidegate.segments import Segments, zero_padding


def diagonal_ssm(
    u: Tensor, decay: Tensor, weight: Tensor, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    if segments is None and u.shape[0]:  # the FFT refuses an empty batch
        return _convolve(u, decay, weight, state)
    dim = u.shape[2]
    b = zero_padding(u, segments)[..., None].expand(-1, -1, -1, decay.shape[1]).to(decay.dtype).flatten(2)
    h, last = scan(decay.flatten().expand(b.shape), b, state.flatten(1), segments)
    y = torch.einsum("btdn,dn->btd", h.unflatten(2, (dim, -1)), weight).real
    return y, last.unflatten(1, (dim, -1))


def _convolve(u: Tensor, decay: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    time = u.shape[1]
    powers = decay_powers(decay, time + 1)  # (D, N, T + 1)
    kernel = torch.einsum("dn,dnt->td", weight, powers[..., :time]).real
    size = 2 * time  # so that the end does not come round to the beginning
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size, dim=0)
    y = torch.fft.irfft(spectrum, n=size, dim=1)[:, :time]
    y = y + torch.einsum("bdn,dnt->btd", weight * state, powers[..., 1:]).real
    last = powers[..., time] * state + torch.einsum("dnt,btd->bdn", powers[..., :time].flip(-1), u.to(powers.dtype))
    return y, last


def decay_powers(decay: Tensor, count: int) -> Tensor:
    """decay^0 ... decay^(count - 1) along a new last axis, by products alone: 0 is as good a decay as any."""
    powers, square = torch.ones_like(decay)[..., None], decay[..., None]
    while powers.shape[-1] < count:
        powers, square = torch.cat([powers, powers * square], -1), square * square
    return powers[..., :count]
