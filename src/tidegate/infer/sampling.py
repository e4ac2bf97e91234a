"""From logits to the next token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Draw one token per row: (B, V) -> (B,) int64. `temperature=0` takes the likeliest.

    `top_k` keeps the k likeliest tokens; `top_p` then the smallest set of likeliest ones whose probability reaches p.
    One uniform number per row, from its own generator if `generator` is a list, chooses from the cumulated
    probabilities, likeliest first; so a row's draw depends on that row alone. Ties go to the smaller token.

    Raises ValueError for options out of range, or a list of generators of another length than the batch.

    >>> sample_next(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
    [1]
    """
    check_sampling(temperature, top_k, top_p)
    if logits.ndim != 2:
        raise ValueError(f"logits: seen shape {tuple(logits.shape)}, wanted (batch, vocabulary)")
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # The likeliest is taken off first, so that a tiny temperature gives zeros beside a one and no overflow.
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    if top_k is not None:
        probabilities = probabilities[:, :top_k]
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    reached = probabilities.cumsum(-1)
    if top_p is not None:
        before = reached - probabilities
        probabilities = torch.where(before < top_p, probabilities, 0.0)
        reached = probabilities.cumsum(-1)
    draw = _uniform(logits, generator) * reached[:, -1:]
    # The first entry whose cumulated probability exceeds the draw; one of probability zero never is.
    choice = (reached <= draw).sum(-1, keepdim=True).clamp(max=reached.shape[-1] - 1)
    return tokens.gather(-1, choice)[:, 0]


def row_seeds(seed: int, batch: int) -> list[int]:
    """One seed per row, from one for all: rows of different batches or seeds do not coincide.

    `model.generate(prompts, seed=7)` gives row i what `model.generate(prompts[i], seed=row_seeds(7, i + 1)[i:])` gives.
    """
    return [
        int.from_bytes(hashlib.blake2b(f"{seed}/{row}".encode(), digest_size=8).digest(), "big") >> 1
        for row in range(batch)
    ]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, naming the option, for one out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: seen {temperature}, wanted 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: seen {top_k}, wanted at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: seen {top_p}, wanted 0 < top_p <= 1")


def _uniform(logits: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    rows = logits.shape[0]
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(rows, 1, generator=generator, dtype=torch.float64).to(logits.device)
    if len(generator) != rows:
        raise ValueError(f"generator: seen {len(generator)} for a batch of {rows}; wanted one per row, or one for all")
    return torch.cat([torch.rand(1, 1, generator=one, dtype=torch.float64) for one in generator]).to(logits.device)
