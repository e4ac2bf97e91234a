"""What the LSTM and the GRU share: PyTorch's kernels under this library's contract."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.backend import choose
from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.ops.loop import over_time
from tidegate.segments import Segments
from tidegate.state import State


class TorchCell(Mixer):
    """A matrix recurrence of PyTorch, hidden size dim, with the parameters of `torch.nn.LSTMCell` or `GRUCell`.

    Whole rows go to PyTorch's kernel as they are; documents and padding go to its kernel for packed sequences, one
    sequence per document. Under torch.compile, torch.export and torch.func, which do not see into these kernels, and
    for `tidegate.backend("reference")`, the cell runs as a loop over time. Half precision computes in float32.
    """

    gates: int  # blocks of rows in the weights
    entries: tuple[str, ...]  # of the state; the first is the output

    def _build(self, dim: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(self.gates * dim, dim, **factory))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * dim, dim, **factory))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * dim, **factory))
        self.bias_hh = nn.Parameter(torch.empty(self.gates * dim, **factory))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±dim^(-1/2), as in PyTorch."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def _set_bias(self, gate: int, value: Tensor | float) -> None:
        """Give a gate exactly this bias: of the two that are added, one holds it and the other zero."""
        rows = slice(gate * self.dim, (gate + 1) * self.dim)
        self.bias_ih[rows] = value
        self.bias_hh[rows] = 0.0

    def _chrono_bias(self, length: int) -> Tensor:
        """log(u), u ~ U(1, length - 1): biases under which memories last up to `length` (arXiv 1804.11188)."""
        return torch.empty_like(self.bias_ih[: self.dim]).uniform_(1, length - 1).log_()

    def state_spec(self) -> dict[str, Any]:
        return {name: (self.dim,) for name in self.entries}

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        wide = accumulation_dtype(x.dtype)
        carry = tuple(state[name].to(wide) for name in self.entries)
        weights = [w.to(wide) for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        if self._runs_as_loop(x, segments):
            y, carry = self._loop(x.to(wide), carry, weights, segments)
        elif segments is None:
            y, last = self._kernel(x.to(wide), None, tuple(entry[None] for entry in carry), weights)
            carry = tuple(entry[0] for entry in last)
        else:
            y, carry = self._packed(x.to(wide), carry, weights, segments)
        return y.to(x.dtype), State(dict(zip(self.entries, carry, strict=True)))

    # -- what a cell gives ---------------------------------------------------------------------------------------------
    def _kernel(
        self, x: Tensor, batch_sizes: Tensor | None, carry: tuple[Tensor, ...], weights: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """PyTorch's kernel on x (B, T, D), or on the tokens of a packed sequence; the carry is (1, B, D) each."""
        raise NotImplementedError

    def _step(self, projected: Tensor, carry: tuple[Tensor, ...], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """The cell's equation for one token, given x W_ih^T + bias_ih."""
        raise NotImplementedError

    # -- ways to run it ------------------------------------------------------------------------------------------------
    def _runs_as_loop(self, x: Tensor, segments: Segments | None) -> bool:
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or choose(x) == "reference":
            return True
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return True
        return segments is not None and not segments.valid.any()  # the kernel refuses an empty batch

    def _loop(
        self, x: Tensor, carry: tuple[Tensor, ...], weights: list[Tensor], segments: Segments | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight_ih, weight_hh, bias_ih, bias_hh = weights
        projected = functional.linear(x, weight_ih, bias_ih)
        flags = () if segments is None else (segments.starts, segments.valid)

        def step(carry: tuple[Tensor, ...], projected: Tensor, *flags: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
            if not flags:
                carry = self._step(projected, carry, weight_hh, bias_hh)
                return carry, carry[0]
            start, real = (flag[:, None] for flag in flags)
            fresh = tuple(torch.where(start, 0, entry) for entry in carry)
            new = self._step(projected, fresh, weight_hh, bias_hh)
            kept = tuple(torch.where(real, n, entry) for n, entry in zip(new, carry, strict=True))
            return kept, torch.where(real, new[0], 0)

        carry, y = over_time(step, carry, (projected, *flags))
        return y, carry

    def _packed(
        self, x: Tensor, carry: tuple[Tensor, ...], weights: list[Tensor], segments: Segments
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        time = x.shape[1]
        # 1. The real tokens, row by row, and with them each document's tokens side by side, in order.
        rows, times = segments.valid.nonzero().unbind(1)
        keys = rows * (time + 1) + segments.documents[rows, times]
        keys, document, lengths = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
        position = torch.arange(len(rows), device=x.device) - (lengths.cumsum(0) - lengths)[document]
        # 2. PyTorch's layout: first all first tokens, then all second ones, ..., the longest document always first.
        longest_first = lengths.argsort(descending=True, stable=True)
        rank = torch.empty_like(longest_first).scatter_(0, longest_first, torch.arange(len(keys), device=x.device))
        order = torch.argsort(position * len(keys) + rank[document])
        rows, times = rows[order], times[order]
        # 3. Document 0 of a row continues from the row's state, all others begin with nothing.
        owner, number = keys // (time + 1), keys % (time + 1)
        initial = tuple(torch.where((number == 0)[:, None], entry[owner], 0)[longest_first][None] for entry in carry)
        data, last = self._kernel(x[rows, times], torch.bincount(position).cpu(), initial, weights)
        # 4. Back to the rows. A row's state is that of its last document, or what it was if the row has no token.
        y = torch.zeros_like(x).index_put((rows, times), data)
        final = torch.ones_like(owner, dtype=torch.bool)
        final[:-1] = owner[1:] != owner[:-1]
        return y, tuple(
            entry.index_put((owner[final],), ending[0][rank][final]) for entry, ending in zip(carry, last, strict=True)
        )
