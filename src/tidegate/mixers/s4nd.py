"""S4ND: state space models along every axis of a video, over whole frames in space and causal in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.grid import GridConvolution, copies
from tidegate.nn.mixer import Mixer
from tidegate.nn.state_space import ChannelMap, DiagonalSystem
from tidegate.ops.diagonal_ssm import diagonal_ssm
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State


@register(
    "s4nd",
    family="scan",
    paper="s4nd",
    title="S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces",
    arxiv="2210.06583",
    tiny=dict(grid=(2, 4), state_dim=8),
)
class S4ND(Mixer):
    """Multidimensional state space model (S4ND) of frames.

    Equation, with c = dim / (h w ...) channels, per channel, k_j a diagonal state space model for each axis, rank r::

        z_t(p) = 1/r sum_{j<r} sum_{s<=t} k_j(t - s) sum_q k_j^1(p_1 - q_1) k_j^2(p_2 - q_2) ... x_s(q) + skip * x_t(p)
        y_t(p) = glu(gelu(z_t(p)) W)                                                                    pixel by pixel

    - A token is a frame of sizes `grid`, flattened row by row with the channels last. `grid=()` is S4 along time alone.
    - Space is looked at in both directions, because a frame is there as a whole (`two_sided=False`: from the top left
      only); time is causal, with a state for each pixel.
    - `rank` terms of products of kernels; the paper's experiments have 1.
    - `dt_min` and `dt_max` are for time, `grid_dt_min` and `grid_dt_max`, in pixels, for space.
    - No weight depends on the size of the grid: weights trained on one serve a finer one, with `grid_rescale` the ratio
      of the pixels' sizes (0.5 for twice the resolution), and `step_rescale` that of the frames' distances.
    - `bandlimit` is about space: see `tidegate.nn.grid.GridConvolution`, which is S4ND for images without time.

    Initialisation: S4D's, skip ~ N(0, 1), W as torch.nn.Linear. Source: arXiv 2210.06583. Shapes: x, y (B, T, dim).
    State: memory (r dim, N / 2), complex, for every pixel what S4D keeps of its channels.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: Sequence[int] = (),
        state_dim: int = 64,
        rank: int = 1,
        two_sided: bool = True,
        init: str = "legs",
        rule: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        grid_dt_min: float = 0.1,
        grid_dt_max: float = 1.0,
        step_rescale: float = 1.0,
        grid_rescale: float = 1.0,
        num_systems: int | None = None,
        bandlimit: float | None = None,
        output: str = "glu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.grid, self.state_dim, self.rank, self.two_sided = dim, tuple(grid), state_dim, rank, two_sided
        self.init, self.rule, self.dt_min, self.dt_max = init, rule, dt_min, dt_max
        self.grid_dt_min, self.grid_dt_max = grid_dt_min, grid_dt_max
        self.step_rescale, self.grid_rescale = step_rescale, grid_rescale
        self.num_systems, self.bandlimit, self.output = num_systems, bandlimit, output
        self.pixels = math.prod(self.grid)
        if any(size < 1 for size in self.grid) or dim % self.pixels:
            raise ValueError(f"grid: seen {self.grid}, wanted sizes from 1 on whose product divides dim = {dim}")
        for name, value in (("step_rescale", step_rescale), ("grid_rescale", grid_rescale)):
            if not value > 0:
                raise ValueError(f"{name}: seen {value}, wanted more than 0")
        if rank < 1:
            raise ValueError(f"rank: seen {rank}, wanted at least 1")
        if rule == "trapezoid":
            raise ValueError("rule: seen 'trapezoid', wanted 'zoh', 'bilinear' or 'dirac'")

        channels = dim // self.pixels
        system: dict[str, Any] = {"state_dim": state_dim, "init": init, "rule": rule, "num_systems": num_systems}
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        space: dict[str, Any] = {"rank": rank, "two_sided": two_sided, "bandlimit": bandlimit, "skip": False}
        space |= {"dt_min": grid_dt_min, "dt_max": grid_dt_max}
        self.space = GridConvolution(channels, len(self.grid), **system, **space, **factory) if self.grid else None
        self.time = DiagonalSystem(rank * channels, dt_min=dt_min, dt_max=dt_max, **system, **factory)
        self.skip = nn.Parameter(torch.empty(channels, **factory))
        self.output_map = ChannelMap(channels, output, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        nn.init.normal_(self.skip)

    def state_spec(self) -> dict[str, Any]:
        return {"memory": ((self.rank * self.dim, self.time.log_real.shape[1]), "complex")}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        batch, time, _ = x.shape
        channels = self.dim // self.pixels
        if self.space is None:
            z = copies(x, self.rank)
        else:
            frames = x.reshape(batch * time, *self.grid, channels)
            z = self.space.terms(frames, self.grid_rescale)  # pixels, rank, channels
            z = z.reshape(batch, time, self.dim * self.rank)
        decay, B, C = self.time.discretised(self.step_rescale)
        # The pixels stand side by side as channels do, each with the same models: nothing is moved or copied.
        decay, weight = (w.repeat(self.pixels, 1) for w in (decay, B * C))
        z, memory = diagonal_ssm(z, decay, weight, state=state["memory"], segments=segments)
        z = z.view(batch, time, self.pixels, self.rank, channels).mean(3)
        y = self.output_map(torch.addcmul(z, self.skip, x.view(batch, time, self.pixels, channels)))
        return zero_padding(y.flatten(2), segments), State(memory=memory)
