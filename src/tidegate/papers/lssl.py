"""LSSL: a linear state space layer that starts from HiPPO reads digits pixel by pixel, and time can be rescaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tidegate.models.sequence import SequenceModel
from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation, thin
from tidegate.tasks.digits import digits, load_digits
from tidegate.tasks.fit import fit
from tidegate.tasks.score import score
from tidegate.tasks.signals import band_signals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, FIXED, RANDOM, GRU = "LSSL", "LSSL-f", "LSSL, random A", "GRU"
DIM, BATCH = 32, 50
FROZEN = {"train_transition": False, "train_step": False}
# system -> width, mixer and options; the GRU's width makes its number of parameters that of the LSSL
SYSTEMS: dict[str, tuple[int, str, dict[str, Any]]] = {
    TRAINED: (DIM, "lssl", {}),
    FIXED: (DIM, "lssl", FROZEN),
    RANDOM: (DIM, "lssl", {"measure": "random"}),
    GRU: (23, "gru", {}),
}


def build(system: str, outputs: int, length: int) -> SequenceModel:
    """Two layers, each on a residual branch and nothing between; the mean of the last one's outputs is classified."""
    dim, name, options = SYSTEMS[system]
    if name == "lssl":
        options = {"state_dim": DIM, "dt_min": 1 / (4 * length), "dt_max": 1.0, **options}
    model = SequenceModel(dim, [(name, options)] * 2, features=1, outputs=outputs, pool="mean", feed_forward="none")
    if system == RANDOM:
        for mixer in mixers(model):
            nn.init.normal_(mixer.transition, std=1 / DIM)
    return model


def mixers(model: SequenceModel) -> list[Any]:
    """The two layers."""
    return [block.mixer for block in model.blocks]


def train(
    model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, label: str, situation: Situation
) -> list[float]:
    """AdamW 4e-3 without decay; A and B at 1e-4 and the steps d at 1e-3, as in the paper's configurations."""
    rates = {"transition": 1e-4, "input_weight": 1e-4, "log_step": 1e-3}
    names = [name for name, _ in model.named_parameters()]
    rates = {part: rate for part, rate in rates.items() if any(part in name for name in names)}

    def say(step: int, loss: float) -> None:
        situation.say(f"{label}: step {step} of {steps}, loss {loss:.3f}")

    return thin(fit(model, draw, steps=steps, lr=4e-3, rates=rates, schedule="cosine", say=say))


def spread(model: SequenceModel) -> float:
    """The deviation of the logarithms of all steps d."""
    return torch.cat([mixer.log_step.detach() for mixer in mixers(model)]).std().item()


# -- digits ------------------------------------------------------------------------------------------------------------
def read_digits(seed: int, situation: Situation) -> Measured:
    """Every system on the same batches of permuted digits; scored on those held out."""
    return Measured.of(SYSTEMS, lambda system: _digits_of(system, seed, situation))


