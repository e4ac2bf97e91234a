"""`tidegate train` and `tidegate evaluate` from the outside: what they print, and one line for every mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tidegate.cli.main import app

TINY = ["--mixer", "gla", "--layers", "1", "--dim", "16", "--steps", "6", "--batch-size", "4", "--length", "16"]
TINY += ["--set", "sample.tokens=5"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("TIDEGATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("\n\n".join(f"Paragraph {i}: the tide comes in, the tide goes out." for i in range(200)))
    return str(path)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run("train", text, *TINY, "--out", str(folder))


def test_train_ends_with_scores_picture_and_sample(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "bits per byte, perplexity" in out
    assert "order-3 n-gram" in out
    assert str(folder / "loss.png") in out
    assert "step 6/6" in out
    assert (folder / "sample.txt").read_text() in out
    assert (folder / "recipe.yaml").is_file()


def test_flags_win_over_the_recipe(finished, text, tmp_path):
    folder, _ = finished
    flags = ["--recipe", str(folder / "recipe.yaml"), "--steps", "2", "--set", "training.clip=0.5"]
    result = run("train", *flags, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "steps: 2\n" in written
    assert "clip: 0.5\n" in written
    assert "dim: 16\n" in written


def test_resume_prolongs(finished):
    folder, _ = finished
    result = run("train", "--out", str(folder), "--resume", "--steps", "8")
    assert result.exit_code == 0, result.output
    assert "continuing from step-00000006" in result.stdout
    assert "step 8/8" in result.stdout


def test_evaluate(finished, text):
    folder, _ = finished
    own = run("evaluate", str(folder))
    assert own.exit_code == 0, own.output
    assert "bits per byte by an order-3 n-gram model" in own.stdout
    result = run("evaluate", str(folder), text, "--json")
    content = json.loads(result.stdout)
    assert content["bytes"] == os.path.getsize(text)
    assert content["ngram_3_bits_per_byte"] < content["bits_per_byte"]
    short = json.loads(run("evaluate", str(folder), text, "--json", "--length", "7", "--no-ngram").stdout)
    assert short["bits_per_byte"] == pytest.approx(content["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.txt", "--out", "RUN"], "nowhere.txt: no such file or directory; give a text file"),
        (["train", "--mixer", "gal", "--out", "RUN"], "there is no 'gal', did you mean 'gla'?"),
        (
            ["train", "--mixer", "bidirectional", "--out", "RUN"],
            "'bidirectional' (layer 0) cannot predict a next token",
        ),
        (["train", "--recipe", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["train", "--set", "training.stesp=3"], "training.stesp: there is no such key, did you mean 'steps'?"),
        (["train", "--set", "steps"], "wanted KEY=VALUE"),
        (["train", "--set", "model.options={num_head: 2}"], "gla: no option 'num_head', did you mean 'num_heads'?"),
        (["train", "--tokenizer", "words"], "data.tokenizer: wanted 'bytes' or 'bpe', seen 'words'"),
        (["train", "--resume"], "name the folder of the run to continue with --out"),
        (["train", "--resume", "--out", "RUN"], "nothing to resume"),
        (["train", "--out", "."], "is not empty; name another folder"),
        (["evaluate", "nowhere"], "nowhere: no trained model here"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "something").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == ["something"]


def test_as_a_command_of_its_own(text, tmp_path):
    """In a real process, with two training processes."""
    command = [sys.executable, "-c", _MAIN, "train", text]
    done = subprocess.run(
        [*command, *TINY, "--devices", "2", "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "order-3 n-gram" in done.stdout
    assert not done.stderr.strip(), done.stderr


def test_ctrl_c_says_how_to_go_on(text, tmp_path):
    command = [sys.executable, "-c", _MAIN, "train", text, *TINY, "--steps", "100000", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "step 1/" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    advice, error = errors.splitlines()
    assert f"`tidegate train --out {tmp_path / 'run'} --resume` continues" in advice
    assert error == "error: interrupted"


_MAIN = "import sys; sys.argv[0] = 'tidegate'; from tidegate.cli.main import main; main()"
