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
from tidegate.tasks.language.topics import all_windows, random_windows, topics
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
    return Measured.of(STACKS, lambda system: _recall_of(system, seed, situation))


def _recall_of(system: str, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    steps, batch = (5, 4) if situation.smoke else (500, 64)
    on_the_way = {steps // 5: "recall after 100", steps * 3 // 5: "after 300"}
    torch.manual_seed(seed)
    train, test = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(10_000 + seed)
    fresh = [one_token_pairs(batch, test) for _ in range(1 if situation.smoke else 16)]
    model = PairModel(64, 16, 32, stack(system, LINEAR, ("attention", {"num_heads": 1})), feed_forward_dim=64)
    numbers: dict[str, float] = {}

    def say(step: int, loss: float) -> None:
        situation.say(f"recall, seed {seed}, {system}: step {step} of {steps}, loss {loss:.3f}")
        if step in on_the_way:
            numbers[on_the_way[step]] = score(model, fresh)["accuracy"]

    curve = thin(fit(model, lambda: one_token_pairs(batch, train), steps=steps, lr=5e-3, say=say))
    seen = score(model, fresh)
    numbers |= {"after 500": seen["accuracy"], "loss": seen["loss"]}
    situation.note(f"recall, seed {seed}, {system}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    return numbers, curve


def draw_recall(panel: Axes, measured: Sequence[Measured]) -> None:
    """Recall against the share of attention layers: a dot per seed, lines through means, dashed after 300 steps."""
    shares = {"pure": 0.0, "3:1": 0.25, FULL: 1.0}
    for index, name in enumerate(LINEAR):
        systems = [FULL if share == FULL else f"{name}, {share}" for share in shares]
        for when, style in (("after 300", "--"), ("after 500", "-")):
            seen = [[m.numbers[system][when] for m in measured] for system in systems]
            means = [sum(values) / len(values) for values in seen]
            panel.plot(list(shares.values()), means, style, color=f"C{index}", label=f"{name}, {when} steps")
        for x, values in zip(shares.values(), seen, strict=True):
            panel.plot([x] * len(values), values, "o", color=f"C{index}", alpha=0.5, markersize=4)
    panel.axhline(1 / 16, color="C7", linestyle=":", label="chance")
    panel.set(xlabel="share of softmax attention layers", ylabel="recall", ylim=(0, 1.05))
    panel.set_xticks([0, 0.25, 1], ["0", "1/4", "1"])
    panel.legend(fontsize=7)


# -- text --------------------------------------------------------------------------------------------------------------
def text(seed: int, situation: Situation) -> Measured:
    """Train the GLA stacks on bytes of English; the loss on the part held out."""
    return Measured.of(("GLA, pure", "GLA, 3:1", FULL), lambda system: _text_of(system, seed, situation))


def _text_of(system: str, seed: int, situation: Situation) -> tuple[dict[str, float], list[float]]:
    steps, batch, length = (2, 2, 32) if situation.smoke else (300, 16, 128)
    learnt, held_out = topics()
    batches = all_windows(held_out, length)
    torch.manual_seed(seed)
    train = torch.Generator().manual_seed(seed)
    layers = stack(system, {"GLA": ("gla", {"num_heads": 2})}, ("attention", {"num_heads": 2}))
    model = LanguageModel(256, 64, layers, feed_forward_dim=128)

    def draw() -> tuple[Tensor, Tensor]:
        return random_windows(learnt, batch, length, train)

    def say(step: int, loss: float) -> None:
        situation.say(f"text, seed {seed}, {system}: step {step} of {steps}, loss {loss:.3f}")

    curve = thin(fit(model, draw, steps=steps, lr=3e-3, say=say))
    bits = score(model, batches[: 1 if situation.smoke else None])["loss"] / math.log(2)
    situation.note(f"text, seed {seed}, {system}: {bits:.3f} bits per byte")
    return {"bits per byte": bits}, curve


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


def _gap(name: str, when: str = "after 500") -> Callable[..., float]:
    return lambda n: n[f"{name}, 3:1"][when] - n[f"{name}, pure"][when]


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
                    lambda n: n["GLA, 3:1"]["after 500"] - n[FULL]["after 500"],
                    "<=",
                    0.02,
                ),
                Check(
                    "GLA: recall of 3:1 minus recall of pure, after 300 steps",
                    _gap("GLA", "after 300"),
                    ">=",
                    0.2,
                    deciding=False,
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
                        n["RetNet, pure"]["after 500"]
                        - min(n["GLA, pure"]["after 500"], n["Gated DeltaNet, pure"]["after 500"])
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
    "share the work: 32 bindings fit into a pure stack once it has learnt to spread them, so its recall goes on "
    "rising and the gap is one of so many steps, not for ever. Left open by the paper: no weight decay, and a "
    "constant rate after the warm-up, were chosen beforehand; 500 steps and standard normal embeddings after "
    "trials with seed 0 of recall on another version of the net (pure GLA had 0.68 there, Gated DeltaNet 0.91); "
    "the looks at 100 and 300 steps were added after a first run of two seeds; the bound of 5% on text was kept "
    "after a trial with seed 100 (2.6%). Python's version changes the text a little. The paper's models (340M and "
    "1.3B parameters) are not trained here.",
)
