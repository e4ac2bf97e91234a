"""Attention as its definition says: for each token, write its key and value, then weigh everything in sight."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.attention.weights import ELEMENTWISE, Rule
from tidegate.ops.loop import over_time
from tidegate.segments import Segments

Cache = tuple[Tensor, Tensor, Tensor]


def reference(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, state: Cache | None, segments: Segments | None
) -> tuple[Tensor, Cache]:
    """`ops.attention` after its checks, token by token."""
    batch, time, heads, _ = q.shape
    groups, window = k.shape[2], rule.window
    if state is None:
        slots = window or 0
        state = (
            k.new_zeros(batch, slots, *k.shape[2:]),
            v.new_zeros(batch, slots, *v.shape[2:]),
            torch.zeros(batch, dtype=torch.int64, device=k.device),
        )
    keys, values, length = state
    if window is None:  # room for the tokens of this call
        keys = torch.cat([keys, torch.zeros_like(k)], dim=1)
        values = torch.cat([values, torch.zeros_like(v)], dim=1)
    slot = torch.arange(keys.shape[1], device=k.device)
    if segments is None:
        valid = torch.ones(batch, time, dtype=torch.bool, device=k.device)
        segments = Segments(torch.zeros_like(valid), valid)
    position = segments.positions(length)

    def step(carry: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, start: Tensor, valid: Tensor, p: Tensor):
        keys, values = carry
        # 1. a new document begins with nothing
        fresh = start[:, None, None, None]
        keys = torch.where(fresh, torch.zeros_like(keys), keys)
        values = torch.where(fresh, torch.zeros_like(values), values)
        # 2. a real token takes the slot of its position
        here = (valid[:, None] & (slot == (p % slot.shape[0])[:, None]))[:, :, None, None]
        keys = torch.where(here, k[:, None], keys)
        values = torch.where(here, v[:, None], values)
        # 3. the scores of the slots in use; padding, which may find none, looks at all and is blanked afterwards
        seen = ((slot <= p[:, None]) | ~valid[:, None])[:, None, None]  # (B, 1, 1, L)
        scores = rule.scale * torch.einsum("bgrk,blgk->bgrl", q.unflatten(1, (groups, heads // groups)), keys)
        if rule.kernel != "softmax":
            scores = scores / (window or (p + 1)[:, None, None, None])
        if rule.bias is not None:
            distance = (p[:, None] - slot) % slot.shape[0]  # (B, L)
            scores = scores + rule.bias[:, distance].unflatten(0, (groups, heads // groups)).movedim(2, 0)
        # 4. what each is worth
        if rule.kernel == "softmax":
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        else:
            weights = torch.where(seen, ELEMENTWISE[rule.kernel](scores), 0)
        o = torch.einsum("bgrl,blgv->bgrv", weights, values).flatten(1, 2)
        return (keys, values), torch.where(valid[:, None, None], o, torch.zeros_like(o))

    inputs = (q, k, v, segments.starts, segments.valid, position)
    (keys, values), o = over_time(step, (keys, values), inputs)
    kept = torch.where(segments.documents[:, -1] == 0, length, 0)
    return o, (keys, values, kept + segments.in_last_document().sum(1))
