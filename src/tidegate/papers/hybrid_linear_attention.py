"""Hybrid linear attention: one softmax layer in four restores recall, and hardly matters for the loss on text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tidegate.models.language import LanguageModel
from tidegate.papers.experiment import Check, Experiment, Measured, Paper, Situation, thin
from tidegate.tasks.fit import fit
from tidegate.tasks.recall import PairModel, one_token_pairs, score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Layer = tuple[str, dict[str, Any]]

# One head, K = 8, V = 32 and no convolution: alone, a layer's state can hold 8 bindings exactly, and 32 are shown.
LINEAR: dict[str, Layer] = {
    "GLA": ("gla", {"num_heads": 1, "expand_k": 0.25}),
    "RetNet": ("retnet", {"num_heads": 1, "expand_k": 0.25, "expand_v": 1.0}),
    "Gated DeltaNet": ("gated-deltanet", {"num_heads": 1, "head_dim": 8, "expand_v": 4.0, "conv_width": None}),
}
FULL = "full attention"
STACKS = (*(f"{name}, {share}" for name in LINEAR for share in ("pure", "3:1")), FULL)


def stack(system: str, linear: dict[str, Layer], attention: Layer) -> list[Layer]:
    """Four layers: all linear, three linear and attention last, or all attention."""
    if system == FULL:
        return [attention] * 4
    name, share = system.split(", ")
    return [linear[name]] * 4 if share == "pure" else [linear[name]] * 3 + [attention]


# -- recall ------------------------------------------------------------------------------------------------------------
def recall(seed: int, situation: Situation) -> Measured:
    """Train every stack on the same batches of one-token pairs; score on fresh ones."""
    steps, batch = (2, 4) if situation.smoke else (500, 64)
    numbers, curves = {}, {}
    for system in STACKS:
        torch.manual_seed(seed)
        train, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
        layers = stack(system, LINEAR, ("attention", {"num_heads": 1}))
        model = PairModel(64, 16, 32, layers, feed_forward_dim=64)

        def draw(train: torch.Generator = train) -> tuple[Tensor, Tensor]:
            return one_token_pairs(batch, train)

        say = _teller(situation, "recall", seed, system, steps)
        curves[system] = thin(fit(model, draw, steps=steps, lr=5e-3, say=say))
        seen = score(model, [one_token_pairs(batch, test) for _ in range(1 if situation.smoke else 16)])
        numbers[system] = {"recall": seen["accuracy"], "loss": seen["loss"]}
        situation.note(f"recall, seed {seed}, {system}: recall {seen['accuracy']:.3f}, loss {seen['loss']:.3f}")
    return Measured(numbers, curves)


def draw_recall(panel: Axes, measured: Sequence[Measured]) -> None:
    """Recall against the share of attention layers; a dot per seed, a line through the means."""
    shares = {"pure": 0.0, "3:1": 0.25, FULL: 1.0}
    for index, name in enumerate(LINEAR):
        means = []
        for share, x in shares.items():
            system = FULL if share == FULL else f"{name}, {share}"
            values = [m.numbers[system]["recall"] for m in measured]
            means.append(sum(values) / len(values))
            panel.plot([x] * len(values), values, "o", color=f"C{index}", alpha=0.5, markersize=4)
        panel.plot(list(shares.values()), means, color=f"C{index}", label=name)
    panel.axhline(1 / 16, color="C7", linestyle=":", label="chance")
    panel.set(xlabel="share of softmax attention layers", ylabel="recall", ylim=(0, 1.05))
    panel.set_xticks([0, 0.25, 1], ["0", "1/4", "1"])
    panel.legend(fontsize=8)


# -- text --------------------------------------------------------------------------------------------------------------
def text(seed: int, situation: Situation) -> Measured:
    """Train the GLA stacks on bytes of English; the loss on the part held out."""
    steps, batch, length = (2, 2, 32) if situation.smoke else (300, 16, 128)
    learnt, held_out = topics()
    fresh = _windows(held_out, torch.arange(0, len(held_out) - length - 1, length), length)
    numbers, curves = {}, {}
    for system in ("GLA, pure", "GLA, 3:1", FULL):
        torch.manual_seed(seed)
        train = torch.Generator().manual_seed(seed)
        layers = stack(system, {"GLA": ("gla", {"num_heads": 2})}, ("attention", {"num_heads": 2}))
        model = LanguageModel(256, 64, layers, feed_forward_dim=128)

        def draw(train: torch.Generator = train) -> tuple[Tensor, Tensor]:
            begins = torch.randint(len(learnt) - length, (batch,), generator=train)
            return _windows(learnt, begins, length)

        say = _teller(situation, "text", seed, system, steps)
        curves[system] = thin(fit(model, draw, steps=steps, lr=3e-3, say=say))
        batches = zip(*(part.split(64) for part in fresh), strict=True)
        loss = score(model, list(batches)[: 1 if situation.smoke else None])["loss"]
        numbers[system] = {"bits per byte": loss / math.log(2)}
        situation.note(f"text, seed {seed}, {system}: {numbers[system]['bits per byte']:.3f} bits per byte")
    return Measured(numbers, curves)


def topics() -> tuple[Tensor, Tensor]:
    """Help texts of Python itself as bytes: nine tenths to learn, the last tenth to score."""
    from pydoc_data.topics import topics as texts

    content = torch.frombuffer(bytearray("\n\n".join(texts.values()).encode()), dtype=torch.uint8).long()
    cut = len(content) * 9 // 10
    return content[:cut], content[cut:]


def _windows(content: Tensor, begins: Tensor, length: int) -> tuple[Tensor, Tensor]:
    rows = content[begins[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def spread(numbers: Any) -> float:
    """Distance between the best and the worst stack, as a share of the best."""
    values = [row["bits per byte"] for row in numbers.values()]
    return (max(values) - min(values)) / min(values)


def draw_text(panel: Axes, measured: Sequence[Measured]) -> None:
    """Bits per byte of every stack; a dot per seed."""
    systems = list(measured[0].numbers)
    for index, system in enumerate(systems):
        values = [m.numbers[system]["bits per byte"] for m in measured]
        panel.bar(index, sum(values) / len(values), color="C0", alpha=0.4, width=0.6)
        panel.plot([index] * len(values), values, "o", color="C0", markersize=4)
    panel.set_xticks(range(len(systems)), systems)
    panel.set(ylabel="bits per byte, held-out text")


def _teller(situation: Situation, name: str, seed: int, system: str, steps: int) -> Callable[[int, float], None]:
    return lambda step, loss: situation.say(f"{name}, seed {seed}, {system}: step {step} of {steps}, loss {loss:.3f}")


def _gap(name: str) -> Callable[..., float]:
    return lambda n: n[f"{name}, 3:1"]["recall"] - n[f"{name}, pure"]["recall"]


PAPER = Paper(
    slug="hybrid-linear-attention",
    title="A Systematic Analysis of Hybrid Linear Attention",
    arxiv="2507.06457",
    systems=STACKS,
    claim="Replacing one linear layer in four by softmax attention lifts recall to that of full attention, while the "
    "loss on text hardly depends on the share of attention.",
    threshold="Medians of 3 seeds, stacks of GLA: recall(pure) + 0.2 <= recall(3:1) <= recall(full) + 0.02, and on "
    "bytes of English the held-out loss of the three stacks differs by less than 5%.",
    experiments=(
        Experiment(
            name="recall",
            about="One-token pairs: 32 tokens show different keys (of 64), each with a value (of 16); 32 tokens ask "
            "for them. Four blocks, D 32, one head, K 8, V 32, SwiGLU of 64, no convolution; attention, where there is "
            "one layer of it, is the last. AdamW 5e-3, warm-up 50, clip 1, batch 64, 500 steps; scored on 1,024 fresh "
            "rows. Chance is 0.0625.",
            measure=recall,
            checks=(
                Check("GLA: recall of 3:1 minus recall of pure", _gap("GLA"), ">=", 0.2),
                Check(
                    "GLA: recall of 3:1 minus recall of full attention",
                    lambda n: n["GLA, 3:1"]["recall"] - n[FULL]["recall"],
                    "<=",
                    0.02,
                ),
                Check("RetNet: recall of 3:1 minus recall of pure", _gap("RetNet"), ">=", 0.2, deciding=False),
                Check(
                    "Gated DeltaNet: recall of 3:1 minus recall of pure",
                    _gap("Gated DeltaNet"),
                    ">=",
                    0.2,
                    deciding=False,
                ),
                Check(
                    "pure: recall of RetNet minus the lower of GLA and Gated DeltaNet",
                    lambda n: (
                        n["RetNet, pure"]["recall"] - min(n["GLA, pure"]["recall"], n["Gated DeltaNet, pure"]["recall"])
                    ),
                    "<",
                    0.0,
                    deciding=False,
                ),
            ),
            draw=draw_recall,
        ),
        Experiment(
            name="text",
            about="Bytes of Python's own help texts (pydoc_data.topics), the last tenth held out. Four blocks, D 64, "
            "2 heads, SwiGLU of 128; windows of 128 bytes, batch 16, AdamW 3e-3, warm-up 50, clip 1, 300 steps.",
            measure=text,
            checks=(Check("(worst - best) / best of the three stacks", spread, "<", 0.05),),
            draw=draw_text,
        ),
    ),
    notes="HGRN-2, HGRN and DeltaNet of the paper are not tried yet. Four layers whose states hold 8 bindings each can "
    "share the work, and a linear stack goes on improving for long: a gap to 3:1 is one after 500 steps, not for ever. "
    "Left open by the paper: no weight decay, and a constant rate after the warm-up, were chosen beforehand; 500 steps "
    "and standard normal embeddings after trials with seed 0 of recall (pure GLA had 0.68 there, Gated DeltaNet 0.91, "
    "more than after 300 steps); the bound of 5% on text was kept after a trial with seed 100 (2.6%). Python's version "
    "changes the text a little. The paper's models (340M and 1.3B parameters) are not trained here.",
)
