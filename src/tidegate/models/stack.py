"""Blocks one after the other: what all models share between their first layer and their last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tidegate import registry
from tidegate.backend import sees_values
from tidegate.models.block import Block
from tidegate.models.layers import Layers, parse
from tidegate.nn.parts import RMSNorm
from tidegate.segments import Segments
from tidegate.state import State


class Stack(nn.Module):
    """Base class of models: pre-norm residual blocks and a final norm, `self.blocks` and `self.norm`.

    A subclass makes its embedding, calls `_build_blocks`, makes its head, and runs the blocks with `_run`. The state is
    `State({"0": ..., "1": ...})`, an entry per layer.
    """

    def _build_blocks(
        self,
        dim: int,
        layers: Layers,
        *,
        feed_forward: str | Sequence[str] = "swiglu",
        feed_forward_dim: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dim, self.layers = dim, parse(layers)
        self.feed_forward = feed_forward if isinstance(feed_forward, str) else list(feed_forward)
        self.feed_forward_dim, self.norm_eps, self.dropout = feed_forward_dim, norm_eps, dropout
        each = [feed_forward] * len(self.layers) if isinstance(feed_forward, str) else list(feed_forward)
        if len(each) != len(self.layers):
            raise ValueError(f"feed_forward: {len(each)} entries for {len(self.layers)} layers; wanted one per layer")
        self.blocks = nn.ModuleList(
            Block(
                dim,
                name,
                options,
                feed_forward=each[index],
                feed_forward_dim=feed_forward_dim,
                norm_eps=norm_eps,
                dropout=dropout,
                layer_index=index,
                num_layers=len(self.layers),
                device=device,
                dtype=dtype,
            )
            for index, (name, options) in enumerate(self.layers)
        )
        self.norm = RMSNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        # Looked up once: no compiler follows the registry's lock.
        self._whole_only = {
            index: name for index, (name, _) in enumerate(self.layers) if not registry.info(name).streams
        }

    def _check_sizes(self, *, dropout: float, **sizes: int) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: seen {size}, wanted at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: seen {dropout}, wanted 0 <= dropout < 1")

    def _run(self, x: Tensor, state: State | None, segments: Segments | None) -> tuple[Tensor, dict[str, State]]:
        """x (B, T, dim) through all blocks and the norm, and what the layers remember."""
        side: dict[str, Tensor] = {}  # what layers of one call hand to later ones; no state
        after: dict[str, State] = {}
        for index, block in enumerate(self._stack()):
            name = str(index)
            x, after[name] = block(x, None if state is None else state[name], segments, side)
        return self.norm(x), after

    def _check_ids(self, ids: Tensor, vocab_size: int, segments: Segments | None) -> Tensor:
        """`ids` with 0 on padding, after looking at their shape, type and (on the CPU) range."""
        if ids.ndim != 2:
            raise ValueError(
                f"ids: seen shape {tuple(ids.shape)}, wanted (batch, time); ids[None] makes a batch of one"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids: seen {ids.dtype}, wanted token numbers, torch.int64")
        if ids.shape[1] == 0:
            raise ValueError("ids: seen T = 0 tokens, wanted at least one")
        if segments is not None:
            if segments.shape != tuple(ids.shape):
                raise ValueError(f"segments: made for (batch, time) = {segments.shape}, but ids are {tuple(ids.shape)}")
            ids = segments.zero_padding(ids)
        if ids.device.type == "cpu" and ids.numel() and sees_values(ids):
            low, high = (int(end) for end in ids.aminmax())
            if low < 0 or high >= vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"ids: seen token {wrong}, but the vocabulary has the tokens 0 to {vocab_size - 1}")
        return ids

    def _check_state(self, state: State | None) -> None:
        if state is None:
            return
        if not isinstance(state, State):
            raise ValueError(f"state: seen {type(state).__name__}, wanted the State returned by an earlier call")
        for index, name in self._whole_only.items():
            raise ValueError(
                f"state: layer {index} ({name}) needs the whole sequence at once, so there is none to go on from; give "
                "all of it in one call, without a state"
            )
        wanted = self._entries()
        if list(state) != list(wanted):
            raise ValueError(
                f"state: has the entries {list(state)}, but this model's layers are {list(wanted)}; "
                "it belongs to another model"
            )
        for name, parts in wanted.items():
            if not isinstance(state[name], State) or tuple(state[name]) != parts:
                raise ValueError(f"state: layer {name} of this model keeps {list(parts)}; it belongs to another model")

    def _entries(self) -> dict[str, tuple[str, ...]]:
        """What the state holds, by name and part."""
        return {str(index): block.stateful for index, block in enumerate(self._stack())}

    def _stack(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token; `device` and `dtype` as for a mixer."""
        kind = {"device": device, "dtype": dtype}
        return State({str(index): block.init_state(batch_size, **kind) for index, block in enumerate(self._stack())})

    def state_spec(self) -> dict[str, Any]:
        """Shapes of the state without the batch, by layer and part."""
        return {str(index): block.state_spec() for index, block in enumerate(self._stack())}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
