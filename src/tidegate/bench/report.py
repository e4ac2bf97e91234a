"""What was measured, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.bench.roofline import Rates, Roof
from tidegate.bench.timing import Timing


@dataclass(frozen=True)
class Measurement:
    """One op, mixer or model at one length, batch and number of threads.

    `rates` are the machine's ceilings in the same rounds; the roofs, None where nothing was counted, hold the two
    timings against them. `memory` is the peak of the training call in bytes, None where it was not measured.
    """

    name: str
    length: int
    tokens: int
    forward: Timing
    training: Timing
    batch: int = 1
    threads: int = 1
    rates: Rates | None = None
    forward_roof: Roof | None = None
    training_roof: Roof | None = None
    parameters: int = 0
    memory: int | None = None

    @property
    def forward_per_token(self) -> float:
        """Seconds of the forward per token."""
        return self.forward.median / self.tokens

    @property
    def training_per_token(self) -> float:
        """Seconds of forward and backward per token."""
        return self.training.median / self.tokens

    @property
    def setting(self) -> tuple[int, int]:
        """Batch and threads: only within one setting does time against length mean something."""
        return self.batch, self.threads


@dataclass(frozen=True)
class Decode:
    """One mixer's time for a single token after `context` tokens, and the size of the state it carries by then.

    `compiled` is the time of its `compile_step`, or None if it has none.
    """

    name: str
    context: int
    step: Timing
    compiled: Timing | None
    state_bytes: int
    batch: int = 1
    threads: int = 1

    @property
    def setting(self) -> tuple[int, int]:
        """Batch and threads."""
        return self.batch, self.threads

    @property
    def best(self) -> float:
        """Seconds of a token: compiled, where that is to be had."""
        return (self.compiled or self.step).median


def flatness(measurements: Sequence[Measurement]) -> dict[str, float]:
    """For every name, the cost per token at its longest length over that at its shortest (forward and backward).

    With several settings, the worst of them.
    """
    found: dict[str, float] = {}
    for name, setting in dict.fromkeys((m.name, m.setting) for m in measurements):
        own = sorted((m for m in measurements if (m.name, m.setting) == (name, setting)), key=lambda m: m.length)
        if len(own) > 1:
            found[name] = max(found.get(name, 0.0), own[-1].training_per_token / own[0].training_per_token)
    return found


def peers(measurements: Sequence[Measurement], peer: str) -> list[Measurement | None]:
    """For each measurement that of `peer` at the same length and setting, None where there is none."""
    known = {(m.length, m.setting): m for m in measurements if m.name == peer}
    return [known.get((m.length, m.setting)) for m in measurements]


def write_json(path: Path, results: Sequence[Measurement | Decode], about: Mapping[str, Any]) -> None:
    """Write `about` (machine, options) and all results; the file appears whole or not at all."""
    from tidegate.state import write_atomically

    content = {**about, "results": [dataclasses.asdict(result) for result in results]}
    write_atomically(path, json.dumps(content, indent=2).encode())


def write_lengths(
    path: Path, measurements: Sequence[Measurement], title: str, training: str = "forward and backward"
) -> None:
    """A picture of the time per token against the length, forward beside `training`, on logarithmic axes.

    A row of panels for each batch and number of threads.
    """
    settings = list(dict.fromkeys(m.setting for m in measurements))
    names = list(dict.fromkeys(m.name for m in measurements))
    figure, panels = _figure(2, len(settings), len(names))
    for row, setting in zip(panels, settings, strict=True):
        for panel, phase in zip(row, ("forward", training), strict=True):
            for index, name in enumerate(names):
                own = [m for m in measurements if (m.name, m.setting) == (name, setting)]
                seconds = [m.forward_per_token if phase == "forward" else m.training_per_token for m in own]
                panel.plot([m.length for m in own], [1e9 * s for s in seconds], label=name, **_style(index))
            ticks = sorted({m.length for m in measurements})
            _label(panel, phase + _which(setting, settings), "length T (tokens)", "time per token (ns)", ticks)
    _legend(panels[0][-1], len(names))
    figure.suptitle(title)
    _save(figure, path)


def _which(setting: tuple[int, int], settings: Sequence[tuple[int, int]]) -> str:
    return f", B = {setting[0]}, threads: {setting[1]}" if len(settings) > 1 else ""


def _style(index: int) -> dict[str, Any]:
    """Ten colours; the second ten lines are dashed, then dotted, then both."""
    kind = index // 10 % 4
    return {
        "color": f"C{index % 10}",
        "linestyle": ("-", "--", ":", "-.")[kind],
        "marker": "os^v"[kind],
        "markersize": 3,
    }


def _legend(panel: Any, names: int) -> None:
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, ncols=_columns(names))


def _columns(names: int) -> int:
    """Columns of a legend beside one row of panels."""
    return -(-names // 16)


def write_decode(path: Path, results: Sequence[Decode], title: str) -> None:
    """A picture of the time for one token against the number of tokens before it; a row for each setting."""
    settings = list(dict.fromkeys(r.setting for r in results))
    names = list(dict.fromkeys(r.name for r in results))
    figure, panels = _figure(1, len(settings), len(names))
    for (panel,), setting in zip(panels, settings, strict=True):
        for index, name in enumerate(names):
            own = [r for r in results if (r.name, r.setting) == (name, setting)]
            panel.plot([r.context for r in own], [1e6 * r.best for r in own], label=name, **_style(index))
        contexts = sorted({r.context for r in results})
        named = _which(setting, settings).removeprefix(", ")
        _label(panel, named, "tokens before this one", "time for one token (µs)", contexts)
    _legend(panels[0][0], len(names))
    figure.suptitle(title)
    _save(figure, path)


def _figure(columns: int, rows: int, names: int) -> tuple[Any, list[list[Any]]]:
    # The figure object itself, not pyplot: no window system is asked for, no global state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * _columns(names) + 4.5 * columns, 0.5 + 4 * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, sharey=True, squeeze=False)]


def _label(panel: Any, title: str, x: str, y: str, ticks: Sequence[int]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    panel.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    panel.minorticks_off()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a picture may span less than a factor of ten
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.grid(alpha=0.3, which="both")


def _save(figure: Any, path: Path) -> None:
    import io

    from tidegate.state import write_atomically

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(path, content.getvalue())
