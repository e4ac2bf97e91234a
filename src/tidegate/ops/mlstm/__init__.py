"""mLSTM: a matrix memory with an exponential input gate, its running maximum and its normaliser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.ops.mlstm import parallel, reference
from tidegate.segments import Segments, zero_padding


@recurrence
def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    segments: Segments | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Decayed outer products that are written through exp(log_input), whatever its size, and read normalised.

    Equation, per head (C is K x V, n a vector of K, m a number)::

        m_t = max(log_decay_t + m_{t-1}, log_input_t)
        f_t = exp(log_decay_t + m_{t-1} - m_t)        i_t = exp(log_input_t - m_t)        (both <= 1)
        C_t = f_t C_{t-1} + i_t k_t v_t^T             n_t = f_t n_{t-1} + i_t k_t
        h_t = C_t^T (scale q_t) / (max(|n_t . (scale q_t)|, exp(-m_t)) + eps)

    m keeps every exponent at or below zero and cancels: C exp(m) and n exp(m) are the memory and the normaliser
    without it, and h is their quotient with a floor of 1 (up to eps). The state is what is stored, so its gradient is
    that of C, n and m as they are.

    Shapes: q, k (B, T, H, K); v, h (B, T, H, V); log_input of any size and log_decay <= 0, both (B, T, H);
    state (C (B, H, K, V), n (B, H, K), m (B, H)), zeros if None, float32 at least. scale None means 1.
    Returns h in q's dtype and the final state. A document starts from C = n = m = 0.

    Raises ValueError for shapes that do not fit. Sources: arXiv 2405.04517 (xLSTM), 2503.14376 (TFLA).

    >>> q = k = torch.ones(1, 2, 1, 1)
    >>> v = torch.tensor([2.0, 6.0]).reshape(1, 2, 1, 1)
    >>> gates = torch.full((1, 2, 1), 100.0), torch.zeros(1, 2, 1)  # e^100 is no float32
    >>> h, (memory, normaliser, maximum) = mlstm(q, k, v, *gates)
    >>> [round(x, 3) for x in h.flatten().tolist()], normaliser.item(), maximum.item()
    ([2.0, 4.0], 2.0, 100.0)
    """
    batch, heads, key_dim, value_dim = _check(q, k, v, log_input, log_decay, state)
    if segments is not None:
        zero_padding(q, segments)  # checks that the shapes belong together
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        shapes = (batch, heads, key_dim, value_dim), (batch, heads, key_dim), (batch, heads)
        state = tuple(torch.zeros(shape, dtype=wide, device=q.device) for shape in shapes)  # type: ignore[assignment]
    inputs = [x.to(wide) for x in (q, k, v, log_input, log_decay, *state)]  # type: ignore[misc]
    chosen = choose(q)
    form: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    if chosen == "numba":
        from tidegate.ops.mlstm.numba_cpu import mlstm as form
    else:
        form = reference.mlstm if chosen == "reference" else parallel.mlstm
    h, memory, normaliser, maximum = form(*inputs, 1.0 if scale is None else float(scale), float(eps), segments)
    return h.to(q.dtype), (memory, normaliser, maximum)


def _check(q, k, v, log_input, log_decay, state) -> tuple[int, int, int, int]:
    if q.ndim != 4:
        raise ValueError(f"q: seen shape {tuple(q.shape)}, wanted (batch, time, heads, key dim)")
    if q.shape[1] == 0:
        raise ValueError("q: seen T = 0 tokens, wanted at least one")
    if k.shape != q.shape:
        raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted the shape of q, {tuple(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: seen shape {tuple(v.shape)}, wanted {tuple(q.shape[:3])} + (value dim,)")
    for name, gate in (("log_input", log_input), ("log_decay", log_decay)):
        if gate.shape != q.shape[:3]:
            raise ValueError(
                f"{name}: seen shape {tuple(gate.shape)}, wanted (batch, time, heads) = {tuple(q.shape[:3])}"
            )
    batch, _, heads, key_dim = q.shape
    wanted = [(batch, heads, key_dim, v.shape[-1]), (batch, heads, key_dim), (batch, heads)]
    if state is not None and [tuple(x.shape) for x in state] != wanted:
        raise ValueError(
            f"state: seen shapes {', '.join(str(tuple(x.shape)) for x in state)}, wanted (memory, normaliser, maximum) "
            f"= {', '.join(map(str, wanted))}"
        )
    return batch, heads, key_dim, v.shape[-1]
