"""Gated associative memory: cost that grows with the length, quality on text, and how far it looks back."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.mixers.attention import Attention
from tidegate.models.block import Block
from tidegate.models.language import LanguageModel
from tidegate.models.layers import Layer
from tidegate.models.sequence import SequenceModel
from tidegate.nn.parts import split_heads
from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation, thin
from tidegate.state import State
from tidegate.tasks.fit import fit
from tidegate.tasks.language.topics import all_windows, random_windows, topics
from tidegate.tasks.recall import induction
from tidegate.tasks.score import score
from tidegate.tasks.targets import unscored

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GAM, LOCAL, SUM, TRANSFORMER = "GAM", "GAM, local only", "GAM, sum of branches", "Transformer"
Numbers = Mapping[str, Mapping[str, float]]


# -- scaling -----------------------------------------------------------------------------------------------------------
class WithScores(nn.Module):
    """An `Attention` mixer that writes its T x T scores to memory, as the paper's baseline; without positions."""

    def __init__(self, mixer: Attention) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, state: State | None = None, **ignored: Any) -> tuple[Tensor, State]:
        parts = self.mixer.qkv_proj(x).split(self.mixer.widths, -1)
        q, k, v = (split_heads(part, self.mixer.num_heads).transpose(1, 2) for part in parts)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        return self.mixer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)), State()


SCORES, FUSED = "attention, scores in memory", "attention, fused"


def scaling(seed: int, situation: Situation) -> Measured:
    """Forward and backward of one block at several lengths, in turns; the slope over the three longest."""
    lengths = (64, 128, 256) if situation.smoke else (256, 512, 1024, 2048, 4096)
    blocks = {
        GAM: Block(128, "gam", {"num_slots": 128}, feed_forward="gelu"),
        SCORES: Block(128, "attention", {"num_heads": 4}, feed_forward="gelu"),
        FUSED: Block(128, "attention", {"num_heads": 4}, feed_forward="gelu"),
    }
    blocks[SCORES].mixer = WithScores(blocks[SCORES].mixer)  # type: ignore[arg-type]
    seen: dict[str, dict[int, list[float]]] = {name: {length: [] for length in lengths} for name in blocks}
    for length in lengths:
        x = torch.randn(1, length, 128, requires_grad=True)
        for turn in range(2 if situation.smoke else 6):
            for name, block in blocks.items():
                begin = time.perf_counter()
                block(x, None, None, {})[0].sum().backward()
                if turn:  # the first is for compiling
                    seen[name][length].append(time.perf_counter() - begin)
        situation.say(f"gam, scaling: length {length}")
    numbers, curves = {}, {}
    for name, times in seen.items():
        curves[name] = [1e3 * statistics.median(times[length]) for length in lengths]
        slope = _slope([math.log(n) for n in lengths[-3:]], [math.log(t) for t in curves[name][-3:]])
        numbers[name] = {"slope": slope} | {f"T = {n} (ms)": t for n, t in zip(lengths, curves[name], strict=True)}
        situation.note(f"gam, scaling, {name}: slope {slope:.2f}, {curves[name][-1]:.0f} ms at T = {lengths[-1]}")
    return Measured(numbers, curves)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def draw_scaling(panel: Axes, measured: Sequence[Measured]) -> None:
    """Milliseconds over lengths."""
    for name, times in measured[0].curves.items():
        lengths = [int(label.split()[2]) for label in measured[0].numbers[name] if label.startswith("T = ")]
        panel.plot(lengths, times, "o-", label=f"{name}, slope {measured[0].numbers[name]['slope']:.2f}")
    panel.set(xlabel="tokens", ylabel="forward and backward (ms)", xscale="log", yscale="log")
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    panel.set_xticks([], minor=True)
    panel.legend(fontsize=8)


# -- text --------------------------------------------------------------------------------------------------------------
NETS: dict[str, tuple[Layer, int]] = {  # the mixer, and the feed-forward width that makes parameters equal
    GAM: (("gam", {"num_slots": 64}), 256),
    LOCAL: (("gam", {"num_slots": 64, "branches": "local"}), 256),
    SUM: (("gam", {"num_slots": 64, "gate": "none"}), 256),
    TRANSFORMER: (("attention", {"num_heads": 4}), 224),
}


