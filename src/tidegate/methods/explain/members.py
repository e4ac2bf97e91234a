"""From the arguments of an op to its dynamical system: one function per recurrence, mirroring the op's signature.

Every function gives `Matrices` in the wide dtype, all of them (B, T, heads, ...), heads being what shares one attention
matrix: a head of linear attention, but a single channel of a scan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.methods.explain.matrices import Matrices, run
from tidegate.ops.attention.weights import ELEMENTWISE
from tidegate.segments import Segments


def refusal(op: str, arguments: Any) -> str | None:
    """Why this call is no linear recurrence, if it is none."""
    if op == "cell":
        return "the update of this cell is not linear in its state, so there is no matrix to show"
    if op not in MEMBERS:
        return f"{op} is a recurrence that tidegate.methods.explain does not know yet; add it to MEMBERS in members.py"
    if op == "sru" and arguments["weight"] is not None:
        return "the gates of this SRU see its state, so its recurrence is not linear; gates_see_state=False is"
    return None


# -- diagonal recurrences ----------------------------------------------------------------------------------------------
def _scan(a: Tensor, b: Tensor, state: Any, segments: Segments | None, reverse: bool) -> Matrices:
    a, b = a.expand(b.shape)[..., None], b[..., None]
    if reverse:
        a, b = a.flip(1), b.flip(1)
        segments = None if segments is None else segments.reversed(continues=True)
    one = torch.ones_like(b)
    return Matrices(a, one[..., None], one, b[..., None], segments, backwards=reverse)


def _selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    negative_eigenvalues: bool,
    state: Any,
    segments: Segments | None,
) -> Matrices:
    step = dt if dt_bias is None else functional.softplus(dt + dt_bias)
    transition = torch.exp(step[..., None] * a)
    transition = 2 * transition - 1 if negative_eigenvalues else transition
    gate = torch.ones_like(x) if z is None else functional.silu(z)
    skip = None if d is None else (gate * d)[..., None]
    values = x[..., None, None]
    return Matrices(
        transition,
        step[..., None, None] * b[:, :, None, :, None],
        gate[..., None] * c[:, :, None],
        values,
        segments,
        skip,
    )


def _diagonal_ssm(u: Tensor, decay: Tensor, weight: Tensor, state: Any, segments: Segments | None) -> Matrices:
    transition, readout = (part.expand(*u.shape[:2], *part.shape) for part in (decay, weight))
    write = readout.new_ones(()).expand(*readout.shape, 1)
    return Matrices(transition, write, readout, u[..., None, None], segments)


def _dense_ssm(u: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Any, segments: Segments | None) -> Matrices:
    """Each of the M outputs of a channel is a head."""
    count = c.shape[1]
    transition, write = (part.repeat_interleave(count, 0).expand(*u.shape[:2], *[-1] * part.ndim) for part in (a, b))
    values = u.repeat_interleave(count, 2)[..., None, None]
    return Matrices(transition, write[..., None], c.flatten(0, 1).expand_as(write), values, segments)


def _sru(
    x: Tensor, projected: Tensor, bias: Tensor, weight: None, alpha: float, state: Any, segments: Segments | None
) -> Matrices:
    u, f, r = projected.chunk(3, -1)
    f, r = torch.sigmoid(f + bias[0]), torch.sigmoid(r + bias[1])
    beside = ((1 - r) * alpha * x)[..., None]
    return Matrices(f[..., None], (1 - f)[..., None, None], r[..., None], u[..., None, None], segments, beside=beside)


# -- outer products ----------------------------------------------------------------------------------------------------
def _decay(log_decay: Tensor | None, q: Tensor) -> Tensor:
    """(B, T, H, 1 or K)."""
    if log_decay is None:
        return torch.ones_like(q[..., :1])
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(q.shape[:3])
    return torch.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])


def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    state: Any,
    segments: Segments | None,
    read_before_write: bool,
    bonus: Tensor | None,
    normaliser_eps: float | None = None,
) -> Matrices:
    q = q * (1.0 if scale is None else scale)
    skip = (q * bonus * k).sum(-1, keepdim=True) if bonus is not None else None
    system = Matrices(
        _decay(log_decay, q), k[..., None], q, v[..., None, :], segments, skip, reads_before=read_before_write
    )
    return system if normaliser_eps is None else _normalised(system, normaliser_eps)


def _normalised(system: Matrices, eps: float) -> Matrices:
    """Divided by the read-out of a constant one."""
    ones = torch.ones_like(system.values[..., :1])
    eta = run(dataclasses.replace(system, values=ones))[..., 0] + eps
    return dataclasses.replace(system, readout=system.readout / eta[..., None], log_normaliser=eta.log())


def _mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    scale: float | None,
    state: Any,
    segments: Segments | None,
    eps: float,
) -> Matrices:
    starts = torch.zeros_like(q[:, :, 0, 0], dtype=torch.bool) if segments is None else segments.starts
    valid = ~starts if segments is None else segments.valid
    before, maxima = torch.zeros_like(log_input[:, 0]), []
    for t in range(q.shape[1]):  # m of the op
        now = torch.maximum(log_decay[:, t] + torch.where(starts[:, t, None], 0, before), log_input[:, t])
        before = torch.where(valid[:, t, None], now, before)
        maxima.append(before)
    m = torch.stack(maxima, 1)
    # In the op, memory and normaliser are kept relative to exp(m); here, relative to the largest of them all.
    top = m.amax(1, keepdim=True)
    q = q * (1.0 if scale is None else scale)
    system = Matrices(
        _decay(log_decay, q), ((log_input - top).exp()[..., None] * k)[..., None], q, v[..., None, :], segments
    )

    read = run(dataclasses.replace(system, values=torch.ones_like(system.values[..., :1])))[..., 0]
    eta = torch.maximum(read.abs(), torch.exp(-top)) + eps * torch.exp(m - top)
    return dataclasses.replace(system, readout=q / eta[..., None], log_normaliser=eta.log())


def _delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    state: Any,
    segments: Segments | None,
) -> Matrices:
    if k.ndim == 4:
        k, v, beta = k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2)
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    transition = torch.diag_embed(_decay(log_decay, q).expand(q.shape))
    written: list[Tensor] = []  # columns of `input`, one for each step so far
    for key, size in zip(k.unbind(2), beta.unbind(2), strict=True):
        turn = one - size[..., None, None] * key[..., :, None] * key[..., None, :]
        transition = turn @ transition
        written = [(turn @ column[..., None])[..., 0] for column in written] + [size[..., None] * key]
    scale = 1.0 if scale is None else scale
    return Matrices(transition, torch.stack(written, -1), scale * q, v.transpose(2, 3), segments)


def _dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    log_decay: Tensor | None,
    scale: float | None,
    state: Any,
    segments: Segments | None,
) -> Matrices:
    correction = (k if b is None else b)[..., :, None] * a[..., None, :]
    transition = torch.diag_embed(_decay(log_decay, q).expand(q.shape)) + correction
    return Matrices(transition, k[..., None], q * (1.0 if scale is None else scale), v[..., None, :], segments)


def _slot_scores(
    q: Tensor,
    k: Tensor,
    slots: Tensor,
    log_decay: Tensor,
    scale: float | None,
    state: Any,
    segments: Segments | None,
) -> Matrices:
    """Each of the M slots of a head is a system of its own, whose value is what is written into the slot."""
    count = slots.shape[-1]
    keys, queries = k.repeat_interleave(count, 2), q.repeat_interleave(count, 2)
    decay, values = log_decay.exp().flatten(2), slots.flatten(2)
    readout = queries * (1.0 if scale is None else scale)
    return Matrices(decay[..., None], keys[..., None], readout, values[..., None, None], segments)


# -- everything kept: the state is a slot for each token, and forgetting is in the read-out ----------------------------
def _cache(readout: Tensor, values: Tensor, segments: Segments | None) -> Matrices:
    """readout (B, T, H, T) of one slot for each token, values (B, T, H, V)."""
    batch, time, heads, _ = readout.shape
    slot = torch.eye(time, dtype=readout.dtype, device=readout.device)
    number = torch.ones_like(readout[..., :1])
    write = slot[:, None, :, None].expand(batch, time, heads, time, 1)
    return Matrices(number, write, readout, values[..., None, :], segments, keeps_all=True)


def _visible(like: Tensor, window: float, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """(B, T, T) how many real tokens before the row's lies the column's, and whether it is in sight."""
    batch, time = like.shape[:2]
    if segments is None:
        segments = Segments.padded(torch.ones(batch, time, device=like.device))
    document, place = segments.documents, segments.positions()
    distance = place[:, :, None] - place[:, None]
    same = (document[:, :, None] == document[:, None]) & segments.valid[:, :, None] & segments.valid[:, None]
    return distance, same & (distance >= 0) & (distance < window)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    kernel: str,
    scale: float | None,
    bias: Tensor | None,
    state: Any,
    segments: Segments | None,
) -> Matrices:
    """The features of a softmax are infinitely many, but T keys span no more than T directions of theirs."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if kernel == "softmax" else 1.0
    distance, visible = _visible(q, window or math.inf, segments)
    distance, visible = distance.unsqueeze(2), visible.unsqueeze(2)  # (B, T, 1, T)
    scores = scale * torch.einsum("bthk,bshk->bths", q, k)
    if kernel != "softmax":
        scores = scores / (window or 1 + distance.amax(-1, keepdim=True))
    if bias is not None:
        heads = torch.arange(q.shape[2], device=q.device)[:, None]
        scores = scores + bias[heads, distance.clamp(0, bias.shape[1] - 1)]
    if kernel != "softmax":
        return _cache(ELEMENTWISE[kernel](scores).masked_fill(~visible, 0), v, segments)
    scores = scores.masked_fill(~visible, -torch.inf)
    log_normaliser = scores.logsumexp(-1)
    log_normaliser = torch.where(visible.any(-1), log_normaliser, 0)
    weights = torch.exp(scores - log_normaliser[..., None])
    return dataclasses.replace(_cache(weights, v, segments), log_normaliser=log_normaliser)


def _long_convolution(x: Tensor, filter: Tensor, state: Any, segments: Segments | None) -> Matrices:
    distance, visible = _visible(x, math.inf, segments)
    taps = filter[:, distance.clamp(min=0)].movedim(0, 2)  # (B, T, D, T)
    return _cache(torch.where(visible.unsqueeze(2), taps, 0), x[..., None], segments)


MEMBERS: dict[str, Callable[..., Matrices]] = {
    "attention": _attention,
    "delta_rule": _delta_rule,
    "dense_ssm": _dense_ssm,
    "diagonal_ssm": _diagonal_ssm,
    "dplr": _dplr,
    "linear_attention": _linear_attention,
    "long_convolution": _long_convolution,
    "mlstm": _mlstm,
    "scan": _scan,
    "selective_scan": _selective_scan,
    "slot_scores": _slot_scores,
    "sru": _sru,
}
