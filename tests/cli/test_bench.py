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