def text(seed: int, situation: Situation) -> Measured:
    """Train every net on the same windows of bytes; bits per byte of the part held out, then the speed of training."""
    learnt, held_out = topics()
    steps, batch, length = (2, 2, 32) if situation.smoke else (800, 16, 128)
    fresh = all_windows(held_out, length)[: 1 if situation.smoke else None]
    models, numbers, curves = {}, {}, {}
    for system, (layer, hidden) in NETS.items():
        torch.manual_seed(seed)
        train = torch.Generator().manual_seed(seed)
        model = LanguageModel(256, 64, [layer] * 4, feed_forward="gelu", feed_forward_dim=hidden)

        def draw(train: torch.Generator = train) -> tuple[Tensor, Tensor]:
            return random_windows(learnt, batch, length, train)

        def say(step: int, loss: float, system: str = system) -> None:
            situation.say(f"gam, text, seed {seed}, {system}: step {step} of {steps}, loss {loss:.3f}")

        curves[system] = thin(fit(model, draw, steps=steps, lr=2e-3, say=say))
        bits = score(model, fresh)["loss"] / math.log(2)
        models[system] = model
        numbers[system] = {"bits per byte": bits, "parameters": model.num_parameters}
        situation.note(f"gam, text, seed {seed}, {system}: {bits:.3f} bits per byte, {model.num_parameters} parameters")
    rows = random_windows(learnt, batch, length, torch.Generator().manual_seed(seed))
    for system, seconds in _training_seconds(models, rows, 2 if situation.smoke else 16).items():
        numbers[system]["tokens per second"] = batch * length / seconds
    return Measured(numbers, curves)


def _training_seconds(models: Mapping[str, nn.Module], data: tuple[Tensor, Tensor], turns: int) -> dict[str, float]:
    """The median of a forward and backward, the models in turns."""
    seen: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(turns):
        for name, model in models.items():
            begin = time.perf_counter()
            functional.cross_entropy(model(data[0])[0].flatten(0, 1), data[1].flatten()).backward()
            seen[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seen.items()}


# -- induction ---------------------------------------------------------------------------------------------------------
GAP = 40  # tokens between the story and the question
FAR: dict[str, list[Layer]] = {
    GAM: [("gam", {"num_slots": 64})] * 6,
    "GAM, dynamic memory": [("gam", {"num_slots": 64, "memory": "dynamic"})] * 2,
    "GLA": [("gla", {"num_heads": 2, "conv_width": 4})] * 2,
    TRANSFORMER: [("attention", {"num_heads": 2})] * 2,
}


def far(seed: int, situation: Situation) -> Measured:
    """Train on induction whose question comes late; score on fresh rows."""
    return Measured.of(FAR, lambda system: _far_of(system, seed, situation))


