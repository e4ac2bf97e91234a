from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tidegate.backend import explain
from tidegate.cli import doctor
from tidegate.cli.main import app

runner = CliRunner()
HEALTHY = {
    "threads": 2,
    "cores": 2,
    "simd": ["AVX2"],
    "cache": {"folder": "/c", "writable": True, "stale": 0},
}


def test_the_report_is_complete():
    result = runner.invoke(app, ["doctor", "--quick"])
    assert result.exit_code == 0, result.output
    for word in (torch.__version__, "cores", "threads", "GFLOP/s", "GB/s", "cached files", "linear_attention", "numba"):
        assert word in result.stdout


def test_json():
    facts = json.loads(runner.invoke(app, ["doctor", "--quick", "--json"]).stdout)
    assert facts["matmul_gflops"] > 0
    assert facts["stream_gbs"] > 0
    assert facts["cache"]["folder"]
    for row in facts["backends"]:
        if row["backend"] == "numba":
            assert row["backend"] == explain(row["device"], getattr(torch, row["dtype"]))[0]
        assert row["reason"]
    assert {row["op"] for row in facts["backends"]} >= {"scan", "delta_rule", "attention"}
    single = [row for row in facts["backends"] if row["device"] == "cpu" and row["dtype"] == "float32"]
    assert {row["op"] for row in single if row["backend"] != "numba"} == {"attention"}


def test_warnings(monkeypatch):
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert doctor.warnings(HEALTHY) == []
    assert "4 threads on 2 cores" in doctor.warnings({**HEALTHY, "threads": 4})[0]
    assert "1 of 2 cores" in doctor.warnings({**HEALTHY, "threads": 1})[0]
    assert "AVX2" in doctor.warnings({**HEALTHY, "simd": []})[0]
    unwritable = {"folder": "/c", "writable": False, "stale": 3}
    seen = doctor.warnings({**HEALTHY, "cache": unwritable})
    assert "not writable" in seen[0]
    assert "make clean" in seen[1]
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    assert "busy" in doctor.warnings(HEALTHY)[0]


def test_warm_says_what_was_compiled():
    result = runner.invoke(app, ["doctor", "--warm"])
    assert result.exit_code == 0, result.output
    for word in ("Kernels", "delta_rule", "backward", "all mixers", "compiled", "loaded", "kept in"):
        assert word in result.stdout
    facts = json.loads(runner.invoke(app, ["doctor", "--warm", "--json"]).stdout)
    assert not any(one["compiled"] or one["loaded"] for one in facts["warmed"])  # they are in this process by now
    assert facts["seconds"] == pytest.approx(sum(one["seconds"] for one in facts["warmed"]))
    assert facts["cache"]["folder"]


def test_warm_warns_of_a_stale_cache(monkeypatch):
    monkeypatch.setattr(doctor, "cache", lambda: {"folder": "/c", "writable": True, "stale": 3})
    assert "make clean" in runner.invoke(app, ["doctor", "--warm"]).stdout
