from __future__ import annotations

from types import SimpleNamespace

import pytest

from tidegate.bench import timing
from tidegate.bench.timing import Timing, interleaved


@pytest.fixture
def sleep(monkeypatch):
    """A clock that stands still but for sleep(seconds): what a busy machine does is no matter."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return sleep


def test_calls_take_turns():
    order = []
    interleaved([lambda: order.append("a"), lambda: order.append("b")], 2, shortest=0)
    assert order == ["a"] * 2 + ["b"] * 2 + ["a", "b"] * 2


def test_the_median_is_the_time_of_a_call(sleep):
    durations = iter([9.0, 0.5, 0.1, 0.7, 0.3, 0.4, 0.2])  # the first two calls are beforehand
    (found,) = interleaved([lambda: sleep(next(durations))], 5, shortest=0, patience=100.0)
    assert found.median == pytest.approx(0.3)
    assert found.best == pytest.approx(0.1)
    assert found.low == pytest.approx(0.2)
    assert found.high == pytest.approx(0.4)
    assert found.repetitions == 5


def test_quick_calls_are_repeated_within_a_sample(sleep):
    calls = []
    (found,) = interleaved([lambda: calls.append(sleep(1e-4))], 2, shortest=5e-3)
    assert len(calls) == 2 + 2 * 50
    assert found.median == pytest.approx(1e-4)


def test_slow_calls_get_fewer_rounds(sleep):
    slow, quick = interleaved([lambda: sleep(0.02), lambda: None], 10, patience=0.05)
    assert slow.repetitions == 2
    assert quick.repetitions == 10


def test_a_call_longer_than_the_patience_is_called_twice_in_all(sleep):
    calls = []
    (found,) = interleaved([lambda: calls.append(sleep(0.01))], 10, patience=0.005)
    assert len(calls) == 2
    assert found.repetitions == 1
    assert found.median == pytest.approx(0.01)


def test_the_clock_is_a_real_one():
    (found,) = interleaved([lambda: sum(range(1000))], 3, shortest=0)
    assert found.best > 0


def test_spread():
    assert Timing(2.0, 1.5, 2.5, 1.0, 5).spread == 0.5


def test_no_repetitions_is_an_error():
    with pytest.raises(ValueError, match="repetitions: seen 0"):
        interleaved([lambda: None], 0)
    with pytest.raises(ValueError, match="patience: seen -1"):
        interleaved([lambda: None], 1, patience=-1)
