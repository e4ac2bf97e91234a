"""The diagonal linear recurrence h_t = a_t * h_{t-1} + b_t."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

__all__ = ["scan"]


@recurrence
def scan(
    a: Tensor,
    b: Tensor,
    *,
    state: Tensor | None = None,
    segments: Segments | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """h_t = a_t * h_{t-1} + b_t, channel by channel; returns all h_t and the last one.

    Shapes: b, h (B, T, D), T >= 1, real or complex; a (D,) for a decay that does not depend on time, or anything that
    broadcasts to (B, T, D); `state`, the h before the first token, and the returned state (B, D). h has the common
    dtype of a and b; half precision is computed in float32, and its state is float32. |a| <= 1 is what keeps h bounded;
    a = 0 is exact.

    The first token of a document sees h_{t-1} = 0; padding is stepped over and its h is zero.

    With `reverse=True` time runs from right to left, h_t = a_t * h_{t+1} + b_t: `state` enters at the last real token
    of a row, so belongs to the row's last document, and the returned state is h at the first real token, so belongs to
    its first document. Between documents h is reset: the last token of every document but the row's last sees zero.
    The result is that of a forward scan over the flipped row. A row that is cut in two goes right part first; where
    the right part begins with the start of a document, its state is not to be handed to the left part.

    Raises ValueError for tensors whose shapes or dtypes do not fit together.

    Source: Blelloch 1990, "Prefix sums and their applications", for the recurrence as a scan.

    >>> h, state = scan(torch.tensor([0.5]), torch.tensor([[[4.0], [2.0], [1.0]]]))
    >>> h.flatten().tolist(), state.tolist()
    ([4.0, 4.0, 3.0], [[3.0]])
    >>> scan(torch.tensor([0.5]), torch.tensor([[[4.0], [2.0], [1.0]]]), reverse=True)[0].flatten().tolist()
    [5.25, 2.5, 1.0]
    """
    _check(a, b, state)
    zero_padding(b[:, :, :0], segments)  # only the check of shapes
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    batch, _, dim = b.shape
    constant = a.numel() == dim and a.shape[-1] == dim
    a = a.to(wide).reshape(dim) if constant else a.to(wide).expand(b.shape)
    b = b.to(wide)
    state = b.new_zeros(batch, dim) if state is None else state.to(wide)
    if reverse and segments is not None:
        segments = segments.reversed(continues=True)
    form = choose(b)
    if form == "numba":
        from tidegate.ops.scan.numba_cpu import scan as fused

        h, state = fused(a, b, state, segments, reverse)
        return h.to(dtype), state
    if form == "reference":
        from tidegate.ops.scan.reference import scan as forward
    else:
        from tidegate.ops.scan.parallel import scan as forward
    a = a.expand(b.shape)
    if reverse:
        a, b = a.flip(1), b.flip(1)
    h, state = forward(a, b, state, segments)
    return (h.flip(1) if reverse else h).to(dtype), state


def _check(a: Tensor, b: Tensor, state: Tensor | None) -> None:
    if b.ndim != 3:
        raise ValueError(f"b: seen shape {tuple(b.shape)}, wanted (batch, time, dim)")
    batch, time, dim = b.shape
    if time == 0:
        raise ValueError("b: seen T = 0 tokens, wanted at least one")
    for name, tensor in (("a", a), ("b", b)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name}: seen dtype {tensor.dtype}, wanted a floating-point or complex one")
    fits = a.shape == (dim,) or (a.ndim == 3 and all(n in (1, m) for n, m in zip(a.shape, b.shape, strict=True)))
    if not fits:
        raise ValueError(f"a: seen shape {tuple(a.shape)}, wanted ({dim},) or what broadcasts to {tuple(b.shape)}")
    if state is not None and state.shape != (batch, dim):
        raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted (batch={batch}, dim={dim})")
    if state is not None and state.is_complex() and not (a.is_complex() or b.is_complex()):
        raise ValueError(f"state: seen dtype {state.dtype} for a real recurrence, wanted a real one")
