"""A stack of cells in the place of torch.nn.LSTM, GRU and RNN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tidegate import registry
from tidegate.nn.cell import CellMixer, check_share
from tidegate.nn.mixer import Mixer, grows
from tidegate.segments import Segments
from tidegate.state import State

_TORCH = {"lstm": nn.LSTM, "gru": nn.GRU, "elman": nn.RNN}


class RNN(nn.Module):
    """Layers of any cell, called as torch.nn.LSTM, GRU and RNN are: `output, hx = rnn(input, hx)`.

    Equation, with the cell of layer l, and of its reversed direction where there is one::

        y^0 = input      y^l = cell_l(y^{l-1})
        bidirectional:   y^l = [cell_l(y^{l-1}), reverse(cell'_l(reverse(y^{l-1})))]

    - `cell` is the name of a mixer, "lstm", "gru", "elman", "slstm" ... or of any other that streams; `options` are its
      own. A cell takes `input_size` by its input weights; other mixers get a linear map in front where it differs.
    - `proj_size` P > 0 makes outputs and the state h that narrow, as in torch.nn.LSTM (arXiv 1402.1128).
    - `dropout` is between layers. With `variational=True` one mask serves all tokens of a sequence (arXiv 1512.05287).
    - `weight_dropout` and `zoneout` regularise the recurrence itself: they are set on all layers, see
      `tidegate.nn.cell.CellMixer`.
    - `batch_first=False`, as in PyTorch, means (T, B, ...) for input and output; (T, ...) without batch is taken, too.
    - A `PackedSequence` is taken and given back; `segments` (B, T) says the same and more: documents in a row.
    - `hx` is a tensor for a cell of one state, else a tuple in the order of the cell's states (h and c for "lstm"),
      each (num_layers * directions, B, ...), the reversed direction after each layer's own.
      In half precision the states that come out are float32, as every state of the library.
    - `RNN.from_torch(module)` and `rnn.to_torch()` copy weights, bit by bit.

    Raises ValueError for sizes and shapes that do not fit together.
    Shapes: input (T, B, input_size), output (T, B, directions * (proj_size or hidden_size)).

    >>> import torch
    >>> rnn = RNN("gru", 5, 8, num_layers=2, bidirectional=True)
    >>> output, h = rnn(torch.randn(20, 3, 5))
    >>> output.shape, h.shape
    (torch.Size([20, 3, 16]), torch.Size([4, 3, 8]))
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        variational: bool = False,
        weight_dropout: float = 0.0,
        zoneout: float | Mapping[str, float] = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if size < 1:
                raise ValueError(f"{name}: seen {size}, wanted at least 1")
        check_share("dropout", dropout)
        if not registry.info(cell).streams:
            raise ValueError(f"cell: {cell!r} cannot be read from left to right; see `tidegate list`")
        if not isinstance(proj_size, int) or not 0 <= proj_size < hidden_size:
            raise ValueError(
                f"proj_size: seen {proj_size}, wanted less than hidden_size = {hidden_size}, or 0 for none"
            )
        if proj_size:
            if "hidden_size" not in registry.info(cell).options:
                raise ValueError(f"proj_size: seen {proj_size}, but {cell!r} has no projection; 'lstm' has")
            options = {**options, "hidden_size": hidden_size}
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.variational = batch_first, dropout, variational
        self.bidirectional, self.proj_size, self.options = bidirectional, proj_size, options
        self.directions = 2 if bidirectional else 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim = proj_size or hidden_size
        widths = [input_size] + [self.directions * dim] * (num_layers - 1)
        # In PyTorch's order: layer by layer, the reversed direction after its layer's own.
        self.layers = nn.ModuleList(
            _layer(cell, width, dim, {**_place(cell, index, num_layers), **options}, factory)
            for index, width in enumerate(widths)
            for _ in range(self.directions)
        )
        self._set("weight_dropout", weight_dropout)
        self._set("zoneout", zoneout)

    def _set(self, name: str, value: Any) -> None:
        """An attribute of all layers."""
        for layer in self.layers if value else ():
            mixer = _mixer(layer)
            if not isinstance(mixer, CellMixer):
                raise ValueError(f"{name}: seen {value}, but {self.cell!r} is more than a cell; wanted 0")
            setattr(mixer, name, value)

    def reset_parameters(self) -> None:
        """Every layer as it initialises itself."""
        for layer in self.layers:
            for part in layer if isinstance(layer, nn.Sequential) else (layer,):
                part.reset_parameters()  # type: ignore[operator]

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, segments: Segments | None = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, segments)
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            wanted = "(batch, time, " if self.batch_first else "(time, batch, "
            raise ValueError(
                f"input: seen shape {tuple(input.shape)}, wanted {wanted}input_size={self.input_size}) or "
                f"(time, {self.input_size})"
            )
        if input.shape[int(self.batch_first and input.ndim == 3)] == 0:
            raise ValueError("input: seen T = 0 tokens, wanted at least one")
        if input.ndim == 2:
            inner = None if hx is None else _map(lambda x: x[:, None], hx)
            y, last = self._run(input[None], inner, segments)
            return y[0], _map(lambda x: x[:, 0], last)
        if self.batch_first:
            return self._run(input, hx, segments)
        y, last = self._run(input.transpose(0, 1), hx, segments)
        return y.transpose(0, 1), last

    def _packed(self, input: PackedSequence, hx: Any, segments: Segments | None) -> tuple[PackedSequence, Any]:
        if segments is not None:
            raise ValueError("segments: a PackedSequence has its own lengths; give one of the two")
        x, lengths = nn.utils.rnn.pad_packed_sequence(input, batch_first=True)
        valid = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
        y, last = self._run(x, hx, Segments(torch.zeros_like(valid), valid))
        if input.sorted_indices is not None:  # the order that came: sequences of one length could swap places
            y, lengths = y[input.sorted_indices], lengths[input.sorted_indices.cpu()]
        data = nn.utils.rnn.pack_padded_sequence(y, lengths, batch_first=True).data
        return PackedSequence(data, input.batch_sizes, input.sorted_indices, input.unsorted_indices), last

    def _run(self, x: Tensor, hx: Any, segments: Segments | None) -> tuple[Tensor, Any]:
        """(B, T, input_size) -> (B, T, directions * hidden_size)."""
        states = self._split(hx, x)
        turned = None if segments is None or not self.bidirectional else segments.reversed(continues=True)
        last = []
        for level in range(self.num_layers):
            if level:
                x = self._drop(x)
            sides = []
            for side in range(self.directions):
                index = self.directions * level + side
                y, after = _read(
                    self.layers[index], x.flip(1) if side else x, states[index], turned if side else segments
                )
                sides.append(y.flip(1) if side else y)
                last.append(after)
            x = torch.cat(sides, -1) if self.bidirectional else sides[0]
        stacked = tuple(torch.stack([state[name] for state in last]) for name in last[0])
        return x, stacked[0] if len(stacked) == 1 else stacked

    def _split(self, hx: Any, x: Tensor) -> list[State]:
        """hx as a State for each layer and direction."""
        cell: Any = _mixer(self.layers[0])
        empty = cell.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        if hx is None:
            return [empty] * len(self.layers)
        parts, names = (tuple(hx) if isinstance(hx, tuple | list) else (hx,)), tuple(empty)
        wanted = [(len(self.layers), *empty[name].shape) for name in names]
        spec, seen = cell.state_spec(), [tuple(part.shape) for part in parts]
        grown = [  # as wanted, but for the length of a state that grows
            tuple(n if w == 0 and grows(spec[name]) else w for n, w in zip(given, shape, strict=False))
            + shape[len(given) :]
            for name, given, shape in zip(names, seen, wanted, strict=False)
        ]
        if seen != grown + wanted[len(grown) :]:
            raise ValueError(
                f"hx: seen {'a tuple of ' if isinstance(hx, tuple | list) else ''}"
                f"{', '.join(str(tuple(part.shape)) for part in parts)}, wanted "
                f"{'a tuple of ' if len(names) > 1 else ''}{', '.join(names)} of shape "
                f"{', '.join(map(str, wanted))}: (num_layers * directions, batch, ...)"
            )
        return [
            State({name: part[i].to(empty[name].dtype) for name, part in zip(names, parts, strict=True)})
            for i in range(len(self.layers))
        ]

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropout:
            return x
        shape = (x.shape[0], 1, x.shape[2]) if self.variational else x.shape
        return x * nn.functional.dropout(torch.ones(shape, dtype=x.dtype, device=x.device), self.dropout)

    # -- PyTorch's modules ---------------------------------------------------------------------------------------------
    @classmethod
    def from_torch(cls, module: nn.LSTM | nn.GRU | nn.RNN) -> RNN:
        """The same network, with copies of its weights; a module without biases gives biases of zero.

        Raises ValueError for another module.

        >>> theirs = torch.nn.LSTM(4, 6)
        >>> x = torch.randn(5, 2, 4)
        >>> torch.testing.assert_close(RNN.from_torch(theirs)(x), theirs(x))
        """
        name = next((name for name, kind in _TORCH.items() if type(module) is kind), None)
        if name is None:
            raise ValueError(f"module: seen {type(module).__name__}, wanted torch.nn.LSTM, GRU or RNN")
        options: dict[str, Any] = {"nonlinearity": module.nonlinearity} if name == "elman" else {}
        rnn = cls(name, **_arguments(module, module.weight_ih_l0), **options)
        with torch.no_grad():
            for layer, names in rnn._torch_names():
                for own, theirs in names.items():
                    source = getattr(module, theirs, None)
                    getattr(layer, own).copy_(torch.zeros(()) if source is None else source)
        return rnn.train(module.training)

    def to_torch(self) -> nn.LSTM | nn.GRU | nn.RNN:
        """The same network as PyTorch's own module, with copies of the weights.

        Raises ValueError for a cell or an option that PyTorch does not have.
        """
        layer: Any = _mixer(self.layers[0])
        plain: Any = registry.build(self.cell, layer.dim)
        # How weights begin is no part of the network, and PyTorch has the projection.
        left_out = ("forget_bias", "chrono_length", "recurrent_init", "hidden_size")
        own = {k: v for k, v in layer.config().items() if k not in left_out and v != plain.config()[k]}
        given: dict[str, Any] = {"nonlinearity": own.pop("nonlinearity")} if "nonlinearity" in own else {}
        own |= {"variational": True} if self.variational else {}
        for name in ("weight_dropout", "zoneout"):
            drops = [getattr(_mixer(layer), name) for layer in self.layers]
            own |= {name: next(drop for drop in drops if drop)} if any(drops) else {}
        if self.cell not in _TORCH or own:
            seen = [self.cell, *(f"{k}={v!r}" for k, v in own.items())]
            raise ValueError(f"cell: PyTorch has no {', '.join(seen)}; it has lstm, gru and elman as they are")
        module = _TORCH[self.cell](**_arguments(self, layer.weight_ih), **given)
        with torch.no_grad():
            for layer, names in self._torch_names():
                for mine, theirs in names.items():
                    getattr(module, theirs).copy_(getattr(layer, mine))
        return module.train(self.training)

    def _torch_names(self) -> list[tuple[Any, dict[str, str]]]:
        """Each layer, with the name in PyTorch of each of its parameters."""
        found = []
        for index, layer in enumerate(self.layers):
            suffix = f"_l{index // self.directions}" + ("_reverse" if index % self.directions else "")
            names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *["weight_hr"] * bool(self.proj_size)]
            found.append((layer, {name: name + suffix for name in names}))
        return found

    def extra_repr(self) -> str:
        return f"{self.cell!r}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _arguments(network: Any, weight: Any) -> dict[str, Any]:
    """What a network is built from, by the names that PyTorch's modules and `RNN` have for it."""
    names = ["input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional"]
    names += ["proj_size"] * bool(network.proj_size)  # torch.nn.RNN and GRU do not take it
    return {**{name: getattr(network, name) for name in names}, "device": weight.device, "dtype": weight.dtype}


