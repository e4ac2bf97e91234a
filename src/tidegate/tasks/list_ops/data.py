"""The generator of ListOps, as the Long Range Arena draws it (arXiv 2011.04006)."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from tidegate.tasks.randomness import seeds
from tidegate.tasks.targets import check_sizes

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),  # the mean of two middle values loses its half
    "[SM": lambda values: sum(values) % 10,
}
CLOSE = 10 + len(OPERATORS)
PAD = CLOSE + 1
VOCAB_SIZE = PAD + 1
_LEAF = 0.25  # a draw above it makes a digit


def list_ops(
    batch: int,
    generator: Generator,
    *,
    shortest: int = 500,
    longest: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
) -> tuple[Tensor, Tensor]:
    """Expressions such as [MAX 2 9 [MIN 4 7 ] 0 ] and their values, digits 0 ... 9.

    A node above `max_depth` is an operator with chance 1/4, with 2 ... `max_args` arguments, else a digit, evenly.
    Whole trees are drawn until one has more than `shortest` and fewer than `longest` tokens. The defaults are the Long
    Range Arena's (7 ms per expression); (20, 100) with max_depth 6 and max_args 5 is a laptop's. Nothing keeps an
    expression from being drawn twice. An example does not depend on the batch's size, the padding does.

    Returns ids (batch, length of the longest expression) and targets (batch,). Tokens: digits 0 ... 9, then OPERATORS
    in their order, CLOSE, PAD on the right. The classes are not even: compare with `majority(targets)`.

    >>> ids, value = list_ops(1, torch.Generator().manual_seed(3), shortest=4, longest=9, max_depth=3, max_args=3)
    >>> ids.tolist(), value.tolist()
    ([[13, 8, 0, 11, 3, 0, 14, 14]], [1])
    """
    check_sizes(batch=batch, max_depth=max_depth, shortest=shortest + 1)
    if max_args < 2:
        raise ValueError(f"max_args: seen {max_args}, wanted at least 2")
    if longest < shortest + 2:
        raise ValueError(f"longest: seen {longest}, wanted at least shortest + 2 = {shortest + 2}; both are outside")
    if max_depth < 2 and shortest:
        raise ValueError(f"max_depth: seen {max_depth}, wanted at least 2; a tree of depth 1 is a single digit")
    trees = [_accepted(random.Random(seed), shortest, longest, max_depth, max_args) for seed in seeds(batch, generator)]
    rows = [torch.tensor(ids) for ids, _ in trees]
    return torch.nn.utils.rnn.pad_sequence(rows, True, PAD), torch.tensor([value for _, value in trees])


def _accepted(dice: random.Random, shortest: int, longest: int, max_depth: int, max_args: int) -> tuple[list[int], int]:
    while True:
        ids: list[int] = []
        value = _tree(dice, ids, longest, max_depth, max_args)
        if shortest < len(ids) < longest:
            return ids, value


def _tree(dice: random.Random, ids: list[int], longest: int, depth: int, max_args: int) -> int:
    """Append a tree with at most `depth` levels to `ids`; its value, or anything once `ids` has become too long."""
    if depth == 1 or dice.random() > _LEAF or len(ids) >= longest:
        ids.append(dice.randrange(10))
        return ids[-1]
    operator = dice.randrange(len(OPERATORS))
    ids.append(10 + operator)
    values = [_tree(dice, ids, longest, depth - 1, max_args) for _ in range(dice.randint(2, max_args))]
    ids.append(CLOSE)
    return list(OPERATORS.values())[operator](values)
