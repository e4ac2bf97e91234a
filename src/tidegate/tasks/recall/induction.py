"""Induction: what followed this token the last time?"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tidegate.tasks.randomness import distinct
from tidegate.tasks.targets import check_sizes, unscored


def induction(batch: int, generator: Generator, *, vocab_size: int = 16, length: int = 256) -> tuple[Tensor, Tensor]:
    """One special token among random ones, and at the end once more: what came after it? (Mamba, arXiv 2312.00752.)

    Returns ids and targets, both (batch, length). The special token is vocab_size - 1; it stands at an even chance on
    one of the positions 0 ... length - 3, and on the last, which has the only target: the token that followed it.

    >>> ids, targets = induction(1, torch.Generator().manual_seed(0), vocab_size=4, length=6)
    >>> ids.tolist(), targets.tolist()
    ([[2, 0, 2, 3, 1, 3]], [[-100, -100, -100, -100, -100, 1]])
    """
    check_sizes(batch=batch)
    if vocab_size < 2:
        raise ValueError(f"vocab_size: seen {vocab_size}, wanted at least 2: the special token and another")
    if length < 3:
        raise ValueError(f"length: seen {length}, wanted at least 3: the special token, its successor, the question")
    special = vocab_size - 1
    ids = torch.randint(special, (batch, length), generator=generator)
    at = torch.randint(length - 2, (batch, 1), generator=generator)
    answer = ids.gather(1, at + 1)
    ids = ids.scatter(1, at, special)
    ids[:, -1] = special
    return ids, torch.cat([unscored(batch, length - 1), answer], 1)


def induction_copies(
    batch: int,
    generator: Generator,
    *,
    symbols: int = 18,
    length: int = 30,
    copied: int = 1,
    triggers: int = 1,
    everywhere: bool = True,
) -> tuple[Tensor, Tensor]:
    """H3's induction heads (arXiv 2212.14052): after every trigger stand the same `copied` symbols, also at the end.

    A text of `length` random symbols; up to `triggers` of its positions 0 ... length - copied - 2, more than `copied`
    apart, become triggers (in half of the rows one only), and what follows the first is repeated after the others.
    Then the trigger stands once more, and the same symbols again.

    Returns ids and targets, both (batch, length + copied): targets are the next tokens, at all positions or, with
    `everywhere=False`, only where the last copy is to be written. Tokens: symbols 0 ... symbols - 1, the trigger
    `symbols`.

    >>> ids, targets = induction_copies(1, torch.Generator().manual_seed(0), symbols=9, length=6, everywhere=False)
    >>> ids.tolist(), targets.tolist()
    ([[8, 0, 2, 9, 7, 6, 9]], [[-100, -100, -100, -100, -100, -100, 7]])
    """
    check_sizes(batch=batch, symbols=symbols, copied=copied, triggers=triggers)
    places = length - copied - 1
    if places < triggers:
        raise ValueError(f"length: seen {length}, wanted at least copied + 1 + triggers = {copied + 1 + triggers}")
    text = torch.randint(symbols, (batch, length), generator=generator)
    at = distinct(batch, places, triggers, generator)
    alone = torch.rand(batch, generator=generator) < 0.5
    at = torch.cat([at[:, :1], torch.where(alone[:, None], at[:, :1], at[:, 1:])], 1).sort(1).values

    follows = torch.arange(1, copied + 1)
    phrase = text.gather(1, at[:, :1] + follows)
    last = at[:, :1] - copied - 1
    for trigger in at.split(1, 1):
        fits = trigger - last > copied
        place = torch.where(fits, trigger, at[:, :1])  # one too close is left out: the first is written once more
        text = text.scatter(1, place, symbols).scatter(1, place + follows, phrase)
        last = torch.where(fits, trigger, last)
    whole = torch.cat([text, torch.full((batch, 1), symbols), phrase], 1)
    ids, targets = whole[:, :-1], whole[:, 1:]
    return ids, targets if everywhere else torch.cat([unscored(batch, length), targets[:, length:]], 1)
