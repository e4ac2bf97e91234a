"""Whole runs: the folder, resuming bit for bit, several processes, and what happens when something goes wrong."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tidegate.nn.mixer import Mixer
from tidegate.train.metrics_file import read_metrics
from tidegate.train.run import train


def numbers(folder: Path):
    """Every logged row except its speed."""
    rows = read_metrics(folder / "metrics.csv")
    return [{name: str(value) for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def digest(path: Path) -> str:
    """Of the tensors, bit for bit; the file's header may list its two notes in either order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """An uninterrupted run of the small recipe."""
    from tests.train.conftest import BASE

    from tidegate.train.recipe import Recipe, merged

    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, train(Recipe.parse(merged(BASE, {"data.text": str(text)})), folder)


def test_folder_and_result(finished):
    folder, result = finished
    names = {path.name for path in folder.iterdir()}
    wanted = {"recipe.yaml", "model.safetensors", "config.json", "tokenizer.json", "checkpoints", "metrics.csv"}
    assert wanted | {"loss.png", "sample.txt", "tensorboard"} == names
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000008.safetensors", "step-00000012.safetensors"]
    rows = read_metrics(folder / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"]
    assert [row["step"] for row in rows if row["held_out_bits_per_byte"] > 0] == [6, 12]
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_text() == result.sample
    assert result.sample.startswith("the ")
    assert 0 < result.baseline < 8
    assert 0 < result.bits_per_byte < 9
    assert list((folder / "tensorboard").glob("events*"))


def test_other_numbers_change_nothing(finished, recipe, tmp_path):
    """The same recipe gives the same losses, also with another folder and another global generator."""
    folder, _ = finished
    torch.manual_seed(99)
    train(recipe({"training.steps": 12, "sample.tokens": 0}), tmp_path / "again")
    assert numbers(tmp_path / "again") == numbers(folder)


@pytest.mark.parametrize("moment", ["write", "between"])
def test_killed_run_resumes_bit_for_bit(finished, recipe, tmp_path, moment):
    """kill -9 while the checkpoint of step 8 is being written, or at step 10; then --resume."""
    whole, _ = finished
    folder = tmp_path / "killed"
    recipe().save(tmp_path / "recipe.yaml")
    script = f"""
import os, signal
from pathlib import Path
import tidegate.state as state
from tidegate.train import checkpoint, module
from tidegate.train.recipe import Recipe
from tidegate.train.run import train
def die(): os.kill(os.getpid(), signal.SIGKILL)
if {moment!r} == "write":
    def half(path, content):
        if "00000008" in str(path):
            Path(path).with_name("." + Path(path).name + ".1.partial").write_bytes(content[:1000])
            die()
        state.write_atomically(path, content)
    checkpoint.write_atomically = half
else:
    old = module.LanguageModule.training_step
    def step(self, batch, index):
        if self.global_step == 10: die()
        return old(self, batch, index)
    module.LanguageModule.training_step = step
train(Recipe.load({str(tmp_path / "recipe.yaml")!r}), {str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    newest = "step-00000004" if moment == "write" else "step-00000008"
    assert max(path.stem for path in (folder / "checkpoints").glob("step-*.safetensors")) == newest
    train(recipe(), folder, resume=True)
    assert numbers(folder) == numbers(whole)
    assert digest(folder / "model.safetensors") == digest(whole / "model.safetensors")
    assert not list(folder.rglob("*.partial"))


def test_damaged_checkpoint_goes_back_one(finished, recipe, tmp_path, capsys):
    whole, _ = finished
    folder = tmp_path / "damaged"
    train(recipe(), folder)
    newest = folder / "checkpoints" / "step-00000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    train(recipe(), folder, resume=True)
    assert "step-00000012.safetensors: damaged checkpoint" in capsys.readouterr().err
    assert numbers(folder) == numbers(whole)


def test_a_finished_run_can_be_prolonged(recipe, tmp_path):
    changes = {"training.schedule": "constant", "training.evaluate_every": 4}
    train(recipe(changes | {"training.steps": 8}), tmp_path / "short")
    train(recipe(changes | {"training.steps": 12}), tmp_path / "short", resume=True)
    train(recipe(changes | {"training.steps": 12}), tmp_path / "long")
    assert numbers(tmp_path / "short") == numbers(tmp_path / "long")


def test_accumulation_is_the_same_batch(finished, recipe, tmp_path):
    whole, _ = finished
    train(recipe({"training.accumulate": 2}), tmp_path / "parts")
    one, two = (read_metrics(folder / "metrics.csv") for folder in (whole, tmp_path / "parts"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_two_processes_give_the_same_losses(finished, recipe, tmp_path):
    whole, _ = finished
    train(recipe({"training.devices": 2}), tmp_path / "two")
    one, two = (read_metrics(folder / "metrics.csv") for folder in (whole, tmp_path / "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert str(a["held_out_bits_per_byte"])[:6] == str(b["held_out_bits_per_byte"])[:6]


def test_a_dead_process_ends_the_run(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match=r"exit code 1.*--resume"):
        train(recipe({"training.devices": 2}), tmp_path / "run")


def test_divergence_names_step_gradients_and_checkpoint(recipe, tmp_path):
    from tidegate.train import module

    changes = {"training.learning_rate": 1e30, "training.warmup": 0, "training.clip": 0, "training.checkpoint_every": 1}
    with pytest.raises(module.Diverged) as caught:
        train(recipe(changes), tmp_path / "run")
    text = str(caught.value)
    assert "training diverged at step 2" in text
    assert "the largest norms are" in text
    assert "one step before they were" in text
    assert "the last good checkpoint is" in text
    assert "step-00000001.safetensors" in text
    assert "\n" not in text


def test_early_stop_and_best_model(recipe, tmp_path):
    changes = {"training.evaluate_every": 2, "training.patience": 2, "training.learning_rate": 1e-12}
    changes |= {"training.steps": 200, "training.warmup": 200, "training.length": 8}
    result = train(recipe(changes), tmp_path / "run")
    # Steps this small change nothing that a float32 can hold, so nothing improves on the first evaluation.
    assert result.stopped_early
    assert result.step < 200
    again = train(recipe(changes), tmp_path / "run", resume=True)
    assert again.step == result.step


def test_bounds_are_restored_after_every_step(recipe, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Mixer, "constrain_", lambda mixer: seen.append(mixer.o_proj.weight.detach().clone()))
    train(recipe({"training.steps": 3}), tmp_path / "run")
    assert len(seen) == 3 * 2  # layers
    assert not torch.equal(seen[-1], seen[-3])
    assert torch.equal(seen[-1], load_file(tmp_path / "run" / "model.safetensors")["blocks.1.mixer.o_proj.weight"])


def test_folder_is_guarded(finished, recipe, tmp_path):
    whole, _ = finished
    with pytest.raises(ValueError, match=r"is not empty; name another folder, or continue .* --resume"):
        train(recipe(), whole)
    with pytest.raises(ValueError, match=r"model.dim: was 16 in .*recipe.yaml; a resumed run keeps its recipe"):
        train(recipe({"model.dim": 32}), whole, resume=True)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(recipe(), tmp_path / "nowhere", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, wanted a folder"):
        train(recipe(), tmp_path / "file")


def test_too_short_a_text_stops_before_anything_is_written(recipe, tmp_path):
    (tmp_path / "short.txt").write_text("The tide comes in. " * 9)
    changes = {"data.text": str(tmp_path / "short.txt"), "training.length": 512}
    with pytest.raises(ValueError, match=r"one row takes training.length \+ 1 = 513"):
        train(recipe(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_disk_is_an_error_and_leaves_earlier_files(recipe, tmp_path, monkeypatch):
    import errno

    from tidegate.train import checkpoint

    write = checkpoint.write_atomically

    def full(path, content):
        if "00000008" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(OSError, match=r"No space left on device: .*step-00000008"):
        train(recipe(), tmp_path / "run")
    monkeypatch.undo()
    assert checkpoint.newest_good(tmp_path / "run", print).name == "step-00000004.safetensors"


def test_bpe_run_reports_bits_per_byte(recipe, tmp_path):
    result = train(recipe({"data.tokenizer": "bpe", "data.vocab_size": 300}), tmp_path / "run")
    assert 0 < result.bits_per_byte < 9
    assert result.sample.startswith("the ")
