"""A review of recurrent networks: gradients that vanish or explode, what gates, both directions and windows change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from tidegate import registry
from tidegate.methods.gradients import state_gradient_profile
from tidegate.models.recurrent import RNN
from tidegate.nn.cell import CellMixer
from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation, thin
from tidegate.tasks.fit import fit
from tidegate.tasks.score import score
from tidegate.tasks.targets import IGNORE, unscored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# -- gradients over time -----------------------------------------------------------------------------------------------
HIDDEN, INPUTS, BACK = 64, 16, (10, 50, 99)
ELMAN, GRU = "Elman", "GRU"
# system -> mixer, options, spectral radius of U
CELLS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    ELMAN: ("elman", {}, None),
    **{f"Elman, radius {radius}": ("elman", {}, radius) for radius in (0.5, 1.0, 1.5, 3.0)},
    GRU: ("gru", {}, None),
    **{f"LSTM, forget bias {bias:.0f}": ("lstm", {"forget_bias": bias}, None) for bias in (0.0, 1.0, 3.0, 5.0)},
}


def gradients(seed: int, situation: Situation) -> Measured:
    """Every cell as it is initialised, on random inputs."""
    # Channels of zeros are as good as none, and let a layer of 64 read 16.
    x = nn.functional.pad(torch.randn(4, max(BACK) + 2, INPUTS, dtype=torch.float64), (0, HIDDEN - INPUTS))
    return Measured.of(CELLS, lambda system: _gradients_of(system, x, seed, situation))


def _gradients_of(system: str, x: Tensor, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    name, options, radius = CELLS[system]
    torch.manual_seed(seed)
    mixer = registry.build(name, HIDDEN, **options, dtype=torch.float64)
    if radius is not None:
        with torch.no_grad():
            mixer.weight_hh *= radius / torch.linalg.eigvals(mixer.weight_hh).abs().max()
    profile = state_gradient_profile(mixer, x, entries=["c" if name == "lstm" else "h"])
    relative = (profile - profile[:, -1:]).mean(0).flip(0)  # by tokens back from the last state that is read
    numbers = {f"{back} back": relative[back].item() for back in BACK}
    situation.note(f"gradients, seed {seed}, {system}: " + ", ".join(f"{k} {v:.1f}" for k, v in numbers.items()))
    return numbers, [round(value, 3) for value in relative[: max(BACK) + 1].tolist()]


def draw_gradients(panel: Axes, measured: Sequence[Measured]) -> None:
    """log10 of the gradient over tokens back: a line per cell, the mean over seeds."""
    styles = {"Elman": "-", "LSTM": "--", "GRU": ":"}
    for index, system in enumerate(CELLS):
        lines = zip(*(seen.curves[system] for seen in measured), strict=True)
        mean = [sum(values) / len(values) for values in lines]
        style = next(style for name, style in styles.items() if system.startswith(name))
        panel.plot(range(len(mean)), mean, style, color=f"C{index}", linewidth=1.4, label=system)
    panel.set(xlabel="tokens back", ylabel="log10 of the gradient, relative", ylim=(-30, 15))
    panel.legend(fontsize=7)


# -- trained nets ------------------------------------------------------------------------------------------------------
class Reader(nn.Module):
    """Embedded tokens, one layer of `tidegate.RNN`, a linear map at every position.

    With `window`, no gradient flows from one window of that many tokens into the one before: truncated
    back-propagation, the state carried and detached.
    """

    def __init__(self, vocab_size: int, outputs: int, rnn: RNN, window: int | None = None) -> None:
        super().__init__()
        self.embedding, self.rnn, self.window = nn.Embedding(vocab_size, rnn.input_size), rnn, window
        self.head = nn.Linear(rnn.directions * rnn.hidden_size, outputs)

    def forward(self, ids: Tensor) -> tuple[Tensor, Any]:
        x = self.embedding(ids)
        hx, pieces = None, []
        for piece in x.split(self.window or x.shape[1], 1):
            y, hx = self.rnn(piece, hx)
            hx = tuple(part.detach() for part in hx) if isinstance(hx, tuple) else hx.detach()
            pieces.append(y)
        return self.head(torch.cat(pieces, 1)), hx


def first_token(rows: int, generator: Generator, *, length: int = 40) -> tuple[Tensor, Tensor]:
    """One of four tokens, then others of four kinds; the target of the last position is the first token.

    >>> ids, targets = first_token(1, torch.Generator().manual_seed(0), length=4)
    >>> ids.tolist(), targets.tolist()
    ([[3, 7, 5, 4]], [[-100, -100, -100, 3]])
    """
    ids, targets = torch.randint(4, 8, (rows, length), generator=generator), unscored(rows, length)
    ids[:, 0] = torch.randint(4, (rows,), generator=generator)
    targets[:, -1] = ids[:, 0]
    return ids, targets


def coming(rows: int, generator: Generator, *, length: int = 20, ahead: int = 3) -> tuple[Tensor, Tensor]:
    """Random tokens of eight kinds; the target of every position is the token `ahead` positions after it.

    >>> ids, targets = coming(1, torch.Generator().manual_seed(0), length=5)
    >>> ids.tolist(), targets.tolist()
    ([[4, 7, 5, 0, 3]], [[0, 3, -100, -100, -100]])
    """
    ids = torch.randint(8, (rows, length), generator=generator)
    return ids, nn.functional.pad(ids[:, ahead:], (0, ahead), value=IGNORE)


def lag_cell(name: str, bias: float | None = None) -> RNN:
    """A layer of 48 on embeddings of 16; with `bias`, one that keeps from the start (an LSTM also hardly writes)."""
    options: dict[str, Any] = {} if bias is None else {"forget_bias": bias}
    rnn = RNN(name, 16, 48, batch_first=True, **options)
    layer = rnn.layers[0]
    if name == "lstm" and bias:
        assert isinstance(layer, CellMixer)
        assert layer.bias_hh is not None
        with torch.no_grad():
            layer.bias_ih[: layer.dim], layer.bias_hh[: layer.dim] = -bias, 0.0  # of the input gate
    return rnn


def _train(
    label: str,
    model: nn.Module,
    draw: Callable[[int, Generator], tuple[Tensor, Tensor]],
    seed: int,
    situation: Situation,
    *,
    steps: int,
    lr: float,
) -> tuple[dict[str, float], list[float]]:
    """Accuracy on 1,024 fresh rows after `steps` updates of Adam, and the loss curve."""
    steps, batch, rows = (2, 4, 4) if situation.smoke else (steps, 64, 1024)
    train, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)

    def say(step: int, loss: float) -> None:
        situation.say(f"{label}, seed {seed}: step {step} of {steps}, loss {loss:.3f}")

    curve = thin(fit(model, lambda: draw(batch, train), steps=steps, lr=lr, warmup=0, say=say))
    accuracy = score(model, [draw(rows, test)])["accuracy"]
    situation.note(f"{label}, seed {seed}: accuracy {accuracy:.3f}")
    return {"accuracy": accuracy, "updates": steps}, curve


def draw_losses(panel: Axes, measured: Sequence[Measured]) -> None:
    """Loss while training: a line per system and seed."""
    for index, system in enumerate(measured[0].curves):
        for seed, seen in enumerate(measured):
            losses = [max(loss, 1e-4) for loss in seen.curves[system]]
            steps = [10 * point + 5 for point in range(len(losses))]
            panel.plot(steps, losses, color=f"C{index}", alpha=0.8, linewidth=1.2, label=None if seed else system)
    panel.set(xlabel="updates", ylabel="loss (nats)", yscale="log", ylim=(8e-5, 4))
    panel.legend(fontsize=8)


# -- a lag, the future, a window ---------------------------------------------------------------------------------------
ZERO, LONG_LSTM, LONG_GRU = "LSTM, forget bias 0", "LSTM, biases 3, -3", "GRU, bias 3"
LAGS: dict[str, tuple[str, float | None, int]] = {  # system -> cell, bias, updates
    ELMAN: ("elman", None, 600),
    ZERO: ("lstm", 0.0, 600),
    LONG_LSTM: ("lstm", 3.0, 300),
    LONG_GRU: ("gru", 3.0, 300),
}


def lag(seed: int, situation: Situation) -> Measured:
    """The first of 40 tokens is asked for at the end."""

    def measure(system: str) -> tuple[dict[str, float], list[float]]:
        name, bias, steps = LAGS[system]
        torch.manual_seed(seed)
        return _train(
            f"lag, {system}", Reader(8, 4, lag_cell(name, bias)), first_token, seed, situation, steps=steps, lr=3e-3
        )

    return Measured.of(LAGS, measure)


BOTH, FORWARD = "BLSTM, 2 x 32", "LSTM, 64"
SIDES: dict[str, tuple[int, bool]] = {BOTH: (32, True), FORWARD: (64, False)}


def future(seed: int, situation: Situation) -> Measured:
    """Every position is asked for the token three positions later."""

    def measure(system: str) -> tuple[dict[str, float], list[float]]:
        width, both = SIDES[system]
        torch.manual_seed(seed)
        rnn = RNN("lstm", 16, width, batch_first=True, bidirectional=both)
        return _train(f"future, {system}", Reader(8, 8, rnn), coming, seed, situation, steps=300, lr=5e-3)

    return Measured.of(SIDES, measure)


WHOLE, PIECES = "window 40", "window 10"
WINDOWS = {WHOLE: 40, PIECES: 10}


def horizon(seed: int, situation: Situation) -> Measured:
    """The lag again, with gradients through the whole sequence and through its last ten tokens."""

    def measure(system: str) -> tuple[dict[str, float], list[float]]:
        torch.manual_seed(seed)
        model = Reader(8, 4, lag_cell("lstm", 3.0), WINDOWS[system])
        return _train(f"horizon, {system}", model, first_token, seed, situation, steps=300, lr=3e-3)

    return Measured.of(WINDOWS, measure)


# -- what is claimed ---------------------------------------------------------------------------------------------------
def _accuracy(system: str) -> Callable[..., float]:
    return lambda n: n[system]["accuracy"]


def _back(system: str) -> Callable[..., float]:
    return lambda n: n[system]["50 back"]


_LAG = "One of four tokens, then 39 of four others; the first is asked for at the end (chance is 0.25)."
_TRAINED = "Embeddings of 16; Adam, clip 1, batch 64; scored on 1,024 fresh rows."

PAPER = Paper(
    slug="rnn-review",
    title="A Critical Review of Recurrent Neural Networks for Sequence Learning",
    arxiv="1506.00019",
    systems=tuple(CELLS),
    claim="Through a plain recurrent net gradients vanish or explode with the distance; through an LSTM whose forget "
    "gate starts open they last, and it learns what the plain one does not. Reading in both directions gives the "
    "future, and truncated back-propagation learns no more than its window shows.",
    threshold="Medians of 3 seeds. Gradients 50 tokens back, as powers of ten: below -10 for a tanh net as PyTorch "
    "initialises it, above -1 for an LSTM with forget bias 3, above 3 for a tanh net of spectral radius 3. The first "
    "of 40 tokens is told with at least 0.99 by an LSTM and a GRU with bias 3 after 300 updates, with at most 0.4 by a "
    "tanh net and an LSTM with bias 0 after 600. The token three places ahead: at least 0.98 in both directions, at "
    "most 0.2 in one. The lag through a window of 40: at least 0.99; of 10: at most 0.8.",
    experiments=(
        Experiment(
            name="gradients",
            about="No training. 64 channels, 16 random inputs, L a random projection of the last output: log10 of "
            "||dL/dstate_t|| relative to the last state before it, mean of 4 rows, in float64. The state is h, or c of "
            "the LSTM; U as PyTorch initialises it, or scaled to the spectral radius that is given.",
            measure=gradients,
            checks=(
                Check("Elman, 50 tokens back", _back(ELMAN), "<", -10.0),
                Check("LSTM, forget bias 3, 50 tokens back", _back("LSTM, forget bias 3"), ">", -1.0),
                Check("Elman, radius 3, 50 tokens back", _back("Elman, radius 3.0"), ">", 3.0),
            ),
            draw=draw_gradients,
        ),
        Experiment(
            name="lag",
            about=f"{_LAG} 48 channels, {_TRAINED[0].lower()}{_TRAINED[1:]} Rate 3e-3.",
            measure=lag,
            checks=(
                Check("LSTM, biases 3 and -3: accuracy", _accuracy(LONG_LSTM), ">=", 0.99),
                Check("GRU, bias 3: accuracy", _accuracy(LONG_GRU), ">=", 0.99),
                Check("Elman: accuracy", _accuracy(ELMAN), "<=", 0.4),
                Check("LSTM, forget bias 0: accuracy", _accuracy(ZERO), "<=", 0.4),
            ),
            draw=draw_losses,
        ),
        Experiment(
            name="future",
            about=f"20 tokens of eight kinds; every position is asked for the token three places ahead (chance is "
            f"0.125). {_TRAINED} 300 updates at 5e-3.",
            measure=future,
            checks=(
                Check("both directions: accuracy", _accuracy(BOTH), ">=", 0.98),
                Check("one direction: accuracy", _accuracy(FORWARD), "<=", 0.2),
            ),
            draw=draw_losses,
        ),
        Experiment(
            name="horizon",
            about="The lag by the LSTM with biases 3 and -3, 300 updates. The state is carried from window to window, "
            "the gradient is not.",
            measure=horizon,
            checks=(
                Check("window 40: accuracy", _accuracy(WHOLE), ">=", 0.99),
                Check("window 10: accuracy", _accuracy(PIECES), "<=", 0.8),
            ),
            draw=draw_losses,
        ),
    ),
    notes="A survey without experiments of its own: these show what it explains. Its sequence-to-sequence models, with "
    "attention and without, are not tried here, nor is the Neural Turing Machine. The bound for a window of 10 is not "
    "chance: what a net with random weights writes still carries the first token to the end, and the last window "
    "learns to read it.",
)
