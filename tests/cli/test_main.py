"""The command's frame: quick help, lazy commands, and errors that are one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pydantic
import pytest
import typer
from typer.testing import CliRunner

from tidegate.cli import main as cli

runner = CliRunner()


def run(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def failing(monkeypatch):
    """`tidegate doctor` replaced by a command that raises what it is given."""

    def install(error):
        def command():
            raise error

        single = typer.Typer(add_completion=False)
        single.command("doctor")(command)
        monkeypatch.setattr(cli, "_load", lambda name: typer.main.get_command(single))

    return install


def test_help_names_every_command_without_loading_pytorch():
    done = run(
        "import sys, tidegate.cli.main as m\n"
        "sys.argv = ['tidegate', '--help']\n"
        "try: m.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'numba', 'lightning', 'matplotlib'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_a_summary(name):
    result = runner.invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    summary = cli._summary(name)
    assert summary.endswith(".")
    assert summary.split()[0] in result.stdout


def test_version():
    assert runner.invoke(cli.app, ["--version"]).stdout.startswith("tidegate 0.")


def test_an_unknown_command_names_the_closest():
    result = runner.invoke(cli.app, ["docter"])
    assert result.exit_code == 2
    assert "doctor" in result.output


class Recipe(pydantic.BaseModel):
    steps: int


def validation_error():
    try:
        Recipe(steps="many")
    except pydantic.ValidationError as error:
        return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("dim: seen 7,\n wanted a multiple of 2"), "dim: seen 7, wanted a multiple of 2"),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.txt"),
            "a.txt: no such file or directory; check",
        ),
        (FileNotFoundError("a.state: no such state file"), "a.state: no such state file"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on device; free some space"),
        (validation_error(), "Recipe: steps: Input should be a valid integer"),
        (FloatingPointError("the loss is NaN at step 3"), "the loss is NaN at step 3"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "the Python module 'x' is missing"),
    ],
)
def test_an_error_is_one_line(failing, error, line):
    failing(error)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {line}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_shows_the_traceback(failing):
    failing(ValueError("seen"))
    result = runner.invoke(cli.app, ["--debug", "doctor"])
    assert isinstance(result.exception, ValueError)
    assert "error:" not in result.stderr


def test_a_bug_is_not_hidden(failing):
    failing(TypeError("a bug"))
    assert isinstance(runner.invoke(cli.app, ["doctor"]).exception, TypeError)


def test_an_interrupt_has_its_own_code(failing):
    failing(KeyboardInterrupt())
    result = runner.invoke(cli.app, ["doctor"])
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_a_real_interrupt_leaves_no_traceback():
    code = (
        "import time, typer, tidegate.cli.main as m\n"
        "def command():\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "one = typer.Typer(add_completion=False)\none.command('doctor')(command)\n"
        "m._load = lambda name: typer.main.get_command(one)\n"
        "import sys\nsys.argv = ['tidegate', 'doctor']\nm.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_reader_that_leaves_is_no_error(options):
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys, tidegate.cli.main as m; sys.argv = ['tidegate', 'list', *sys.argv[1:]]; m.main()"
    done = subprocess.run([sys.executable, "-c", code, *options], stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode != 0
