"""FlashRNN: a sequential net is as fast as its loop over time is scheduled, and it tracks states that scans cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tidegate import registry
from tidegate.backend import backend
from tidegate.papers.experiment import Check, Experiment, Measured, Numbers, Paper, Situation
from tidegate.papers.extrapolation import draw_accuracies
from tidegate.papers.tracker import Tracker, track
from tidegate.papers.turns import in_turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LSTM, SLSTM, GRU, ELMAN = "LSTM", "sLSTM", "GRU", "Elman"
CELLS: dict[str, tuple[str, dict[str, Any]]] = {  # the cell alone: no convolution, no norm
    LSTM: ("lstm", {}),
    SLSTM: ("slstm", {"preset": "cell"}),
    GRU: ("gru", {}),
    ELMAN: ("elman", {}),
}
TORCH: dict[str, Callable[..., nn.Module]] = {LSTM: nn.LSTM, GRU: nn.GRU, ELMAN: nn.RNN}


def cell(system: str, dim: int, heads: int) -> nn.Module:
    """A layer whose recurrent matrices start from N(0, 1 / d), d = dim / heads."""
    name, options = CELLS[system]
    mixer = registry.build(name, dim, num_heads=heads, **options)
    assert isinstance(mixer.weight_hh, Tensor)
    nn.init.normal_(mixer.weight_hh, std=(dim / heads) ** -0.5)
    return mixer


# -- speed -------------------------------------------------------------------------------------------------------------
BATCH, TIME, DIM = 16, 256, 256
LOOP, KERNEL, PEER = "loop (ms)", "kernel (ms)", "PyTorch (ms)"


class Trial:
    """Forward and backward of a layer, into its input and all its parameters."""

    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x.clone().requires_grad_()
        self.onto = torch.randn_like(x)

    def run(self) -> tuple[Tensor, ...]:
        """The gradients."""
        y = self.layer(self.x)[0]
        return torch.autograd.grad(y, [self.x, *self.layer.parameters()], self.onto)

    def loop(self) -> tuple[Tensor, ...]:
        """The same, token by token in PyTorch."""
        with backend("reference"):
            return self.run()


def speed(seed: int, situation: Situation) -> Measured:
    """Every cell with one head and with four: gradients against the loop in float64, then times in turns."""
    x = torch.randn(*((2, 20, 16) if situation.smoke else (BATCH, TIME, DIM)))
    numbers: Numbers = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for heads in (4, 1):
        for system in CELLS:
            row, layer = f"{system}, {_heads(heads)}", cell(system, x.shape[-1], heads)
            trial = Trial(layer, x)
            numbers[row] = {"gradient error": gradient_error(trial)}
            calls[row, LOOP], calls[row, KERNEL] = trial.loop, trial.run
            if heads == 1 and system in TORCH:
                calls[row, PEER] = Trial(TORCH[system](x.shape[-1], x.shape[-1], batch_first=True), x).run
    say = partial(_say, situation, "speed")
    for (row, way), seconds in in_turns(calls, 2 if situation.smoke else 7, say).items():
        numbers[row][way] = 1e3 * seconds
    for row, values in numbers.items():
        situation.note(f"speed, {row}: " + ", ".join(f"{k} {v:.3g}" for k, v in values.items()))
    return Measured(numbers)


def _heads(count: int) -> str:
    return f"{count} head{'s' if count > 1 else ''}"


def _say(situation: Situation, label: str, text: str) -> None:
    situation.say(f"{label}: {text}")


def gradient_error(trial: Trial) -> float:
    """The kernels' gradients in float32 against those through the loop in float64, relative to each one's largest."""
    seen = trial.run()
    exact = Trial(trial.layer.double(), trial.x.detach().double())
    exact.onto = trial.onto.double()
    wanted = exact.loop()
    trial.layer.float()
    pairs = zip(seen, wanted, strict=True)
    return max(((mine - true).abs().max() / true.abs().max()).item() for mine, true in pairs)


Table = Mapping[str, Mapping[str, float]]


def gain(numbers: Table) -> float:
    """The loop's time over the kernel's with four heads, for the cell that gains least."""
    return min(row[LOOP] / row[KERNEL] for system, row in numbers.items() if system.endswith("4 heads"))


def beside_torch(numbers: Table, system: str) -> float:
    """The kernel's time with one head over that of PyTorch's LSTM."""
    return numbers[f"{system}, 1 head"][KERNEL] / numbers[f"{LSTM}, 1 head"][PEER]


def draw_speed(panel: Axes, measured: Sequence[Measured]) -> None:
    """A group of bars per cell and number of heads."""
    numbers, ways = measured[0].numbers, {LOOP: "C7", KERNEL: "C0", PEER: "C1"}
    for place, row in enumerate(numbers.values()):
        for index, (way, colour) in enumerate(ways.items()):
            if way in row:
                panel.bar(place + 0.27 * (index - 1), row[way], 0.27, color=colour)
    for way, colour in ways.items():
        panel.bar([0], [0], color=colour, label=way.removesuffix(" (ms)"))
    panel.set_xticks(range(len(numbers)), [row.replace(", ", "\n") for row in numbers], fontsize=7)
    panel.set(ylabel="forward and backward (ms)", yscale="log")
    panel.legend(fontsize=8)


# -- state tracking ----------------------------------------------------------------------------------------------------
LINEAR = "minGRU (linear)"


def tracking(seed: int, situation: Situation) -> Measured:
    """Parity by every cell with four heads of eight, and by a recurrence that is gated but linear in its state."""

    def measure(system: str) -> tuple[dict[str, float], list[float]]:
        torch.manual_seed(seed)
        linear = system == LINEAR
        mixer = registry.build("min-gru", 32, candidate="linear") if linear else cell(system, 32, 4)
        return track(f"parity, seed {seed}, {system}", Tracker(mixer, 32), seed, situation, lr=5e-3)

    return Measured.of((*CELLS, LINEAR), measure)


# -- heads -------------------------------------------------------------------------------------------------------------
HEADS = (1, 4, 16)


def heads(seed: int, situation: Situation) -> Measured:
    """An LSTM of 256 channels in one, four and sixteen heads: time, and parity once."""
    dim = 16 if situation.smoke else DIM
    x = torch.randn(*((2, 20, dim) if situation.smoke else (BATCH, TIME, dim)))
    calls = {_heads(count): Trial(cell(LSTM, dim, count), x).run for count in HEADS}
    say = partial(_say, situation, "heads")
    seconds = in_turns(calls, 2 if situation.smoke else 9, say)

    def measure(system: str) -> tuple[dict[str, float], list[float]]:
        torch.manual_seed(seed)
        model = Tracker(cell(LSTM, dim, int(system.split()[0])), dim)
        numbers, curve = track(f"heads, seed {seed}, {system}", model, seed, situation, lr=5e-3)
        return {KERNEL: 1e3 * seconds[system], **numbers}, curve

    return Measured.of(calls, measure)


def draw_heads(panel: Axes, measured: Sequence[Measured]) -> None:
    """Milliseconds by number of heads."""
    numbers = measured[0].numbers
    panel.plot([int(system.split()[0]) for system in numbers], [row[KERNEL] for row in numbers.values()], "o-")
    panel.set(xlabel="heads of an LSTM with 256 channels", ylabel="forward and backward (ms)", xscale="log", ylim=0)
    panel.set_xticks(HEADS, [str(count) for count in HEADS])


# -- what is claimed ---------------------------------------------------------------------------------------------------
def _of(system: str, quantity: str) -> Callable[..., float]:
    return lambda n: n[system][quantity]


def _speed_checks() -> tuple[Check, ...]:
    return (
        Check("largest gradient error", lambda n: max(row["gradient error"] for row in n.values()), "<", 1e-5),
        Check("loop over kernel, 4 heads, the cell that gains least", gain, ">=", 3.0),
        *(
            Check(f"{system}, 1 head: time over that of torch.nn.LSTM", partial(beside_torch, system=system), "<=", 1.3)
            for system in CELLS
        ),
    )


def _accuracy_checks() -> tuple[Check, ...]:
    far = [
        Check(f"{system}: accuracy at 160", _of(system, "at 160"), ">=", 0.99, deciding=system != ELMAN)
        for system in CELLS
    ]
    return (*far, Check(f"{LINEAR}: accuracy at 160", _of(LINEAR, "at 160"), "<=", 0.6))


def _heads_checks() -> tuple[Check, ...]:
    return (
        Check("time of 4 heads over 1", lambda n: n["4 heads"][KERNEL] / n["1 head"][KERNEL], "<", 1.0),
        Check("time of 16 heads over 4", lambda n: n["16 heads"][KERNEL] / n["4 heads"][KERNEL], "<", 1.0),
        Check("least accuracy at 160", lambda n: min(row["at 160"] for row in n.values()), ">=", 0.99),
    )


PAPER = Paper(
    slug="flashrnn",
    title="FlashRNN: Optimizing Traditional RNNs on Modern Hardware",
    arxiv="2412.07752",
    systems=(*CELLS, LINEAR),
    claim="What makes sequential recurrent nets slow is how their loop over time is run, not the loop: fused kernels "
    "speed all of them up, the more so in heads; and they track a state that a gated linear recurrence cannot.",
    threshold="Forward and backward at batch 16, 256 tokens, 256 channels: with 4 heads every cell at least 3 times "
    "faster than the loop in PyTorch, with 1 head none takes more than 1.3 times torch.nn.LSTM; gradients within 1e-5; "
    "an LSTM takes less time with 4 heads than with 1, and less with 16, and tells parity with each. Parity, trained "
    "at 40, medians of 3 seeds: LSTM, sLSTM and GRU have at least 0.99 at 160, the linear recurrence at most 0.6.",
    experiments=(
        Experiment(
            name="speed",
            about="float32, B 16, T 256, 256 channels, input projection included. Gradients of input and parameters "
            "against the loop in float64, relative to each one's largest; then forward and backward, medians of 7 in "
            "turns: our kernel, the same equations token by token in PyTorch with the input projected beforehand, and "
            "PyTorch's own module where there is one (one head).",
            measure=speed,
            checks=_speed_checks(),
            draw=draw_speed,
            seeded=False,
        ),
        Experiment(
            name="parity",
            about="Random bits; the target of every position is the parity so far (chance is 1/2). Embedding, the "
            "cell with 4 heads of 8 (recurrent weights from N(0, 1/8)), LayerNorm, MLP of 64. 400 steps of AdamW 5e-3 "
            "at 40 bits, weight decay 1e-4, warm-up 50, cosine, clip 1, batch 64; 512 fresh rows. minGRU is "
            "h = (1 - z) h + z W x with z from x alone.",
            measure=tracking,
            checks=_accuracy_checks(),
            draw=partial(draw_accuracies, chance=1 / 2),
        ),
        Experiment(
            name="heads",
            about="An LSTM of 256 channels, kernel as above, medians of 9 in turns; and parity as above with that "
            "many channels, one seed.",
            measure=heads,
            checks=_heads_checks(),
            draw=draw_heads,
            seeded=False,
        ),
    ),
    notes="Elman's net is reported and decides nothing: it depends on the seed. The paper's times are of GPUs, where "
    "its kernels keep recurrent weights in registers; ours are of one CPU, where they stay in the cache.",
)
