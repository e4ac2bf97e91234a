"""The delta-rule recurrences as the papers write them: one step per token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidegate.ops.loop import over_time
from tidegate.segments import Segments, zero_padding


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """S_t = Diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,  o_t = scale S_t^T q_t."""

    def step(carry: tuple[Tensor, ...], *now: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (before,) = carry  # (B, H, K, V)
        q, k, v, a, b, log_decay, start, valid = now
        S = torch.where(start, torch.zeros_like(before), before)
        read = torch.einsum("bhk,bhkv->bhv", a, S)  # before the decay
        S = log_decay.exp().unsqueeze(-1) * S + _outer(b, read) + _outer(k, v)
        S = torch.where(valid, S, before)
        return (S,), scale * torch.einsum("bhk,bhkv->bhv", q, S)

    return _loop(step, state, (q, k, v, a, b, log_decay), segments)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """S = Diag(w_t) S_{t-1}, then for every sub-step n: S += beta_n k_n (v_n - S^T k_n)^T;  o_t = scale S^T q_t.

    k (B, T, n, H, K), v (B, T, n, H, V), beta (B, T, n, H).
    """

    def step(carry: tuple[Tensor, ...], *now: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (before,) = carry
        q, k, v, beta, log_decay, start, valid = now
        S = log_decay.exp().unsqueeze(-1) * torch.where(start, torch.zeros_like(before), before)
        for n in range(k.shape[1]):
            error = v[:, n] - torch.einsum("bhk,bhkv->bhv", k[:, n], S)
            S = S + _outer(k[:, n], beta[:, n].unsqueeze(-1) * error)
        S = torch.where(valid, S, before)
        return (S,), scale * torch.einsum("bhk,bhkv->bhv", q, S)

    return _loop(step, state, (q, k, v, beta, log_decay), segments)


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)


def _loop(step, state: Tensor, inputs: tuple[Tensor, ...], segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Run `step` in the state's dtype; padding reads zeros, so whatever stands there stays out."""
    x = inputs[0]
    if segments is None:
        start = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        valid = ~start
    else:
        start, valid = segments.starts, segments.valid
    cast = tuple(zero_padding(tensor.to(state.dtype), segments) for tensor in inputs)
    (state,), o = over_time(step, (state,), (*cast, start[..., None, None, None], valid[..., None, None, None]))
    return o.to(x.dtype), state
