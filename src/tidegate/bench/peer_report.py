"""The comparison with peers as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.bench.peers import Row


def seconds(value: float) -> str:
    """A time to three digits.

    >>> seconds(0.00123), seconds(12.3)
    ('1.23 ms', '12.3 s')
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1 or unit == "us":
            return f"{value * factor:#.3g} {unit}".replace(". ", " ")
    raise AssertionError


def cells(row: Row) -> list[str]:
    """A row as text, in the order of HEAD."""
    amount = (lambda x: f"{x / 1e6:,.0f} MB") if row.phase == "memory" else seconds
    where = [str(row.threads), str(row.batch), f"{row.length:,}", str(row.dim or "")]
    error = "" if row.error is None else f"{row.error:.0e}"
    start = [row.function, row.peer, row.phase, *where, error]
    if row.ours is None or row.theirs is None or row.ratio is None:
        return [*start, *[""] * 5, row.note]
    ratio = f"{row.ratio:.3g}" if row.ratio < 100 else f"{row.ratio:.0f}"
    aim = "" if row.target is None else f"{row.target:g}" + ("" if row.reached else " missed")
    spread = f"{row.ours.spread:.0%} {row.theirs.spread:.0%}"
    return [*start, amount(row.ours.seconds), amount(row.theirs.seconds), ratio, aim, spread, row.note]


HEAD = (
    *("function", "peer", "phase", "threads", "B", "T", "D", "error"),
    *("ours", "theirs", "ratio", "aim", "spread", "note"),
)
LEFT = ("function", "peer", "phase", "note")


def show(rows: Sequence[Row], about: Mapping[str, Any], console: Any) -> None:
    """Print all rows, and what is missing; a line is as wide as it has to be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="theirs over ours: the same inputs and outputs, in turns", box=None)
    for name in HEAD:
        wide = name == "note"  # it alone may take several lines
        table.add_column(
            name, justify="left" if name in LEFT else "right", no_wrap=not wide, max_width=60 if wide else None
        )
    for row in rows:
        style = "red" if row.reached is False else "dim" if row.ratio is None else ""
        table.add_row(*(Text(cell) for cell in cells(row)), style=style)
    Console(width=max(console.width, 240)).print(table)
    for name, why in about["missing"].items():
        console.print(Text(f"without {name}: {why}"), soft_wrap=True)


def write(folder: Path, name: str, content: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write `name`.json, `name`.md (a table to paste) and `name`.png into `folder`, each whole or not at all."""
    from tidegate.state import write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(content, indent=2).encode())
    lines = [HEAD, ["---"] * len(HEAD), *(cells(row) for row in rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_atomically(folder / f"{name}.md", text.encode())
    picture(folder / f"{name}.png", rows)


def picture(path: Path, rows: Sequence[Row]) -> None:
    """A dot per comparison, theirs over ours on a logarithmic axis, one panel per phase; a bar marks the aim."""
    import io

    from matplotlib.figure import Figure

    from tidegate.state import write_atomically

    compared = [row for row in rows if row.ratio is not None]
    phases = [phase for phase in ("forward", "training", "decode", "memory") if any(r.phase == phase for r in compared)]
    if not phases:
        return
    names = {phase: _names(compared, phase) for phase in phases}
    tallest = max(len(found) for found in names.values())
    figure = Figure(figsize=(8 * len(phases), 1.5 + 0.3 * tallest), layout="constrained")
    for panel, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
        for row in (row for row in compared if row.phase == phase):
            height = names[phase][f"{row.function}\n{row.peer}"]
            filled = {"markerfacecolor": "none"} if row.threads > 1 else {}
            panel.plot(row.ratio, height, "s" if row.batch > 1 else "o", color=_colour(row.length), **filled)
            if row.target:
                panel.plot([row.target] * 2, [height - 0.4, height + 0.4], color="0.6", linewidth=1)
        panel.axvline(1, color="0.3", linewidth=1)
        labels = [name.replace("\n", "  ") for name in names[phase]]
        panel.set_yticks(list(names[phase].values()), labels, fontsize=8)
        panel.set(title=phase, xlabel="theirs / ours", xscale="log")
        panel.invert_yaxis()
        panel.grid(alpha=0.3, axis="x", which="both")
    figure.suptitle(
        "Right of 1 tidegate is faster; short bar: the aim. Circle: B = 1, square: more; hollow: several threads; "
        "light: T <= 512, dark: longer",
        fontsize=9,
    )
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_atomically(path, content.getvalue())


def _names(rows: Sequence[Row], phase: str) -> dict[str, int]:
    found = dict.fromkeys(f"{row.function}\n{row.peer}" for row in sorted(rows, key=_order) if row.phase == phase)
    return {name: height for height, name in enumerate(found)}


def _order(row: Row) -> tuple[int, str]:
    return ("op", "layer", "decode").index(row.function.split("/")[0]), row.function


def _colour(length: int) -> str:
    return "tab:cyan" if length <= 512 else "tab:blue"
