"""The selective scan, chunk by chunk: within a chunk a diagonal scan over (D N) channels.

The expanded tensors (B, chunk, D, N) exist for one chunk at a time, also for the backward pass: a chunk keeps the state
it began with, and is computed again when its gradients are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tidegate.backend import mapped
from tidegate.ops.scan import parallel
from tidegate.segments import Segments, zero_padding

_CHUNK = 64


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    state: Tensor,
    segments: Segments | None,
    negative: bool,
) -> tuple[Tensor, Tensor]:
    """See `tidegate.ops.selective_scan`; tensors of one dtype."""
    x, dt, b, c = (zero_padding(tensor, segments) for tensor in (x, dt, b, c))
    step = dt if bias is None else functional.softplus(dt + bias)
    time, outputs = x.shape[1], []
    # Nothing is recomputed for a single chunk, nor inside torch.func, which has no place for it.
    recompute = time > _CHUNK and torch.is_grad_enabled() and not mapped()
    for begin in range(0, time, _CHUNK):
        own = slice(begin, begin + _CHUNK)
        part = None if segments is None else segments[own]
        arguments = (x[:, own], step[:, own], a, b[:, own], c[:, own], state, part, negative)
        if recompute:
            y, state = checkpoint(_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _chunk(*arguments)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    if d is not None:
        y = y + d * x
    if z is not None:
        y = y * functional.silu(zero_padding(z, segments))
    return y, state


def _chunk(
    x: Tensor,
    step: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    segments: Segments | None,
    negative: bool,
) -> tuple[Tensor, Tensor]:
    decay = torch.exp(step[..., None] * a)  # (B, C, D, N)
    if negative:
        decay = 2 * decay - 1
    taken = (step * x)[..., None] * b[:, :, None]
    h, state_ = parallel.scan(decay.flatten(2), taken.flatten(2), state.flatten(1), segments)
    y = (h.unflatten(2, a.shape) @ c[..., None]).squeeze(-1)
    return y, state_.unflatten(1, a.shape)
