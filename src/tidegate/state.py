"""State: what a recurrent layer remembers between two calls.

A frozen tree of tensors whose first axis is the batch. It knows nothing of layers: a mixer's state is
`State(memory=S, convolution=tail)`, a model's is `State({"0": ..., "1": ...})`; every operation below works on both.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Leaf = Union[Tensor, "State"]
_SEPARATOR = "/"


class State(Mapping[str, Leaf]):
    """An immutable mapping from names to tensors (batch first) or to further states.

    Operations return new states; the tensors of the old one are never written to, so forking a stream is keeping
    a reference. Registered with torch's pytree, so `torch.compile`, `torch.export` and `torch.vmap` see through it.

    >>> state = State(memory=torch.zeros(2, 3), inner=State(tail=torch.ones(2, 1)))
    >>> state.select(0)["inner"]["tail"].shape
    torch.Size([1, 1])
    >>> state.nbytes
    32
    """

    def __init__(self, entries: Mapping[str, Leaf] | None = None, /, **named: Leaf) -> None:
        self._entries: dict[str, Leaf] = {**(entries or {}), **named}
        for name in self._entries:
            if _SEPARATOR in name:  # paths of nested entries are joined with it: two tensors could share one path
                raise ValueError(f"entries: the name {name!r} contains {_SEPARATOR!r}, which separates nested names")

    # -- mapping ---------------------------------------------------------------------------------------------------
    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        shown = (
            f"{name}={tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"{name}={leaf!r}"
            for name, leaf in self.items()
        )
        return f"State({', '.join(shown)})"

    # -- whole-tree operations -------------------------------------------------------------------------------------
    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Apply `function` to every tensor and return the tree of results."""
        return State(
            {name: leaf.map(function) if isinstance(leaf, State) else function(leaf) for name, leaf in self.items()}
        )

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors under their path, as `{"0/memory": tensor}`."""
        flat: dict[str, Tensor] = {}
        for name, leaf in self.items():
            path = prefix + name
            flat.update(leaf.tensors(path + _SEPARATOR) if isinstance(leaf, State) else {path: leaf})
        return flat

    def detach(self) -> State:
        """The same values, cut from the autograd graph (truncated back-propagation through time)."""
        return self.map(lambda leaf: leaf.detach())

    def to(self, *args: Any, **kwargs: Any) -> State:
        """Move or cast as `torch.nn.Module.to`; integers (positions) keep their dtype, complex tensors stay complex."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(leaf: Tensor) -> Tensor:
            wanted = dtype if leaf.is_floating_point() or leaf.is_complex() else None
            if leaf.is_complex() and dtype is not None and not dtype.is_complex:
                wanted = torch.complex128 if dtype == torch.float64 else torch.complex64
            return leaf.to(device, wanted, non_blocking)

        return self.map(move)

    def select(self, index: int | slice | Sequence[int] | Tensor) -> State:
        """Rows of the batch: one (kept as a batch of one), a slice, a list of indices or a boolean mask."""
        if isinstance(index, int):
            size = self.batch_size
            if not self.tensors():
                return self  # of a layer that remembers nothing: the same for every row
            if not -size <= index < size:
                raise IndexError(f"index: {index} is outside this state's batch of {size}")
            index = [index % size]
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index.long() if index.numel() == 0 else index  # an empty list has the dtype of no index
            index = index.reshape(1) if index.ndim == 0 else index  # one row is a batch of one
        return self.map(lambda leaf: leaf[index.to(leaf.device) if isinstance(index, Tensor) else index])

    @staticmethod
    def concat(states: Sequence[State]) -> State:
        """Join states of the same layer along the batch."""
        if not states:
            raise ValueError("states: the list is empty; concat needs at least one state")
        first = states[0]
        for position, other in enumerate(states[1:], start=1):
            if list(other) != list(first):
                raise ValueError(
                    f"states: entry {position} has the names {list(other)}, entry 0 has {list(first)}; "
                    "only states of the same layer can be joined"
                )
        joined: dict[str, Leaf] = {}
        for name, leaf in first.items():
            leaves = [state[name] for state in states]
            if len({isinstance(other, State) for other in leaves}) > 1:
                raise ValueError(f"states: {name!r} is a tensor in one and nested in another; they cannot join")
            if isinstance(leaf, State):
                joined[name] = State.concat(leaves)
            else:
                joined[name] = torch.cat(_same_trailing_shape(name, leaves))
        return State(joined)

    @property
    def batch_size(self) -> int:
        """Rows in the batch (0 for a state without tensors)."""
        for tensor in self.tensors().values():
            return tensor.shape[0]
        return 0

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as safetensors; the file appears whole or not at all."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().resolve_conj().contiguous() for name, tensor in self.tensors().items()}
        complex_names = sorted(name for name, tensor in tensors.items() if tensor.is_complex())
        tensors = {n: torch.view_as_real(t).contiguous() if t.is_complex() else t for n, t in tensors.items()}
        tensors = {n: t.clone() for n, t in tensors.items()}  # safetensors refuses tensors that share memory
        meta = {"format": "tidegate.State", "names": json.dumps(_skeleton(self)), "complex": json.dumps(complex_names)}
        write_atomically(path, save(tensors, metadata=meta))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> State:
        """Read what `save` wrote.

        Raises ValueError if the file is not a tidegate state or is damaged, FileNotFoundError if it is missing.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such state file")
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable state file ({error}); it may be truncated") from None
        if meta.get("format") != "tidegate.State":
            raise ValueError(f"{path}: a safetensors file, but not one written by State.save")
        try:
            for name in json.loads(meta["complex"]):
                tensors[name] = torch.view_as_complex(tensors[name])
            return _rebuild(json.loads(meta["names"]), tensors, "")
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: the list of names does not fit the tensors ({error!r}); it is damaged") from None


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` so that `path` holds either its old content or all of the new one, also after a crash.

    Written beside the target and renamed over it; an error (a full disk) removes the partial file and is raised.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _same_trailing_shape(name: str, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Zero-pad axis 1 where states of different length meet (key-value caches); other axes must agree."""
    shapes = {tuple(leaf.shape[2:]) for leaf in leaves} | {leaf.ndim for leaf in leaves}
    if len(shapes) > 2 or leaves[0].ndim < 1:
        raise ValueError(f"states: {name!r} has the shapes {[tuple(leaf.shape) for leaf in leaves]}; they cannot join")
    if leaves[0].ndim == 1:
        return list(leaves)
    longest = max(leaf.shape[1] for leaf in leaves)
    return [
        torch.cat([leaf, leaf.new_zeros(leaf.shape[0], longest - leaf.shape[1], *leaf.shape[2:])], dim=1)
        if leaf.shape[1] < longest
        else leaf
        for leaf in leaves
    ]


def _skeleton(state: State) -> list[Any]:
    return [[name, _skeleton(leaf) if isinstance(leaf, State) else None] for name, leaf in state.items()]


def _rebuild(skeleton: list[Any], tensors: dict[str, Tensor], prefix: str) -> State:
    return State(
        {
            name: tensors[prefix + name] if inner is None else _rebuild(inner, tensors, prefix + name + _SEPARATOR)
            for name, inner in skeleton
        }
    )


pytree.register_pytree_node(
    State,
    lambda state: (list(state.values()), tuple(state)),
    lambda leaves, names: State(dict(zip(names, leaves, strict=True))),
    serialized_type_name="tidegate.State",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
    flatten_with_keys_fn=lambda state: ([(pytree.MappingKey(name), leaf) for name, leaf in state.items()], (*state,)),
)
