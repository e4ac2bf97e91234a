"""What the sweeps count and yield."""

from __future__ import annotations

import json

import pytest

from tidegate import registry
from tidegate.bench import mixers, model, ops, report
from tidegate.bench.machine import threads
from tidegate.bench.roofline import Rates, roof
from tidegate.bench.timing import Timing
from tidegate.nn.mixer import grows

SIZES = {"batch": 2, "heads": 3, "key_dim": 4, "value_dim": 5}
COARSE = {"ceilings": {"ceiling_size": 64, "stream_elements": 1024}, "repetitions": 1}


@pytest.mark.parametrize("name", ops.CASES)
def test_every_op_runs_with_unequal_dimensions(name):
    case, inputs = ops.CASES[name], ops.Inputs(ops.Shape(**SIZES, time=16))
    assert case.op(*inputs.take(case.inputs))[0].numel() == 2 * 16 * 3 * 5
    forward, training = ops.runs(case, inputs)
    forward()
    assert len(training()) == len(case.inputs)


def test_cases_share_their_inputs():
    inputs = ops.Inputs(ops.Shape(**SIZES, time=3))
    q, k = inputs.take(["q", "k"])
    assert inputs.take(["k", "q"])[1] is q
    assert q is not k
    assert not q.equal(k)


def test_op_sweep():
    with threads(1):
        found = list(ops.sweep(["scan", "torch/sdpa"], [8, 4], **SIZES, **COARSE))
    assert [(m.name, m.length) for m in found] == [("scan", 4), ("torch/sdpa", 4), ("scan", 8), ("torch/sdpa", 8)]
    for m in found:
        assert (m.batch, m.threads, m.tokens, m.memory) == (2, 1, 2 * m.length, None)
        forward, backward = ops.CASES[m.name].work(ops.Shape(**SIZES, time=m.length))
        assert m.forward_roof == roof(forward, m.rates, m.forward.median)
        assert m.training_roof == roof(forward + backward, m.rates, m.training.median)
        assert m.forward_per_token == m.forward.median / (2 * m.length)


def test_a_quadratic_case_stops_when_it_gets_slow():
    found = list(ops.sweep(["scan", "torch/sdpa"], [4, 8], patience=1e-9, **SIZES, **COARSE))
    assert [(m.name, m.length) for m in found] == [("scan", 4), ("torch/sdpa", 4), ("scan", 8)]
    assert {m.forward.repetitions for m in found} == {1}


def test_mixer_sweep_and_decode():
    found = list(mixers.sweep(["deltanet"], [8, 16], dim=16, **COARSE))
    assert [(m.name, m.length, m.tokens) for m in found] == [("deltanet", 8, 8), ("deltanet", 16, 16)]
    assert found[0].rates == found[1].rates
    assert found[1].forward_roof.flops == mixers.work("deltanet", 1, 16, 16)[0].flops
    steps = list(mixers.decode(["deltanet"], [3, 20], dim=16, chunk=7, repetitions=1))
    assert [step.context for step in steps] == [3, 20]
    assert len({step.state_bytes for step in steps}) == 1


SMALL = {"dim": 16, "layers": 2, "vocabulary": 11}


def test_model_sweep():
    found = list(model.sweep(["deltanet"], [8, 4], batch=2, **SMALL, **COARSE))
    assert [(m.name, m.length) for m in found] == [
        (name, length) for length in (4, 8) for name in ("deltanet", "attention")
    ]
    for m in found:
        assert m.parameters == model.build(m.name, **SMALL).num_parameters
        forward, training = model.work(m.name, 2, m.length, **SMALL)
        assert m.forward_roof.flops == forward.flops
        assert m.training_roof.flops == training.flops


def test_a_transformer_that_would_take_too_long_is_left_out():
    found = list(model.sweep(["lstm"], [4, 8], longest=0.0, **SMALL, **COARSE))
    assert [(m.name, m.length) for m in found] == [("lstm", 4), ("attention", 4), ("lstm", 8)]


