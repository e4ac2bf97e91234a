"""Causal attention, over everything so far or over a sliding window, with its keys and values as state."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.attention.weights import KERNELS, Rule
from tidegate.ops.calls import recurrence
from tidegate.segments import Segments, zero_padding

Cache = tuple[Tensor, Tensor, Tensor]


@recurrence
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    kernel: str = "softmax",
    scale: float | None = None,
    bias: Tensor | None = None,
    state: Cache | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Cache]:
    r"""Causal attention with grouped queries and a streaming state.

    ::

        o_t = sum_s softmax_s(scale * q_t . k_s + bias[t - s]) v_s      "softmax"
        o_t = sum_s f(scale * q_t . k_s / n + bias[t - s]) v_s          "relu2", "laplace"
        f(x) = max(x, 0)^2  or  f(x) = (1 + erf((x - sqrt(1/2)) / sqrt(1 / 2 pi))) / 2

    over s <= t of the same document, and s > t - window. With a `window` a token sees itself and the `window - 1` real
    tokens before it; n is the window, or without one the number of tokens in sight, t + 1. `bias` (H, window), for a
    window only, is added by the distance.

    Query head h reads key-value head h // (H / G). `scale=None` means D^(-1/2) (unlike `linear_attention`, where it
    means 1) for a softmax, else 1.

    q (B, T, H, D); k (B, T, G, D) and v (B, T, G, V) with H a multiple of G; o (B, T, H, V).

    The state is `(keys, values, length)`: keys (B, L, G, D), values (B, L, G, V), and length (B,) int64, the number of
    tokens the current document has had. Without a window the token at position p lies in slot p and L grows by T with
    each call; with one, L is `window`, the slot is p % window, and the newest token takes the place of the oldest.
    Slots without a token are zero. Positions are counted in real tokens, so padding shifts nothing.

    Raises ValueError naming the argument for shapes, dtypes, a window, kernel, bias or state that do not fit together.

    Source: Vaswani et al. 2017, arXiv 1706.03762; grouped queries: Ainslie et al. 2023, arXiv 2305.13245; relu^2: Hua
    et al. 2022, arXiv 2202.10447; Laplace: Ma et al. 2022, arXiv 2209.10655.

    >>> q, k, v = torch.randn(3, 1, 5, 2, 4).unbind()
    >>> whole, _ = attention(q, k, v, window=3)
    >>> first, state = attention(q[:, :2], k[:, :2], v[:, :2], window=3)
    >>> second, state = attention(q[:, 2:], k[:, 2:], v[:, 2:], window=3, state=state)
    >>> torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6), state[2].tolist()
    (True, [5])
    """
    _check(q, k, v, window, state)
    _check_weights(q, window, kernel, bias)
    q, k, v = (zero_padding(x, segments) for x in (q, k, v))
    if scale is None:
        scale = q.shape[-1] ** -0.5 if kernel == "softmax" else 1.0
    # "numba" means parallel.py here: torch's own fused attention is the CPU kernel. It also exports in one piece; only
    # the blocks of a window need a known length, so there the loop, with its small state, is what exports.
    if choose(q) == "reference" and (window is not None or not torch.compiler.is_exporting()):
        from tidegate.ops.attention.reference import reference as form
    else:
        from tidegate.ops.attention.parallel import parallel as form
    o, state = form(q, k, v, Rule(kernel, scale, window, bias), state, segments)
    return zero_padding(o, segments), state


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, state: Cache | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: seen shape {tuple(x.shape)}, wanted (batch, time, heads, dim)")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: seen {x.dtype}, wanted the dtype of q, {q.dtype}")
    if q.shape[1] == 0:
        raise ValueError("q: seen T = 0 tokens, wanted at least one")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted (B, T, G, D) of q's {tuple(q.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: seen shape {tuple(v.shape)}, wanted the (B, T, G) of k's {tuple(k.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} key-value heads do not divide the {q.shape[2]} query heads of q")
    if window is not None and window < 1:
        raise ValueError(f"window: seen {window}, wanted at least 1 (a token sees itself) or None")
    if state is None:
        return
    if len(state) != 3:
        raise ValueError(f"state: seen {len(state)} entries, wanted (keys, values, length)")
    keys, values, length = state
    slots = keys.shape[1] if window is None and keys.ndim == 4 else window
    for name, x, new in (("keys", keys, k), ("values", values, v)):
        if tuple(x.shape) != (new.shape[0], slots, *new.shape[2:]):
            wanted = "L" if window is None else f"window={window}"
            raise ValueError(
                f"state: its {name} have shape {tuple(x.shape)}, wanted ({new.shape[0]}, {wanted}, {new.shape[2]}, "
                f"{new.shape[3]})"
            )
    if tuple(length.shape) != (q.shape[0],) or length.dtype != torch.int64:
        raise ValueError(
            f"state: its length is {length.dtype} {tuple(length.shape)}, wanted one int64 per row of {q.shape[0]}"
        )


def _check_weights(q: Tensor, window: int | None, kernel: str, bias: Tensor | None) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel: seen {kernel!r}, wanted one of {', '.join(KERNELS)}")
    if bias is None:
        return
    if window is None:
        raise ValueError("bias: wanted None without a window; there is one number for each distance in it")
    if tuple(bias.shape) != (q.shape[2], window):
        raise ValueError(f"bias: seen shape {tuple(bias.shape)}, wanted (heads={q.shape[2]}, window={window})")
