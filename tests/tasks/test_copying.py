"""Copying tasks: what stands where, checked by a reader of the row."""

from __future__ import annotations

import pytest
import torch

from tidegate.tasks.copying import bit_copy, copying, lagged_copying, selective_copying
from tidegate.tasks.targets import IGNORE


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("draw", [copying, selective_copying])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_content_is_the_target(draw, reverse):
    ids, targets = draw(200, generator(), gap=9, tokens=4, vocab_size=6, reverse=reverse)
    assert ids.shape == targets.shape == (200, 17)
    places = set()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        at = [t for t, token in enumerate(row[:13]) if token]
        content = [row[t] for t in at]
        assert all(1 <= token <= 4 for token in content)
        assert row[13:] == [5] * 4
        assert wanted == [IGNORE] * 13 + (content[::-1] if reverse else content)
        assert len(at) == 4
        places |= set(at)
    assert places == set(range(4 if draw is copying else 13))


def test_lagged_copying_is_a_delay():
    ids, targets = lagged_copying(8, generator(), length=20, lag=7, vocab_size=5)
    assert (targets[:, :7] == IGNORE).all()
    assert torch.equal(targets[:, 7:], ids[:, :13])
    assert ids.unique().tolist() == [0, 1, 2, 3, 4]


def test_bits_come_back_after_the_flag():
    inputs, targets = bit_copy(16, generator(), bits=7, steps=10, gap=7)
    assert inputs.shape == (16, 28, 8)
    assert targets.shape == (16, 28, 7)
    assert torch.equal(inputs[:, :10, :7].long(), targets[:, -10:])
    assert set(targets.unique().tolist()) == {IGNORE, 0, 1}
    assert (targets[:, :18] == IGNORE).all()
    flags = inputs[..., 7]
    assert (flags.sum(1) == 1).all()
    assert (flags[:, 17] == 1).all()
    assert inputs[:, 10:, :7].abs().sum() == 0


@pytest.mark.parametrize("draw", [copying, selective_copying, lagged_copying, bit_copy])
def test_data_are_a_function_of_the_generator(draw):
    first, again, other = (draw(4, generator(seed)) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("draw", "sizes", "message"),
    [
        (copying, {"vocab_size": 2}, "vocab_size: seen 2"),
        (selective_copying, {"gap": 0}, "gap: seen 0"),
        (lagged_copying, {"length": 5, "lag": 5}, "lag: seen 5, wanted less than length = 5"),
        (bit_copy, {"bits": 0}, "bits: seen 0"),
    ],
)
def test_sizes_that_cannot_be_are_named(draw, sizes, message):
    with pytest.raises(ValueError, match=message):
        draw(2, generator(), **sizes)
