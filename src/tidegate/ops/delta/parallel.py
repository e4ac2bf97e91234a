"""The chunkwise form in plain PyTorch: matrix products inside a chunk, a loop over chunks for the state.

With U_t = a_t^T S_{t-1} and the decay D[i, j] = exp(sum of log_decay over j+1..i), one chunk of C tokens that starts
from S0 is (derived in the specification of RWKV-7, section A2)

    U = A_ab U + A_ak V + (decayed a) S0,     A_ab[i, j] = sum_K a_i D[i-1, j] b_j  for j < i, A_ak likewise with k
    O = (decayed q) S0 + A_qb U + A_qk V,     A_qb[i, j] = sum_K q_i D[i, j] b_j    for j <= i
    S_end = D[C, 0] S0 + (D[C, .] b)^T U + (D[C, .] k)^T V

Every exponent is a sum of non-positive numbers, added up rather than subtracted: nothing overflows or cancels, however
extreme the gates. Solving for U is a unit lower triangular system.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidegate.segments import Segments, zero_padding

SCALAR_CHUNK = 64  # decay per head: D is (C, C)
VECTOR_CHUNK = 16  # decay per channel: D is (C, C, K)


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor | None,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """See `tidegate.ops.dplr`; log_decay (B, T, H, 1) or (B, T, H, K), b None means k."""
    dtype, T = q.dtype, q.shape[1]
    C = min(VECTOR_CHUNK if log_decay.shape[-1] > 1 else SCALAR_CHUNK, T)
    missing = -T % C

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, D) -> (B, H, N, C, D); zeros at the end change nothing
        x = zero_padding(x.to(state.dtype), segments)
        x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4)

    q, k, v, a, g = chunks(q * scale), chunks(k), chunks(v), chunks(a), chunks(log_decay)
    b = None if b is None else chunks(b)
    same, carried, final = _masks(segments, T, C, missing, q.device)

    # D[i, j] for j <= i, zero above the diagonal; the sum runs down the columns of a masked matrix.
    lower = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    later = lower.tril(-1).unsqueeze(-1)
    steps = torch.where(later, g.unsqueeze(-2), 0).cumsum(-3)  # (B, H, N, C, C, 1 or K)
    D = torch.where(lower.unsqueeze(-1), steps, 0).exp()
    D = torch.where(lower.unsqueeze(-1), D, 0)
    from_start = g.cumsum(-2).exp()  # decay of S0 once token i has acted
    before = pad(from_start[..., :-1, :], (0, 0, 1, 0), value=1.0)  # and before it acts

    # Row i of A_a uses D[i - 1], so a moves up one row and the result down again.
    rows = (q, pad(a[..., 1:, :], (0, 0, 0, 1)))

    def products(columns: Tensor) -> tuple[Tensor, Tensor]:
        if D.shape[-1] == 1:
            with_q, with_a = (D.squeeze(-1) * (x @ columns.mT) for x in rows)
        else:
            decayed = D * columns.unsqueeze(-3)  # (B, H, N, C, C, K)
            with_q, with_a = (decayed @ torch.stack(rows, -1)).unbind(-1)
        with_a = pad(with_a[..., :-1, :], (0, 0, 1, 0))
        return torch.where(same, with_q, 0), torch.where(same, with_a, 0)

    A_qk, A_ak = products(k)
    A_qb, A_ab = (A_qk, A_ak) if b is None else products(b)
    q_read = torch.where(carried, q * from_start, 0)
    a_read = torch.where(carried, a * before, 0)
    to_end = torch.where(final, D[..., -1, :, :], 0)  # (B, H, N, C, 1 or K)
    k_end = (k * to_end).mT
    b_end = k_end if b is None else (b * to_end).mT
    keep = torch.where(carried[..., -1:, :], from_start[..., -1:, :], 0).mT  # (B, H, N, 1 or K, 1)

    # All that does not need S0, for every chunk at once: U = X + Y S0.
    solved = torch.linalg.solve_triangular(-A_ab, torch.cat([A_ak @ v, a_read], -1), upper=False, unitriangular=True)
    X, Y = solved.split([v.shape[-1], a.shape[-1]], -1)
    o_local = A_qk @ v + A_qb @ X
    o_read = q_read + A_qb @ Y
    written = k_end @ v + b_end @ X

    starts = []
    for n in range(q.shape[2]):
        starts.append(state)
        state = keep[:, :, n] * state + b_end[:, :, n] @ (Y[:, :, n] @ state) + written[:, :, n]
    o = o_local + o_read @ torch.stack(starts, 2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(dtype), state


def _masks(
    segments: Segments | None, T: int, C: int, missing: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of a chunk share a document, which rows still see S0, which rows reach the end of the chunk.

    (B, 1, N, C, C), (B, 1, N, C, 1), (B, 1, N, C, 1); all true without segments.
    """
    if segments is None:
        everywhere = torch.ones(1, 1, 1, 1, 1, dtype=torch.bool, device=device)
        return everywhere, everywhere, everywhere
    document = segments.documents
    document = torch.cat([document, document[:, -1:].expand(-1, missing)], 1).unflatten(1, (-1, C)).unsqueeze(1)
    entering = pad(document[:, :, :-1, -1:], (0, 0, 1, 0))  # document of the token before the chunk; 0 is S0's
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    carried = document == entering
    final = document == document[..., -1:]
    return same, carried.unsqueeze(-1), final.unsqueeze(-1)


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
    """As `dplr`: the correction reads with a = -beta (w * k), both writes go along k, and beta scales the value."""
    k, v, beta, log_decay = (zero_padding(x.to(state.dtype), segments) for x in (k, v, beta, log_decay))
    beta = beta.unsqueeze(-1)
    a = -beta * (log_decay.exp() * k)
    return dplr(q, k, beta * v, a, None, log_decay, scale, state, segments)
