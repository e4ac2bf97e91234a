"""What a token in sight is worth: a share of a softmax, or a function of its own score alone; and who is in sight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KERNELS = ("softmax", "relu2", "laplace")
APART = 2**40  # between the places of two documents
_MEAN, _DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)  # with which Laplace's function is near relu^2


def relu2(scores: Tensor) -> Tensor:
    """max(s, 0)^2."""
    return scores.relu().square()


def laplace(scores: Tensor) -> Tensor:
    """(1 + erf((s - mean) / (deviation sqrt(2)))) / 2."""
    return 0.5 * (1 + torch.erf((scores - _MEAN) / (_DEVIATION * math.sqrt(2))))


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "laplace": laplace}


class Rule(NamedTuple):
    """How scores become weights: `kernel`, and `bias` (H, window) by the distance."""

    kernel: str
    scale: float
    window: int | None
    bias: Tensor | None

    @property
    def fused(self) -> bool:
        """Whether torch's own attention can do it."""
        return self.kernel == "softmax" and self.bias is None


class Sees:
    """A mask that is made when it is needed, and again in the backward pass, rather than kept.

    A query at place a sees a key at place b if 0 <= a - b < span (see parallel.py); places are (B or 1, tokens).
    """

    def __init__(self, query_place: Tensor, key_place: Tensor, span: int) -> None:
        self.query_place, self.key_place, self.span = query_place, key_place, span

    def distance(self) -> Tensor:
        """(B, queries, keys) int64."""
        return self.query_place[:, :, None] - self.key_place[:, None, :]

    def __call__(self) -> Tensor:
        """(B, 1, queries, keys) bool."""
        distance = self.distance()
        return ((distance >= 0) & (distance < self.span))[:, None]


def by_definition(q: Tensor, k: Tensor, v: Tensor, sees: Sees | None, rule: Rule) -> Tensor:
    """Attention by plain products, which torch can differentiate as often as asked, and map over.

    q (N, T, H, D), k (N, S, G, D), v (N, S, G, V); without a mask, causal with S = T.
    """
    dtype, groups = v.dtype, k.shape[2]
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    q = q.transpose(1, 2).unflatten(1, (groups, -1))  # (N, G, R, T, D)
    k, v = k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]  # (N, G, 1, S, .)
    if sees is None:
        order = torch.arange(q.shape[-2], device=q.device)[None]
        sees = Sees(order, order, APART)
    visible = sees()[:, :, None]
    scores = rule.scale * (q @ k.mT)
    if rule.kernel != "softmax":  # over the tokens in sight; without a window, of the query's document
        scores = scores / (rule.window or (sees.query_place % APART + 1)[:, None, None, :, None])
    if rule.bias is not None:
        near = sees.distance().clamp(0, rule.bias.shape[1] - 1)
        bias = rule.bias.to(scores.dtype)[:, near]  # (H, N or 1, T, S)
        scores = scores + bias.unflatten(0, (groups, -1)).movedim(2, 0)
    if rule.kernel == "softmax":
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    else:
        weights = ELEMENTWISE[rule.kernel](scores).masked_fill(~visible, 0)
    return (weights @ v).flatten(1, 2).transpose(1, 2).to(dtype)
