"""Systems on one page: a row for each, with its hidden attention, its eigenvalues and how it fades."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from tidegate.methods.explain.system import System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8  # heads that get a line of their own
MANY = 64  # heads that are looked at, evenly spaced, where there are more (the channels of a scan)
LABELLED = 48  # tokens that are written along the axes
INK, GREY, LINE, PALE = "#263238", "#607d8b", "#b0bec5", "#eceff1"


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

    figure = Figure(figsize=(15, 4.7 * len(views) + 0.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(len(views), 3, squeeze=False, width_ratios=(1.2, 1, 1.15))
    for (attention, eigenvalues, fading), view, name in zip(panels, views, titles, strict=True):
        _draw_attention(attention, view, tokens)
        _draw_eigenvalues(eigenvalues, view)
        _draw_profile(fading, view)
        attention.set_title(name, loc="left", fontsize=14, fontweight="bold", color=INK, pad=10)
        kind = f"{view.system.op.replace('_', ' ')}, {view.count} {view.unit}{'s' if view.count > 1 else ''}"
        attention.set_title(kind, loc="right", fontsize=10, color=GREY, pad=10)
        fading.set_title("how it fades", fontsize=11, color=INK, pad=10)
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
    shades = ["#ffffff", "#b2dfdb", "#26a69a", "#00695c", "#062b2b"]
    ink = LinearSegmentedColormap.from_list("ink", shades).with_extremes(bad="white")
    panel.imshow(weights, cmap=ink, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    panel.plot(*_staircase(time), color=LINE, linewidth=0.8)
    own = len(tokens) == time and view.system.segments is None
    if own and time <= LABELLED:
        labels = [visible(token) for token in (reversed(tokens) if view.system.backwards else tokens)]
        letters: dict[str, Any] = {"fontsize": min(10.0, 330 / time), "family": "monospace"}
        panel.set_xticks(range(time), labels, rotation=90 if max(map(len, labels)) > 1 else 0, **letters)
        panel.set_yticks(range(time), labels, **letters)
        panel.tick_params(length=0, pad=3, colors=INK)
    else:
        panel.tick_params(labelsize=8, colors=INK)
    panel.set_xlabel("token that wrote", fontsize=9, color=GREY)
    panel.set_ylabel("token that reads", fontsize=9, color=GREY)
    _without_frame(panel)


def _staircase(time: int) -> tuple[np.ndarray, np.ndarray]:
    """The border of what a causal matrix may hold."""
    steps = np.arange(time + 1) - 0.5
    x, y = np.repeat(steps, 2)[1:], np.repeat(steps, 2)[:-1]
    return np.concatenate([[-0.5], x, [-0.5, -0.5]]), np.concatenate([[-0.5], y, [time - 0.5, -0.5]])


def _draw_eigenvalues(panel: Axes, view: View) -> None:
    """Complex ones as points in the plane, with the unit circle; real ones as a density on the line."""
    numbers = view.system.eigenvalues[0][~view.system.matrices.first()[0]]  # (tokens, H, 1 or N)
    real, imaginary = numbers.real.numpy(), numbers.imag.numpy()
    far = np.quantile(np.hypot(real, imaginary), 0.99) if real.size else 1.0
    limit = float(np.clip(1.05 * far, 1.15, 2.5))
    if not real.size or np.abs(imaginary).max() < 1e-9:
        _draw_line(panel, view, real, limit)
    else:
        _draw_plane(panel, view, real, imaginary, limit)
    outside = float((np.hypot(real, imaginary) > limit * (1 + 1e-9)).mean()) if real.size else 0.0
    title = "eigenvalues of the transitions" + (f" ({outside:.1%} further out)" if outside >= 5e-4 else "")
    panel.set_title(title, fontsize=11, color=INK, pad=10)
    panel.tick_params(labelsize=9, length=0, colors=INK)
    _without_frame(panel)


def _draw_plane(panel: Axes, view: View, real: np.ndarray, imaginary: np.ndarray, limit: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 361)
    panel.fill(np.cos(turn), np.sin(turn), color=PALE, zorder=0)
    panel.plot(np.cos(turn), np.sin(turn), color=LINE, linewidth=1, zorder=1)
    panel.axhline(0, color=LINE, linewidth=0.7, zorder=1)
    panel.axvline(0, color=LINE, linewidth=0.7, zorder=1)
    dot, alpha = (16, 0.6) if real.size < 600 else (8, 0.35) if real.size < 6000 else (4, 0.2)
    for heads, colour in _groups(view, real.shape[1]):
        panel.scatter(real[:, heads], imaginary[:, heads], s=dot, color=colour, alpha=alpha, linewidth=0, zorder=2)
    panel.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[-1, 0, 1])
    panel.set_yticks([-1, 0, 1], ["-i", "0", "i"])


def _draw_line(panel: Axes, view: View, real: np.ndarray, limit: float) -> None:
    """A ridge for every head, or one for all of many. Heights are square roots, so that few are seen beside many."""
    groups = _groups(view, real.shape[1] if real.size else 1)
    panel.axvspan(-1, 1, color=PALE, zorder=0)
    for place in (-1, 0, 1):
        panel.axvline(place, color=LINE, linewidth=1, zorder=1)
    fine = int(np.clip(1.5 * np.sqrt(real.size / len(groups)) / limit, 10, 60))  # bins between 0 and 1
    edges = np.arange(-np.ceil(limit * fine), np.ceil(limit * fine) + 1) / fine + 1e-9  # 1 belongs to what is below
    for index, (heads, colour) in enumerate(groups):
        floor = len(groups) - 1 - index
        height = np.sqrt(np.histogram(real[:, heads], bins=edges)[0]) if real.size else np.zeros(len(edges) - 1)
        height = np.append(height, height[-1]) / max(height.max(), 1) * 0.86
        panel.fill_between(edges, floor, floor + height, step="post", color=colour, alpha=0.55, linewidth=0, zorder=2)
        panel.step(edges, floor + height, where="post", color=colour, linewidth=1, zorder=3)
        if len(groups) > 1:
            label = f" {view.unit} {view.heads[index]}"
            panel.text(-limit, floor + 0.08, label, fontsize=8, color=colour, zorder=4)
    panel.set(xlim=(-limit, limit), ylim=(-0.02 * len(groups), len(groups)), yticks=[])
    panel.set_xticks([-1, 0, 1], ["-1\nkept, sign flips", "0\nforgotten", "1\nkept"])


def _draw_profile(panel: Axes, view: View) -> None:
    """Every head's decay profile relative to its largest value; many heads as a median and a band.

    Without the longest lags, which a few pairs of tokens have and whose means jump.
    """
    profile, lengths = view.system.decay_profile[0].numpy(), view.system.memory_length[0]
    time = profile.shape[1]
    shown = max(1, time - max(2, time // 12))
    relative = (profile / np.maximum(profile.max(1, keepdims=True), np.finfo(float).tiny))[:, :shown]
    lags = np.arange(shown)
    groups = _groups(view, len(profile))
    if len(groups) > 1 or len(profile) == 1:
        for index, (heads, colour) in enumerate(groups):
            label = f"{view.unit} {view.heads[index]}: {_tokens(lengths[heads])}"
            panel.plot(
                lags, relative[index], color=colour, linewidth=2, label=label, marker="o" if shown == 1 else None
            )
        title = "memory length"
    else:
        for line in relative[:: max(1, len(relative) // 24)]:
            panel.plot(lags, line, color=groups[0][1], linewidth=0.6, alpha=0.35)
        low, middle, high = np.quantile(relative, (0.1, 0.5, 0.9), axis=0)
        panel.fill_between(lags, np.maximum(low, 1e-9), high, color=groups[0][1], alpha=0.15, linewidth=0)
        of = f"{len(view.heads)} of {view.count}" if len(view.heads) < view.count else f"{view.count}"
        panel.plot(lags, middle, color=INK, linewidth=2, label=f"median of {of} {view.unit}s")
        title = f"memory length {_tokens(lengths)}"
    panel.legend(fontsize=9, frameon=False, title=title, title_fontsize=9, labelcolor=INK, loc="best")
    seen = relative[relative > 0]
    lowest = np.quantile(seen, 0.02) if seen.size else 1.0
    panel.set(yscale="log", ylim=(float(np.clip(10 ** np.floor(np.log10(lowest)), 1e-6, 1e-2)), 1.6))
    panel.set_xlim(0, max(1, shown - 1))
    panel.set_xlabel("lag in tokens", fontsize=9, color=GREY)
    panel.set_ylabel("mean |weight|, relative", fontsize=9, color=GREY)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _without_frame(panel: Axes) -> None:
    for spine in panel.spines.values():
        spine.set_visible(False)


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
