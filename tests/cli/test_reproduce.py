from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tidegate.cli.main import app
from tidegate.papers import papers

runner = CliRunner()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("slug", sorted(papers()))
def test_smoke_runs_every_paper_without_a_verdict(slug, tmp_path):
    result = runner.invoke(app, ["reproduce", slug, "--smoke"])
    assert result.exit_code == 0, result.output
    assert "verdict: none" in result.stdout
    folder = tmp_path / "reports" / "smoke" / slug
    assert sorted(file.name for file in folder.iterdir()) == ["results.json", "results.md", "results.png"]
    record = json.loads((folder / "results.json").read_text())
    assert record["verdict"] is None
    assert record["command"] == f"tidegate reproduce {slug} --smoke"


def test_the_list_shows_the_last_verdict(tmp_path):
    result = runner.invoke(app, ["reproduce", "--list"])
    assert result.exit_code == 0, result.output
    for slug in papers():
        assert slug in result.stdout
    assert result.stdout.count("not run") == len(papers())

    folder = tmp_path / "elsewhere" / "gla"
    folder.mkdir(parents=True)
    record = {"paper": "gla", "verdict": "does not hold", "seeds": [0, 1, 2], "finished": "2026-11-23T01:02:03+00:00"}
    (folder / "results.json").write_text(json.dumps(record))
    result = runner.invoke(app, ["reproduce", "--list", "--out", "elsewhere"])
    assert "does not hold" in result.stdout
    assert "2026-11-23" in result.stdout

    (folder / "results.json").write_text("{")
    result = runner.invoke(app, ["reproduce", "--list", "--out", "elsewhere"])
    assert result.exit_code == 0
    assert "unreadable report" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glaa"], "error: paper: there is no 'glaa', did you mean 'gla'?"),
        ([], "error: PAPER: wanted either"),
        (["gla", "--list"], "error: PAPER: wanted either"),
    ],
)
def test_a_wrong_call_is_one_line(arguments, message):
    result = runner.invoke(app, ["reproduce", *arguments])
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_found_before_the_work(tmp_path):
    (tmp_path / "reports").write_text("a file")
    result = runner.invoke(app, ["reproduce", "gla"])
    assert result.exit_code == 1
    assert "reports" in result.stderr
    assert "Traceback" not in result.output