def _place(name: str, index: int, layers: int) -> dict[str, int]:
    """Where in the stack a layer stands, for mixers whose initialisation or bounds depend on it."""
    takes = registry.info(name).options
    return {key: value for key, value in {"layer_index": index, "num_layers": layers}.items() if key in takes}


def _layer(name: str, width: int, hidden: int, options: dict[str, Any], factory: dict[str, Any]) -> nn.Module:
    mixer = registry.build(name, hidden, **options, **factory)
    if width == hidden:
        return mixer
    if isinstance(mixer, CellMixer) and type(mixer).forward is CellMixer.forward:
        return mixer.with_input_size(width)
    return nn.Sequential(nn.Linear(width, hidden, **factory), mixer)


def _mixer(layer: nn.Module) -> Mixer:
    found = layer[-1] if isinstance(layer, nn.Sequential) else layer
    assert isinstance(found, Mixer)
    return found


def _read(layer: nn.Module, x: Tensor, state: State, segments: Segments | None) -> tuple[Tensor, State]:
    mixer = _mixer(layer)
    if isinstance(layer, nn.Sequential):
        x = layer[0](x)
    if isinstance(mixer, CellMixer) and type(mixer).forward is CellMixer.forward:
        return mixer.run(x if segments is None else segments.zero_padding(x), state, segments)
    found: tuple[Tensor, State] = mixer(x, state, segments=segments)
    return found


def _map(function: Any, hx: Any) -> Any:
    return tuple(map(function, hx)) if isinstance(hx, tuple | list) else function(hx)
