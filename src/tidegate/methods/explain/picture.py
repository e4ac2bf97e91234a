"""Systems on one page: a row for each, with its hidden attention, its eigenvalues and how it fades."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tidegate.methods.explain.system import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8  # heads that get a line of their own
MANY = 64  # heads that are looked at, evenly spaced, where there are more (the channels of a scan)
LABELLED = 48  # tokens that are written along the axes
INK, PALE = "#263238", "#eceff1"


@dataclass(frozen=True)
class View:
    """What is drawn of a system: numbers of its first row of the batch, and which heads they are of."""

    system: System
    heads: list[int]
    count: int  # heads there are

    @staticmethod
    def of(system: System) -> View:
        count = system.matrices.readout.shape[2]
        heads = sorted({round(i) for i in np.linspace(0, count - 1, min(count, MANY))})
        return View(system if len(heads) == count else system.select(heads), heads, count)

    @property
    def unit(self) -> str:
        """What shares an attention matrix."""
        return "head" if self.system.values.shape[-1] > 1 or self.count <= FEW else "channel"


def picture(views: Sequence[View], titles: Sequence[str], tokens: Sequence[str] = ()) -> bytes:
    """A PNG with a row per system; `tokens` are written along the axes where they are few, and the system's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.3 * len(views) + 0.6), layout="constrained", facecolor="white")
    panels = figure.subplots(len(views), 3, squeeze=False, width_ratios=(1.15, 1, 1.25))
    for (attention, circle, fading), view, name in zip(panels, views, titles, strict=True):
        _draw_attention(attention, view, tokens)
        _draw_eigenvalues(circle, view)
        _draw_profile(fading, view)
        attention.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK)
        circle.set_title("eigenvalues of the transitions", fontsize=10, color=INK)
        fading.set_title("how it fades", fontsize=10, color=INK)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def _draw_attention(panel: Axes, view: View, tokens: Sequence[str]) -> None:
    """Mean over heads of |attention|, every row as a share of its largest weight."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    size = view.system.attention[0].abs()
    time = size.shape[1]
    weights = size.unflatten(-1, (time, -1)).sum(-1).mean(0).numpy()
    weights = weights / np.maximum(weights.max(1, keepdims=True), np.finfo(float).tiny)
    weights[np.triu_indices(time, 1)] = np.nan
    ink = LinearSegmentedColormap.from_list(
        "ink", ["#ffffff", "#b2dfdb", "#26a69a", "#00695c", "#062b2b"]
    ).with_extremes(bad=PALE)
    panel.imshow(weights, cmap=ink, norm=PowerNorm(0.6, 0, 1), interpolation="nearest")
    own = len(tokens) == time and view.system.segments is None
    if own and time <= LABELLED:
        labels = [visible(token) for token in (reversed(tokens) if view.system.backwards else tokens)]
        size_of_letters = min(9.0, 260 / time)
        panel.set_xticks(range(time), labels, rotation=90, fontsize=size_of_letters, family="monospace")
        panel.set_yticks(range(time), labels, fontsize=size_of_letters, family="monospace")
        panel.tick_params(length=0, pad=2, colors=INK)
    else:
        panel.tick_params(labelsize=8, colors=INK)
    panel.set_xlabel("token that wrote", fontsize=9, color=INK)
    panel.set_ylabel("token that reads", fontsize=9, color=INK)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _draw_eigenvalues(panel: Axes, view: View) -> None:
    """Complex ones as points in the plane; real ones as a density on the real line. Both with the unit circle."""
    numbers = view.system.eigenvalues[0][~view.system.matrices.first()[0]]  # (tokens, H, 1 or N)
    real, imaginary = numbers.real.numpy(), numbers.imag.numpy()
    on_the_line = not len(real) or np.abs(imaginary).max() < 1e-9
    far = np.quantile(np.hypot(real, imaginary), 0.99) if len(real) else 1.0
    limit = float(np.clip(1.05 * far, 1.15, 2.5))
    turn = np.linspace(0, 2 * np.pi, 361)
    panel.fill(np.cos(turn), np.sin(turn), color=PALE, zorder=0)
    panel.plot(np.cos(turn), np.sin(turn), color="#90a4ae", linewidth=1, zorder=1)
    panel.axhline(0, color="#b0bec5", linewidth=0.7, zorder=1)
    panel.axvline(0, color="#b0bec5", linewidth=0.7, zorder=1)
    groups = _groups(view, real.shape[1] if len(real) else 1)
    if on_the_line:
        edges = np.linspace(-limit, limit, 93)
        densities = [np.histogram(real[:, heads], bins=edges)[0] for heads, _ in groups]
        highest = max(max((density.max() for density in densities), default=1), 1)
        for density, (_, colour) in zip(densities, groups, strict=True):
            height = np.append(density, density[-1]) / highest * 0.9
            panel.fill_between(edges, height, step="post", color=colour, alpha=0.45, linewidth=0, zorder=2)
            panel.step(edges, height, where="post", color=colour, linewidth=1, zorder=3)
    else:
        points = sum(real[:, heads].size for heads, _ in groups)
        dot, alpha = (14, 0.55) if points < 600 else (7, 0.3) if points < 6000 else (3, 0.15)
        for heads, colour in groups:
            panel.scatter(real[:, heads], imaginary[:, heads], s=dot, color=colour, alpha=alpha, linewidth=0, zorder=2)
    outside = float((np.abs(real) > limit).mean()) if len(real) else 0.0
    if outside > 0:
        panel.text(
            0.98, 0.02, f"{outside:.1%} further out", transform=panel.transAxes, ha="right", fontsize=8, color=INK
        )
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    panel.tick_params(labelsize=8, colors=INK)
    for spine in panel.spines.values():
        spine.set_visible(False)


def _draw_profile(panel: Axes, view: View) -> None:
    """Every head's decay profile relative to its largest value; many heads as a median and a band."""
    profile, lengths = view.system.decay_profile[0].numpy(), view.system.memory_length[0]
    time = profile.shape[1]
    relative = profile / np.maximum(profile.max(1, keepdims=True), np.finfo(float).tiny)
    lags = np.arange(time)
    groups = _groups(view, len(profile))
    if len(profile) <= FEW:
        for index, (heads, colour) in enumerate(groups):
            label = f"{view.unit} {view.heads[index]}: {_tokens(lengths[heads])}"
            panel.plot(lags, relative[index], color=colour, linewidth=1.8, label=label)
        panel.legend(fontsize=8, frameon=False, title="memory length", title_fontsize=8, labelcolor=INK, loc="best")
    else:
        for line in relative[:: max(1, len(relative) // 24)]:
            panel.plot(lags, line, color=groups[0][1], linewidth=0.6, alpha=0.35)
        low, middle, high = np.quantile(relative, (0.1, 0.5, 0.9), axis=0)
        panel.fill_between(lags, np.maximum(low, 1e-9), high, color=groups[0][1], alpha=0.15, linewidth=0)
        of = f"{len(view.heads)} of {view.count}" if len(view.heads) < view.count else f"{view.count}"
        panel.plot(lags, middle, color=INK, linewidth=2, label=f"median of {of} {view.unit}s")
        panel.legend(fontsize=8, frameon=False, title=f"memory length {_tokens(lengths)}", title_fontsize=8, loc="best")
    panel.set(yscale="log", ylim=(1e-4, 1.6), xlim=(0, max(1, time - 1)))
    panel.set_xlabel("lag in tokens", fontsize=9, color=INK)
    panel.set_ylabel("mean |weight|, relative", fontsize=9, color=INK)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _groups(view: View, heads: int) -> list[tuple[slice, str]]:
    """Few heads have a colour each, many have one together."""
    if heads > FEW:
        return [(slice(None), "#00897b")]
    colours = ("#00897b", "#d81b60", "#3949ab", "#f9a825", "#6d4c41", "#00acc1", "#8e24aa", "#7cb342")
    return [(slice(head, head + 1), colours[head]) for head in range(heads)]


def _tokens(lengths: Tensor) -> str:
    """`4.2 tokens`, or the median and the range of several."""
    known = lengths[~lengths.isnan()]
    if not len(known):
        return "none"
    if len(known) == 1:
        return f"{known.item():.1f} tokens"
    return f"{known.median():.1f} tokens ({known.min():.1f} to {known.max():.1f})"


def visible(token: str) -> str:
    """A token as a label: blanks and controls as signs, and not too long.

    >>> visible(" the"), visible("\\n"), visible("")
    ('␣the', '⏎', '·')
    """
    signs = {" ": "␣", "\n": "⏎", "\t": "⇥"}
    shown = "".join(signs.get(c, c if unicodedata.category(c)[0] != "C" else "·") for c in token)
    return (shown[:9] + "…" if len(shown) > 10 else shown) or "·"
