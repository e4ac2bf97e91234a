"""Papers: one file per paper, its central claim as an experiment that runs on a laptop.

A file in this folder is a paper if it has a `PAPER` (see `experiment.py`); its slug is the name for the command line.

>>> "gla" in papers()
True
"""

from __future__ import annotations

import importlib
import pkgutil

from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.registry import did_you_mean

__all__ = ["Check", "Experiment", "Measured", "Paper", "Situation", "paper", "papers"]


def papers() -> dict[str, Paper]:
    """All papers by slug."""
    found: dict[str, Paper] = {}
    for file in pkgutil.iter_modules(__path__):
        declared = getattr(importlib.import_module(f"{__name__}.{file.name}"), "PAPER", None)
        if declared is None:
            continue
        if declared.slug in found:
            raise ValueError(f"slug: {declared.slug!r} is declared by two files in tidegate/papers")
        found[declared.slug] = declared
    return found


def paper(slug: str) -> Paper:
    """The paper of that slug. Raises ValueError naming the closest one."""
    known = papers()
    if slug not in known:
        hint = did_you_mean(slug, known)
        raise ValueError(f"paper: there is no {slug!r}{hint}; `tidegate reproduce --list` shows all")
    return known[slug]
