"""metrics.csv and the picture drawn from it."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from tidegate.state import write_atomically

COLUMNS = (
    "step",
    "loss",
    "bits_per_byte",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "held_out_bits_per_byte",
    "held_out_perplexity",
)


class MetricsFile:
    """A CSV that grows by one row per step. Opened at step n, it forgets the rows after n: they will come again."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.is_file() and step else []
        head = io.StringIO()
        writer = csv.DictWriter(head, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in kept:
            cells = {name: value for name, value in row.items() if not math.isnan(value)}
            writer.writerow({**cells, "step": int(row["step"])})
        write_atomically(path, head.getvalue().encode())
        self._file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115  (closed by `close`)
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, **values: float) -> None:
        """Append one row; what is not given stays empty."""
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        """Close the file; further rows are an error."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, empty cells as NaN; a last line cut short by a crash is left out."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


def draw_losses(rows: list[dict[str, float]], path: Path, title: str, baseline: tuple[str, float] | None) -> None:
    """Bits per byte against steps: training (thin: every step; thick: its running mean) and held out, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display, and leaves the user's own matplotlib backend alone
    axes = figure.add_subplot()
    train = [(row["step"], row["bits_per_byte"]) for row in rows if not math.isnan(row["bits_per_byte"])]
    held = [(row["step"], row["held_out_bits_per_byte"]) for row in rows if row["held_out_bits_per_byte"] > 0]
    if train:
        steps, bits = zip(*train, strict=True)
        axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.7)
        axes.plot(steps, _running_mean(bits, 0.95), color="tab:blue", label="training text")
    if held:
        axes.plot(*zip(*held, strict=True), color="tab:orange", marker="o", label="held-out text")
    if baseline is not None:
        name, value = baseline
        axes.axhline(value, color="tab:gray", linestyle="--", label=f"{name}: {value:.3f}")
    shown = [value for _, value in held] + [value for _, value in train[len(train) // 20 :]]
    if shown:  # the first steps, at eight bits, would flatten the rest
        low, high = min(shown), max([*shown, baseline[1] if baseline else 0.0])
        axes.set_ylim(max(0.0, low - 0.1 * (high - low) - 0.02), high + 0.1 * (high - low) + 0.02)
    axes.set(xlabel="optimiser step", ylabel="bits per byte (lower is better)", title=title)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _running_mean(values: tuple[float, ...], keep: float) -> list[float]:
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result
