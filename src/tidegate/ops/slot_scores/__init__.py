"""Slot scores: a decayed outer-product memory asked which of its rows resemble a query."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["slot_scores"]


@recurrence
def slot_scores(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys kept in slots that each fade at their own rate; a query's product with every slot.

    Equation, per head (S is M x K, * multiplies its rows)::

        S_t = exp(log_decay_t) * S_{t-1} + slots_t k_t^T        o_t = scale * S_t q_t

    Linear attention reads the same memory along its other axis, S_t^T q_t.

    Shapes: q, k (B, T, H, K); slots, log_decay <= 0 and o (B, T, H, M); state (B, H, M, K), zeros if None, float32 at
    least. scale None means 1. Returns o in q's dtype and the final state.

    Raises ValueError for shapes that do not fit. Source: gated slot attention, arXiv 2409.07146.

    >>> key, slot = torch.eye(2)[None, :, None], torch.eye(3)[None, :2, None]  # each key into a slot of its own
    >>> o, state = slot_scores(key, key, slot, torch.zeros(1, 2, 1, 3))
    >>> o[0, :, 0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if q.ndim != 4 or q.shape[1] == 0:
        raise ValueError(f"q: seen shape {tuple(q.shape)}, wanted (batch, time, heads, key dim), at least one token")
    if k.shape != q.shape:
        raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted the shape of q, {tuple(q.shape)}")
    if slots.ndim != 4 or slots.shape[:3] != q.shape[:3]:
        raise ValueError(f"slots: seen shape {tuple(slots.shape)}, wanted {tuple(q.shape[:3])} + (slots,)")
    if log_decay.shape != slots.shape:
        raise ValueError(f"log_decay: seen shape {tuple(log_decay.shape)}, wanted that of slots, {tuple(slots.shape)}")
    shape = (q.shape[0], q.shape[2], slots.shape[3], q.shape[3])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted (batch, heads, slots, key dim) = {shape}")
    zero_padding(q, segments)  # checks that the shapes belong together
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(shape, dtype=wide) if state is None else state.to(wide)
    chosen = choose(q)
    if chosen == "numba":
        from tidegate.ops.slot_scores.numba_cpu import slot_scores as implementation
    elif chosen == "reference":
        from tidegate.ops.slot_scores.reference import slot_scores as implementation
    else:
        from tidegate.ops.slot_scores.parallel import slot_scores as implementation
    q, k, slots, log_decay = (x.to(wide) for x in (q, k, slots, log_decay))
    o, state = implementation(q, k, slots, log_decay, 1.0 if scale is None else float(scale), state, segments)
    return o.to(dtype), state
