"""A survey from S4 to Mamba and Jamba: what a step of the ladder needs, fixed dynamics, selection, or attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.papers.ladder import (
    ATTENTION,
    CHOSEN,
    DELAY,
    DIFFERENCE,
    DSS,
    FAR,
    GROWTH,
    GSS,
    H3,
    HYBRID,
    HYENA,
    LEGT,
    LIQUID,
    LONGER,
    LRU,
    LSSL,
    MAMBA,
    MAMBA2,
    MANY,
    MORE,
    NEAR,
    NET,
    NO_POSITIONS,
    PLAIN,
    RANDOM,
    RECALL,
    RG_LRU,
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

RECURRENT = (LSSL, S4, S4D, DSS, S5, LRU, GSS, H3, LIQUID, MAMBA, MAMBA2, RG_LRU)  # a state of one size
SYSTEMS = (*RECURRENT, HYENA, HYBRID, ATTENTION)
HARD = (SELECTIVE, LONGER, RECALL, MANY)  # T3 to T5
PATIENT = f"{S4D}, 2x steps"


def memory(seed: int, situation: Situation) -> Measured:
    """T1: a matrix from HiPPO, an imitation of its spectrum, and a random one."""
    return climb(dict.fromkeys((S4D, LEGT, RANDOM), ("T1",)), seed, situation)


def selection_and_recall(seed: int, situation: Situation) -> Measured:
    """T2 to T5 for the systems that the claim names."""
    rungs = ("T3", "T4", "T5", "T5, 16 keys")
    one = {H3: ("T5",), NO_POSITIONS: ("T5, 16 keys",)}
    return climb({S4D: ("T2", *rungs), MAMBA: ("T2", *rungs), HYBRID: rungs, **one}, seed, situation)


def patience(seed: int, situation: Situation) -> Measured:
    """Does S4D only need more time?"""
    return climb({S4D: ("T3", "T5")}, seed, situation, times=2)


def _of(system: str, quantity: str) -> Callable[..., float]:
    return lambda n: n[system][quantity]


def _lead(system: str, other: str) -> Callable[..., float]:
    """Of the mean accuracies on T3 to T5."""
    return lambda n: statistics.fmean(n[system][name] - n[other][name] for name in HARD)


PAPER = Paper(
    slug="s4-survey",
    title="A Survey on Structured State Space Sequence (S4) Models",
    arxiv="2503.18970",
    systems=SYSTEMS,
    claim="Structured dynamics give a long memory; only dynamics that depend on the input choose what is kept, and at "
    "any length; attention beside them adds exact recall. So time-invariant < selective < hybrid in what is solved, "
    "and the reverse in what a step costs: the state of an SSM stays, the cache of attention grows.",
    threshold="Medians of 3 seeds. T1: the error of S4D and of LSSL with LegT is at most half of that with a random "
    "matrix. T2: S4D and Mamba at least 0.99. T3: Mamba at least 0.99, S4D at most 0.95. T4 at four times the length: "
    "Mamba at least 0.95, S4D at most 0.5. T5, 6 keys: H3 at least 0.98, S4D at most 0.65; on T3 and T5 S4D stays "
    "within its bounds with twice the steps, too (seed 0). T5, 16 keys: the hybrid at least 0.98, Mamba and "
    "attention without positions alone at most 0.6. Mean of T3 to T5: Mamba at least 0.1 above S4D, the hybrid at "
    "least 0.1 above Mamba. T6: the states of all SSMs keep their size; the hybrid's grows, attention's more; late "
    "over early, a step of attention takes at least 1.5 times what it is in the median of the SSMs.",
    experiments=(
        Experiment(
            name="T1: memory",
            about=f"{NET} {TASKS}",
            measure=memory,
            checks=(
                Check("error of S4D over random A", lambda n: n[S4D][DELAY] / n[RANDOM][DELAY], "<=", 0.5),
                Check("error of LegT over random A", lambda n: n[LEGT][DELAY] / n[RANDOM][DELAY], "<=", 0.5),
            ),
            draw=draw_table,
        ),
        Experiment(
            name="selection and recall",
            about="The systems that the claim names.",
            measure=selection_and_recall,
            checks=(
                Check("T2: S4D", _of(S4D, PLAIN), ">=", 0.99),
                Check("T2: Mamba", _of(MAMBA, PLAIN), ">=", 0.99),
                Check("T3: Mamba", _of(MAMBA, SELECTIVE), ">=", 0.99),
                Check("T3: S4D", _of(S4D, SELECTIVE), "<=", 0.95),
                Check("T4 at 128: Mamba", _of(MAMBA, LONGER), ">=", 0.95),
                Check("T4 at 128: S4D", _of(S4D, LONGER), "<=", 0.5),
                Check("T5, 6 keys: H3", _of(H3, RECALL), ">=", 0.98),
                Check("T5, 6 keys: S4D", _of(S4D, RECALL), "<=", 0.65),
                Check("T5, 16 keys: hybrid", _of(HYBRID, MANY), ">=", 0.98),
                Check("T5, 16 keys: Mamba", _of(MAMBA, MANY), "<=", 0.6),
                Check("T5, 16 keys: attention, no positions", _of(NO_POSITIONS, MANY), "<=", 0.6),
                Check("mean of T3 to T5: Mamba minus S4D", _lead(MAMBA, S4D), ">=", 0.1),
                Check("mean of T3 to T5: hybrid minus Mamba", _lead(HYBRID, MAMBA), ">=", 0.1),
            ),
            draw=draw_table,
        ),
        Experiment(
            name="patience",
            about="S4D with twice the steps, seed 0.",
            measure=patience,
            checks=(
                Check("T3: S4D, twice the steps", _of(PATIENT, SELECTIVE), "<=", 0.95),
                Check("T5, 6 keys: S4D, twice the steps", _of(PATIENT, RECALL), "<=", 0.65),
            ),
            draw=draw_table,
            seeded=False,
        ),
        table(
            SYSTEMS,
            "What the claim names has three seeds above; 16 keys were for some only.",
            dict.fromkeys((S4D, MAMBA, HYBRID, ATTENTION), ("T5, 16 keys",)),
        ),
        Experiment(
            name="T6: cost",
            about=f"No training. One row; a step after {FAR:,} tokens and after {NEAR}, median of 30 in turns; the "
            "state after the same; and 40 tokens one by one against the same in one call, relative to the largest "
            "output.",
            measure=lambda seed, situation: cost(SYSTEMS, situation),
            checks=(
                Check("growth of the state, most of the SSMs", lambda n: max(n[s][GROWTH] for s in RECURRENT), "<=", 1),
                Check("growth of the state: hybrid", _of(HYBRID, GROWTH), ">=", 4),
                Check(
                    "growth of the state: attention over hybrid",
                    lambda n: n[ATTENTION][GROWTH] / n[HYBRID][GROWTH],
                    ">",
                    1,
                ),
                Check(
                    "step, late over early: attention over the median of the SSMs",
                    lambda n: n[ATTENTION][MORE] / statistics.median(n[s][MORE] for s in RECURRENT),
                    ">=",
                    1.5,
                ),
                Check(
                    "step, late over early, most of the SSMs",
                    lambda n: max(n[s][MORE] for s in RECURRENT),
                    "<=",
                    1.3,
                    False,
                ),
                Check(
                    "whole against stepwise, largest",
                    lambda n: max(row[DIFFERENCE] for row in n.values()),
                    "<=",
                    1e-4,
                    False,
                ),
            ),
            draw=draw_cost,
            seeded=False,
        ),
    ),
    notes="The survey has no experiment of its own; these tasks are the ones that its systems were told apart by. "
    f"{CHOSEN} The hybrid is "
    "Jamba's in small: a Mamba with norms inside, then attention without positions, a dense MLP after each and no "
    "experts. That it is above Mamba is claimed of the mean, not of every task. The attention of the table has rotary "
    "positions. Patience was to be longer (2,000 steps for T5, and 1,000 for Mamba and attention alone with 16 "
    "keys) and was cut to fit the time. A system that misses a task here may learn it with more steps or "
    "another rate, and one seed of a table is one seed. The survey's language, speech and vision models are not "
    "trained here.",
)
