"""What mixers that are a nonlinear cell share: the parameters that follow from its equations, and running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tidegate.nn.mixer import Mixer, accumulation_dtype
from tidegate.ops.cell import Cell
from tidegate.segments import Segments
from tidegate.state import State


class CellLayer(Mixer):
    """A mixer around a cell (see `tidegate.ops.Cell`).

    How gradients flow, and how the cell is run, is no part of the configuration; it can be set on any such mixer:
    `gradient_clip`, `truncate` and `method` are the arguments of `Cell` of these names.
    """

    cell: Cell
    gradient_clip: float | None = None
    truncate: int | None = None
    method: str | None = None

    def over_time(
        self,
        inputs: Tensor,
        matrices: Tensor | None,
        vectors: Tensor | None,
        state: State,
        segments: Segments | None,
        *,
        cell: Cell | None = None,
        projected_dim: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs and states of `cell`, or the layer's own, by their names, from those in `state`; see `Cell`."""
        cell = cell or self.cell
        y, after = cell(
            inputs,
            matrices,
            vectors,
            torch.stack([state[name] for name in cell.states], 1),
            segments=segments,
            gradient_clip=self.gradient_clip,
            truncate=self.truncate,
            method=self.method,
            projected_dim=projected_dim,
        )
        return y, dict(zip(cell.states, after.unbind(1), strict=True))


