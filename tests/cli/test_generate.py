from __future__ import annotations

import torch
from typer.testing import CliRunner

from tidegate import LanguageModel
from tidegate.cli.main import app
from tidegate.tasks.language.tokenizer import ByteTokenizer

runner = CliRunner()


def saved(folder, layers):
    torch.manual_seed(0)
    LanguageModel(256, 16, layers).save(folder)
    ByteTokenizer().save(folder)
    return str(folder)


def test_a_compiled_step_writes_the_same_text(tmp_path):
    command = ["generate", saved(tmp_path, "lstm,gru"), "--prompt", "sea", "--max-tokens", "30", "--temperature", "0"]
    plain, compiled = runner.invoke(app, command), runner.invoke(app, [*command, "--compiled"])
    assert plain.exit_code == compiled.exit_code == 0, compiled.output
    assert plain.stdout == compiled.stdout
    assert plain.stdout.startswith("sea")


def test_a_model_without_compiled_step_is_told_so(tmp_path):
    folder = saved(tmp_path, [("attention", {"num_heads": 2})])
    result = runner.invoke(app, ["generate", folder, "--compiled"])
    assert result.exit_code != 0
    assert "--compiled: this model has no compiled step" in " ".join((result.output + str(result.exception)).split())