def _far_of(system: str, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    steps, batch = (2, 4) if situation.smoke else (400, 64)
    torch.manual_seed(seed)
    train, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    model = SequenceModel(64, FAR[system], outputs=16, vocab_size=16, feed_forward_dim=128)

    def say(step: int, loss: float) -> None:
        situation.say(f"gam, induction, seed {seed}, {system}: step {step} of {steps}, loss {loss:.3f}")

    curve = thin(fit(model, lambda: late_induction(batch, train), steps=steps, lr=3e-3, say=say))
    numbers = score(model, [late_induction(batch, test) for _ in range(1 if situation.smoke else 16)])
    situation.note(f"gam, induction, seed {seed}, {system}: accuracy {numbers['accuracy']:.3f}")
    return numbers, curve


def late_induction(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`tasks.recall.induction` over 24 tokens of 16 kinds, with 40 more random ones before the question."""
    ids, targets = induction(batch, generator, vocab_size=16, length=24)
    filler = torch.randint(15, (batch, GAP), generator=generator)
    between = unscored(batch, GAP)
    return torch.cat([ids[:, :-1], filler, ids[:, -1:]], 1), torch.cat([targets[:, :-1], between, targets[:, -1:]], 1)


def draw_curves(label: str) -> Callable[[Axes, Sequence[Measured]], None]:
    """Loss while training: a line per system and seed."""

    def draw(panel: Axes, measured: Sequence[Measured]) -> None:
        for index, system in enumerate(measured[0].curves):
            for seed, seen in enumerate(measured):
                losses = seen.curves[system]
                steps = [10 * point + 5 for point in range(len(losses))]
                panel.plot(steps, losses, color=f"C{index}", alpha=0.8, linewidth=1.2, label=None if seed else system)
        panel.set(xlabel="training step", ylabel=label)
        panel.legend(fontsize=8)

    return draw


def _ratio(system: str, other: str, quantity: str) -> Callable[[Numbers], float]:
    return lambda n: n[system][quantity] / n[other][quantity]


def _longest(numbers: Numbers, system: str) -> float:
    return list(numbers[system].values())[-1]


PAPER = Paper(
    slug="gam",
    title="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
    arxiv="2509.00605",
    systems=tuple(NETS),
    claim="A short convolution and a look-up in a learnt bank take the place of attention: the cost is linear in the "
    "length, and text is predicted as well, and faster, as by a Transformer of the same size.",
    threshold="Time of a block over the three longest of 256 to 4,096 tokens: slope of GAM at most 1.15, of attention "
    "with its scores in memory at least 1.5, GAM faster at 4,096. On bytes of English, medians of 3 seeds: bits per "
    "byte of GAM at most 1.03 of the Transformer's and no more than with the local branch alone, at more tokens per "
    "second than the Transformer.",
    experiments=(
        Experiment(
            name="scaling",
            about="One pre-norm block with a GELU feed-forward of 4 D, D 128, M 128 or 4 heads, batch 1: forward and "
            "backward, medians of 5 in turns; slopes of log time over log T. The deciding attention computes its "
            "scores as a matrix, as the paper's; the library's own does not.",
            measure=scaling,
            checks=(
                Check("slope of GAM", lambda n: n[GAM]["slope"], "<=", 1.15),
                Check("slope of attention, scores in memory", lambda n: n[SCORES]["slope"], ">=", 1.5),
                Check(
                    "time of GAM over attention's at the longest",
                    lambda n: _longest(n, GAM) / _longest(n, SCORES),
                    "<",
                    1.0,
                ),
                Check(
                    "the same against fused attention",
                    lambda n: _longest(n, GAM) / _longest(n, FUSED),
                    "<",
                    1.0,
                    deciding=False,
                ),
            ),
            draw=draw_scaling,
            seeded=False,
        ),
        Experiment(
            name="text",
            about="Bytes of Python's own help texts (pydoc_data.topics), the last tenth held out. Four blocks, D 64, "
            "M 64, GELU feed-forward of 256 (the Transformer's of 224 makes its parameters equal; 4 heads, rotary "
            "positions); windows of 128 bytes, batch 16, AdamW 2e-3, warm-up 50, clip 1, 800 steps. Tokens per second "
            "of forward and backward, medians of 16 in turns.",
            measure=text,
            checks=(
                Check(
                    "bits per byte of GAM over the Transformer's", _ratio(GAM, TRANSFORMER, "bits per byte"), "<=", 1.03
                ),
                Check(
                    "bits per byte of GAM over those of the local branch", _ratio(GAM, LOCAL, "bits per byte"), "<=", 1
                ),
                Check(
                    "tokens per second of GAM over the Transformer's",
                    _ratio(GAM, TRANSFORMER, "tokens per second"),
                    ">",
                    1.0,
                ),
                Check(
                    "bits per byte of GAM over those of the sum",
                    _ratio(GAM, SUM, "bits per byte"),
                    "<=",
                    1.0,
                    deciding=False,
                ),
            ),
            draw=draw_curves("loss (nats per byte)"),
        ),
        Experiment(
            name="induction",
            about="A limit, not a claim: what followed the special token, which stands 41 to 63 tokens back? Six "
            "layers of GAM see 13 tokens. D 64, SwiGLU of 128, two layers of everything else, batch 64, AdamW 3e-3, "
            "warm-up 50, clip 1, 400 steps; scored on 1,024 fresh rows. Chance is 0.067. It does not decide.",
            measure=far,
            checks=(
                Check("accuracy of GAM", lambda n: n[GAM]["accuracy"], "<=", 0.1, deciding=False),
                Check(
                    "accuracy of the better of GLA and the Transformer",
                    lambda n: max(n["GLA"]["accuracy"], n[TRANSFORMER]["accuracy"]),
                    ">=",
                    0.9,
                    deciding=False,
                ),
                Check(
                    "accuracy of GAM with a dynamic memory",
                    lambda n: n["GAM, dynamic memory"]["accuracy"],
                    ">=",
                    0.9,
                    deciding=False,
                ),
            ),
            draw=draw_curves("loss (nats)"),
        ),
    ),
    notes="The bank is a parameter, the same for every sequence: nothing but the convolution moves information between "
    "tokens, and L layers of width 3 see 2 L + 1 of them, 9 in the experiment on text. What the paper calls global "
    "is global over the corpus. The dynamic memory is an option of this library, not of the paper. Made smaller than "
    "planned: batch 1 for the scaling, D 64 instead of 128 on text. Positions: rotary in the Transformer, none in "
    "GAM, where the paper learns them; norms are RMSNorm, where the paper has LayerNorm. Times depend on the machine "
    "and on who else uses it. The paper's models on WikiText-2 and TinyStories are not trained here.",
)
