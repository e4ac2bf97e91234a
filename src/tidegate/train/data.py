"""The training rows as Lightning wants them: an endless iterable that can begin at any step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor

from tidegate.tasks.language.data import Corpus, Rows
from tidegate.train.recipe import Recipe


class Batches:
    """Micro-batches from `step` on. Row numbers follow from the step alone, whoever asks and however often."""

    def __init__(self, rows: Rows, recipe: Recipe, step: int, rank: int, world: int) -> None:
        self.rows, self.recipe, self.step, self.rank, self.world = rows, recipe, step, rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        t = self.recipe.training
        size = t.batch_size // (self.world * t.accumulate)
        step = self.step
        while True:
            for part in range(t.accumulate):
                first = step * t.batch_size + (part * self.world + self.rank) * size
                yield self.rows.batch(first, size)
            step += 1


class LanguageData(LightningDataModule):
    """The corpus of a run. Its place in the data is the step, which comes back from the checkpoint."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        super().__init__()
        self.recipe, self.corpus = recipe, corpus
        self.rows = Rows(corpus.train, recipe.training.length, corpus.tokenizer.boundary, recipe.seed)
        self.first_step = 0

    def train_dataloader(self) -> Batches:
        assert self.trainer is not None
        return Batches(self.rows, self.recipe, self.first_step, self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first_step = state_dict["step"]
