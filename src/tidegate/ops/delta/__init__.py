"""The delta rule and its relatives: a matrix state whose transition is diagonal plus rank one.

`dplr` is the general recurrence (RWKV-7 uses it in full); `delta_rule` is DeltaNet, Gated DeltaNet, KDA and, with
several steps per token, DeltaProduct.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.backend import choose
from tidegate.ops.calls import recurrence
from tidegate.ops.delta import parallel, reference
from tidegate.segments import Segments

__all__ = ["delta_rule", "dplr"]


@recurrence
def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal-plus-rank-one recurrence over a matrix state.

        S_t = Diag(exp log_decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,     o_t = scale S_t^T q_t

    `a` reads S_{t-1} before the decay. Without `b` the correction is written along k, which saves a third of the work.
    q, k, a, b: (B, T, H, K); v, o: (B, T, H, V); log_decay <= 0: None, (H,), (B, T, H) or (B, T, H, K);
    state: (B, H, K, V), zeros if None, float32 for half-precision inputs. scale None means 1.

    Raises ValueError for shapes that do not fit. Source: RWKV-7, arXiv 2503.14456; chunkwise form after Yang et al.,
    arXiv 2406.06484.

    >>> x = torch.ones(1, 3, 2, 4)
    >>> o, state = dplr(x, x, x, -x / 4)  # the same key each time: what is remembered is overwritten by itself
    >>> o.shape, state[0, 0, 0].tolist()
    (torch.Size([1, 3, 2, 4]), [1.0, 1.0, 1.0, 1.0])
    """
    _check_heads(q, v)
    for name, x in (("k", k), ("a", a), ("b", b)):
        if x is not None and x.shape != q.shape:
            raise ValueError(f"{name}: seen shape {tuple(x.shape)}, wanted q's (B, T, H, K) = {tuple(q.shape)}")
    g = _log_decay(log_decay, q)
    state = _state(state, q, v)
    _check_segments(segments, q)
    scale = 1.0 if scale is None else scale
    chosen = choose(q)
    if chosen == "reference":
        return reference.dplr(q, k, v, a, k if b is None else b, _zeros_if_none(g, q), scale, state, segments)
    if chosen == "parallel":
        return parallel.dplr(q, k, v, a, b, _zeros_if_none(g, q), scale, state, segments)
    from tidegate.ops.delta import numba_cpu

    return numba_cpu.dplr(q, k, v, a, b, None, g, scale, state, segments)


@recurrence
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule: move what is stored under k_t towards v_t by a step beta_t.

        S_t = (I - beta_t k_t k_t^T) Diag(exp log_decay_t) S_{t-1} + beta_t k_t v_t^T,     o_t = scale S_t^T q_t

    The decay acts first, then the correction. With unit keys and beta in [0, 2] the transition never expands.
    q, k: (B, T, H, K); v, o: (B, T, H, V); beta: (B, T, H); log_decay <= 0: None, (H,), (B, T, H) or (B, T, H, K);
    state: (B, H, K, V), zeros if None, float32 for half-precision inputs. scale None means 1.

    Several steps per token (DeltaProduct): k (B, T, n, H, K), v (B, T, n, H, V), beta (B, T, n, H). The decay acts
    once, before the first step; the query reads after the last.

    Raises ValueError for shapes that do not fit. Sources: DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464;
    DeltaProduct, arXiv 2502.10297.

    >>> key, value = torch.eye(4)[None, :2, None], torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    >>> o, state = delta_rule(key, key, value, torch.ones(1, 2, 1))
    >>> o[0, :, 0].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    several = k.ndim == 5
    if several:
        k, v, beta = _check_steps(q, k, v, beta)
    else:
        if k.shape != q.shape:
            raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted q's (B, T, H, K) = {tuple(q.shape)}")
        if beta.shape != q.shape[:3]:
            raise ValueError(f"beta: seen shape {tuple(beta.shape)}, wanted (B, T, H) = {tuple(q.shape[:3])}")
        _check_heads(q, v)
    g = _log_decay(log_decay, q)
    state = _state(state, q, v[:, :, 0] if several else v)
    _check_segments(segments, q)
    scale = 1.0 if scale is None else scale
    chosen = choose(q)
    if chosen == "reference":
        if not several:
            k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
        return reference.delta_rule(q, k, v, beta, _zeros_if_none(g, q), scale, state, segments)

    steps = k.shape[2] if several else 1
    if steps > 1:
        # One long sequence of single steps: the decay on the first step of a token, the query on the last.
        q = _spread(q, steps, last=True)
        g = None if g is None else _spread(g, steps, last=False)
        segments = None if segments is None else _stretch(segments, steps)
    if several:
        k, v, beta = k.flatten(1, 2), v.flatten(1, 2), beta.flatten(1, 2)
    if chosen == "parallel":
        o, state = parallel.delta_rule(q, k, v, beta, _zeros_if_none(g, q), scale, state, segments)
    else:
        from tidegate.ops.delta import numba_cpu

        o, state = numba_cpu.dplr(q, k, v, None, None, beta, g, scale, state, segments)
    return (o[:, steps - 1 :: steps] if steps > 1 else o), state


