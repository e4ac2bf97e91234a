"""Trained at one length, scored at others: what papers on state tracking have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tidegate.papers.experiment import Measured, Situation, thin
from tidegate.tasks.fit import fit
from tidegate.tasks.score import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[[int, torch.Generator, int], tuple[Tensor, Tensor]]  # rows, generator, length -> inputs, targets
BATCH, ROWS = 64, 512


def extrapolate(
    label: str,
    model: nn.Module,
    draw: Draw,
    lengths: Sequence[int],
    seed: int,
    situation: Situation,
    *,
    steps: int,
    **options: Any,
) -> tuple[dict[str, float], list[float]]:
    """Train at the first of `lengths` and score at all, on fresh rows: accuracies "at LENGTH", and the loss curve.

    `options` are those of `tasks.fit`; the rate falls along a cosine.
    """
    steps, batch, rows = (2, 4, 4) if situation.smoke else (steps, BATCH, ROWS)
    train, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)

    def say(step: int, loss: float) -> None:
        situation.say(f"{label}: step {step} of {steps}, loss {loss:.3f}")

    def fresh() -> tuple[Tensor, Tensor]:
        return draw(batch, train, lengths[0])

    curve = thin(fit(model, fresh, steps=steps, schedule="cosine", say=say, **options))
    numbers = {f"at {length}": score(model, [draw(rows, test, length)])["accuracy"] for length in lengths}
    situation.note(f"{label}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    return numbers, curve


def draw_accuracies(panel: Axes, measured: Sequence[Measured], chance: float) -> None:
    """A group of bars per system, one bar per length: the mean over seeds, and a dot for each."""
    systems = list(measured[0].numbers)
    names = list(measured[0].numbers[systems[0]])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, system in enumerate(systems):
            values = [m.numbers[system][name] for m in measured]
            x = place + (index - (len(names) - 1) / 2) * width
            label = None if place else f"{name}{' (as trained)' if index == 0 else ''}"
            panel.bar(x, sum(values) / len(values), width, color=f"C{index}", alpha=0.5, label=label)
            panel.plot([x] * len(values), values, "o", color=f"C{index}", markersize=4)
    panel.axhline(chance, color="C7", linestyle=":", label="chance")
    panel.set_xticks(range(len(systems)), [system.replace(" [", "\n[") for system in systems], fontsize=8)
    panel.set(ylabel="accuracy", ylim=(0, 1.05))
    panel.legend(fontsize=8)
