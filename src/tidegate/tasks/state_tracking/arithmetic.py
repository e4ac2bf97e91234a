"""Arithmetic modulo a small number, written out as an expression."""

from __future__ import annotations

import random

import torch
from torch import Generator, Tensor

from tidegate.tasks.randomness import seeds
from tidegate.tasks.targets import IGNORE, check_range, check_sizes, unscored

PAD, PLUS, MINUS, TIMES, EQUALS = range(5)
OPEN, CLOSE = 5, 6  # only in the vocabulary with brackets
_SIGNS = {"+": PLUS, "-": MINUS, "*": TIMES}


def modular_arithmetic(
    batch: int, generator: Generator, *, length: int = 31, modulus: int = 5, operators: str = "+-*"
) -> tuple[Tensor, Tensor]:
    """digit operator digit ...; the target of every digit is the value of the expression up to and with it.

    `*` binds tighter than + and -, so a product that is not finished belongs to the value as far as it goes.

    Returns ids and targets, both (batch, length). Tokens: PAD 0, + 1, - 2, * 3, = 4, the digits 0 ... modulus - 1
    from 5 on. Targets are the values 0 ... modulus - 1, IGNORE on operators.

    >>> ids, targets = modular_arithmetic(1, torch.Generator().manual_seed(0), length=7)
    >>> ids.tolist(), targets.tolist()
    ([[9, 2, 9, 1, 8, 2, 5]], [[4, -100, 0, -100, 3, -100, 3]])
    """
    check_sizes(batch=batch, length=length)
    ids, values = _expressions(batch, generator, length, modulus, operators)
    targets = unscored(batch, length)
    targets[:, ::2] = values
    return ids, targets


def modular_arithmetic_answer(
    batch: int,
    generator: Generator,
    *,
    lengths: tuple[int, int] = (3, 40),
    modulus: int = 5,
    operators: str | None = None,
    brackets: bool = False,
) -> tuple[Tensor, Tensor]:
    """An expression, "=", and one answer behind it.

    The expression's length is drawn evenly from `lengths` (both ends included); without brackets it is odd, digit
    operator digit ..., and an even draw counts as one less. With `brackets` an expression of n tokens is: a digit (1),
    -digit (2), (digit) (3), (-digit) (4), and from there on (expression operator expression), cut at an even chance.
    `operators` are "+-*", with brackets "+-".

    Returns ids and targets, both (batch, longest length + 2). Tokens as in `modular_arithmetic`, with `brackets` ( 5,
    ) 6 and the digits from 7 on. The answer's position is the PAD behind "="; its target is the value 0 ...
    modulus - 1, all other targets are IGNORE.

    >>> ids, targets = modular_arithmetic_answer(1, torch.Generator().manual_seed(0), lengths=(3, 4))
    >>> ids.tolist(), targets.tolist()
    ([[9, 1, 8, 4, 0, 0]], [[-100, -100, -100, -100, 2, -100]])
    """
    check_sizes(batch=batch)
    check_range("lengths", lengths, 1 if brackets else 3)
    length = torch.randint(lengths[0], lengths[1] + 1, (batch, 1), generator=generator)
    if brackets:
        body, value = _bracketed(length[:, 0].tolist(), seeds(batch, generator), modulus, operators or "+-")
        body = torch.nn.functional.pad(body, (0, lengths[1] - body.shape[1]))
    else:
        length = length - 1 + length % 2
        body, values = _expressions(batch, generator, lengths[1], modulus, operators or "+-*")
        value = values.gather(1, length // 2)
    time = torch.arange(lengths[1] + 2)
    body = torch.nn.functional.pad(body, (0, 2))
    ids = torch.where(time < length, body, torch.where(time == length, EQUALS, PAD))
    return ids, torch.where(time == length + 1, value, IGNORE)


def _expressions(batch: int, generator: Generator, length: int, modulus: int, operators: str) -> tuple[Tensor, Tensor]:
    """The ids of digits and operators in turn (batch, length), and the value at every digit."""
    signs = torch.tensor(_checked(modulus, operators))
    count = (length + 1) // 2
    digits = torch.randint(modulus, (batch, count), generator=generator)
    sign = signs[torch.randint(len(signs), (batch, count), generator=generator)]  # the one behind each digit

    total, term, values = torch.zeros(batch, dtype=torch.long), digits[:, 0], [digits[:, 0]]
    for at in range(1, count):  # the sum of the finished terms, and the signed term that may still grow
        times = sign[:, at - 1] == TIMES
        total = torch.where(times, total, total + term)
        fresh = torch.where(sign[:, at - 1] == MINUS, -digits[:, at], digits[:, at])
        term = torch.where(times, term * digits[:, at], fresh) % modulus
        values.append((total + term) % modulus)
    ids = torch.stack([len(_SIGNS) + 2 + digits, sign], -1).flatten(1)[:, :length]
    return ids, torch.stack(values, 1)


def _bracketed(lengths: list[int], seeds: list[int], modulus: int, operators: str) -> tuple[Tensor, Tensor]:
    """Expressions of the given lengths, padded to the longest, and their values (batch, 1)."""
    signs = _checked(modulus, operators)
    built = [
        _bracketed_one(length, random.Random(seed), modulus, signs) for length, seed in zip(lengths, seeds, strict=True)
    ]
    rows = [torch.tensor(ids) for ids, _ in built]
    return torch.nn.utils.rnn.pad_sequence(rows, True, PAD), torch.tensor([[value] for _, value in built])


def _bracketed_one(length: int, dice: random.Random, modulus: int, signs: list[int]) -> tuple[list[int], int]:
    if length <= 4:
        digit = dice.randrange(modulus)
        ids = [MINUS, CLOSE + 1 + digit] if length % 2 == 0 else [CLOSE + 1 + digit]
        return (ids if length <= 2 else [OPEN, *ids, CLOSE]), (-digit if length % 2 == 0 else digit) % modulus
    cut = dice.randrange(1, length - 3)
    left, a = _bracketed_one(cut, dice, modulus, signs)
    right, b = _bracketed_one(length - 3 - cut, dice, modulus, signs)
    sign = dice.choice(signs)
    value = a + b if sign == PLUS else a - b if sign == MINUS else a * b
    return [OPEN, *left, sign, *right, CLOSE], value % modulus


def _checked(modulus: int, operators: str) -> list[int]:
    """The tokens of the operators."""
    check_sizes(modulus=modulus)
    if not operators or set(operators) - set(_SIGNS):
        raise ValueError(f"operators: seen {operators!r}, wanted some of {''.join(_SIGNS)!r}")
    return [_SIGNS[sign] for sign in operators]
