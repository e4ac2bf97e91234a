"""The ladder: one small net with any mixer in it, on one row of synthetic tasks. What papers that survey compare by.

| rung | task | what it asks for |
| --- | --- | --- |
| T1 | a signal, delayed by 32 of 128 samples | a long, even memory of what is continuous |
| T2 | copying, tokens at fixed places | memory for tokens |
| T3 | copying, tokens strewn over the gap | choosing what is kept: selection |
| T4 | induction at 32, scored at 32 and 128 | choosing, at any length |
| T5 | associative recall, 6 keys, or 16 | finding by content |
| T6 | none; time and state of a step | cost |
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from tidegate.models.sequence import SequenceModel
from tidegate.papers.experiment import Experiment, Measured, Situation, medians
from tidegate.tasks.copying import copying, selective_copying
from tidegate.tasks.fit import Batch, fit
from tidegate.tasks.recall import associative_recall, induction, segment_recall
from tidegate.tasks.score import score
from tidegate.tasks.signals import delay
from tidegate.tasks.targets import check_sizes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIM, BUDGET = 32, 28_000  # parameters of the whole net: the feed-forward part is as wide as they allow
LONGEST = 128  # of all rows

# -- the systems -------------------------------------------------------------------------------------------------------
LSSL, LEGT, RANDOM = "LSSL", "LSSL, LegT", "LSSL, random A"
S4, S4D, DSS, S5, HYENA = "S4", "S4D", "DSS", "S5", "Hyena"
LRU, RETNET, HGRN, LIQUID, RWKV7 = "LRU", "RetNet", "HGRN", "Liquid-S4", "RWKV-7"
GSS, H3, GAU = "GSS", "H3", "GAU"
MAMBA, MAMBA2, RG_LRU = "Mamba", "Mamba-2", "RG-LRU"
HYBRID, ATTENTION, NO_POSITIONS = "Mamba + attention", "attention", "attention, no positions"

_LSSL = {"state_dim": 16, "output": "glu"}
_NO_POSITIONS = ("attention", {"rope_theta": None})
# system -> one layer, which stands twice, or both
LAYERS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    LSSL: [("lssl", _LSSL)],
    LEGT: [("lssl", {**_LSSL, "measure": "legt"})],
    RANDOM: [("lssl", {**_LSSL, "measure": "random"})],
    S4: [("s4", {"state_dim": 16})],
    S4D: [("s4d", {"state_dim": 16})],
    DSS: [("dss", {"state_dim": 16, "length": LONGEST})],
    S5: [("s5", {"state_dim": 32})],
    HYENA: [("hyena", {"filter_order": 16, "max_length": LONGEST})],
    LRU: [("lru", {})],
    RETNET: [("retnet", {})],
    HGRN: [("hgrn", {})],
    LIQUID: [("liquid-s4", {"state_dim": 16})],
    RWKV7: [("rwkv7", {"head_dim": 16})],
    GSS: [("gss", {"state_dim": 16})],
    H3: [("h3", {"state_dim": 16, "shift_dim": 16, "head_dim": 4})],
    GAU: [("gated-attention-unit", {"key_dim": 16})],
    MAMBA: [("mamba", {})],
    MAMBA2: [("mamba2", {"state_dim": 16, "head_dim": 16})],
    RG_LRU: [("rg-lru", {})],
    HYBRID: [("mamba", {"use_bcdt_norm": True}), _NO_POSITIONS],
    ATTENTION: [("attention", {})],
    NO_POSITIONS: [_NO_POSITIONS],
}


def build(system: str, **ends: int) -> SequenceModel:
    """Two blocks of D 32, each a mixer and a GELU MLP that is as wide as the budget of parameters allows.

    `ends` are the inputs and outputs of a `SequenceModel`.
    """
    return _net(system, _width(system, tuple(ends.items())), ends)


def _net(system: str, width: int, ends: Mapping[str, Any]) -> SequenceModel:
    layers = LAYERS[system] * (2 // len(LAYERS[system]))
    return SequenceModel(DIM, layers, feed_forward="gelu", feed_forward_dim=width, **ends)


@functools.cache
def _width(system: str, ends: tuple[tuple[str, int], ...]) -> int:
    with torch.random.fork_rng(devices=[]):
        least, more = (_net(system, width, dict(ends)).num_parameters for width in (1, 2))
    return max(1, 1 + round((BUDGET - least) / (more - least)))


# -- the rungs ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rung:
    """A task, how long it is trained, and the lengths or sizes it is scored at: quantity -> generator of rows."""

    ends: Mapping[str, int]  # of the net
    draw: Callable[[int, Generator], Batch]
    scored: Mapping[str, Callable[[int, Generator], Batch]]
    batch: int = 32
    steps: int = 500
    lr: float = 8e-3


def _rung(quantity: str, draw: Callable[[int, Generator], Batch], ends: Mapping[str, int], **options: Any) -> Rung:
    return Rung(ends, draw, {quantity: draw}, **options)


def _delay(rows: int, generator: Generator) -> Batch:
    return delay(rows, generator, length=LONGEST, lag=32, dt=1e-3, freq=120)


def _plain(rows: int, generator: Generator) -> Batch:
    return copying(rows, generator, gap=28, tokens=4, vocab_size=8)


def _selective(rows: int, generator: Generator) -> Batch:
    return selective_copying(rows, generator, gap=28, tokens=4, vocab_size=8)


def _induction(rows: int, generator: Generator, length: int = 32) -> Batch:
    return induction(rows, generator, vocab_size=8, length=length)


def _six_keys(rows: int, generator: Generator) -> Batch:
    return associative_recall(rows, generator, keys=6, values=6, pairs=12)


def _sixteen_keys(rows: int, generator: Generator) -> Batch:
    return segment_recall(rows, generator, length=65, keys=16, values=16, pairs=(32,))


DELAY, PLAIN, SELECTIVE = "T1 delay (nmse)", "T2 copying", "T3 selective copying"
INDUCTION, LONGER, RECALL, MANY = "T4 induction", "T4 at 4x length", "T5 recall, 6 keys", "T5 recall, 16 keys"
_TOKENS = {"vocab_size": 8, "outputs": 8}
RUNGS: dict[str, Rung] = {
    "T1": _rung(DELAY, _delay, {"features": 1, "outputs": 1}, batch=16, steps=150),
    "T2": _rung(PLAIN, _plain, _TOKENS, steps=800, lr=5e-3),
    "T3": _rung(SELECTIVE, _selective, _TOKENS, steps=800, lr=5e-3),
    "T4": Rung(
        _TOKENS,
        _induction,
        {INDUCTION: _induction, LONGER: functools.partial(_induction, length=128)},
        batch=64,
        steps=200,
    ),
    "T5": _rung(RECALL, _six_keys, {"vocab_size": 13, "outputs": 13}, batch=64, lr=5e-3),
    "T5, 16 keys": _rung(MANY, _sixteen_keys, {"vocab_size": 33, "outputs": 33}, steps=800, lr=3e-3),
}
TASKS = (
    "T1: a white signal without anything above 120 Hz (128 samples, 1 ms), to be given back 32 samples later; batch "
    "16, 150 steps. T2: 4 of 6 kinds of token, a gap of 28, 4 marks on which to write them; 800 steps. T3: the same "
    "tokens strewn over the gap; 800 steps. T4: one special token among 7 kinds, at the end once more: what followed "
    "it? Rows of 32, scored at 32 and 128; batch 64, 200 steps. T5: 12 pairs with repetition of 6 keys and 6 values, "
    "fresh for every row, and one question; 500 steps; or 32 pairs of 16 keys and 16 values, where every return of a "
    "key is a question; 800 steps. Batch 32 (T5 with 6 keys: 64) where nothing is said; AdamW 8e-3 for T1 and T4, 3e-3 "
    "for 16 keys, else 5e-3, without decay, warm-up 50, cosine, clip 1; scored on 512 fresh rows."
)
CHOSEN = (
    "Steps, batches and rates of T1, T4 and T5 with 6 keys were chosen in trials with seed 0 of S4D, Mamba, H3 and a "
    "hybrid with N 4. The bounds on single tasks from T2 to T5 were given before these trials, all others after them "
    "and before the runs. This is the second run. In the first, T2 and 16 keys had 400 steps and T3 600, fewer than "
    "the 800 for which the bounds were meant, and Mamba missed T3 with 0.975, the hybrid 16 keys with 0.971; trials of "
    "more steps with seeds 1 and 2 then chose these. "
    "One rate is for all parameters, also where papers have a lower one for the dynamics. Sizes: N 16 "
    "(LRU and S5 have 32 states for all channels), heads of 16 in Mamba-2 and RWKV-7, heads of 4 in H3, filters of 16 "
    "units in Hyena, keys of 16 in GAU. The time of a step depends on the machine and on who else uses it."
)
NET = (
    "Two blocks of D 32, each RMSNorm, mixer, RMSNorm and a GELU MLP. It is the mixer that differs; the MLP is as wide "
    "as 28,000 parameters of the whole net allow, which all systems meet within 1%."
)


_TRAINED: dict[tuple[Any, ...], dict[str, float]] = {}  # what two experiments of a process ask for is trained once


def train(system: str, rung: str, seed: int, situation: Situation, times: int = 1) -> dict[str, float]:
    """One system on one task, for `times` its steps: what it scores, by quantity."""
    check_sizes(times=times)
    asked = (system, rung, seed, times, situation.smoke)
    if asked not in _TRAINED:
        _TRAINED[asked] = _train(system, rung, seed, situation, times)
    return _TRAINED[asked]


def _train(system: str, rung: str, seed: int, situation: Situation, times: int) -> dict[str, float]:
    task = RUNGS[rung]
    steps, batch, rows = (1, 2, 2) if situation.smoke else (times * task.steps, task.batch, 512)
    torch.manual_seed(seed)
    model = build(system, **task.ends)
    generator = Generator().manual_seed(seed)
    label = f"{rung}, seed {seed}, {system}"

    def say(step: int, loss: float) -> None:
        situation.say(f"{label}: step {step} of {steps}, loss {loss:.3f}")

    fit(model, lambda: task.draw(batch, generator), steps=steps, lr=task.lr, schedule="cosine", say=say)
    numbers = {}
    for quantity, draw in task.scored.items():
        seen = score(model, [draw(rows, Generator().manual_seed(10_000 + seed))])
        numbers[quantity] = seen["nmse" if "nmse" in seen else "accuracy"]
    situation.note(f"{label}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    return numbers


def climb(systems: Mapping[str, Iterable[str]], seed: int, situation: Situation, times: int = 1) -> Measured:
    """Every system on its rungs; with `times` the steps, which its name then says."""
    numbers = {}
    for system, rungs in systems.items():
        name = system if times == 1 else f"{system}, {times}x steps"
        numbers[name] = {k: v for rung in rungs for k, v in train(system, rung, seed, situation, times).items()}
    return Measured(numbers)


def table(systems: Sequence[str], about: str, more: Mapping[str, Sequence[str]] | None = None) -> Experiment:
    """All systems on T1 to T5 with 6 keys, some on `more`, with seed 0: shown, and nothing is decided by it."""

    def measure(seed: int, situation: Situation) -> Measured:
        rungs = ("T4",) if situation.smoke else ("T1", "T2", "T3", "T4", "T5")
        return climb({system: (*rungs, *(more or {}).get(system, ())) for system in systems}, seed, situation)

    return Experiment("the ladder", f"All systems, seed 0. {about}", measure, (), draw_table, seeded=False)


# -- T6: cost ----------------------------------------------------------------------------------------------------------
NEAR, FAR, PIECE = 256, 8192, 256
EARLY, LATE, MORE = f"step at {NEAR} (ms)", f"step at {FAR} (ms)", "step, late over early"
STATE, GROWTH, DIFFERENCE = "state (bytes)", "state, late over early", "whole against stepwise"


def cost(systems: Sequence[str], situation: Situation) -> Measured:
    """A step's time and the state's size, early and late; and how far 40 steps are from the same 40 in one call."""
    near, far, piece, turns = (8, 16, 8, 2) if situation.smoke else (NEAR, FAR, PIECE, 31)
    numbers: dict[str, dict[str, float]] = {}
    states: dict[tuple[str, str], Any] = {}
    times: dict[tuple[str, str], list[float]] = {}
    models = {}
    for system in systems:
        torch.manual_seed(0)
        model = models[system] = build(system, **_TOKENS).eval()
        ids = torch.randint(8, (1, far))
        state = None
        with torch.no_grad():
            for begin in range(0, far, piece):
                _, state = model(ids[:, begin : begin + piece], state)
                if begin + piece == near:
                    states[system, EARLY] = state
        states[system, LATE] = state
        sizes = [states[system, when].nbytes for when in (EARLY, LATE)]
        numbers[system] = {
            "parameters": float(model.num_parameters),
            STATE: float(sizes[0]),
            GROWTH: sizes[1] / sizes[0],
            DIFFERENCE: stepwise_difference(model, ids[:, :40]),
        }
        situation.say(f"cost: {system}")
    ids = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        for turn in range(turns):  # in turns, so that a busy moment of the machine hits all alike
            for (system, when), state in states.items():
                begin_time = time.perf_counter()
                models[system](ids, state)
                if turn:  # the first is for compiling
                    times.setdefault((system, when), []).append(1e3 * (time.perf_counter() - begin_time))
    for (system, when), seen in times.items():
        numbers[system][when] = statistics.median(seen)
    for system in systems:
        numbers[system][MORE] = numbers[system][LATE] / numbers[system][EARLY]
    situation.note("cost: measured")
    return Measured(numbers)


@torch.no_grad()
def stepwise_difference(model: SequenceModel, ids: Tensor) -> float:
    """The largest difference between one call and a call per token, relative to the largest output."""
    whole, state, steps = model(ids)[0], None, []
    for token in ids.split(1, 1):
        y, state = model(token, state)
        steps.append(y)
    return ((whole - torch.cat(steps, 1)).abs().max() / whole.abs().max()).item()


# -- pictures ----------------------------------------------------------------------------------------------------------
_NARROW = {DELAY: "T1", PLAIN: "T2", SELECTIVE: "T3", INDUCTION: "T4", LONGER: "T4\n4x", RECALL: "T5", MANY: "T5\n16"}


def draw_table(panel: Axes, measured: Sequence[Measured]) -> None:
    """System by task, medians over seeds; dark is good. For T1 it is what is left of the variance."""
    numbers = medians(measured)
    quantities = [name for name in _NARROW if any(name in row for row in numbers.values())]
    nan = float("nan")
    values = [[row.get(name, nan) for name in quantities] for row in numbers.values()]
    colours = [
        [1 - min(value, 1) if name == DELAY else value for name, value in zip(quantities, row, strict=True)]
        for row in values
    ]
    panel.imshow(colours, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", zorder=2)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):  # not every system is on every rung
                dark = colours[y][x] > 0.75
                panel.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, zorder=3, color="w" if dark else "k"
                )
    panel.set_axisbelow(True)
    panel.set_xticks(range(len(quantities)), [_NARROW[name] for name in quantities], fontsize=8)
    panel.set_yticks(range(len(numbers)), list(numbers), fontsize=7)


def draw_cost(panel: Axes, measured: Sequence[Measured]) -> None:
    """The time of a step late in a sequence over that early in it, and the same for the state."""
    numbers = measured[0].numbers
    places = range(len(numbers))
    for offset, (name, label) in enumerate([(MORE, "time of a step"), (GROWTH, "bytes of the state")]):
        values = [row[name] for row in numbers.values()]
        panel.barh([place + 0.4 * offset - 0.2 for place in places], values, 0.4, color=f"C{offset}", label=label)
    panel.set_yticks(places, list(numbers), fontsize=7)
    panel.set(xscale="log", xlabel=f"after {FAR:,} tokens over after {NEAR}")
    panel.invert_yaxis()
    panel.legend(fontsize=8)
