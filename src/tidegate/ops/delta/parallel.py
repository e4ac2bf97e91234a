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

from tidegate.ops.decay import decayed_products
from tidegate.segments import Segments, zero_padding

CHUNK, SHORT = 64, 16  # tokens; the second for sequences that are no longer


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
    C = CHUNK if T > SHORT else SHORT
    missing = -T % C

    def chunks(x: Tensor) -> Tensor:  # (B, T, H, D) -> (B, H, N, C, D); zeros at the end change nothing
        x = zero_padding(x.to(state.dtype), segments)
        x = pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4)

    q, k, v, a, g = chunks(q * scale), chunks(k), chunks(v), chunks(a), chunks(log_decay)
    b = None if b is None else chunks(b)
    same, carried, final = _masks(segments, T, C, missing, q.device)

    # Row i of A_a uses D[i - 1], so a moves up one row and the result down again.
    rows, columns = (q, pad(a[..., 1:, :], (0, 0, 0, 1))), (k,) if b is None else (k, b)
    with_q, with_a, through, after = _products(rows, columns, g)
    from_start = through.exp()  # decay of S0 once token i has acted
    before = pad(from_start[..., :-1, :], (0, 0, 1, 0), value=1.0)  # and before it acts
    A_qk, *others = (torch.where(same, x, 0) for x in with_q)
    A_qb = others[0] if others else A_qk
    A_ak, *others = (torch.where(same, pad(x[..., :-1, :], (0, 0, 1, 0)), 0) for x in with_a)
    A_ab = others[0] if others else A_ak
    q_read = torch.where(carried, q * from_start, 0)
    a_read = torch.where(carried, a * before, 0)
    to_end = torch.where(final, after.exp(), 0)  # (B, H, N, C, 1 or K)
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


def _products(rows, columns, g: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Both rows' products with the columns, decayed; and the log decays through each token and after it."""
    if g.shape[-1] > 1:
        (with_q, with_a), through, after = decayed_products(rows, columns, g)
        return with_q, with_a, through, after
    # D[i, j] for j <= i, zero above the diagonal; the sum runs down the columns of a masked matrix.
    lower = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).tril()
    steps = torch.where(lower.tril(-1), g, 0).cumsum(-2)
    D = torch.where(lower, torch.where(lower, steps, 0).exp(), 0)
    with_q, with_a = ([D * (x @ y.mT) for y in columns] for x in rows)
    return with_q, with_a, g.cumsum(-2), steps[..., -1, :, None]


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
