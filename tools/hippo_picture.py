"""Draw docs/images/hippo-reconstruction.png: a signal, and what memories of a few coefficients still have of it.

From the checkout's folder:

    python tools/hippo_picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from tidegate.nn.projection import Projection
from tidegate.tasks.signals import white_signal

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "hippo-reconstruction.png"
TOKENS, WINDOW = 2000, 500


def main() -> None:
    """Three panels over one signal: LegS with all of the past alike, LegS fading, and windows."""
    signal = white_signal(1, torch.Generator().manual_seed(4), length=TOKENS, dt=1e-3, freq=8.0)[0]
    time = torch.arange(TOKENS) + 0.5  # the middle of each token

    def recalled(ages: torch.Tensor, **options: object) -> torch.Tensor:
        project = Projection(1, **options)  # type: ignore[arg-type]
        coefficients, _ = project(signal.view(1, -1, 1))
        return project.reconstruct(coefficients[0, -1, 0], ages)

    ages, inside = TOKENS - time, TOKENS - time < WINDOW
    fading = 4 / TOKENS
    panels = [
        ("legs, step None: all of the past alike", time > 0,
         [(f"N = {n}", recalled(ages / TOKENS, states=n)) for n in (16, 32, 64)]),
        ("legs, step 4 / T: the past fades", time > 0,
         [(f"N = {n}", recalled(ages, states=n, step=fading)) for n in (16, 32, 64)]),
        (f"windows of {WINDOW} tokens, step 2 / {WINDOW}, N = 16", inside,
         [(name, recalled(ages, states=16, measure=name, step=2 / WINDOW)) for name in ("legt", "fout")]),
    ]  # fmt: skip

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True)
    for axis, (title, shown, curves) in zip(axes, panels, strict=True):
        axis.plot(time, signal, color="0.75", linewidth=4, label="signal")
        for index, (name, curve) in enumerate(curves):
            axis.plot(time[shown], curve[shown], color=f"C{index}", linewidth=1.2, label=name)
        if not bool(shown.all()):
            axis.axvspan(TOKENS - WINDOW, TOKENS, color="0.95", zorder=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axis.grid(alpha=0.3)
    low, high = float(signal.min()), float(signal.max())
    axes[0].set(xlim=(0, TOKENS), ylim=(1.3 * low - 0.3 * high, 1.3 * high - 0.3 * low))
    axes[-1].set_xlabel("tokens; all curves are drawn from the coefficients after the last one")
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
