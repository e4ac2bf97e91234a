"""Slot scores in plain PyTorch, without a recurrence of their own.

The memory of linear attention, keys = slots and values = k, read with queries w, gives S_t^T w_t. So sum_t q_t . S_t^T
w_t is linear in w, and its derivative by w_t is S_t q_t: the scores are the backward pass of linear attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.linear_attention.parallel import linear_attention
from tidegate.segments import Segments, zero_padding


def slot_scores(
    q: Tensor, k: Tensor, slots: Tensor, log_decay: Tensor, scale: float, state: Tensor, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), slots and log_decay (B, T, H, M), state (B, H, M, K), all of one dtype."""

    def read(w: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(w, slots, k, log_decay, scale, state, segments)

    _, derivative, last = torch.func.vjp(read, torch.zeros_like(slots), has_aux=True)  # type: ignore[misc]
    (o,) = derivative(zero_padding(q, segments))
    return o, last
