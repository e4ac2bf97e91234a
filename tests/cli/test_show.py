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


def test_the_source_of_a_cell_is_that_of_its_equations():
    from tidegate.ops import Cell

    result = runner.invoke(app, ["show", "lstm", "--source"])
    assert result.exit_code == 0, result.output
    cell = registry.build("lstm", 4).cell
    assert isinstance(cell, Cell)
    assert result.stdout == cell.source + "\n"
    names: dict = {"product": lambda U, h: U * h, "sigmoid": abs, "tanh": abs}
    exec(result.stdout.partition("# CPU kernels")[0], names)  # Python, as it stands
    output, states = names["step"]((1, 2, 3, 4), (0, 0, 0, 0), (), (5, 6))
    assert states == (4 * (1 * 3 + 2 * 6), 1 * 3 + 2 * 6)
    assert output == states[0]
    variant = runner.invoke(app, ["show", "lstm", "--source", "--preset", "peephole"])
    assert "p_i" in variant.stdout
    assert "p_i" not in result.stdout


def test_what_is_no_cell_has_no_source_to_show():
    result = runner.invoke(app, ["show", "gla", "--source"])
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    assert "gla is not written as equations" in message
    assert "tidegate.mixers.gla" in message
    assert "gru, " in message
    assert "sru" not in message.partition("Cells are")[2].replace(",", "").split()  # of the family, but no equations
    for arguments in (["show", "lstm", "--source", "--json"], ["show", "lstm", "--preset", "heads"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1
        assert "--source" in result.stderr
    result = runner.invoke(app, ["show", "lstm", "--source", "--preset", "peephol"])
    assert "did you mean 'peephole'?" in result.stderr
