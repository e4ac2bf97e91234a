"""The part every mixer shares: its state's shape, and the checks at its door."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tidegate.segments import Segments, zero_padding
from tidegate.state import State

GROWS = -1  # an axis of a state that lengthens with the sequence (a key-value cache)


class Mixer(nn.Module):
    """A token mixer: `y, state = mixer(x, state=None, *, segments=None)` with x, y (B, T, D), any T >= 1.

    Constructor arguments are the configuration and are stored under the same names. A subclass gives
    `state_spec` and `forward`; `forward` begins with `x, state = self.prepare(x, state, segments)`.
    Parameters named in `no_weight_decay` are exempt from weight decay.
    """

    dim: int
    no_weight_decay: tuple[str, ...] = ()

    def state_spec(self) -> Mapping[str, Any]:
        """Name -> shape without the batch, or (shape, dtype) for one whose dtype is not the accumulation dtype."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its state looks like")

    def reset_parameters(self) -> None:
        """Every part as it initialises itself; a mixer with parameters or ranges of its own adds to this."""
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]

    def constrain_(self) -> None:
        """Bring parameters back within their bounds, if they have any: training calls this after every step."""

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token. `dtype` is the input's; accumulators are at least float32."""
        number = next(itertools.chain(self.parameters(), self.buffers()))
        device, dtype = device or number.device, dtype or number.dtype

        def zeros(spec: Any) -> Any:
            if isinstance(spec, Mapping):
                return State({name: zeros(inner) for name, inner in spec.items()})
            shape, leaf_dtype = _shape_and_dtype(spec, dtype)
            return torch.zeros(batch_size, *(0 if n == GROWS else n for n in shape), device=device, dtype=leaf_dtype)

        return zeros(self.state_spec())

    def prepare(self, x: Tensor, state: State | None, segments: Segments | None) -> tuple[Tensor, State]:
        """Check the input, blank its padding, and give the state to start from.

        Raises ValueError for a wrong shape, T = 0, or a state that belongs to another layer.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x: seen shape {tuple(x.shape)}, wanted (batch, time, dim={self.dim})")
        if x.shape[1] == 0:
            raise ValueError("x: seen T = 0 tokens, wanted at least one")
        x = zero_padding(x, segments)
        if state is None:
            return x, self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        _check(state, self.state_spec(), x.shape[0], type(self).__name__, "state")
        return x, state

    def config(self) -> dict[str, Any]:
        """The constructor arguments this mixer was built with."""
        return {
            name: getattr(self, name)
            for name in inspect.signature(type(self).__init__).parameters
            if name not in ("self", "device", "dtype")
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())


def constrain_(model: nn.Module) -> None:
    """`Mixer.constrain_` for every mixer of a model: what comes after an optimiser's step."""
    for part in model.modules():
        if isinstance(part, Mixer):
            part.constrain_()


def grows(spec: Any) -> bool:
    """Whether a state of this description, a mixer's or a model's, lengthens with the sequence."""
    if isinstance(spec, Mapping):
        return any(grows(inner) for inner in spec.values())
    return any(grows(inner) for inner in spec) if isinstance(spec, tuple) else spec == GROWS


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself: what states accumulate in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _shape_and_dtype(spec: Any, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """A leaf's shape and dtype: the accumulation dtype, its `"complex"` counterpart, the `"input"`'s or a fixed one."""
    if len(spec) == 2 and (isinstance(spec[1], torch.dtype | str)):
        complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64  # to_complex() does not compile
        named = {"input": dtype, "complex": complex_dtype}
        return tuple(spec[0]), named[spec[1]] if isinstance(spec[1], str) else spec[1]
    return tuple(spec), accumulation_dtype(dtype)


def _check(state: Any, spec: Mapping[str, Any], batch: int, owner: str, path: str) -> None:
    if not isinstance(state, State):
        raise ValueError(f"{path}: seen {type(state).__name__}, wanted the State returned by an earlier call")
    if tuple(state) != tuple(spec):
        raise ValueError(
            f"{path}: has the entries {list(state)}, but {owner} keeps {list(spec)}; it belongs to another layer"
        )
    for name, leaf in state.items():
        inner = spec[name]
        if isinstance(inner, Mapping):
            _check(leaf, inner, batch, owner, f"{path}[{name!r}]")
            continue
        if not isinstance(leaf, Tensor):
            raise ValueError(f"{path}[{name!r}]: seen {type(leaf).__name__}, wanted a tensor; it is another layer's")
        shape = (batch, *_shape_and_dtype(inner, torch.float32)[0])
        if len(leaf.shape) != len(shape) or any(w != GROWS and n != w for n, w in zip(leaf.shape, shape, strict=True)):
            wanted = ", ".join("any" if n == GROWS else str(n) for n in shape)
            raise ValueError(
                f"{path}[{name!r}]: seen shape {tuple(leaf.shape)}, but {owner} with this configuration and a batch "
                f"of {batch} wants ({wanted}); it belongs to another layer or batch"
            )
