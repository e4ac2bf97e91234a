"""`tidegate explain`: a picture and a table of a saved model, and one clear line for what cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.cli.test_generate import saved
from tidegate.cli.main import app

runner = CliRunner()
HYBRID = [
    ("gla", {"num_heads": 2}),
    ("lstm", {}),
    ("mamba", {"state_dim": 4}),
    ("deltanet", {"num_heads": 2}),
    ("attention", {"num_heads": 2}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "hybrid", HYBRID)


def call(*arguments):
    return runner.invoke(app, ["explain", *map(str, arguments)])


def size_of(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_it_draws_all_linear_layers_and_names_the_others(run, tmp_path):
    result = call(run, "--text", "the sea, the sea", "--out", tmp_path / "sea.png")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert [name in shown for name in ("gla", "mamba", "deltanet", "attention")] == [True] * 4
    assert "without linear recurrence, not drawn: layer 1 (lstm)" in shown
    assert str(tmp_path / "sea.png") in shown.replace("\n", "")
    wide, high = size_of(tmp_path / "sea.png")
    assert wide > 1000
    assert high > 1000


def test_the_picture_lies_in_the_run_by_default_and_has_a_row_per_layer(run, tmp_path):
    assert call(run, "--text", "sea", "--layer", 0).exit_code == 0
    one = size_of(f"{run}/explain.png")
    assert call(run, "--text", "sea", "--layer", 0, "--layer", 4, "--out", tmp_path / "two.png").exit_code == 0
    assert size_of(tmp_path / "two.png")[1] > 1.5 * one[1]


def test_json_has_the_numbers(run, tmp_path):
    result = call(run, "--text", "the sea", "--out", tmp_path / "sea.png", "--json", "--layer", 2, "--layer", 4)
    assert result.exit_code == 0, result.output
    seen = json.loads(result.stdout)
    assert seen["picture"] == str(tmp_path / "sea.png")
    assert seen["tokens"] == ["⊢", *"the sea"]
    assert [(row["layer"], row["mixer"], row["recurrence"]) for row in seen["recurrences"]] == [
        (2, "mamba", "selective_scan"),
        (4, "attention", "attention"),
    ]
    mamba, attention = seen["recurrences"]
    assert (mamba["heads"], attention["heads"]) == (32, 2)
    assert len(mamba["memory_length"]) == len(mamba["time_constant"]) == 32
    assert all(0 <= length <= 7 for length in mamba["memory_length"] + attention["memory_length"])


def test_many_channels_are_shown_by_some(tmp_path):
    torch.manual_seed(0)
    run = saved(tmp_path / "run", [("mamba", {"state_dim": 2, "expand": 5})])
    result = call(run, "--text", "sea", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["recurrences"]
    assert row["heads"] == 80
    assert len(row["shown_heads"]) == 64
    assert (row["shown_heads"][0], row["shown_heads"][-1]) == (0, 79)


@pytest.mark.parametrize("text", ["a", " ", "\n\t", "ä€", "x" * 300])
def test_any_text_can_be_drawn(run, tmp_path, text):
    result = call(run, "--text", text, "--layer", 3, "--out", tmp_path / "text.png")
    assert result.exit_code == 0, result.output
    size_of(tmp_path / "text.png")


# -- what cannot be ----------------------------------------------------------------------------------------------------
def fails_with(message, *arguments):
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("layer", [5, -1])
def test_a_layer_that_is_not_there(run, layer):
    fails_with(f"--layer: seen {layer}, wanted 0 to 4: the model has 5 layers", run, "--text", "sea", "--layer", layer)


def test_a_layer_that_is_a_cell(run, tmp_path):
    out = tmp_path / "none.png"
    fails_with("--layer: layer 1 (lstm) has no linear", run, "--text", "sea", "--layer", 1, "--out", out)
    assert not out.exists()


def test_a_model_of_cells_alone(tmp_path):
    run = saved(tmp_path / "cells", "3*lstm")
    fails_with("LSTM: the update of this cell is not linear in its state", run, "--text", "sea")
    fails_with("Wanted a linear recurrence, such as gla", run, "--text", "sea")


def test_texts_that_are_too_long_or_empty(run):
    fails_with("--text: it has 601 tokens, wanted at most 512; give less of it", run, "--text", "x" * 600)
    fails_with("--text: it is empty", run, "--text", "")


def test_folders_that_are_no_run(tmp_path):
    fails_with(f"{tmp_path / 'gone'}: no such folder", tmp_path / "gone", "--text", "sea")
    fails_with("config.json: missing", tmp_path, "--text", "sea")


def test_a_picture_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    fails_with("file", run, "--text", "sea", "--layer", 0, "--out", tmp_path / "file" / "sea.png")
