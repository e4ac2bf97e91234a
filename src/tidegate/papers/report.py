"""A reproduction on disk: results.json (everything), results.md (for people) and results.png."""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tidegate import __version__
from tidegate.papers.experiment import Measured, Paper
from tidegate.state import write_atomically


def surroundings() -> dict[str, Any]:
    """Versions and machine: what numbers depend on beside the seeds."""
    return {
        "tidegate": __version__,
        **{name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy")},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write(folder: Path, paper: Paper, record: Mapping[str, Any], measured: list[list[Measured]], command: str) -> None:
    """Write the three files into `folder`; each appears whole or not at all."""
    finished = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = _finite({**record, "command": command, "finished": finished, "machine": surroundings()})
    write_atomically(folder / "results.png", picture(paper, measured))
    write_atomically(folder / "results.md", markdown(whole).encode())
    write_atomically(folder / "results.json", json.dumps(whole, indent=1, allow_nan=False).encode())


def read(folder: Path) -> dict[str, Any] | None:
    """The record that `write` left, or None if there is none.

    Raises ValueError for a damaged file, naming it.
    """
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"paper", "verdict", "seeds", "finished"} <= record.keys():
            raise ValueError("not all entries are there")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a record of `tidegate reproduce` ({error}); remove it or run again") from None
    return record


def picture(paper: Paper, measured: list[list[Measured]]) -> bytes:
    """A PNG with a panel per experiment."""
    from matplotlib.figure import Figure

    count = len(paper.experiments)
    figure = Figure(figsize=(1 + 4.6 * count, 4.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, experiment, seen in zip(panels, paper.experiments, measured, strict=True):
        panel.set_title(experiment.name, fontsize=11)
        experiment.draw(panel, seen)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{paper.title} (arXiv {paper.arxiv})", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def markdown(record: Mapping[str, Any]) -> str:
    """The report: claim, verdict, a table of numbers and one of checks per experiment."""
    lines = [f"# {record['title']}", "", f"arXiv [{record['arxiv']}](https://arxiv.org/abs/{record['arxiv']})", ""]
    verdict = f"**{record['verdict']}** ({record['reason']})" if record["verdict"] else f"none: {record['reason']}"
    lines += [f"**Claim.** {record['claim']}", "", f"**Threshold.** {record['threshold']}", ""]
    lines += [f"**Verdict.** {verdict}", "", "![What was measured](results.png)", ""]
    for experiment in record["experiments"]:
        name = experiment["name"]
        lines += [f"## {name[:1].upper()}{name[1:]}", "", experiment["about"], ""]
        lines += [*_numbers(experiment), ""]
        lines += [] if record["smoke"] or not experiment["checks"] else [*_checks(experiment), ""]
    if record["notes"]:
        lines += ["## Notes", "", record["notes"], ""]
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    seeds = ", ".join(map(str, record["seeds"]))
    lines += ["## How", "", f"`{record['command']}`, seeds {seeds}, {duration(record['seconds'])}, {machine};"]
    lines += [f"finished {record['finished']}. All numbers, by seed: results.json.", ""]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Whole minutes and seconds.

    >>> duration(75.4), duration(3.2)
    ('1 min 15 s', '3.2 s')
    """
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def number(value: float | None) -> str:
    """Three significant digits, of large numbers all before the point.

    >>> number(0.123456), number(41.26), number(197184.0), number(None)
    ('0.123', '41.3', '197,184', 'not finite')
    """
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _numbers(experiment: Mapping[str, Any]) -> list[str]:
    """System by quantity: the median over seeds, and the range if there are several."""
    quantities = list(dict.fromkeys(name for row in experiment["medians"].values() for name in row))
    lines = _head(["", *quantities])
    for system, row in experiment["medians"].items():
        cells = []
        for name in quantities:
            seen = [m["numbers"][system].get(name) for m in experiment["measured"]] if name in row else []
            several = len(seen) > 1 and None not in seen
            cells.append(f"{number(row[name])}{_range(seen) if several else ''}" if name in row else "")
        lines.append(_row([system, *cells]))
    return lines


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return f" ({low} to {high})" if low != high else ""


def _checks(experiment: Mapping[str, Any]) -> list[str]:
    lines = _head(["check", "bound", "of the medians", "by seed", "met"])
    for check in experiment["checks"]:
        text = check["text"] if check["deciding"] else f"{check['text']} (reported, not deciding)"
        by_seed = ", ".join(map(number, check["values"]))
        bound = f"{check['relation']} {check['bound']:g}"
        lines.append(_row([text, bound, number(check["median"]), by_seed, "yes" if check["met"] else "no"]))
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|" + " --- |" * len(cells)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _finite(value: Any) -> Any:
    """The same tree with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
