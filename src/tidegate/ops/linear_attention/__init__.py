"""Decayed outer products: linear attention, RetNet, GLA, Mamba-2, HGRN-2, RWKV-6 and their kin."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.ops.linear_attention import parallel, reference
from tidegate.segments import Segments, zero_padding


@recurrence
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
    read_before_write: bool = False,
    bonus: Tensor | None = None,
    normaliser_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A matrix state per head, decayed and written with an outer product at every step.

    Equation, per head (S is K x V, * multiplies the rows of S)::

        S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t

    With `read_before_write`, o_t = scale * (S_{t-1} + (bonus * k_t) v_t^T)^T q_t: the state is read before it decays
    and is written to, and the current token is seen through `bonus` (RWKV-6).

    With `normaliser_eps`, o_t / (n_t + normaliser_eps), where n is what a value of constant one would read: a weighted
    mean, for keys and queries without negative entries. The state has a column more, for that value.

    Shapes: q, k (B, T, H, K); v (B, T, H, V); log_decay <= 0, one of None, (H,), (B, T, H) or (B, T, H, K);
    bonus (H, K); state (B, H, K, V) or (B, H, K, V + 1), zeros if None, float32 at least. scale None means 1.
    Returns o (B, T, H, V) in q's dtype and the final state.

    Raises ValueError for shapes that do not fit. Sources: arXiv 2006.16236 (linear attention), 2307.08621 (RetNet),
    2312.06635 (GLA), 2405.21060 (Mamba-2), 2404.05892 (RWKV-6).

    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> o, state = linear_attention(q, k, v, torch.tensor([0.5]).log())
    >>> o.flatten().tolist(), state.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    if normaliser_eps is not None:
        v = pad(v, (0, 1), value=1.0)
    batch, time, heads, key_dim = _check(q, k, v, log_decay, state, bonus, read_before_write)
    dtype = q.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    if state is None:
        state = torch.zeros(batch, heads, key_dim, v.shape[-1], dtype=accumulate, device=q.device)
    if segments is not None:
        zero_padding(q, segments)  # checks that the shapes belong together
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(batch, time, heads)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    scale = 1.0 if scale is None else float(scale)

    if read_before_write:
        o, state = _read_before_write(q, k, v, log_decay, scale, state, segments, bonus)
    else:
        o, state = _dispatch(q, k, v, log_decay, scale, state, segments)
    if normaliser_eps is not None:
        o = o[..., :-1] / (o[..., -1:] + normaliser_eps)
    return o.to(dtype), state


def _dispatch(q, k, v, log_decay, scale, state, segments):
    """log_decay is None or (B, T, H, 1 or K) from here on."""
    chosen = choose(q)
    if chosen == "numba":
        from tidegate.ops.linear_attention import numba_cpu

        return numba_cpu.linear_attention(q, k, v, log_decay, scale, state, segments)
    form = reference if chosen == "reference" else parallel
    return form.linear_attention(q, k, v, log_decay, scale, state, segments)


def _read_before_write(q, k, v, log_decay, scale, state, segments, bonus):
    """o_t reads S_{t-1}: hand every query to the token before it, and its answer back.

    The kernels then need no second mode. A document's first token reads zeros; the row's first token, where it
    continues, reads the state that was passed in.
    """
    if segments is None:
        # Cut after joining: q[:, 1:] alone would tie an exported program to T > 2.
        asked = torch.cat([q, torch.zeros_like(q[:, :1])], 1)[:, 1:]
        answers, last = _dispatch(asked, k, v, log_decay, scale, state, segments)
        first = scale * torch.einsum("bhk,bhkv->bhv", q[:, 0].to(state.dtype), state)
        o = torch.cat([first.unsqueeze(1), answers.to(state.dtype)], 1)[:, :-1]
    else:
        previous = segments.previous()
        asks = (previous >= 0)[..., None, None]
        index = previous.clamp(min=0)[..., None, None]
        asked = torch.zeros_like(q).scatter_add(1, index.expand_as(q), torch.where(asks, q, 0))
        answers, last = _dispatch(asked, k, v, log_decay, scale, state, segments)
        answers = torch.where(asks, answers.gather(1, index.expand_as(v)), 0)
        continues = (segments.valid & (segments.documents == 0) & (previous < 0))[..., None, None]  # one in a row
        asking = torch.where(continues, q, 0).sum(1).to(state.dtype)
        first = scale * torch.einsum("bhk,bhkv->bhv", asking, state)
        o = torch.where(continues, first.unsqueeze(1), answers.to(state.dtype))
    if bonus is not None:
        seen = (q * bonus.to(q.dtype) * k).sum(-1, keepdim=True)
        o = o + scale * zero_padding(seen * v, segments).to(state.dtype)
    return o.to(q.dtype), last


def _check(q, k, v, log_decay, state, bonus, read_before_write) -> tuple[int, int, int, int]:
    if q.ndim != 4:
        raise ValueError(f"q: seen shape {tuple(q.shape)}, wanted (batch, time, heads, key dim)")
    if q.shape[1] == 0:
        raise ValueError("q: seen T = 0 tokens, wanted at least one")
    if k.shape != q.shape:
        raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted the shape of q, {tuple(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: seen shape {tuple(v.shape)}, wanted {tuple(q.shape[:3])} + (value dim,)")
    batch, time, heads, key_dim = q.shape
    allowed = [(heads,), (batch, time, heads), (batch, time, heads, key_dim)]
    if log_decay is not None and tuple(log_decay.shape) not in allowed:
        raise ValueError(
            f"log_decay: seen shape {tuple(log_decay.shape)}, wanted None or one of {', '.join(map(str, allowed))}"
        )
    if state is not None and tuple(state.shape) != (batch, heads, key_dim, v.shape[-1]):
        raise ValueError(
            f"state: seen shape {tuple(state.shape)}, wanted (batch, heads, key dim, value dim) = "
            f"{(batch, heads, key_dim, v.shape[-1])}"
        )
    if bonus is not None and not read_before_write:
        raise ValueError("bonus: only has a meaning with read_before_write=True")
    if bonus is not None and tuple(bonus.shape) != (heads, key_dim):
        raise ValueError(f"bonus: seen shape {tuple(bonus.shape)}, wanted (heads, key dim) = {(heads, key_dim)}")
    return batch, time, heads, key_dim
