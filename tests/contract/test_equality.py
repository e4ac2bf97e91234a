"""Whole = any split = one by one = packed = padded = alone: outputs, final states and every gradient."""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.contract.helpers import (
    KINDS,
    LENGTHS,
    Subject,
    alone,
    assert_near,
    check_equal,
    pieces,
    segments_of,
    tensors_of,
    unless_excused,
    whole,
)
from tests.contract.tolerances import EQUAL
from tidegate import registry

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def drawn(*key: object) -> random.Random:
    """A generator of its own for every case, the same in every run."""
    return random.Random("-".join(map(str, key)))


@pytest.mark.parametrize("time", LENGTHS)
def test_any_split_is_the_whole(subject: Subject, time: int):
    draw = drawn("split", subject.name, time)
    cuts = sorted(draw.sample(range(1, time), min(time - 1, draw.randint(1, 4))))
    for dtype in (torch.float64, torch.float32):
        mixer = subject.build(dtype)
        x, state = subject.input(2, time, dtype), subject.state(mixer, 2, dtype)
        with unless_excused(subject, "streaming") if cuts else nullcontext():
            check_equal(mixer, pieces(mixer, cuts), whole(mixer), x, state)


@DTYPES
def test_one_by_one_is_the_whole(subject: Subject, dtype: torch.dtype):
    mixer = subject.build(dtype)
    x, state = subject.input(2, 19, dtype), subject.state(mixer, 2, dtype)
    with unless_excused(subject, "streaming"):
        check_equal(mixer, pieces(mixer, range(1, 19)), whole(mixer), x, state)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_documents_alone(subject: Subject, kind: str, dtype: torch.dtype):
    """Packed, padded or beside others, each document gives what it gives alone; what stands on padding is not read."""
    draw = drawn("alone", subject.name, kind, dtype)
    time = draw.choice(LENGTHS[2:])
    segments = segments_of(kind, 3, time, draw)
    mixer = subject.build(dtype)
    x, state = subject.input(3, time, dtype), subject.state(mixer, 3, dtype)
    if segments is not None:
        x[~segments.valid] = float("nan")
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    if segments is not None:
        assert not got.outputs["y"][~segments.valid].any(), "outputs on padding are not zero"
        assert not got.gradients["x"][~segments.valid].any(), "padding receives gradient"


@pytest.mark.parametrize("kind", ["packed_with_holes", "left", "blank_row"])
def test_splits_of_packed_and_padded_batches(subject: Subject, kind: str):
    draw = drawn("split", subject.name, kind)
    time = draw.choice(LENGTHS[2:])
    segments = segments_of(kind, 3, time, draw)
    cuts = sorted(draw.sample(range(1, time), 3))
    mixer = subject.build()
    x, state = subject.input(3, time), subject.state(mixer, 3)
    x[~segments.valid] = float("nan")
    with unless_excused(subject, "streaming"):
        check_equal(mixer, pieces(mixer, cuts, segments), whole(mixer, segments), x, state)


@pytest.mark.parametrize("kind", ["packed_with_holes", "left"])
def test_one_by_one_through_documents_and_padding(subject: Subject, kind: str):
    """Tokens arrive singly, some of them padding: a server that steps rows of different length together."""
    segments = segments_of(kind, 3, 17, drawn("steps", subject.name, kind))
    mixer = subject.build()
    x, state = subject.input(3, 17), subject.state(mixer, 3)
    x[~segments.valid] = float("nan")
    with unless_excused(subject, "streaming"):
        check_equal(mixer, pieces(mixer, range(1, 17), segments), whole(mixer, segments), x, state)


@pytest.mark.parametrize("time", [1, 2])
def test_the_shortest_calls_with_documents_and_padding(subject: Subject, time: int):
    mixer = subject.build()
    x, state = subject.input(3, time), subject.state(mixer, 3)
    for kind in ("packed", "packed_with_holes", "left", "right", "blank_row"):
        segments = segments_of(kind, 3, time, drawn("short", subject.name, kind, time))
        check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)


def test_every_switch_keeps_the_contract(subject: Subject):
    """Options that are on or off, each turned from its default: what tiny options alone would never run."""
    for option, parameter in registry.Info(subject.name, subject.cls, "", "").options.items():
        if isinstance(parameter.default, bool):
            turned = replace(subject, options={**subject.options, option: not parameter.default})
            mixer = turned.build()
            x, state = turned.input(3, 33), turned.state(mixer, 3)
            segments = segments_of("packed_with_holes", 3, 33, drawn("switch", subject.name, option))
            x[~segments.valid] = float("nan")
            check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
            with unless_excused(subject, "streaming"):
                check_equal(mixer, pieces(mixer, (1, 17), segments), whole(mixer, segments), x, state)


@DTYPES
def test_no_state_is_the_initial_state(subject: Subject, dtype: torch.dtype):
    mixer = subject.build(dtype)
    x = subject.input(2, 17, dtype)
    with torch.no_grad():
        y, last = mixer(x)
        again, last_again = mixer(x, mixer.init_state(2, dtype=dtype))
    assert_near({"y": again}, {"y": y}, EQUAL[dtype], "outputs from the initial state")
    assert_near(*tensors_of(mixer, last_again, last), EQUAL[dtype], "final states from the initial state")
