"""DeltaProduct: two reflections per token track S3 beyond the training length; one cannot, nor two shrinkings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tidegate.models.sequence import SequenceModel
from tidegate.ops import delta_rule
from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation
from tidegate.papers.extrapolation import draw_accuracies, extrapolate
from tidegate.tasks.state_tracking import group_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# system -> number of Householder factors per token, and whether their eigenvalues reach down to -1
TWO, ONE, TWO_POSITIVE = "n=2 [-1,1]", "n=1 [-1,1]", "n=2 [0,1]"
SYSTEMS = {TWO: (2, True), ONE: (1, True), TWO_POSITIVE: (2, False)}
LENGTHS = (16, 64)


# -- words in S3 -------------------------------------------------------------------------------------------------------
def words(seed: int, situation: Situation) -> Measured:
    """Train every system on the same words of 16 elements; score on words of 16 and of 64."""
    return Measured.of(SYSTEMS, lambda system: _words_of(system, seed, situation))


def _words_of(system: str, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    num_steps, negative = SYSTEMS[system]
    torch.manual_seed(seed)
    options = {"num_steps": num_steps, "num_heads": 4, "conv_width": None, "negative_eigenvalues": negative}
    model = SequenceModel(64, [("deltaproduct", options)], vocab_size=8, outputs=6, feed_forward_dim=128)

    def draw(rows: int, generator: torch.Generator, length: int) -> tuple[Tensor, Tensor]:
        return group_words(rows, generator, group="S3", length=length)

    label = f"words in S3, seed {seed}, {system}"
    return extrapolate(label, model, draw, LENGTHS, seed, situation, steps=700, lr=3e-3, weight_decay=1e-6)


# -- the price of a factor ---------------------------------------------------------------------------------------------
def price(seed: int, situation: Situation) -> Measured:
    """Forward and backward of the op with one and with two factors per token, and of a step loop with two, in turns."""
    forms: dict[str, Callable[[], None]] = {
        "n=1": _pass(delta_rule, 1, situation),
        "n=2": _pass(delta_rule, 2, situation),
        "n=2, step loop": _pass(step_loop, 2, situation),
    }
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(2 if situation.smoke else 12):  # in turns, so that a busy moment of the machine hits all alike
        for name, form in forms.items():
            begin = time.perf_counter()
            form()
            if turn:  # the first is for compiling
                times[name].append(1e3 * (time.perf_counter() - begin))
    situation.note("price of a factor: measured")
    return Measured({name: {"forward and backward (ms)": statistics.median(each)} for name, each in times.items()})


def step_loop(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, a token and a factor at a time. Shapes as `ops.delta_rule` with several steps per token."""
    state, outputs = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        for j in range(k.shape[2]):
            key = k[:, t, j, :, :, None]
            change = v[:, t, j, :, None] - (key * state).sum(-2, keepdim=True)
            state = state + beta[:, t, j, :, None, None] * key * change
        outputs.append((q[:, t, :, :, None] * state).sum(-2))
    return torch.stack(outputs, 1), state


def _pass(form: Callable[..., tuple[Tensor, Tensor]], steps: int, situation: Situation) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    batch, length, heads, dim = (1, 16, 2, 8) if situation.smoke else (4, 512, 4, 32)
    normal = partial(torch.randn, generator=generator)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    q, v = unit(normal(batch, length, heads, dim)), normal(batch, length, steps, heads, dim)
    k, beta = (
        unit(normal(batch, length, steps, heads, dim)),
        2 * torch.rand(batch, length, steps, heads, generator=generator),
    )
    inputs = [x.requires_grad_() for x in (q, k, v, beta)]

    def once() -> None:
        torch.autograd.grad(form(*inputs)[0].sum(), inputs)

    return once


def draw_price(panel: Axes, measured: Sequence[Measured]) -> None:
    """Milliseconds of each form."""
    names = list(measured[0].numbers)
    values = [measured[0].numbers[name]["forward and backward (ms)"] for name in names]
    bars = panel.barh(names, values, color=["C0", "C0", "C7"])
    panel.bar_label(bars, [f"{value:.0f} ms" for value in values], padding=3)
    panel.set(xlabel="forward and backward, T = 512 (ms)", xscale="log", xlim=(min(values) / 3, 5 * max(values)))
    panel.invert_yaxis()


def _ratio(form: str, other: str) -> Callable[..., float]:
    return lambda n: n[form]["forward and backward (ms)"] / n[other]["forward and backward (ms)"]


PAPER = Paper(
    slug="deltaproduct",
    title="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
    arxiv="2502.10297",
    systems=tuple(SYSTEMS),
    claim="With two Householder factors per token, whose eigenvalues reach down to -1, one layer learns the products "
    "in the group S3 and goes on beyond the training length; with one factor, or with eigenvalues in [0,1], it does "
    "not.",
    threshold="Trained on words of 16, scored on words of 64, medians of 3 seeds: two factors with [-1,1] have an "
    "accuracy of at least 0.95, at least 0.3 above one factor with [-1,1] and at least 0.3 above two with [0,1].",
    experiments=(
        Experiment(
            name="words in S3",
            about="BOS and random elements of S3; at each, the product so far is the target (chance is 1/6). One "
            "block, D 64, 4 heads, K = V = 16, no convolution, no gate, SwiGLU of 128; AdamW 3e-3, warm-up 50, "
            "cosine, weight decay 1e-6, clip 1, batch 64, 700 steps on words of 16; scored at every position of 512 "
            "fresh words.",
            measure=words,
            checks=(
                Check("two factors, [-1,1]: accuracy at 64", lambda n: n[TWO]["at 64"], ">=", 0.95),
                Check("at 64: two factors minus one", lambda n: n[TWO]["at 64"] - n[ONE]["at 64"], ">=", 0.3),
                Check(
                    "at 64: two factors with [-1,1] minus two with [0,1]",
                    lambda n: n[TWO]["at 64"] - n[TWO_POSITIVE]["at 64"],
                    ">=",
                    0.3,
                ),
            ),
            draw=lambda panel, measured: draw_accuracies(panel, measured, 1 / 6),
        ),
        Experiment(
            name="price of a factor",
            about="No training. Forward and backward of `ops.delta_rule` at batch 4, T = 512, H 4, K = V = 32, median "
            "of 11 in turns, beside a loop over tokens and factors.",
            measure=price,
            checks=(
                Check("two factors over one: time", _ratio("n=2", "n=1"), "<=", 2.3, deciding=False),
                Check(
                    "two factors: times faster than the step loop",
                    _ratio("n=2, step loop", "n=2"),
                    ">=",
                    3,
                    deciding=False,
                ),
            ),
            draw=draw_price,
            seeded=False,
        ),
    ),
    notes="'Far below' for the positive range was made a number, 0.3, as for one factor; the sizes and the 700 steps "
    "come from trials with seed 0, in which all checks were met. One factor is not at chance: it can follow the sign "
    "of a permutation. The paper trains at 128 and scores at 512, with D 128, on S3, S4, A5 and S5, for 100 epochs of "
    "two million words; S3 is what a laptop learns in a minute. That two reflections turn by any angle, that equal "
    "keys gain nothing, and that permutations of five things are products of four reflections are tests, with weights "
    "set by hand, over 10,000 tokens (tests/papers/test_state_tracking.py). The time depends on the machine and on "
    "who else uses it, so it does not decide. The paper's language models (213M to 805M parameters) are not trained "
    "here.",
)
