"""Past inputs as a state: the token at position p of the current document lies in slot p, or in slot p % window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidegate.backend import mapped
from tidegate.segments import Segments


def append(
    new: Sequence[Tensor],
    past: Sequence[Tensor] | None,
    length: Tensor | None,
    segments: Segments | None,
    window: int | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The slots after a call, those of the last document and its new tokens, and how many tokens it has had.

    `new` are (B, T, ...), `past` (B, L, ...) of the same kinds, `length` (B,) int64 the tokens of document 0 so far.
    Without a window there are L + T slots afterwards; with one there are `window`, and the newest token takes the place
    of the oldest. Slots without a token are zero.
    """
    first = new[0]
    batch, time = first.shape[:2]
    length = first.new_zeros(batch, dtype=torch.int64) if length is None else length
    if segments is None:
        if past is None and window is None:
            return tuple(new), length + time
        new_length = length + time
        # Cutting only saves work, and a traced length is no number to compare with.
        begin = 0 if window is None or torch.compiler.is_compiling() else max(0, time - window)
        new = [x[:, begin:] for x in new]
        slot = length[:, None] + torch.arange(begin, time, device=first.device)
    else:
        in_last = segments.in_last_document()
        kept = segments.documents[:, -1] == 0
        length = torch.where(kept, length, 0)
        slot = segments.positions(length)
        new_length = length + in_last.sum(1)
        if past is not None:
            past = [torch.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in past]
    size = window or (time if past is None else past[0].shape[1] + time)
    if window is not None:
        stays = slot >= (new_length - window)[:, None]
        slot = slot % window
    else:
        stays = slot < size
    if segments is not None:
        stays = stays & in_last
    slot = torch.where(stays, slot, size)  # one slot too many takes what is not kept

    def write(past: Tensor | None, new: Tensor) -> Tensor:
        room = new.new_zeros(batch, size + 1 - (0 if past is None else past.shape[1]), *new.shape[2:])
        buffer = room if past is None else torch.cat([past, room], dim=1)
        # The buffer is new, so writing into it harms nobody; only `vmap` cannot, if the past is the same for all.
        scatter = buffer.scatter if mapped() else buffer.scatter_
        return scatter(1, slot.reshape(*slot.shape, *[1] * (new.ndim - 2)).expand_as(new), new)[:, :size]

    pasts = [None] * len(new) if past is None else past
    return tuple(write(old, x) for old, x in zip(pasts, new, strict=True)), new_length