class CellMixer(CellLayer):
    """A mixer that is a cell (see `tidegate.ops.Cell`): everything but the equations and the initialisation.

    `_build` sets up, for G inputs, M recurrent matrices and V vectors of the cell: `weight_ih` (G * dim, dim) and
    `bias_ih`, one bias per input, or for the first `biased` of them; x itself, where equations use it, does not count
    and comes last;
    `weight_hh` (M * dim, dim / num_heads), block-diagonal, the block of a head in its rows; `bias_hh`, a second bias
    for each recurrent product, where the cell has it from PyTorch; `vectors` (V, dim).

    With `width` the cell is that wide, not dim, but for its projected state, a product with its last matrix R: that is
    `weight_hr` (dim, width), and the others, `weight_hh`, are (width, dim) each.

    Two ways to regularise the recurrence are attributes, too; both are 0 where nothing else is set:

    - `weight_dropout`, the share of numbers of `weight_hh` that are zero during a call in training, the same for all
      its tokens (DropConnect, arXiv 1708.02182);
    - `zoneout`, the probability with which a channel of a state stays as it was, token by token (1606.01305), for all
      states or as {"h": 0.05, "c": 0.5}. Outside of training every state moves by its expected share instead. No part
      of `config()` either: it has to be set again where a mixer is built anew.

    State: every state of the cell (dim, or width where it is not projected).
    """

    num_heads: int
    _weight_dropout: float = 0.0
    _zoneout: Mapping[str, float] = MappingProxyType({})
    _zoned: Cell | None = None  # the cell with zoneout
    width: int
    bias_hh: nn.Parameter | None
    weight_hr: nn.Parameter | None

    def _build(
        self,
        cell: Cell,
        num_heads: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        *,
        second_bias: bool = False,
        vectors: bool = True,
        width: int | None = None,
        biased: int | None = None,
    ) -> None:
        if num_heads < 1 or self.dim % num_heads:
            raise ValueError(f"num_heads: seen {num_heads}, wanted a divisor of dim = {self.dim}")
        self.cell, self.num_heads, self.width = cell, num_heads, width or self.dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = sum(name != "x" for name in cell.inputs) * self.width
        matrices = (len(cell.matrices) - bool(width)) * self.width
        self.weight_ih = nn.Parameter(torch.empty(gates, self.dim, **factory))
        biases = gates if biased is None else biased * self.width
        self.bias_ih = nn.Parameter(torch.empty(biases, **factory))
        self.weight_hh = nn.Parameter(torch.empty(matrices, self.dim // num_heads, **factory)) if matrices else None
        self.bias_hh = nn.Parameter(torch.empty(matrices, **factory)) if second_bias else None
        self.weight_hr = nn.Parameter(torch.empty(self.dim, width, **factory)) if width else None
        own = vectors and cell.vectors
        self.vectors = nn.Parameter(torch.empty(len(cell.vectors), self.width, **factory)) if own else None
        self.no_weight_decay = ("vectors",) if own else ()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform in ±width^(-1/2), as PyTorch's cells."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(self.width), 1 / math.sqrt(self.width))

    def _set_bias(self, name: str, value: Tensor | float) -> None:
        """Give an input of the cell exactly this bias; a second one that is added to it becomes zero."""
        self._rows(self.bias_ih, self.cell.inputs.index(name))[...] = value
        matrix = "U" + name[1:]
        if self.bias_hh is not None and matrix in self.cell.matrices:
            self._rows(self.bias_hh, self.cell.matrices.index(matrix))[...] = 0.0

    def _set_vector(self, name: str, value: Tensor | float) -> None:
        assert self.vectors is not None
        self.vectors[self.cell.vectors.index(name)] = value

    def _rows(self, parameter: Tensor, number: int) -> Tensor:
        return parameter[number * self.width : (number + 1) * self.width]

    def _chrono_bias(self, length: int) -> Tensor:
        """log(u), u ~ U(1, length - 1): biases under which memories last up to `length` (arXiv 1804.11188)."""
        return torch.empty_like(self.bias_ih[: self.width]).uniform_(1, length - 1).log_()

    def _biases(self) -> tuple[Tensor, Tensor | None]:
        """The bias of all inputs, and the vectors."""
        bias = self.bias_ih if self.bias_hh is None else self.bias_ih + self.bias_hh
        missing = self.weight_ih.shape[0] - bias.shape[0]
        return (functional.pad(bias, (0, missing)) if missing else bias), self.vectors

    def extra_repr(self) -> str:
        drops = {"weight_dropout": self._weight_dropout, "zoneout": dict(self._zoneout)}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in drops.items() if value)])

    def _constants(self) -> Tensor:
        """The vectors of a cell for which they are numbers, options of these names.

        Written into the equations as what they are, each would compile kernels of its own.
        """
        wide, values = accumulation_dtype(self.bias_ih.dtype), [getattr(self, name) for name in self.cell.vectors]
        return torch.stack([self.bias_ih.new_full((self.width,), value, dtype=wide) for value in values])

    def state_spec(self) -> dict[str, Any]:
        narrow = self.cell.projected if self.weight_hr is not None else ()
        return {name: (self.dim if name in narrow else self.width,) for name in self.cell.states}

    def _matrices(self) -> Tensor | None:
        """The recurrent matrices by head, (M, H, d, d)."""
        if self.weight_hh is None:
            return None
        weight: Tensor = self.weight_hh
        if self.training and self._weight_dropout > 0:
            weight = functional.dropout(weight, self._weight_dropout)
        if self.weight_hr is None:
            return weight.unflatten(0, (-1, self.num_heads, self.width // self.num_heads))
        others = functional.pad(weight, (0, self.width - self.dim)).unflatten(0, (-1, self.width))
        projection = functional.pad(self.weight_hr, (0, 0, 0, self.width - self.dim))
        return torch.cat([others, projection[None]])[:, None]

    def forward(
        self, x: Tensor, state: State | None = None, *, segments: Segments | None = None
    ) -> tuple[Tensor, State]:
        x, state = self.prepare(x, state, segments)
        return self.run(x, state, segments)

    def with_input_size(self, size: int) -> CellMixer:
        """The same cell for inputs of another width than dim, drawn anew; for stacks (`tidegate.RNN`), through `run`.

        Raises ValueError for a cell that adds its input to its states as it is.
        """
        if size != self.dim and "x" in self.cell.inputs:
            raise ValueError(f"input_size: seen {size}; this cell takes its input as it is, wanted {self.dim}")
        self.weight_ih = nn.Parameter(self.weight_ih.new_empty(self.weight_ih.shape[0], size))
        self.reset_parameters()
        return self

    def run(self, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, State]:
        """`forward` after its checks, for an x of any width that `weight_ih` takes."""
        bias, vectors = self._biases()
        inputs = functional.linear(x, self.weight_ih, bias).unflatten(-1, (-1, self.width))
        if "x" in self.cell.inputs:
            inputs = torch.cat([inputs, x.unsqueeze(2)], 2)
        cell = self.cell
        if self._zoned is not None:
            cell, inputs = self._zoned, torch.cat([inputs, *self._moves(inputs)], 2)
        if self.weight_hr is None:
            y, after = self.over_time(inputs, self._matrices(), vectors, state, segments, cell=cell)
            return y, State(after)
        full = state.map(lambda x: functional.pad(x, (0, self.width - x.shape[-1])))
        narrow = self.dim if cell.projected else None
        y, after = self.over_time(inputs, self._matrices(), vectors, full, segments, cell=cell, projected_dim=narrow)
        return y[..., : self.dim], State({name: x[:, : state[name].shape[-1]] for name, x in after.items()})

    @property
    def weight_dropout(self) -> float:
        """See the class. Raises ValueError for what is no share, and for a cell without recurrent matrices."""
        return self._weight_dropout

    @weight_dropout.setter
    def weight_dropout(self, share: float) -> None:
        check_share("weight_dropout", share)
        if share and self.weight_hh is None:
            raise ValueError(f"weight_dropout: seen {share}, but this cell has no recurrent matrices; wanted 0")
        self._weight_dropout = share

    @property
    def zoneout(self) -> Mapping[str, float]:
        """See the class. May be set to a number, for all states, too; raises ValueError for what is no probability."""
        return dict(self._zoneout)

    @zoneout.setter
    def zoneout(self, given: float | Mapping[str, float]) -> None:
        given = dict(given) if isinstance(given, Mapping) else dict.fromkeys(self.cell.states, given)
        for name, share in given.items():
            if name not in self.cell.states:
                raise ValueError(f"zoneout: seen {name!r}, wanted states of the cell: {', '.join(self.cell.states)}")
            check_share("zoneout", share)
        self._zoneout = {name: given[name] for name in self.cell.states if given.get(name)}
        # The states that it is about go only part of the way, by one more input each.
        lines = [f"zoneout_{name} = {name}" for name in self._zoneout] + [self.cell.equations]
        for name in self._zoneout:
            old, moves = f"zoneout_{name}", f"(moves_{name} @ x)"
            part = f"{old} + {moves} * ({name} - {old})"  # exactly the one or the other where it is all or nothing
            lines.append(f"{name} = where(0 < {moves}, where({moves} < 1, {part}, {name}), {old})")
        self._zoned = Cell("\n".join(lines), self.cell.states) if self._zoneout else None

    def _moves(self, inputs: Tensor) -> list[Tensor]:
        """How far each of these states moves at every token, (B, T, 1, width) each."""
        like = inputs[:, :, :1].to(accumulation_dtype(inputs.dtype))
        moves = [torch.full_like(like, 1.0 - share) for share in self._zoneout.values()]
        return [(torch.bernoulli(share) if self.training else share).to(inputs.dtype) for share in moves]


def check_share(argument: str, share: float) -> None:
    """Raises ValueError for what is no share from 0 to below 1."""
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise ValueError(f"{argument}: seen {share!r}, wanted a share from 0 to below 1")


def check_chrono(length: int | None) -> None:
    """Raises ValueError for a `chrono_length` that no bias can be drawn for."""
    if length is not None and length < 3:
        raise ValueError(f"chrono_length: seen {length}, wanted at least 3 tokens, or None")