def test_a_training_step_trains():
    import torch

    built = model.build("lstm", **SMALL)
    before = [p.detach().clone() for p in built.parameters()]
    loss = model._runs(built, 2, 5)[1]()
    assert loss.item() == pytest.approx(torch.tensor(11.0).log().item(), abs=0.5)
    assert all(not torch.equal(old, new) for old, new in zip(before, built.parameters(), strict=True))


@pytest.mark.parametrize(("subject", "sizes"), [(ops, {"heads": 2}), (mixers, {"dim": 16}), (model, SMALL)])
def test_the_call_whose_memory_is_measured(subject, sizes):
    assert subject.prepare("attention", batch=2, length=5, **sizes)() is not None


@pytest.mark.parametrize("sweep", [ops.sweep, mixers.sweep, model.sweep, mixers.decode])
def test_an_unknown_name_is_found_before_anything_is_measured(sweep):
    with pytest.raises(ValueError, match="there is no 'nothing'"):
        next(iter(sweep(["attention", "nothing"], [4])))


@pytest.mark.parametrize("name", registry.names())
def test_cost_of_a_mixer(name):
    cost = mixers.cost(name, 64)
    mixer = mixers.build(name, 64)
    assert cost.parameters == sum(p.numel() for p in mixer.parameters())
    assert cost.flops_per_token > cost.parameters
    if grows(mixer.state_spec()):
        assert "constant_state" in registry.info(name).exceptions
        state = mixer(_x(64))[1]
        assert state.nbytes == cost.state_bytes + 10 * cost.state_bytes_per_token
    else:
        assert mixer(_x(64))[1].nbytes == cost.state_bytes


def test_a_wrapper_costs_what_it_wraps():
    both, one = mixers.cost("bidirectional", 64), mixers.cost("gla", 64)
    assert (both.parameters, both.flops_per_token) == (2 * one.parameters, 2 * one.flops_per_token)
    assert (both.state_bytes, both.state_bytes_per_token) == (0, 0)
    with pytest.raises(ValueError, match="names: bidirectional has no single tokens to time"):
        next(iter(mixers.decode(["gla", "bidirectional"], [3])))


def _x(dim):
    import torch

    return torch.randn(1, 10, dim)


def timing(median: float) -> Timing:
    return Timing(median, median, median, median, 1)


def measured(name: str, length: int, seconds: float, **more) -> report.Measurement:
    return report.Measurement(name, length, length, timing(seconds), timing(2 * seconds), **more)


def test_every_setting_has_its_own_peer_and_flatness():
    results = [
        measured(name, length, seconds * batch**2, batch=batch)
        for name, seconds in (("gla", 1.0), ("attention", 2.0))
        for batch in (1, 8)
        for length in (100, 200)
    ]
    beside = report.peers(results, "attention")
    assert [other.forward.median / own.forward.median for own, other in zip(results, beside, strict=True)] == [
        2.0
    ] * 4 + [1.0] * 4
    assert report.peers(results[:1], "attention") == [None]
    assert report.flatness(results) == {"gla": 0.5, "attention": 0.5}
    assert report.flatness([*results, measured("gla", 400, 800.0, batch=8)])["gla"] == pytest.approx(800 / 64 / 4)


def test_report(tmp_path):
    rates = Rates(1e9, 1e9)
    results = [
        measured("gla", length, seconds, threads=count, rates=rates, memory=5)
        for count in (1, 2)
        for length, seconds in ((100, 1.0), (200, 2.2))
    ]
    assert report.flatness(results)["gla"] == pytest.approx(1.1)
    report.write_json(tmp_path / "a.json", results, {"subject": "mixers"})
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["subject"] == "mixers"
    assert content["results"][1]["forward"]["median"] == 2.2
    assert content["results"][2]["threads"] == 2
    assert content["results"][2]["rates"] == {"matmul": 1e9, "stream": 1e9}
    assert content["results"][2]["memory"] == 5
    report.write_lengths(tmp_path / "a.png", results, "title")
    report.write_decode(tmp_path / "b.png", [report.Decode("gla", 10, timing(1e-4), None, 64)], "title")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000
