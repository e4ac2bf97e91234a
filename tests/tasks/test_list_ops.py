"""ListOps: expressions are read again by a second parser, and trees are counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tidegate.tasks.list_ops import CLOSE, PAD, VOCAB_SIZE, list_ops, majority

LAPTOP = dict(shortest=20, longest=100, max_depth=6, max_args=5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def read(tokens):
    """A shift-reduce reader: its value, the depth and the largest number of arguments."""
    stack, deepest, widest = [], 1, 0
    for token in tokens:
        if token < 10:
            stack.append(token)
        elif token < CLOSE:
            stack.append(("MIN", "MAX", "MED", "SUM")[token - 10])
            deepest = max(deepest, 1 + sum(isinstance(item, str) for item in stack))
        else:
            arguments = []
            while not isinstance(stack[-1], str):
                arguments.append(stack.pop())
            name = stack.pop()
            assert len(arguments) >= 2
            widest = max(widest, len(arguments))
            value = {"MIN": np.min, "MAX": np.max, "MED": np.median, "SUM": np.sum}[name](arguments)
            stack.append(int(value) % 10)
    assert len(stack) == 1
    return stack[0], deepest, widest


def test_values_are_those_of_another_parser():
    ids, targets = list_ops(200, generator(), **LAPTOP)
    assert ids.max() == PAD == VOCAB_SIZE - 1
    deepest = widest = 0
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        length = [*row, PAD].index(PAD)
        assert 20 < length < 100
        assert set(row[length:]) <= {PAD}
        value, depth, width = read(row[:length])
        assert value == wanted
        deepest, widest = max(deepest, depth), max(widest, width)
    assert (deepest, widest) == (6, 5), "the limits are reached, and not passed"
    assert ids.shape[1] == (ids != PAD).sum(1).max()


def test_a_tree_is_a_digit_three_times_in_four():
    ids, _ = list_ops(4000, generator(), shortest=0, longest=10_000, max_depth=2, max_args=4)
    lengths = (ids != PAD).sum(1)
    share = (lengths == 1).double().mean().item()
    assert share == pytest.approx(0.75, abs=4 * math.sqrt(0.75 * 0.25 / 4000))
    arguments = lengths[lengths > 1] - 2  # at depth 2 they are digits
    for count in (2, 3, 4):
        assert (arguments == count).double().mean().item() == pytest.approx(1 / 3, abs=0.06)
    operators = ids[lengths > 1, 0]
    assert torch.bincount(operators - 10, minlength=4).double().div(len(operators)).sub(0.25).abs().max() < 0.06


def test_an_expression_does_not_depend_on_the_batch():
    few, many = list_ops(3, generator(), **LAPTOP), list_ops(9, generator(), **LAPTOP)
    width = few[0].shape[1]
    assert torch.equal(few[0], many[0][:3, :width])
    assert (many[0][:3, width:] == PAD).all()
    assert torch.equal(few[1], many[1][:3])
    other = list_ops(3, generator(1), **LAPTOP)[0]
    assert other.shape != few[0].shape or not torch.equal(other, few[0])


def test_classes_are_uneven():
    _, targets = list_ops(1000, generator(), **LAPTOP)
    assert 0.11 < majority(targets) < 0.2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_args": 1}, "max_args: seen 1"),
        ({"shortest": 20, "longest": 21}, "longest: seen 21, .* = 22"),
        ({"max_depth": 1}, "max_depth: seen 1"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        list_ops(1, generator(), **sizes)
