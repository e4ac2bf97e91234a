from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from tidegate.bench.ops import CASES
from tidegate.cli.main import app

runner = CliRunner()
PNG = b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["ops"], list(CASES)),
        (["mixers", "--only", "deltanet,gated-deltanet"], ["deltanet", "gated-deltanet"]),
        (["cells", "--only", "lstm,torch/lstm,loop/gru"], ["lstm", "torch/lstm", "loop/gru"]),
        (["model", "--only", "deltanet,attention"], ["deltanet", "attention"]),
        (["decode", "--only", "deltanet"], ["deltanet"]),
    ],
)
def test_table_json_and_picture(tmp_path, arguments, names):
    result = runner.invoke(app, ["bench", *arguments, "--quick", "--threads", "1", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    subject = arguments[0]
    content = json.loads((tmp_path / "new" / f"{subject}.json").read_text())
    assert list(dict.fromkeys(row["name"] for row in content["results"])) == names
    assert content["machine"]["threads"] == 1
    assert (tmp_path / "new" / f"{subject}.png").read_bytes()[:4] == PNG
    assert all(name in result.stdout for name in names)
    assert f"{subject}.png" in result.stdout


def rows(folder, subject):
    return json.loads((folder / f"{subject}.json").read_text())["results"]


@pytest.mark.parametrize("subject", ["mixers", "decode"])
def test_a_row_for_every_batch_and_number_of_threads(tmp_path, subject):
    options = ["--only", "deltanet", "--lengths", "8,16", "--batch", "1,3", "--threads", "2,1", "--quick"]
    result = runner.invoke(app, ["bench", subject, *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    at = "context" if subject == "decode" else "length"
    found = [(row["threads"], row["batch"], row[at]) for row in rows(tmp_path, subject)]
    assert found == [(t, b, n) for t in (1, 2) for b in (1, 3) for n in (8, 16)]
    assert "batch" in result.stdout
    assert "threads" in result.stdout


def test_the_transformer_is_beside_every_model(tmp_path):
    options = ["--only", "lstm", "--lengths", "8", "--layers", "2", "--vocabulary", "11", "--quick"]
    result = runner.invoke(app, ["bench", "model", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [row["name"] for row in rows(tmp_path, "model")] == ["lstm", "attention"]
    for word in ("tokens per second", "parameters", "training step", "attention takes", "1.00 x", "of ceiling"):
        assert word in result.stdout


def test_peak_memory(tmp_path):
    options = ["--only", "scan", "--lengths", "512", "--memory", "--quick"]
    result = runner.invoke(app, ["bench", "ops", *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.stdout
    assert [row["memory"] > 0 for row in rows(tmp_path, "ops")] == [True]


def test_the_roofline_names_the_bound(tmp_path):
    result = runner.invoke(app, ["bench", "ops", "--only", "scan,dplr", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for row in rows(tmp_path, "ops"):
        for phase in ("forward", "training"):
            assert set(row[f"{phase}_roof"]) == {"flops", "bytes", "bound", "seconds", "reached"}
            assert f"% {row[f'{phase}_roof']['bound']}" in result.stdout
    assert "Ceilings in the same rounds (medians): matmul" in result.stdout


def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    options = ["--only", "scan", "--quick", "--threads", str(before + 1), "--out", str(tmp_path)]
    assert runner.invoke(app, ["bench", "ops", *options]).exit_code == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["ops", "--only", "scam"], "op: there is no 'scam', did you mean 'scan'?"),
        (["mixers", "--only", "deltanett"], "did you mean 'deltanet'?"),
        (["ops", "--lengths", "5,x"], "--lengths: seen '5,x', wanted positive numbers"),
        (["ops", "--lengths", "0"], "--lengths: seen '0', wanted positive numbers"),
        (["ops", "--lengths", ""], "--lengths: seen '', wanted positive numbers"),
        (["ops", "--batch", "1,0"], "--batch: seen '1,0', wanted positive numbers"),
        (["ops", "--threads", "two"], "--threads: seen 'two', wanted positive numbers"),
        (["mixers", "--only", "gla,"], "--only: seen 'gla,', wanted names by commas, as in gla,mamba2"),
        (["ops", "--only", ""], "--only: seen '', wanted names by commas"),
        (["model", "--only", "glaa"], "did you mean 'gla'?"),
        (["decode", "--only", "glaa"], "did you mean 'gla'?"),
        (["decode", "--memory"], "--memory: is of a forward and backward"),
        (["ops", "--out", "/dev/null/reports"], "not a directory"),
    ],
)
def test_bad_input_is_one_line(arguments, cause, tmp_path):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    result = runner.invoke(app, ["bench", *arguments, "--quick"])
    assert result.exit_code == 1
    assert cause in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_negative_patience_is_refused(tmp_path):
    result = runner.invoke(app, ["bench", "ops", "--patience", "-1", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--patience" in result.stderr
