from __future__ import annotations

import pytest
import torch

from tidegate.bench import memory

MB = 1 << 20


def test_what_is_added_is_counted_once_freed_too():
    def prepare():
        kept = torch.ones(8 * MB)  # 32 MB

        def call():
            torch.ones(16 * MB)  # 64 MB, gone afterwards
            return kept

        return call

    found = memory.added(prepare)
    assert 90 * MB < found < 120 * MB
    assert memory.added(lambda: lambda: None) < 4 * MB  # an earlier peak does not count


def test_the_highest_is_at_least_what_is_there():
    assert 10 * MB < memory.resident() <= memory.highest()


def test_a_case_in_a_fresh_process():
    # x, its gradient and the gradient that comes in: three of 8 MB; weights and the output's share are small beside it
    found = memory.peak("ops", "short_convolution", batch=1, length=8192, threads=1, heads=4, key_dim=4, value_dim=64)
    assert 24 * MB < found < 64 * MB


def test_a_failure_says_why():
    with pytest.raises(ValueError, match=r"memory of nothing at T = 8: .*there is no 'nothing'"):
        memory.peak("mixers", "nothing", batch=1, length=8, threads=1, dim=16)
    with pytest.raises(ValueError, match="subject: seen 'decode'"):
        memory.peak("decode", "gla", batch=1, length=8, threads=1, dim=16)
