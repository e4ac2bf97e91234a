"""The gates of the RG-LRU in one pass over memory."""

from __future__ import annotations

from torch import Tensor

from tidegate.backend import POINTWISE_WORTHWHILE, choose

__all__ = ["rg_lru_gates"]


def rg_lru_gates(u: Tensor, gates: Tensor, rate: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and input of the RG-LRU's recurrence h_t = a_t h_{t-1} + b_t.

    Equation, with r and i the two halves of sigmoid(gates)::

        a_t = exp(-rate * r_t)        b_t = m_t * i_t * u_t,   m_t = sqrt(1 - a_t^2), but 1 where `first`

    The derivative of the root is held below 1000.

    Shapes: u, a, b (B, T, W); gates (B, T, H, 2 W / H), for each head r and then i; rate (W,); first (B, T), boolean.
    a and b are float32 at least.

    Raises ValueError for shapes that do not fit. Source: Griffin, arXiv 2402.19427.

    >>> import torch
    >>> a, b = rg_lru_gates(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 2), torch.tensor([1.0]), torch.ones(1, 1).bool())
    >>> round(a.item(), 4), b.item()  # e^(-1/2), and the first token of a document is not scaled
    (0.6065, 0.5)
    """
    batch, time, width = u.shape
    if gates.ndim != 4 or gates.shape[:2] != u.shape[:2] or gates.shape[2] * gates.shape[3] != 2 * width:
        raise ValueError(
            f"gates: seen shape {tuple(gates.shape)}, wanted ({batch}, {time}, heads, {2 * width} / heads)"
        )
    if rate.shape != (width,) or first.shape != (batch, time):
        raise ValueError(
            f"rate, first: seen shapes {tuple(rate.shape)} and {tuple(first.shape)}, wanted ({width},) and "
            f"({batch}, {time})"
        )
    if choose(u, worthwhile=POINTWISE_WORTHWHILE) == "numba":
        from tidegate.ops.rg_lru import numba_cpu

        return numba_cpu.direct(u, gates, rate, first)
    from tidegate.ops.rg_lru import parallel

    return parallel.rg_lru_gates(u, gates, rate, first)
