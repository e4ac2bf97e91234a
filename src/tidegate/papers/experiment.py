"""The frame of a reproduction: what a paper declares, how it is run, and how a verdict follows from what was measured.

A paper has experiments. An experiment measures numbers, by system and quantity, once per seed; its checks compare them
with a bound that was fixed beforehand. The verdict is over the deciding checks of all experiments:

- holds: the medians over seeds meet every check, and so do at least three quarters of the seeds on their own;
- does not hold: the medians miss a check, and so do at least three quarters of the seeds;
- inconclusive: anything between, fewer than three seeds, or a number that is not finite.
"""

from __future__ import annotations

import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOLDS, FAILS, INCONCLUSIVE = "holds", "does not hold", "inconclusive"
FEWEST_SEEDS = 3
AGREEMENT = 0.75  # of the seeds must be on the side of the medians

Numbers = dict[str, dict[str, float]]  # system -> quantity -> value
RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">=": operator.ge,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Situation:
    """What an experiment is told about the run: whether it only has to show that it works, and whom to tell."""

    smoke: bool = False
    say: Callable[[str], None] = lambda text: None  # where it is just now
    note: Callable[[str], None] = lambda text: None  # a result, worth a line


@dataclass(frozen=True)
class Measured:
    """What one seed gave. `curves` (system -> values) are for the picture and the record, not for checks."""

    numbers: Numbers
    curves: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, systems: Iterable[str], measure: Callable[[str], tuple[dict[str, float], list[float]]]) -> Measured:
        """Every system measured in turn; `measure(system)` gives its numbers and its curve."""
        numbers, curves = {}, {}
        for system in systems:
            numbers[system], curves[system] = measure(system)
        return cls(numbers, curves)


@dataclass(frozen=True)
class Check:
    """`measure(numbers) relation bound`. One that is not `deciding` is reported and does not touch the verdict."""

    text: str
    measure: Callable[[Mapping[str, Mapping[str, float]]], float]
    relation: str
    bound: float
    deciding: bool = True

    def met(self, value: float) -> bool:
        """Whether `value` is on the claimed side of the bound; NaN never is."""
        return RELATIONS[self.relation](value, self.bound)


@dataclass(frozen=True)
class Experiment:
    """`measure(seed, situation)` is called for every seed, or once with seed 0 if nothing in it is random."""

    name: str
    about: str
    measure: Callable[[int, Situation], Measured]
    checks: tuple[Check, ...]
    draw: Callable[[Axes, Sequence[Measured]], None]
    seeded: bool = True


@dataclass(frozen=True)
class Paper:
    """A paper's central claim, and how it is tried here."""

    slug: str
    title: str
    arxiv: str
    systems: tuple[str, ...]
    claim: str
    threshold: str
    experiments: tuple[Experiment, ...]
    notes: str = ""  # what was left open by the paper and chosen here, what is not tried


def run(paper: Paper, seeds: int, situation: Situation) -> tuple[dict[str, Any], list[list[Measured]]]:
    """Run all experiments of a paper. Gives the record, plain numbers and text, and what the picture is drawn from."""
    if seeds < 1:
        raise ValueError(f"seeds: seen {seeds}, wanted at least 1")
    begin, records, all_measured = time.perf_counter(), [], []
    for experiment in paper.experiments:
        measured, seconds = [], []
        for seed in range(seeds if experiment.seeded else 1):
            started = time.perf_counter()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                measured.append(experiment.measure(seed, situation))
            seconds.append(round(time.perf_counter() - started, 1))
        records.append(_record(experiment, measured, seconds))
        all_measured.append(measured)
    verdict, reason = (None, "a smoke run has no verdict") if situation.smoke else judge(records, seeds)
    record = {
        "paper": paper.slug,
        "title": paper.title,
        "arxiv": paper.arxiv,
        "systems": list(paper.systems),
        "claim": paper.claim,
        "threshold": paper.threshold,
        "notes": paper.notes,
        "verdict": verdict,
        "reason": reason,
        "smoke": situation.smoke,
        "seeds": list(range(seeds)),
        "seconds": round(time.perf_counter() - begin, 1),
        "experiments": records,
    }
    return record, all_measured


def judge(records: Sequence[Mapping[str, Any]], seeds: int) -> tuple[str, str]:
    """The verdict of the module's docstring, and its reason in one sentence.

    >>> def record(median, *values):
    ...     check = dict(deciding=True, median=median, values=values, met=median < 1, met_by=[v < 1 for v in values])
    ...     return dict(seeded=True, checks=[check])
    >>> judge([record(0.5, 0.4, 0.5, 0.6)], 3)[0], judge([record(0.5, 0.4, 0.5, 1.6)], 3)[0]
    ('holds', 'inconclusive')
    >>> judge([record(2.0, 1.5, 2.0, 2.5)], 3)[0], judge([record(2.0, 2.0)], 1)[0]
    ('does not hold', 'inconclusive')
    """
    checks = [(record, check) for record in records for check in record["checks"] if check["deciding"]]
    values = [value for _, check in checks for value in (check["median"], *check["values"])]
    if any(value is None or not math.isfinite(value) for value in values):
        return INCONCLUSIVE, "a number is missing or not finite"
    met = all(check["met"] for _, check in checks)
    by_seed = [
        all(check["met_by"][seed if record["seeded"] else 0] for record, check in checks) for seed in range(seeds)
    ]
    agreeing = sum(seed == met for seed in by_seed)
    count = f"the medians {'meet every' if met else 'miss a'} deciding check, {agreeing} of {seeds} seeds agree"
    if seeds < FEWEST_SEEDS:
        return INCONCLUSIVE, f"{count}; a verdict takes at least {FEWEST_SEEDS} seeds"
    if agreeing < AGREEMENT * seeds:
        return INCONCLUSIVE, f"{count}; a verdict takes {AGREEMENT:.0%} of them"
    return (HOLDS if met else FAILS), count


def thin(losses: Sequence[float], every: int = 10) -> list[float]:
    """Means over `every` steps: a curve that is smooth enough to draw and small enough to keep.

    >>> thin([1.0, 2.0, 3.0, 4.0, 9.0], every=2)
    [1.5, 3.5, 9.0]
    """
    return [round(statistics.fmean(losses[at : at + every]), 4) for at in range(0, len(losses), every)]


def medians(measured: Sequence[Measured]) -> Numbers:
    """The median of every number over seeds; NaN if one is not finite."""

    def median(values: list[float]) -> float:
        return statistics.median(values) if all(map(math.isfinite, values)) else math.nan

    return {
        system: {name: median([m.numbers[system][name] for m in measured]) for name in quantities}
        for system, quantities in measured[0].numbers.items()
    }


def _record(experiment: Experiment, measured: Sequence[Measured], seconds: list[float]) -> dict[str, Any]:
    middle = medians(measured)
    checks = []
    for check in experiment.checks:
        value, values = check.measure(middle), [check.measure(m.numbers) for m in measured]
        checks.append(
            {
                "text": check.text,
                "relation": check.relation,
                "bound": check.bound,
                "deciding": check.deciding,
                "median": value,
                "values": values,
                "met": check.met(value),
                "met_by": [check.met(v) for v in values],
            }
        )
    return {
        "name": experiment.name,
        "about": experiment.about,
        "seeded": experiment.seeded,
        "medians": middle,
        "checks": checks,
        "measured": [
            {"seed": seed, "seconds": s, "numbers": m.numbers, "curves": m.curves}
            for seed, (m, s) in enumerate(zip(measured, seconds, strict=True))
        ],
    }
