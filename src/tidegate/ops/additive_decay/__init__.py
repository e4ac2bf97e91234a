"""Additive decay: the gates of a weighted mean over everything seen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.segments import Segments, zero_padding

__all__ = ["additive_decay"]


def additive_decay(
    x: Tensor, *, state: Tensor | None = None, segments: Segments | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Share and log decay that make a linear recurrence a mean of its inputs with weights exp(x).

    Equation, channel by channel, z the logarithm of all weights so far::

        z_t = log(exp z_{t-1} + exp x_t)        share_t = exp(x_t - z_t)        log_decay_t = z_{t-1} - z_t

    so that share + exp(log_decay) = 1 and h_t = exp(log_decay_t) h_{t-1} + share_t v_t is the mean of v_1 .. v_t with
    weights exp(x): a softmax over time. Only differences of x count, however large it is. A document's first token has
    share 1 and log_decay 0: what it forgets is nothing.

    Shapes: x, share, log_decay (B, T, D), float32 at least; `state`, z before the first token, and the returned one
    (B, D), minus infinity where nothing came before (None: everywhere). On padding both results are zero.

    Raises ValueError for shapes that do not fit. Source: LightNet, arXiv 2405.21022.

    >>> share, log_decay, state = additive_decay(torch.zeros(1, 4, 1))
    >>> share.flatten().tolist(), round(state.exp().item())
    ([1.0, 0.5, 0.3333333432674408, 0.25], 4)
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, dim) with at least one token")
    batch, _, dim = x.shape
    if state is not None and tuple(state.shape) != (batch, dim):
        raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted (batch, dim) = {(batch, dim)}")
    zero_padding(x[..., :0], segments)  # only the check of shapes
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    state = torch.full_like(x[:, 0], -torch.inf) if state is None else state.to(x.dtype)
    chosen = choose(x)
    if chosen == "numba":
        from tidegate.ops.additive_decay.numba_cpu import additive_decay as implementation
    elif chosen == "reference":
        from tidegate.ops.additive_decay.reference import additive_decay as implementation
    else:
        from tidegate.ops.additive_decay.parallel import additive_decay as implementation
    return implementation(x, state, segments)
