"""mLSTM as linear attention: given the running maximum, only a scan of one number per head is not.

The memory decays by f_t <= 1 and is written with i_t k_t v_t^T, and the normaliser is one more column of it, written
with ones in place of values.

Neither C exp(m), n exp(m) nor h depends on the m that the sums are kept relative to. So the sums use m as a constant,
and its gradient is added where a result does depend on it: C and n of the state, and eps. This spares the gradient
the differences of large numbers that would cancel, and infinity times zero where exp(-m) overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.ops.linear_attention.parallel import linear_attention
from tidegate.segments import Segments


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    normaliser: Tensor,
    maximum: Tensor,
    scale: float,
    eps: float,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), gates (B, T, H), memory (B, H, K, V), normaliser (B, H, K), maximum (B, H)."""
    if segments is not None:  # padding neither writes nor decays
        valid = segments.valid[..., None]
        log_input, log_decay = torch.where(valid, log_input, -torch.inf), torch.where(valid, log_decay, 0)
    m = running_maximum(log_input, log_decay, maximum, segments)
    fixed = m.detach()
    before = torch.cat([maximum.detach()[:, None], fixed[:, :-1]], dim=1)
    if segments is not None:
        before = torch.where(segments.starts[..., None], 0, before)

    write = torch.exp(log_input - fixed)[..., None]
    values = torch.cat([write * v, write], dim=-1)
    # The difference first: where the carried maximum wins it is as small as the decay, and exact.
    decay = ((before - fixed) + log_decay)[..., None]
    state = torch.cat([memory, normaliser[..., None]], dim=-1) * torch.exp(maximum - maximum.detach())[..., None, None]
    o, last = linear_attention(q, k, values, decay, scale, state, segments)
    floor = torch.maximum(o[..., -1].abs(), torch.exp(-fixed)) + eps * torch.exp(m - fixed)
    last = last * torch.exp(fixed[:, -1] - m[:, -1])[..., None, None]
    return o[..., :-1] / floor[..., None], last[..., :-1], last[..., -1], m[:, -1]


def running_maximum(log_input: Tensor, log_decay: Tensor, initial: Tensor, segments: Segments | None) -> Tensor:
    """m_t = max(log_decay_t + m_{t-1}, log_input_t), (B, T, H), in log2(T) passes over windows that double.

    The maximum inside a window and the decay across it are only ever added, never subtracted: no digits are lost over
    long rows. Where both are equal the later input counts as the maximum.
    """
    if segments is not None:  # a document starts from m = 0, and nothing decays across its start
        start = segments.starts[..., None]
        log_input = torch.where(start, _larger(log_decay, log_input), log_input)
        log_decay = torch.where(start, -torch.inf, log_decay)
    time, shift = log_input.shape[1], 1
    while shift < time:
        earlier = pad(log_input[:, :-shift], (0, 0, shift, 0), value=-torch.inf)
        log_input = _larger(earlier + log_decay, log_input)
        log_decay = log_decay + pad(log_decay[:, :-shift], (0, 0, shift, 0))
        shift *= 2
    return _larger(initial[:, None] + log_decay, log_input)


def _larger(carried: Tensor, written: Tensor) -> Tensor:
    return torch.where(carried > written, carried, written)
