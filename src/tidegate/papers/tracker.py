"""The least net around one layer that has to track a state: parity, learnt at 40 bits and scored at 160."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tidegate.papers.experiment import Situation
from tidegate.papers.extrapolation import extrapolate
from tidegate.state import State
from tidegate.tasks import state_tracking

LENGTHS = (40, 160)


class Tracker(nn.Module):
    """Two embedded bits, one mixer, LayerNorm, MLP of twice the width, two logits: `logits, state = model(ids)`."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.embedding, self.mixer = nn.Embedding(2, dim), mixer
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, 2))

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.mixer(self.embedding(ids), state)
        return self.head(y), state


def track(
    label: str, model: nn.Module, seed: int, situation: Situation, *, lr: float, steps: int = 400
) -> tuple[dict[str, float], list[float]]:
    """Accuracies "at 40" and "at 160" after training at 40 with a label at every position, and the loss curve."""

    def draw(rows: int, generator: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        return state_tracking.parity(rows, generator, length=length)

    return extrapolate(label, model, draw, LENGTHS, seed, situation, steps=steps, lr=lr, weight_decay=1e-4)
