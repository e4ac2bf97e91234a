"""Routers: which of several parts a token goes to, how evenly they are used, and watching that in a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.backend import choose, sees_values
from tidegate.segments import Segments, zero_padding


def largest(logits: Tensor, k: int) -> Tensor:
    """True on the k largest entries of the last axis: exactly k, also among equals.

    >>> largest(torch.tensor([0.5, 2.0, 1.0]), 2).tolist()
    [False, True, True]
    """
    chosen = logits.topk(k, dim=-1).indices
    return (chosen.unsqueeze(-2) == torch.arange(logits.shape[-1], device=logits.device)[:, None]).any(-1)


def usage(chosen: Tensor, segments: Segments | None = None) -> Tensor:
    """(M,) which share of all routes leads to each of M parts. chosen (B, T, M) is true where a token goes there.

    >>> usage(torch.tensor([[[1, 1, 0], [1, 0, 1]]])).tolist()
    [0.5, 0.25, 0.25]
    """
    routes = zero_padding(chosen, segments).sum((0, 1))
    return routes / routes.sum()


def balance_loss(probabilities: Tensor, chosen: Tensor, segments: Segments | None = None) -> Tensor:
    """M sum_m f_m P_m over all real tokens: f_m the routes to part m per token, P_m its mean probability.

    With k routes per token it is k where every part gets as much as any other, and M where the same k parts get all.
    Gradients flow through P. probabilities, chosen (B, T, M). Source: Switch Transformers, arXiv 2101.03961.

    >>> even = torch.full((1, 4, 4), 0.25)
    >>> balance_loss(even, torch.eye(4)[None] > 0).item()
    1.0
    """
    count = probabilities[..., 0].numel() if segments is None else segments.lengths().sum()
    routes, sums = (
        zero_padding(part.to(probabilities.dtype), segments).sum((0, 1)) for part in (chosen, probabilities)
    )
    return probabilities.shape[-1] * (routes * sums).sum() / count**2


@contextmanager
def watch(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Collect the balance losses of `model` while it runs, without its code knowing.

    Inside the block, `loss()` is the mean `balance_loss(x, segments)` over the calls, since it was last asked, of all
    parts that have one. It is to be weighted and added to what is trained on:

        with watch(model) as loss:
            fit(model, draw, steps=100, lr=1e-3, penalty=lambda: 0.01 * loss())

    Raises ValueError for a model without such parts, and when asked before any of them ran.
    """
    seen: list[Tensor] = []

    def hook(part: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append(part.balance_loss(args[0], kwargs.get("segments")))

    handles = [
        part.register_forward_hook(hook, with_kwargs=True) for part in model.modules() if hasattr(part, "balance_loss")
    ]
    if not handles:
        raise ValueError("model: none of its parts has a balance_loss, so there is nothing to watch")

    def loss() -> Tensor:
        if not seen:
            raise ValueError("loss: no part with a router has run since it was last asked for")
        mean = torch.stack(seen).mean()
        seen.clear()
        return mean

    try:
        yield loss
    finally:
        for handle in handles:
            handle.remove()


def leaves_out(x: Tensor) -> bool:
    """Whether tokens may be left out, so that how much is computed depends on values: of plain tensors alone, outside
    of tracing and transforms. Elsewhere, and in reference forms, they are masked.
    """
    return sees_values(x) and choose(x) != "reference"