def _digits_of(system: str, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    torch.manual_seed(seed)
    model, generator = build(system, 10, 64), torch.Generator().manual_seed(seed)
    numbers = {"parameters": float(model.num_parameters)}
    before = spread(model) if SYSTEMS[system][1] == "lssl" else 0.0
    label = f"digits, seed {seed}, {system}"
    curve = train(model, lambda: digits(BATCH, generator), 3 if situation.smoke else 1150, label, situation)
    numbers |= {"accuracy": score(model, [load_digits().held_out])["accuracy"]}
    if before:
        numbers["spread of the steps, end over start"] = spread(model) / before
    situation.note(f"{label}: " + ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    return numbers, curve


# -- another rate ------------------------------------------------------------------------------------------------------
AS_TRAINED, RESCALED, NOT = "as trained", "half the rate, steps doubled", "half the rate, steps as trained"


def change_rate(seed: int, situation: Situation) -> Measured:
    """An LSSL that has learnt to tell frequencies, given every second sample."""
    torch.manual_seed(seed)
    model = build(TRAINED, 3, 256)
    learnt, fresh = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    steps, batch, rows = (2, 4, 8) if situation.smoke else (300, BATCH, 600)
    label = f"another rate, seed {seed}"
    curve = train(model, lambda: band_signals(batch, learnt), steps, label, situation)
    inputs, classes = band_signals(rows, fresh)
    accuracy = {AS_TRAINED: score(model, [(inputs, classes)])["accuracy"]}
    every_second = [(inputs[:, ::2], classes)]
    accuracy[NOT] = score(model, every_second)["accuracy"]
    for mixer in mixers(model):
        mixer.step_rescale = 2.0
    accuracy[RESCALED] = score(model, every_second)["accuracy"]
    situation.note(f"{label}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))
    return Measured({TRAINED: accuracy}, {TRAINED: curve})


# -- what is claimed ---------------------------------------------------------------------------------------------------
def _lead(system: str, other: str) -> Callable[..., float]:
    return lambda n: n[system]["accuracy"] - n[other]["accuracy"]


def _drop(situation: str) -> Callable[..., float]:
    return lambda n: n[TRAINED][AS_TRAINED] - n[TRAINED][situation]


def draw_digits(panel: Axes, measured: Sequence[Measured]) -> None:
    """Accuracy of every system: the mean, and a dot for each seed."""
    _bars(panel, {system: [m.numbers[system]["accuracy"] for m in measured] for system in SYSTEMS})
    panel.set(ylabel="accuracy, digits held out", ylim=(0, 1))


def draw_rates(panel: Axes, measured: Sequence[Measured]) -> None:
    """Accuracy at each rate."""
    _bars(panel, {name: [m.numbers[TRAINED][name] for m in measured] for name in (AS_TRAINED, RESCALED, NOT)})
    panel.axhline(1 / 3, color="C7", linestyle=":")
    panel.set(ylabel="accuracy, three frequencies", ylim=(0, 1.05))


def _bars(panel: Axes, values: dict[str, list[float]]) -> None:
    for place, each in enumerate(values.values()):
        panel.bar(place, sum(each) / len(each), color=f"C{place}", alpha=0.5)
        panel.plot([place] * len(each), each, "o", color=f"C{place}", markersize=4)
    panel.set_xticks(range(len(values)), [name.replace(", ", ",\n") for name in values], fontsize=8)


PAPER = Paper(
    slug="lssl",
    title="Combining Recurrent, Convolutional, and Continuous-time Models with Linear State-Space Layers",
    arxiv="2110.13985",
    systems=tuple(SYSTEMS),
    claim="A stack of linear state space models reads long sequences as well as a recurrent net, if its matrix starts "
    "from HiPPO; a random matrix does not do. Its step size is a time scale: a model that has been trained at one "
    "sampling rate works at another, when the steps are rescaled.",
    threshold="Medians of 3 seeds. Digits held out: LSSL has at least the accuracy of LSSL-f less 0.01, and both at "
    "least that of the random matrix plus 0.05 and that of a GRU of as many parameters less 0.01. Signals at half the "
    "rate: with the steps doubled at most 0.03 is lost, without at least 0.15.",
    experiments=(
        Experiment(
            name="digits",
            about="scikit-learn's digits, 64 pixels in one random order, 1,437 to learn from and 360 held out. Two "
            "layers with D = N = 32, bilinear, steps d from 1/256 to 1, mean over time; 1,150 steps of AdamW 4e-3 "
            "(A, B 1e-4, d 1e-3) on batches of 50, cosine, clip 1. LSSL-f: A, B, d as they start. Random A: N(0, 1) / "
            "N.",
            measure=read_digits,
            checks=(
                Check("LSSL minus LSSL-f", _lead(TRAINED, FIXED), ">=", -0.01),
                Check("LSSL minus random A", _lead(TRAINED, RANDOM), ">=", 0.05),
                Check("LSSL-f minus random A", _lead(FIXED, RANDOM), ">=", 0.05),
                Check("LSSL minus GRU", _lead(TRAINED, GRU), ">=", -0.01),
                Check("LSSL-f minus GRU", _lead(FIXED, GRU), ">=", -0.01),
                Check(
                    "LSSL: spread of the steps, end over start",
                    lambda n: n[TRAINED]["spread of the steps, end over start"],
                    ">",
                    1.0,
                    deciding=False,
                ),
            ),
            draw=draw_digits,
        ),
        Experiment(
            name="another rate",
            about="A sine of 2, 4 or 8 Hz in noise below 16 Hz, one second in 256 samples: which of them is it? The "
            "LSSL of the digits with steps d from 1/1024 to 1, 300 steps; scored on 600 fresh signals, then on every "
            "second sample of them.",
            measure=change_rate,
            checks=(
                Check("lost at half the rate, steps doubled", _drop(RESCALED), "<=", 0.03),
                Check("lost at half the rate, steps as trained", _drop(NOT), ">=", 0.15),
            ),
            draw=draw_rates,
        ),
    ),
    notes="Batches are drawn with replacement, as many as 40 passes have. Left open and chosen beforehand: a residual "
    "branch with RMSNorm before each layer, no dropout, a rate that falls along a cosine, the mean over time as what "
    "is classified. The random matrix is trained at the rates of the others. The digits stand in for the paper's "
    "sequential MNIST: 64 steps for 784, 1,437 images for 60,000.",
)
