from __future__ import annotations

import time

import pytest

from tidegate.bench.timing import Timing, interleaved


def test_calls_take_turns():
    order = []
    interleaved([lambda: order.append("a"), lambda: order.append("b")], 2, shortest=0)
    assert order == ["a"] * 2 + ["b"] * 2 + ["a", "b"] * 2


def test_the_median_is_the_time_of_a_call():
    (timing,) = interleaved([lambda: time.sleep(0.005)], 5)
    assert 0.005 <= timing.best <= timing.low <= timing.median <= timing.high
    assert timing.median < 0.05
    assert timing.repetitions == 5


def test_quick_calls_are_repeated_within_a_sample():
    calls = []
    interleaved([lambda: calls.append(time.sleep(1e-4))], 2, shortest=5e-3)
    assert len(calls) > 20


def test_slow_calls_get_fewer_rounds():
    slow, quick = interleaved([lambda: time.sleep(0.02), lambda: None], 10, patience=0.05)
    assert slow.repetitions <= 2
    assert quick.repetitions == 10


def test_a_call_longer_than_the_patience_is_called_twice_in_all():
    calls = []
    (timing,) = interleaved([lambda: calls.append(time.sleep(0.01))], 10, patience=0.005)
    assert len(calls) == 2
    assert timing.repetitions == 1
    assert timing.median >= 0.01


def test_spread():
    assert Timing(2.0, 1.5, 2.5, 1.0, 5).spread == 0.5


def test_no_repetitions_is_an_error():
    with pytest.raises(ValueError, match="repetitions: seen 0"):
        interleaved([lambda: None], 0)
    with pytest.raises(ValueError, match="patience: seen -1"):
        interleaved([lambda: None], 1, patience=-1)
