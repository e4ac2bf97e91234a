from __future__ import annotations

import json

from typer.testing import CliRunner

from tidegate import registry
from tidegate.cli.main import app

runner = CliRunner()


def test_every_mixer_is_listed():
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0, result.output
    for name in registry.names():
        assert name in result.stdout


def test_json_holds_the_costs():
    rows = json.loads(runner.invoke(app, ["list", "--json", "--dim", "64"]).stdout)
    assert [row["name"] for row in rows] == registry.names()
    for row in rows:
        assert row["parameters"] > 0
        assert row["flops_per_token"] > 0
        assert (row["state_bytes_per_token"] > 0) == (row["flops_per_cached_token"] > 0)
        assert row["state_bytes"] > 0 or row["state_bytes_per_token"] > 0 or "streaming" in row["exceptions"]


def test_one_family_only():
    rows = json.loads(runner.invoke(app, ["list", "--family", "delta", "--json"]).stdout)
    assert {row["family"] for row in rows} == {"delta"}
    assert len(rows) < len(registry.names())


def test_an_unknown_family_names_the_closest():
    result = runner.invoke(app, ["list", "--family", "detla"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --family: there is no 'detla', did you mean 'delta'?")
