"""One process's share of a training run: Lightning's loop with our data, checkpoints and callbacks."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from tidegate.tasks.language.data import Corpus
from tidegate.tasks.language.metrics import shortened
from tidegate.train.callbacks import Evaluation, Logs, ProgressBar, Speed
from tidegate.train.checkpoint import Checkpoints, SafeCheckpointIO
from tidegate.train.data import LanguageData
from tidegate.train.module import LanguageModule
from tidegate.train.processes import LocalProcesses, Place
from tidegate.train.recipe import Recipe


@dataclass(frozen=True)
class Fitted:
    """What is known when the last step is done."""

    step: int
    first_step: int  # 0, or that of the checkpoint
    tokens_per_second: float
    stopped_early: bool
    best_step: int


def fit(
    recipe: Recipe, folder: Path, corpus: Corpus, place: Place, checkpoint: Path | None, console: Console | None
) -> Fitted:
    """Train from `checkpoint` (None: from the start) to the last step; rank 0 writes into `folder`."""
    t = recipe.training
    model = recipe.build_model(corpus.tokenizer.vocab_size)
    module = LanguageModule(recipe, model, corpus.tokenizer, folder)
    data = LanguageData(recipe, corpus)
    held_out = shortened(corpus.held_out, t.evaluate_tokens, corpus.tokenizer.boundary)
    speed = Speed(recipe)
    evaluation = Evaluation(recipe, held_out, corpus.tokenizer, lambda: model.save(folder))
    callbacks: list[pl.Callback] = [speed, evaluation]
    loggers: list[Any] = []
    if place.rank == 0:
        callbacks += [Logs(recipe, folder, speed, evaluation), ProgressBar(recipe, speed, evaluation, console)]
        loggers = [TensorBoardLogger(folder, name="tensorboard", version="")]
    callbacks.append(Checkpoints(folder, t.checkpoint_every))
    ddp = DDPStrategy(
        cluster_environment=LocalProcesses(place), process_group_backend="gloo", checkpoint_io=SafeCheckpointIO()
    )
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu" if place.world > 1 else "auto",
            devices=t.devices,
            strategy=ddp if place.world > 1 else "auto",
            plugins=[] if place.world > 1 else [SafeCheckpointIO()],
            precision="bf16-mixed" if t.precision == "bfloat16" else "32-true",
            max_steps=t.steps,
            max_epochs=-1,  # the data is one endless epoch; passes over the text are the rows' own affair
            limit_val_batches=0,
            accumulate_grad_batches=t.accumulate,
            gradient_clip_val=t.clip or None,
            callbacks=callbacks,
            logger=loggers or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        with _interruptible():
            try:
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            except RuntimeError as error:
                if checkpoint is None or "state_dict" not in str(error):
                    raise
                raise ValueError(
                    f"{folder / 'recipe.yaml'}: does not describe the model in {checkpoint.name}; restore the recipe "
                    "that the run was started with"
                ) from None
    return Fitted(
        trainer.global_step, data.first_step, speed.tokens_per_second, evaluation.stopped_early, evaluation.best_step
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning answers Ctrl-C with `exit(1)` and ignores the next one; we want it to stay what it is."""
    main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if main_thread and handler is not None:
            signal.signal(signal.SIGINT, handler)


class _quiet:
    """Lightning's advice about devices, loaders and loggers is not addressed to our user."""

    def __enter__(self) -> None:
        self._loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", module="lightning.*")
        warnings.filterwarnings("ignore", message=".*lightning.*")

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)
