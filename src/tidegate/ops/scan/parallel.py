"""The diagonal linear recurrence, chunk by chunk.

The row is cut into short chunks. One pass walks through all chunks side by side, column by column, and gives each
token's h for a chunk that begins at zero, together with the product of the decays so far. What enters each chunk obeys
the same recurrence with one "token" per chunk, so it is found by recursion: the depth is logarithmic in T, the work
proportional to it. Products of decays are only ever multiplied, never divided, so a = 0 is as good as any other value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.segments import Segments

_CHUNK = 16


def scan(a: Tensor, b: Tensor, state: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """a, b (B, T, D), state (B, D), all of one dtype."""
    if segments is None:
        h = _scan(a, b, state)
        return h, h[:, -1]
    # A document's first token forgets; padding keeps what there is.
    valid, starts = segments.valid[..., None], segments.starts[..., None]
    a = torch.where(valid, torch.where(starts, 0, a), 1)
    h = _scan(a, torch.where(valid, b, 0), state)
    return torch.where(valid, h, 0), h[:, -1]


def _scan(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    batch, time, dim = b.shape
    if time <= _CHUNK:
        return torch.stack(_columns(a, b, state), dim=1)
    chunks = -(-time // _CHUNK)
    missing = chunks * _CHUNK - time
    if missing:  # steps that change nothing
        a = torch.cat([a, torch.ones_like(a[:, :1]).expand(-1, missing, -1)], dim=1)
        b = torch.cat([b, torch.zeros_like(b[:, :1]).expand(-1, missing, -1)], dim=1)
    a, b = a.reshape(batch, chunks, _CHUNK, dim), b.reshape(batch, chunks, _CHUNK, dim)
    inside = torch.stack(_columns(a, b, None), dim=2)  # (B, chunks, C, D), from zero
    decay = torch.stack(_products(a), dim=2)
    carried = _scan(decay[:, :, -1], inside[:, :, -1], state)  # h at the end of each chunk
    entering = torch.cat([state[:, None], carried[:, :-1]], dim=1)
    return (inside + decay * entering[:, :, None]).reshape(batch, chunks * _CHUNK, dim)[:, :time]


def _columns(a: Tensor, b: Tensor, h: Tensor | None) -> list[Tensor]:
    columns = []
    for a_t, b_t in zip(a.unbind(-2), b.unbind(-2), strict=True):
        h = b_t if h is None else a_t * h + b_t
        columns.append(h)
    return columns


def _products(a: Tensor) -> list[Tensor]:
    columns = list(a.unbind(-2))
    for t in range(1, len(columns)):
        columns[t] = columns[t - 1] * columns[t]
    return columns
