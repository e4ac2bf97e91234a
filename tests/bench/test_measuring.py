"""What the sweeps count and yield."""

from __future__ import annotations

import json

import pytest

from tidegate import registry
from tidegate.bench import mixers, ops, report
from tidegate.bench.timing import Timing

SHAPE = ops.Shape(batch=2, time=16, heads=3, key_dim=4, value_dim=5)
COARSE = {"ceiling_size": 64, "stream_elements": 1024, "repetitions": 1}


def test_work_of_an_op():
    tokens, state = 2 * 16, 3 * 4 * 5
    assert ops.CASES["linear_attention"].work(SHAPE) == 5 * tokens * state
    assert ops.CASES["delta_rule"].work(SHAPE) == 9 * tokens * state
    assert ops.CASES["scan"].work(SHAPE) == 3 * 4 * tokens * 3 * 5
    assert ops.CASES["attention"].work(SHAPE) == 2 * 3 * (16 * 17 / 2) * 2 * (4 + 5)


@pytest.mark.parametrize("name", ops.CASES)
def test_every_op_runs_with_unequal_dimensions(name):
    case = ops.CASES[name]
    inputs = case.inputs(SHAPE)
    assert case.call(*inputs).numel() == 2 * 16 * 3 * 5
    forward, training = ops._runs(case, SHAPE)
    forward()
    assert len(training()) == len(inputs)


def test_op_sweep():
    found = list(ops.sweep(["scan", "torch/sdpa"], [8, 4], SHAPE, **COARSE))
    assert [(m.name, m.length) for m in found] == [("scan", 4), ("torch/sdpa", 4), ("scan", 8), ("torch/sdpa", 8)]
    assert [m.bound for m in found[:2]] == ["stream", "matmul"]
    for m in found:
        assert m.reached == pytest.approx(
            ops.CASES[m.name].work(ops.Shape(2, m.length, 3, 4, 5)) / m.forward.median / m.ceiling
        )
        assert m.forward_per_token == m.forward.median / (2 * m.length)


def test_a_quadratic_case_stops_when_it_gets_slow():
    found = list(ops.sweep(["scan", "torch/sdpa"], [4, 8], SHAPE, patience=1e-9, **COARSE))
    assert [(m.name, m.length) for m in found] == [("scan", 4), ("torch/sdpa", 4), ("scan", 8)]


def test_mixer_sweep_and_decode():
    found = list(mixers.sweep(["deltanet"], [8, 16], dim=16, repetitions=1))
    assert [(m.name, m.length, m.tokens) for m in found] == [("deltanet", 8, 8), ("deltanet", 16, 16)]
    steps = list(mixers.decode(["deltanet"], [3, 20], dim=16, chunk=7, repetitions=1))
    assert [step.context for step in steps] == [3, 20]
    assert len({step.state_bytes for step in steps}) == 1


@pytest.mark.parametrize("name", registry.names())
def test_cost_of_a_mixer(name):
    cost = mixers.cost(name, 64)
    mixer = mixers.build(name, 64)
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    assert cost.flops_per_token > cost.parameters
    if mixers.grows(mixer):
        assert "constant_state" in registry.info(name).exceptions
        state = mixer(_x(64))[1]
        assert state.nbytes == cost.state_bytes + 10 * cost.state_bytes_per_token
    else:
        assert mixer(_x(64))[1].nbytes == cost.state_bytes


def _x(dim):
    import torch

    return torch.randn(1, 10, dim)


def timing(median: float) -> Timing:
    return Timing(median, median, median, median, 1)


def test_report(tmp_path):
    results = [
        report.Measurement("gla", length, length, timing(seconds), timing(2 * seconds))
        for length, seconds in ((100, 1.0), (200, 2.2))
    ]
    assert report.flatness(results)["gla"] == pytest.approx(1.1)
    report.write_json(tmp_path / "a.json", results, {"subject": "mixers"})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["subject"] == "mixers"
    assert content["results"][1]["forward"]["median"] == 2.2
    report.write_lengths(tmp_path / "a.png", results, "title")
    report.write_decode(tmp_path / "b.png", [report.Decode("gla", 10, timing(1e-4), 64)], "title")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000
