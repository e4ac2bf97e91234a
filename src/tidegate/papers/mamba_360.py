"""Mamba-360's three families on the ladder: structured state spaces, gated ones, recurrent nets made linear."""

from __future__ import annotations

from collections.abc import Callable

from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.papers.ladder import (
    CHOSEN,
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
RECURRENT = (LRU, RETNET, RWKV7)  # of whom something is claimed
OTHERS = (H3, MAMBA, *RECURRENT)


def families(seed: int, situation: Situation) -> Measured:
    """What each family is said to be best at, with those that stand for it."""
    rungs: dict[str, tuple[str, ...]] = {system: ("T1",) for system in (S4D, LEGT, *OTHERS)}
    rungs |= {system: ("T1", "T3", "T4") for system in (S4D, MAMBA)}
    rungs |= {system: ("T1", "T2") for system in RECURRENT}
    return climb(rungs, seed, situation)


def _of(system: str, quantity: str) -> Callable[..., float]:
    return lambda n: n[system][quantity]


def _largest(quantity: str) -> Callable[..., float]:
    """Of the recurrent ones."""
    return lambda n: max(n[system][quantity] for system in FAMILIES["recurrent"])


PAPER = Paper(
    slug="mamba-360",
    title="Mamba-360: Survey of State Space Models as Transformer Alternative",
    arxiv="2404.16112",
    systems=SYSTEMS,
    claim="The three families have different strengths: structured state space models remember signals best, gated "
    "ones choose what they keep, recurrent ones copy with a step whose cost does not grow.",
    threshold="Medians of 3 seeds. T1: the larger error of S4D and LSSL with LegT is below the smallest of H3, Mamba, "
    "LRU, RetNet and RWKV-7. T2: LRU, RetNet and RWKV-7 have at least 0.99. T3: Mamba at least 0.99, S4D at most 0.95. "
    "T4 at four times the length: Mamba at least 0.95, S4D at most 0.5. T6: the states of the recurrent systems keep "
    "their size; for all systems, 40 calls and one call differ by at most 1e-4.",
    experiments=(
        Experiment(
            name="three families",
            about=f"{NET} {TASKS}",
            measure=families,
            checks=(
                Check(
                    "T1: larger error of S4D and LegT over the smallest of the others",
                    lambda n: max(n[s][DELAY] for s in (S4D, LEGT)) / min(n[s][DELAY] for s in OTHERS),
                    "<",
                    1.0,
                ),
                Check("T2: LRU", _of(LRU, PLAIN), ">=", 0.99),
                Check("T2: RetNet", _of(RETNET, PLAIN), ">=", 0.99),
                Check("T2: RWKV-7", _of(RWKV7, PLAIN), ">=", 0.99),
                Check("T3: Mamba", _of(MAMBA, SELECTIVE), ">=", 0.99),
                Check("T3: S4D", _of(S4D, SELECTIVE), "<=", 0.95),
                Check("T4 at 128: Mamba", _of(MAMBA, LONGER), ">=", 0.95),
                Check("T4 at 128: S4D", _of(S4D, LONGER), "<=", 0.5),
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
                    _largest(GROWTH),
                    "<=",
                    1,
                ),
                Check(
                    "step, late over early, most of the recurrent",
                    _largest(MORE),
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
    notes=f"The survey has no experiment of its own. {CHOSEN} RWKV-7 stands where the survey has RWKV-4, which is not "
    "among the mixers here; it decides by the input what it keeps, which RWKV-4 does not, and so does HGRN. So nothing "
    "is claimed of the recurrent family on T3 and T4. GSS and H3 gate what a time-invariant state space model gives; "
    "of the gating family only Mamba is selective and stands for it on these two. H3 has a structural one inside, "
    "which is why it remembers signals. GAU is attention, with a state that grows; as it is by default, with squared "
    "ReLU, it leaves no plateau in these steps. Mega is not among the mixers. What this paper and s4-survey both ask "
    "for was trained once, in one process that ran both; alone it takes longer. The survey's own tables (Long Range "
    "Arena, ImageNet, forecasting) are not tried here.",
)
