"""Gated associative memory: a short convolution and a look-up in a learnt bank, each behind a gate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.nn.mixer import Mixer
from tidegate.nn.parts import ShortConvolution, check_heads, split_heads
from tidegate.nn.routing import largest
from tidegate.ops import linear_attention
from tidegate.registry import register
from tidegate.segments import Segments, zero_padding
from tidegate.state import State

EPS = 1e-6  # added to the normaliser of a dynamic memory


@register(
    "gam",
    family="linear_attention",
    paper="gam",
    title="Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
    arxiv="2509.00605",
    tiny=dict(num_slots=12),
    presets={"paper": {}, "dynamic": dict(memory="dynamic")},
)
class GatedAssociativeMemory(Mixer):
    """Gated associative memory (GAM).

    Equation (A is the bank, M x D, a part of its columns for every head)::

        local_t = b + sum_{j < W} w_j * x_{t - j dilation}
        p_t = softmax(x_t A^T / temperature)        global_t = p_t A
        y_t = sigmoid(x_t W_l + b_l) * local_t + sigmoid(x_t W_g + b_g) * global_t

    - The bank is a parameter: it holds what is common in the corpus, nothing of the present sequence. Only the
      convolution sees other tokens, so L layers look back L (W - 1) dilation tokens, and no further.
    - `memory="dynamic"` files the tokens themselves under the bank's addresses, so that the look-up becomes linear
      attention with phi = softmax(x A^T): S_t = S_{t-1} + phi_t (x_t, 1)^T, global_t the first D of S_t^T phi_t over
      the last. That is ours, not the paper's.
    - `separate_banks` reads other vectors than it addresses; a dynamic memory then writes by other addresses.
    - `num_heads` cuts the channels, each part with a look-up of its own. `temperature=None` is sqrt(D / num_heads);
      `learn_temperature` starts there. `read_slots` keeps the softmax to the likeliest slots.
    - `gate`: "sigmoid" (the paper), "softmax" between the two branches, "none" their sum. `branches`: "both", "local"
      or "global" alone, then without gate. The paper's ablations.
    - There is no projection before or after; the mixer is to be given normalised inputs.

    Initialisation (official code): the bank Xavier-uniform, the rest as PyTorch.
    Source: arXiv 2509.00605. Shapes: x, y (B, T, dim); M = num_slots.
    State: convolution ((W - 1) dilation, dim); dynamic: memory (num_heads, M, dim / num_heads + 1).
    """

    def __init__(
        self,
        dim: int,
        *,
        num_slots: int = 512,
        num_heads: int = 1,
        memory: str = "static",
        separate_banks: bool = False,
        conv_width: int = 3,
        dilation: int = 1,
        gate: str = "sigmoid",
        branches: str = "both",
        temperature: float | None = 1.0,
        learn_temperature: bool = False,
        read_slots: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.num_slots, self.num_heads, self.memory = dim, num_slots, num_heads, memory
        self.separate_banks, self.conv_width, self.dilation = separate_banks, conv_width, dilation
        self.gate, self.branches, self.temperature = gate, branches, temperature
        self.learn_temperature, self.read_slots = learn_temperature, read_slots
        self.head_dim = check_heads(dim, num_heads)
        for name, size in (("num_slots", num_slots), ("conv_width", conv_width), ("dilation", dilation)):
            if size < 1:
                raise ValueError(f"{name}: seen {size}, wanted at least 1")
        choices = {
            "memory": (memory, ("static", "dynamic")),
            "gate": (gate, ("sigmoid", "softmax", "none")),
            "branches": (branches, ("both", "local", "global")),
        }
        for name, (seen, wanted) in choices.items():
            if seen not in wanted:
                raise ValueError(f"{name}: seen {seen!r}, wanted one of {', '.join(wanted)}")
        if temperature is not None and temperature <= 0:
            raise ValueError(f"temperature: seen {temperature}, wanted a positive number, or None for sqrt(head dim)")
        if read_slots is not None and not 1 <= read_slots <= num_slots:
            raise ValueError(f"read_slots: seen {read_slots}, wanted 1 to num_slots = {num_slots}, or None for all")
        self.start_temperature = self.head_dim**0.5 if temperature is None else temperature
        self.local, self.lookup = branches != "global", branches != "local"

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convolution = self.bank = self.value_bank = self.log_temperature = self.gate_proj = None
        if self.local:
            self.convolution = ShortConvolution(
                dim, conv_width, bias=True, activation=False, dilation=dilation, **factory
            )
        if self.lookup:
            self.bank = nn.Parameter(torch.empty(num_slots, dim, **factory))
            self.value_bank = nn.Parameter(torch.empty(num_slots, dim, **factory)) if separate_banks else None
            self.log_temperature = nn.Parameter(torch.empty(num_heads, **factory)) if learn_temperature else None
        if self.local and self.lookup and gate != "none":
            self.gate_proj = nn.Linear(dim, 2 * dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class docstring."""
        super().reset_parameters()
        for bank in (self.bank, self.value_bank):
            if bank is not None:
                nn.init.xavier_uniform_(bank)
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.start_temperature))

    def state_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = {}
        if self.local:
            spec["convolution"] = (((self.conv_width - 1) * self.dilation, self.dim), "input")
        if self.lookup and self.memory == "dynamic":
            spec["memory"] = (self.num_heads, self.num_slots, self.head_dim + 1)
        return spec

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        new: dict[str, Tensor] = {}
        branches = []
        if self.convolution is not None:
            local, new["convolution"] = self.convolution(x, state["convolution"], segments)
            branches.append(local)
        if self.bank is not None:
            heads = split_heads(x, self.num_heads)
            other = self.bank if self.value_bank is None else self.value_bank
            read = self._resembles(heads, self.bank)
            if self.memory == "static":
                found = torch.einsum("bthm,mhd->bthd", read, split_heads(other, self.num_heads))
            else:
                write = read if self.value_bank is None else self._resembles(heads, other)
                found, new["memory"] = linear_attention(
                    read, write, heads, state=state["memory"], segments=segments, normaliser_eps=EPS
                )
            branches.append(found.flatten(-2))
        return zero_padding(self._gated(x, *branches), segments), State(new)

    def _resembles(self, heads: Tensor, bank: Tensor) -> Tensor:
        """(B, T, H, M): the softmax over slots of every head."""
        logits = torch.einsum("bthd,mhd->bthm", heads, split_heads(bank, self.num_heads))
        if self.log_temperature is not None:
            logits = logits * (-self.log_temperature).exp()[:, None]
        elif self.start_temperature != 1:
            logits = logits / self.start_temperature
        if self.read_slots is not None:
            logits = logits.masked_fill(~largest(logits, self.read_slots), -torch.inf)
        return logits.softmax(-1)

    def _gated(self, x: Tensor, *branches: Tensor) -> Tensor:
        if self.gate_proj is None:
            return sum(branches[1:], start=branches[0])
        (local, found), (by_local, by_found) = branches, self.gate_proj(x).chunk(2, -1)
        if self.gate == "softmax":
            return torch.lerp(found, local, torch.sigmoid(by_local - by_found))
        return torch.addcmul(by_local.sigmoid() * local, by_found.sigmoid(), found)
