from __future__ import annotations

import pytest
import torch

from tidegate.bench import machine


def test_work_is_counted():
    call, flops = machine.matmul(64)
    assert flops == 2 * 64**3
    assert call().shape == (64, 64)
    call, moved = machine.stream(1000)
    assert moved == 12_000
    assert torch.equal(call(), torch.full((1000,), 1.5))


def test_ceilings_are_plausible():
    assert 0.1 < machine.matmul_gflops(3, size=256) < 1e5
    assert 0.1 < machine.stream_gbs(3, elements=1 << 20) < 1e4


def test_threads_inside_the_block_only():
    before = torch.get_num_threads()
    with machine.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with machine.threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: seen 0"), machine.threads(0):
        pass


def test_description():
    about = machine.describe()
    assert about["torch"] == torch.__version__
    assert about["cores"] >= 1
    assert set(about) >= {"tidegate", "numba", "python", "processor", "threads", "simd"}
