"""Generators of copying tasks: endless, exact, a pure function of the random generator handed in."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from tidegate.tasks.randomness import distinct
from tidegate.tasks.targets import IGNORE, check_sizes, unscored

BLANK = 0  # the token of a gap


def copying(
    batch: int,
    generator: Generator,
    *,
    gap: int = 1000,
    tokens: int = 10,
    vocab_size: int = 10,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Tokens, a gap of blanks, marks: write the tokens in their order on the marks (Arjovsky, arXiv 1511.06464).

    Returns ids and targets, both (batch, gap + 2 tokens). Tokens: blank 0, content 1 ... vocab_size - 2, the mark
    vocab_size - 1; the targets stand on the marks, backwards with `reverse`.

    >>> ids, targets = copying(1, torch.Generator().manual_seed(0), gap=2, tokens=3)
    >>> ids.tolist(), targets.tolist()
    ([[5, 8, 6, 0, 0, 9, 9, 9]], [[-100, -100, -100, -100, -100, 5, 8, 6]])
    """
    check_sizes(batch=batch, gap=gap, tokens=tokens)
    at = torch.arange(tokens).expand(batch, tokens)
    return _copying(batch, generator, at, gap, tokens, vocab_size, reverse)


def selective_copying(
    batch: int,
    generator: Generator,
    *,
    gap: int = 4064,
    tokens: int = 16,
    vocab_size: int = 16,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `copying`, with the tokens strewn over the gap: what is content depends on the input (arXiv 2312.00752).

    Which of the first gap + tokens positions hold the tokens is drawn evenly; all else is as in `copying`.

    >>> ids, targets = selective_copying(1, torch.Generator().manual_seed(0), gap=2, tokens=3, vocab_size=10)
    >>> ids.tolist(), targets.tolist()
    ([[0, 6, 3, 0, 5, 9, 9, 9]], [[-100, -100, -100, -100, -100, 6, 3, 5]])
    """
    check_sizes(batch=batch, gap=gap, tokens=tokens)
    at = distinct(batch, gap + tokens, tokens, generator).sort(1).values
    return _copying(batch, generator, at, gap, tokens, vocab_size, reverse)


def _copying(
    batch: int, generator: Generator, at: Tensor, gap: int, tokens: int, vocab_size: int, reverse: bool
) -> tuple[Tensor, Tensor]:
    if vocab_size < 3:
        raise ValueError(f"vocab_size: seen {vocab_size}, wanted at least 3: the blank, the mark and something to copy")
    content = torch.randint(1, vocab_size - 1, (batch, tokens), generator=generator)
    story = torch.full((batch, gap + tokens), BLANK).scatter(1, at, content)
    ids = torch.cat([story, torch.full((batch, tokens), vocab_size - 1)], 1)
    return ids, torch.cat([unscored(batch, gap + tokens), content.flip(1) if reverse else content], 1)


def lagged_copying(
    batch: int, generator: Generator, *, length: int = 256, lag: int = 10, vocab_size: int = 10
) -> tuple[Tensor, Tensor]:
    """Random tokens; the target of every position is the token `lag` positions before.

    Returns ids and targets, both (batch, length); the first `lag` targets are IGNORE.

    >>> ids, targets = lagged_copying(1, torch.Generator().manual_seed(0), length=4, lag=2)
    >>> ids.tolist(), targets.tolist()
    ([[4, 9, 3, 0]], [[-100, -100, 4, 9]])
    """
    check_sizes(batch=batch, length=length, lag=lag, vocab_size=vocab_size)
    if lag >= length:
        raise ValueError(f"lag: seen {lag}, wanted less than length = {length}; nothing would be scored")
    ids = torch.randint(vocab_size, (batch, length), generator=generator)
    return ids, torch.cat([unscored(batch, lag), ids[:, :-lag]], 1)


def bit_copy(
    batch: int, generator: Generator, *, bits: int = 4, steps: int = 5, gap: int = 100
) -> tuple[Tensor, Tensor]:
    """Patterns of bits, a gap, a flag: repeat the patterns after it (minimal-LRU's copy task).

    Returns inputs (batch, 2 steps + gap + 1, bits + 1) of zeros and ones, the last channel being the flag, which is up
    on the one position after the gap; and targets (batch, 2 steps + gap + 1, bits): 0 or 1 on the last `steps`
    positions, whose inputs are zero, IGNORE elsewhere. Chance is one half.

    >>> inputs, targets = bit_copy(1, torch.Generator().manual_seed(0), bits=2, steps=1, gap=1)
    >>> inputs.int().tolist(), targets.tolist()
    ([[[0, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]], [[[-100, -100], [-100, -100], [-100, -100], [0, 1]]])
    """
    check_sizes(batch=batch, bits=bits, steps=steps, gap=gap)
    pattern = torch.randint(2, (batch, steps, bits), generator=generator)
    inputs = torch.zeros(batch, 2 * steps + gap + 1, bits + 1)
    inputs[:, :steps, :bits] = pattern
    inputs[:, steps + gap, bits] = 1
    targets = torch.full((batch, 2 * steps + gap + 1, bits), IGNORE)
    targets[:, -steps:] = pattern
    return inputs, targets
