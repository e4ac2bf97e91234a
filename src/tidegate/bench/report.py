"""What was measured, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.bench.timing import Timing


@dataclass(frozen=True)
class Measurement:
    """One op or mixer at one length. `reached` are shares of `ceiling` (per second), None where none was counted."""

    name: str
    length: int
    tokens: int
    forward: Timing
    training: Timing
    bound: str = ""
    ceiling: float | None = None
    reached: float | None = None
    reached_training: float | None = None

    @property
    def forward_per_token(self) -> float:
        """Seconds of the forward per token."""
        return self.forward.median / self.tokens

    @property
    def training_per_token(self) -> float:
        """Seconds of forward and backward per token."""
        return self.training.median / self.tokens


@dataclass(frozen=True)
class Decode:
    """One mixer's time for a single token after `context` tokens, and the size of the state it carries by then."""

    name: str
    context: int
    step: Timing
    state_bytes: int


def flatness(measurements: Sequence[Measurement]) -> dict[str, float]:
    """For every name, the cost per token at its longest length over that at its shortest (forward and backward)."""
    found = {}
    for name in dict.fromkeys(m.name for m in measurements):
        ordered = sorted((m for m in measurements if m.name == name), key=lambda m: m.length)
        if len(ordered) > 1:
            found[name] = ordered[-1].training_per_token / ordered[0].training_per_token
    return found


def write_json(path: Path, results: Sequence[Measurement | Decode], about: Mapping[str, Any]) -> None:
    """Write `about` (machine, options) and all results; the file appears whole or not at all."""
    from tidegate.state import write_atomically

    content = {**about, "results": [dataclasses.asdict(result) for result in results]}
    write_atomically(path, json.dumps(content, indent=2).encode())


def write_lengths(path: Path, measurements: Sequence[Measurement], title: str) -> None:
    """A picture of the time per token against the length, forward beside forward and backward, on logarithmic axes."""
    figure, panels = _figure(2)
    for panel, phase in zip(panels, ("forward", "forward and backward"), strict=True):
        for index, name in enumerate(dict.fromkeys(m.name for m in measurements)):
            own = [m for m in measurements if m.name == name]
            seconds = [m.forward_per_token if phase == "forward" else m.training_per_token for m in own]
            panel.plot([m.length for m in own], [1e9 * s for s in seconds], label=name, **_style(index))
        _label(panel, phase, "length T (tokens)", "time per token (ns)", sorted({m.length for m in measurements}))
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _style(index: int) -> dict[str, Any]:
    """Ten colours; the second ten lines are dashed."""
    dashed = index >= 10
    return {
        "color": f"C{index % 10}",
        "linestyle": "--" if dashed else "-",
        "marker": "s" if dashed else "o",
        "markersize": 3,
    }


def write_decode(path: Path, results: Sequence[Decode], title: str) -> None:
    """A picture of the time for one token against the number of tokens before it."""
    figure, panels = _figure(1)
    for index, name in enumerate(dict.fromkeys(r.name for r in results)):
        own = [r for r in results if r.name == name]
        panels[0].plot([r.context for r in own], [1e6 * r.step.median for r in own], label=name, **_style(index))
    contexts = sorted({r.context for r in results})
    _label(panels[0], "", "tokens before this one", "time for one token (µs)", contexts)
    panels[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _figure(panels: int) -> tuple[Any, list[Any]]:
    # The figure object itself, not pyplot: no window system is asked for, no global state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.5 * panels, 4.5), layout="constrained")
    return figure, list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])


def _label(panel: Any, title: str, x: str, y: str, ticks: Sequence[int]) -> None:
    panel.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    panel.minorticks_off()
    panel.grid(alpha=0.3, which="both")


def _save(figure: Any, path: Path) -> None:
    import io

    from tidegate.state import write_atomically

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