# -- several steps per token -------------------------------------------------------------------------------------------
def _spread(x: Tensor, steps: int, *, last: bool) -> Tensor:
    """(B, T, ...) -> (B, T * steps, ...), x on the first or last step of each token and zeros on the others."""
    x = x.unsqueeze(2)
    zeros = torch.zeros_like(x).expand(-1, -1, steps - 1, *x.shape[3:])
    return torch.cat([zeros, x] if last else [x, zeros], 2).flatten(1, 2)


def _stretch(segments: Segments, steps: int) -> Segments:
    starts = _spread(segments.starts, steps, last=False)
    return Segments(starts, segments.valid.repeat_interleave(steps, 1))


def _check_steps(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, n, H, K = k.shape
    if q.ndim != 4 or tuple(q.shape) != (B, T, H, K):
        raise ValueError(f"q: seen shape {tuple(q.shape)}, wanted (B, T, H, K) = {(B, T, H, K)} to go with k")
    if n < 1 or T < 1:
        raise ValueError(f"k: seen shape {tuple(k.shape)}, wanted (B, T, n, H, K) with at least one token and one step")
    if v.ndim != 5 or tuple(v.shape[:4]) != (B, T, n, H):
        raise ValueError(f"v: seen shape {tuple(v.shape)}, wanted (B, T, n, H, V) = {(B, T, n, H, 'V')} to go with k")
    if tuple(beta.shape) != (B, T, n, H):
        raise ValueError(f"beta: seen shape {tuple(beta.shape)}, wanted (B, T, n, H) = {(B, T, n, H)} to go with k")
    return k, v, beta


# -- checks ------------------------------------------------------------------------------------------------------------
def _check_heads(q: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"q: seen shape {tuple(q.shape)}, wanted (B, T, H, K) with at least one token")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v: seen shape {tuple(v.shape)}, wanted (B, T, H, V) = {(*q.shape[:3], 'V')} to go with q")


def _check_segments(segments: Segments | None, q: Tensor) -> None:
    if segments is not None and segments.shape != tuple(q.shape[:2]):
        raise ValueError(f"segments: made for (B, T) = {segments.shape}, but q has {tuple(q.shape[:2])}")


def _log_decay(log_decay: Tensor | None, q: Tensor) -> Tensor | None:
    """(B, T, H, 1) or (B, T, H, K), or None."""
    if log_decay is None:
        return None
    B, T, H, K = q.shape
    if tuple(log_decay.shape) == (H,):
        return log_decay[:, None].expand(B, T, H, 1)
    if tuple(log_decay.shape) == (B, T, H):
        return log_decay.unsqueeze(-1)
    if tuple(log_decay.shape) == (B, T, H, K):
        return log_decay
    raise ValueError(
        f"log_decay: seen shape {tuple(log_decay.shape)}, wanted None, (H,) = {(H,)}, (B, T, H) = {(B, T, H)} or "
        f"(B, T, H, K) = {(B, T, H, K)}"
    )


def _zeros_if_none(g: Tensor | None, q: Tensor) -> Tensor:
    return q.new_zeros(()).expand(*q.shape[:3], 1) if g is None else g


def _state(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[-1])
    dtype = torch.float32 if q.dtype in (torch.bfloat16, torch.float16) else q.dtype
    if state is None:
        return q.new_zeros(shape, dtype=dtype)
    if tuple(state.shape) != shape:
        raise ValueError(f"state: seen shape {tuple(state.shape)}, wanted (B, H, K, V) = {shape}")
    return state.to(dtype)
