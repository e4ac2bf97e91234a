"""What happens beside the training step: held-out scores, early stop, logs, and the progress a person sees."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from tidegate.tasks.language.metrics import Score, evaluate
from tidegate.tasks.language.tokenizer import Tokenizer
from tidegate.train.metrics_file import MetricsFile
from tidegate.train.recipe import Recipe


class Evaluation(Callback):
    """Scores the held-out text every so many steps, keeps the best model on disk, and stops when nothing improves.

    The best score and its step are part of the checkpoint, so a resumed run stops where an uninterrupted one would.
    """

    def __init__(self, recipe: Recipe, stream: np.ndarray, tokenizer: Tokenizer, save_best: Callable[[], None]) -> None:
        self.recipe, self.stream, self.tokenizer, self.save_best = recipe, stream, tokenizer, save_best
        self.score: Score | None = None  # of this step, None if it was not evaluated
        self.latest = math.nan
        self.best, self.best_step = math.inf, 0
        self.stopped_early = False
        self._previous = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._previous = trainer.global_step
        self._stop_if_stuck(trainer)  # a run that had stopped early does not go on when it is resumed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, t = trainer.global_step, self.recipe.training
        self.score = None
        if step == self._previous or (step % t.evaluate_every and step != t.steps):
            return
        self._previous = step
        part = (trainer.global_rank, trainer.world_size)
        score = evaluate(pl_module.model, self.stream, self.tokenizer, part=part)  # type: ignore[arg-type]
        if trainer.world_size > 1:
            sums = torch.tensor([score.nats, score.tokens, score.bytes], dtype=torch.float64)
            torch.distributed.all_reduce(sums)
            score = Score(sums[0].item(), int(sums[1]), int(sums[2]))
        self.score, self.latest = score, score.bits_per_byte
        if not self.best_step or self.latest < self.best:
            self.best, self.best_step = self.latest, step
            if trainer.is_global_zero:
                self.save_best()
        self._stop_if_stuck(trainer)

    def _stop_if_stuck(self, trainer: Trainer) -> None:
        t = self.recipe.training
        if t.patience and trainer.global_step - self.best_step >= t.patience * t.evaluate_every:
            self.stopped_early = trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.latest = state_dict["latest"]


class Speed(Callback):
    """Tokens per second of the training steps alone: evaluation and saving are not counted, nor are the first steps."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens_per_second = math.nan
        self._begin, self._seconds, self._steps, self._step = 0.0, 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.recipe.training.accumulate == 0:
            self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._steps += 1
        if self._steps > 3:  # the first ones compile kernels
            t = self.recipe.training
            self._seconds += time.perf_counter() - self._begin
            self.tokens_per_second = (self._steps - 3) * t.batch_size * t.length / self._seconds


class Logs(Callback):
    """metrics.csv and TensorBoard, one row per optimiser step; stands after `Speed` and `Evaluation`."""

    def __init__(self, recipe: Recipe, folder: Path, speed: Speed, evaluation: Evaluation) -> None:
        self.recipe, self.folder, self.speed, self.evaluation = recipe, folder, speed, evaluation
        self._step = 0
        self._file: MetricsFile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._file = MetricsFile(self.folder / "metrics.csv", self._step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step, score = trainer.global_step, self.evaluation.score
        if step == self._step or (step % self.recipe.training.log_every and score is None):
            return
        self._step = step
        row: dict[str, float] = dict(pl_module.last)  # type: ignore[arg-type]
        if not math.isnan(self.speed.tokens_per_second):
            row["tokens_per_second"] = round(self.speed.tokens_per_second, 1)
        if score is not None:
            row.update(held_out_bits_per_byte=score.bits_per_byte, held_out_perplexity=score.perplexity)
        assert self._file is not None
        self._file.write(step=step, **row)
        for logger in trainer.loggers:
            logger.log_metrics(row, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class ProgressBar(Callback):
    """A rich bar with tokens per second and time left; plain lines where the output is no terminal."""

    def __init__(self, recipe: Recipe, speed: Speed, evaluation: Evaluation, console: Console | None) -> None:
        self.recipe, self.speed, self.evaluation, self.console = recipe, speed, evaluation, console
        self._bar: Progress | None = None
        self._task: Any = None
        self._mean = math.nan
        self._begin, self._first, self._said = 0.0, 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin, self._first = time.perf_counter(), trainer.global_step
        if self.console is not None and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                _Steps(),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}"),
                console=self.console,
                expand=True,
            )
            self._bar.start()
            steps = self.recipe.training.steps
            self._task = self._bar.add_task("train", total=steps, completed=self._first, said="compiling kernels ...")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._first or not pl_module.last:
            return
        bits = float(pl_module.last["bits_per_byte"])  # type: ignore[index]
        self._mean = bits if math.isnan(self._mean) else 0.9 * self._mean + 0.1 * bits
        if self._bar is not None:
            self._bar.update(self._task, completed=step, said=self._said_now(step))
        elif self.console is not None:
            now, t = time.perf_counter(), self.recipe.training
            if self.evaluation.score is not None or step in (self._first + 1, t.steps) or now - self._said > 15:
                self._said = now
                self.console.print(f"step {step}/{t.steps}  {self._said_now(step)}", soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _said_now(self, step: int) -> str:
        done, steps = step - self._first, self.recipe.training.steps
        left = (time.perf_counter() - self._begin) / done * (steps - step)
        held = f"  held out {self.evaluation.latest:.3f}" if not math.isnan(self.evaluation.latest) else ""
        speed = self.speed.tokens_per_second
        rate = f"{speed:,.0f} tokens/s  " if not math.isnan(speed) else ""
        return f"train {self._mean:.3f}{held} bits/byte  {rate}{timedelta(seconds=round(left))} left"


class _Steps(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total)}")


def warn(text: str) -> None:
    """A warning on standard error, in one line."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
