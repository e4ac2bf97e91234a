"""Linear attention in chunks, in plain PyTorch: matrix products inside a chunk, a loop over chunks for the state.

G is the cumulative log decay inside a chunk. Every exponent that is taken is a sum of log decays, so none is positive
and nothing overflows, whatever the gates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tidegate.ops.decay import decayed_products
from tidegate.segments import Segments

CHUNK = 64
STRONGEST = -60.0  # e^-60 = 9e-27 forgets everything; stronger gates would only cost the cumulative sum its digits


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Segments | None,
) -> tuple[Tensor, Tensor]:
    """q, k (B, T, H, K), v (B, T, H, V), log_decay None or (B, T, H, 1 or K), state (B, H, K, V)."""
    dtype, time = state.dtype, q.shape[1]
    if log_decay is None:
        log_decay = torch.zeros_like(q[..., :1])
    valid = torch.ones_like(q[:, :, 0, 0], dtype=torch.bool) if segments is None else segments.valid
    documents = torch.zeros_like(valid, dtype=torch.long) if segments is None else segments.documents
    # Padding is a token that neither decays nor writes; its output is blanked at the end.
    k = torch.where(valid[..., None, None], k, 0)
    log_decay = torch.where(valid[..., None, None], log_decay, 0).clamp(min=STRONGEST)

    q, k, v, g = (_chunks(x.to(dtype)) for x in (scale * q, k, v, log_decay))  # (B, H, chunks, CHUNK, K)
    documents = _chunks(documents[..., None, None], mode="replicate").squeeze(-1)  # (B, 1, chunks, CHUNK)
    arrived = functional.pad(documents[..., -1], (1, 0))[..., :-1, None]  # the document that the chunk continues
    last = documents[..., -1:]

    order = torch.arange(CHUNK, device=q.device)
    pairs = (documents[..., :, None] == documents[..., None, :]) & (order[:, None] >= order)
    if g.shape[-1] > 1:
        ((scores,),), G, after = decayed_products([q], [k], g)
        scores = torch.where(pairs, scores, 0)
    else:
        G = g.cumsum(-2)
        scores, after = (q @ k.mT) * _decays(G.squeeze(-1), pairs), G[..., -1:, :] - G
    within = scores @ v
    reads, continues = q * G.exp(), (documents == arrived)[..., None]
    writes = torch.where((documents == last)[..., None], k * after.exp(), 0).mT @ v
    decay, kept = G[..., -1, :, None].exp(), (arrived == last)[..., None]

    outputs = []
    for chunk in range(q.shape[2]):
        # Selected, not multiplied: zero times an infinite state is no zero.
        past = torch.where(continues[:, :, chunk], reads[:, :, chunk] @ state, 0)
        outputs.append(within[:, :, chunk] + past)
        state = torch.where(kept[:, :, chunk], decay[:, :, chunk] * state, 0) + writes[:, :, chunk]
    o = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :time].transpose(1, 2)
    return torch.where(valid[..., None, None], o, 0), state


def _chunks(x: Tensor, mode: str = "constant") -> Tensor:
    """(B, T, H, K) -> (B, H, chunks, CHUNK, K), padded at the end."""
    missing = -x.shape[1] % CHUNK
    tail = (
        x[:, -1:].expand(-1, missing, -1, -1)
        if mode == "replicate"
        else x.new_zeros(()).expand(x.shape[0], missing, *x.shape[2:])
    )
    return torch.cat([x, tail], dim=1).transpose(1, 2).unflatten(2, (-1, CHUNK))


def _decays(G: Tensor, pairs: Tensor) -> Tensor:
    """exp(G_m - G_n) where `pairs` allows it, else 0; masked before exp, so that no gradient is 0 * inf."""
    difference = G[..., :, None] - G[..., None, :]
    return torch.where(pairs, torch.where(pairs, difference, 0).exp(), 0)
