"""A survey from S4 to Mamba and Jamba: what a step of the ladder needs, fixed dynamics, selection, or attention."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.papers.ladder import (
    ATTENTION,
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
    MAMBA4,
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

RECURRENT = (LSSL, S4, S4D, DSS, S5, LRU, GSS, H3, LIQUID, MAMBA, MAMBA4, MAMBA2, RG_LRU)  # a state of one size
SYSTEMS = (*RECURRENT, HYENA, HYBRID, ATTENTION)
HARD = (SELECTIVE, LONGER, RECALL, MANY)  # T3 to T5
PATIENT = "{}, 2x steps".format


def memory(seed: int, situation: Situation) -> Measured:
    """T1: a matrix from HiPPO, an imitation of its spectrum, and a random one."""
    return climb(dict.fromkeys((S4D, LEGT, RANDOM), ("T1",)), seed, situation)


def selection_and_recall(seed: int, situation: Situation) -> Measured:
    """T2 to T5 for the systems that the claim names; what is to fail gets twice the steps where its bound decides."""
    rungs = ["T3", "T4", "T5", "T5, 16 keys"]
    systems = {S4D: ["T2", *rungs], MAMBA4: rungs, HYBRID: rungs, MAMBA: ["T2", "T3", "T4"], H3: ["T5"]}
    patient = {S4D: ["T3", "T5"], MAMBA4: ["T5, 16 keys"], NO_POSITIONS: ["T5, 16 keys"]}
    once, twice = climb(systems, seed, situation), climb(patient, seed, situation, times=2)
    return Measured(once.numbers | twice.numbers)


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
    "matrix. T2: S4D and Mamba 0.99. T3: Mamba at least 0.99, S4D at most 0.95 with twice the steps. T4 at four times "
    "the length: Mamba at least 0.95, S4D at most 0.5. T5: H3 at least 0.98 with 6 keys, S4D at most 0.65 with twice "
    "the steps; with 16 keys the hybrid at least 0.98, Mamba and attention without positions, alone and with twice "
    "the steps, at most 0.6. Mean of T3 to T5: Mamba at least 0.1 above S4D, the hybrid at least 0.1 above Mamba (both "
    "N 4). T6: the states of all SSMs keep their size; the hybrid's grows, attention's more; a late step of attention "
    "over an early one takes at least 1.5 times what the same is in the median of the SSMs.",
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
            name="T2 to T5",
            about="The systems that the claim names. What has to stay below a bound also had twice the steps.",
            measure=selection_and_recall,
            checks=(
                Check("T2: S4D", _of(S4D, PLAIN), ">=", 0.99),
                Check("T2: Mamba", _of(MAMBA, PLAIN), ">=", 0.99),
                Check("T3: Mamba", _of(MAMBA, SELECTIVE), ">=", 0.99),
                Check("T3: S4D, twice the steps", _of(PATIENT(S4D), SELECTIVE), "<=", 0.95),
                Check("T4 at 128: Mamba", _of(MAMBA, LONGER), ">=", 0.95),
                Check("T4 at 128: S4D", _of(S4D, LONGER), "<=", 0.5),
                Check("T5, 6 keys: H3", _of(H3, RECALL), ">=", 0.98),
                Check("T5, 6 keys: S4D, twice the steps", _of(PATIENT(S4D), RECALL), "<=", 0.65),
                Check("T5, 16 keys: hybrid", _of(HYBRID, MANY), ">=", 0.98),
                Check("T5, 16 keys: Mamba N 4, twice the steps", _of(PATIENT(MAMBA4), MANY), "<=", 0.6),
                Check(
                    "T5, 16 keys: attention without positions, twice the steps",
                    _of(PATIENT(NO_POSITIONS), MANY),
                    "<=",
                    0.6,
                ),
                Check("mean of T3 to T5: Mamba N 4 minus S4D", _lead(MAMBA4, S4D), ">=", 0.1),
                Check("mean of T3 to T5: hybrid minus Mamba N 4", _lead(HYBRID, MAMBA4), ">=", 0.1),
            ),
            draw=draw_table,
        ),
        table(SYSTEMS, "What the claim names has three seeds above."),
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
    notes="",
)
