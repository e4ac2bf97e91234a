from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tidegate import registry
from tidegate.cli.main import app

runner = CliRunner()


@pytest.mark.parametrize("name", registry.names())
def test_every_mixer_explains_itself(name):
    result = runner.invoke(app, ["show", name])
    assert result.exit_code == 0, result.output
    facts = json.loads(runner.invoke(app, ["show", name, "--json"]).stdout)
    assert facts["equation"], f"the docstring of {facts['class']} has no indented equation"
    for line in facts["equation"].splitlines():
        assert line in result.stdout
    for option in registry.info(name).options:
        assert option in result.stdout
    for reason in registry.info(name).exceptions.values():
        assert " ".join(reason.split()) in " ".join(result.stdout.split())


def test_the_example_runs():
    facts = json.loads(runner.invoke(app, ["show", "deltanet", "--json", "--dim", "32"]).stdout)
    names: dict = {}
    exec(facts["example"], names)
    assert names["y"].shape == (1, 40, 32)


def test_the_example_of_one_that_needs_the_whole_gives_it_the_whole():
    facts = json.loads(runner.invoke(app, ["show", "bidirectional", "--json", "--dim", "32"]).stdout)
    assert list(facts["exceptions"]) == ["causality", "streaming"]
    names: dict = {}
    exec(facts["example"], names)
    assert names["y"].shape == (1, 100, 32)


def test_options_have_types_and_defaults():
    facts = json.loads(runner.invoke(app, ["show", "deltanet", "--json"]).stdout)
    assert facts["options"]["num_heads"] == {"type": "int", "default": 4}


def test_an_unknown_mixer_names_the_closest():
    result = runner.invoke(app, ["show", "deltanett"])
    assert result.exit_code == 1
    assert "did you mean 'deltanet'?" in result.stderr
