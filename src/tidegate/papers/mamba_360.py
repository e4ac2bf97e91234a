"""Mamba-360's three families on the ladder: structured state spaces, gated ones, recurrent nets made linear."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.papers.ladder import (
    DELAY,
    DIFFERENCE,
    DSS,
    FAR,
    GAU,
    GROWTH,
    GSS,
    H3,
    HGRN,
    HYENA,
    LEGT,
    LIQUID,
    LONGER,
    LRU,
    MAMBA,
    MORE,
    NEAR,
    NET,
    PLAIN,
    RETNET,
    RWKV7,
    S4,
    S4D,
    S5,
    SELECTIVE,
    TASKS,
    climb,
    cost,
    draw_cost,
    draw_table,
    table,
)

FAMILIES = {
    "structural": (S4, S4D, DSS, S5, HYENA),
    "gating": (GSS, H3, MAMBA, GAU),
    "recurrent": (LRU, RETNET, HGRN, LIQUID, RWKV7),
}
SYSTEMS = tuple(system for family in FAMILIES.values() for system in family)
STRUCTURAL, GATING, RECURRENT = (S4D, LEGT), (H3, MAMBA), (LRU, RETNET, RWKV7)  # of whom something is claimed
DECIDING = (*STRUCTURAL, *GATING, *RECURRENT)


def families(seed: int, situation: Situation) -> Measured:
    """T1 to T4 for two or three of each family."""
    return climb(dict.fromkeys(DECIDING, ("T1", "T2", "T3", "T4")), seed, situation)


def _best(systems: tuple[str, ...], quantity: str) -> Callable[..., float]:
    return lambda n: max(n[system][quantity] for system in systems)


def _lead(quantity: str) -> Callable[..., float]:
    return lambda n: max(n[s][quantity] for s in GATING) - max(n[s][quantity] for s in STRUCTURAL)


PAPER = Paper(
    slug="mamba-360",
    title="Mamba-360: Survey of State Space Models as Transformer Alternative",
    arxiv="2404.16112",
    systems=SYSTEMS,
    claim="The three families have different strengths: structured state space models remember signals best, gated "
    "ones choose what they keep, recurrent ones copy with a step whose cost does not grow.",
    threshold="Medians of 3 seeds. T1: the larger error of S4D and LSSL with LegT is below the smallest of H3, Mamba, "
    "LRU, RetNet and RWKV-7. T3: the better of H3 and Mamba has at least 0.99, and at least 0.05 more than the better "
    "of S4D and LegT; T4 at four times the length: at least 0.95, and 0.45 more. T2: LRU, RetNet and RWKV-7 at least "
    "0.99; T6: their states keep their size. T6: for all systems, 40 calls and one call differ by at most 1e-4.",
    experiments=(
        Experiment(
            name="T1 to T4",
            about=f"{NET} {TASKS}",
            measure=families,
            checks=(
                Check(
                    "T1: larger structural error over the smallest of the others",
                    lambda n: max(n[s][DELAY] for s in STRUCTURAL) / min(n[s][DELAY] for s in (*GATING, *RECURRENT)),
                    "<",
                    1.0,
                ),
                Check("T2: least of LRU, RetNet, RWKV-7", lambda n: min(n[s][PLAIN] for s in RECURRENT), ">=", 0.99),
                Check("T3: best gating", _best(GATING, SELECTIVE), ">=", 0.99),
                Check("T3: best gating minus best structural", _lead(SELECTIVE), ">=", 0.05),
                Check("T4 at 128: best gating", _best(GATING, LONGER), ">=", 0.95),
                Check("T4 at 128: best gating minus best structural", _lead(LONGER), ">=", 0.45),
                Check("T3: best recurrent (no claim)", _best(RECURRENT, SELECTIVE), "<=", 0.95, deciding=False),
            ),
            draw=draw_table,
        ),
        table(
            SYSTEMS,
            "In the order of the families: " + "; ".join(f"{k}: {', '.join(v)}" for k, v in FAMILIES.items()) + ".",
        ),
        Experiment(
            name="T6: cost",
            about=f"No training. One row; a step after {FAR:,} tokens and after {NEAR}, median of 30 in turns; the "
            "state after the same; and 40 tokens one by one against the same in one call, relative to the largest "
            "output.",
            measure=lambda seed, situation: cost(SYSTEMS, situation),
            checks=(
                Check(
                    "growth of the state, most of the recurrent",
                    lambda n: max(n[s][GROWTH] for s in FAMILIES["recurrent"]),
                    "<=",
                    1,
                ),
                Check(
                    "step, late over early, most of the recurrent",
                    lambda n: max(n[s][MORE] for s in FAMILIES["recurrent"]),
                    "<=",
                    1.3,
                    False,
                ),
                Check(
                    "whole against stepwise, largest", lambda n: max(row[DIFFERENCE] for row in n.values()), "<=", 1e-4
                ),
            ),
            draw=draw_cost,
            seeded=False,
        ),
    ),
    notes="",
)
