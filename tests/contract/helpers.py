"""What the contract is checked with: a subject, its inputs, and one comparison for all programs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.tolerances import EQUAL
from tidegate import Segments, State, registry
from tidegate.nn.mixer import GROWS, Mixer

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 131)  # around the sizes of chunks, and a prime above 64
Program = Callable[[Tensor, State], tuple[Tensor, State]]


# -- what is tested ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Subject:
    """One architecture under test: its class, tiny options and declared exceptions."""

    name: str
    cls: type[Mixer]
    dim: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def registered(name: str) -> Subject:
        info = registry.info(name)
        options = dict(info.tiny)
        return Subject(name, info.cls, options.pop("dim", 32), options, info.exceptions)  # type: ignore[arg-type]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        """A module whose weights are the same numbers in every dtype from float32 up.

        Every weight is moved a little: what an initialisation sets to zero would hide whatever flows through it.
        """
        torch.manual_seed(seed)
        mixer = self.cls(self.dim, **self.options, dtype=torch.float64)
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.copy_((parameter + 0.05 * torch.randn_like(parameter)).float())
        return mixer.to(dtype)

    def input(self, batch: int, time: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(batch, time, self.dim, generator=draw).to(dtype)

    def state(self, mixer: Mixer, batch: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> State:
        """A state that is not zero: what a random prefix left behind."""
        with torch.no_grad():
            return mixer(self.input(batch, 7, dtype, seed))[1]


@contextmanager
def unless_excused(subject: Subject, prop: str) -> Iterator[None]:
    """The block must pass, or, for a declared exception, must fail: an excuse that is not needed is an error."""
    assert prop in registry.PROPERTIES
    if prop not in subject.exceptions:
        yield
        return
    assert subject.exceptions[prop].strip(), f"{subject.name}: the exception {prop!r} gives no reason"
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, ValueError)):
        yield


# -- documents and padding ---------------------------------------------------------------------------------------------
def _documents(draw: random.Random, time: int) -> list[int]:
    cuts = sorted(draw.sample(range(1, time), min(time - 1, draw.randint(1, 4))))
    return [b - a for a, b in itertools.pairwise([0, *cuts, time])]


def _mask(rows: Sequence[Sequence[bool]]) -> Segments:
    return Segments.padded(torch.tensor(rows))


KINDS = ("whole", "packed", "packed_continued", "left", "right", "holes", "packed_with_holes", "blank_row")


def segments_of(kind: str, batch: int, time: int, draw: random.Random) -> Segments | None:
    """Random segments of one kind, another draw in every row."""
    if kind == "whole":
        return None
    if kind == "packed":
        return Segments.packed([_documents(draw, time) for _ in range(batch)])
    if kind == "packed_continued":
        return Segments.packed([_documents(draw, time) for _ in range(batch)], continues=True)
    pads = [draw.randint(0, time - 1) for _ in range(batch)]
    if kind == "left":
        return _mask([[t >= pad for t in range(time)] for pad in pads])
    if kind == "right":
        return _mask([[t < time - pad for t in range(time)] for pad in pads])
    holes = _mask([[draw.random() < 0.7 for _ in range(time)] for _ in range(batch)])
    if kind == "holes":
        return holes
    if kind == "packed_with_holes":
        return Segments.packed([_documents(draw, time) for _ in range(batch)], continues=True) & holes
    if kind == "blank_row":
        return holes & _mask([[row != 1 for _ in range(time)] for row in range(batch)])
    raise ValueError(kind)


# -- programs: several ways to run the same tokens ---------------------------------------------------------------------
def whole(mixer: Mixer, segments: Segments | None = None) -> Program:
    """One call."""
    return lambda x, state: mixer(x, state, segments=segments)


def pieces(mixer: Mixer, cuts: Sequence[int], segments: Segments | None = None) -> Program:
    """One call per piece, the state carried from each to the next."""

    def program(x: Tensor, state: State) -> tuple[Tensor, State]:
        outputs = []
        for a, b in itertools.pairwise([0, *cuts, x.shape[1]]):
            y, state = mixer(x[:, a:b], state, segments=None if segments is None else segments[a:b])
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return program


def alone(mixer: Mixer, segments: Segments | None) -> Program:
    """One call per document, with nothing in it but its real tokens: what packing and padding are to be equal to."""

    def program(x: Tensor, state: State) -> tuple[Tensor, State]:
        batch, time, _ = x.shape
        if segments is None:
            starts, valid = [[False] * time] * batch, [[True] * time] * batch
        else:
            starts, valid = segments.starts.tolist(), segments.valid.tolist()
        outputs, states = [], []
        for row in range(batch):
            documents: list[list[int]] = [[]]
            for t in range(time):
                if starts[row][t]:
                    documents.append([])
                if valid[row][t]:
                    documents[-1].append(t)
            last = state.select(row)
            y = x.new_zeros(time, x.shape[2])
            for number, times in enumerate(documents):
                if times:
                    piece, last = mixer(x[row : row + 1, times], last if number == 0 else None)
                    y = y.index_put((torch.tensor(times),), piece[0])
            outputs.append(y)
            states.append(last)
        return torch.stack(outputs), State.concat(states)

    return program


# -- comparison --------------------------------------------------------------------------------------------------------
def growing(spec: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Paths of the state's entries that lengthen with the sequence."""
    found: set[str] = set()
    for name, inner in spec.items():
        if isinstance(inner, Mapping):
            found |= growing(inner, f"{prefix}{name}/")
        elif GROWS in (inner[0] if len(inner) == 2 and isinstance(inner[1], torch.dtype | str) else inner):
            found.add(prefix + name)
    return found


def tensors_of(mixer: Mixer, *states: State) -> list[dict[str, Tensor]]:
    """The states' tensors by path; entries that grow are filled up with zeros to the longest."""
    flat = [state.tensors() for state in states]
    for other in flat[1:]:
        assert list(other) == list(flat[0]), f"states: entries {list(other)} instead of {list(flat[0])}"
    for path in growing(mixer.state_spec()):
        longest = max(tensors[path].shape[1] for tensors in flat)
        for tensors in flat:
            leaf = tensors[path]
            filler = leaf.new_zeros(leaf.shape[0], longest - leaf.shape[1], *leaf.shape[2:])
            tensors[path] = torch.cat([leaf, filler], 1)
    return flat


def assert_near(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float, what: str) -> None:
    """Each of `got` equals its namesake in `wanted`, up to `tolerance` of its magnitude (see tolerances.py)."""
    assert list(got) == list(wanted)
    magnitudes = {
        name: float(tensor.detach().abs().max()) if tensor.numel() else 0.0 for name, tensor in wanted.items()
    }
    largest = max(magnitudes.values(), default=0.0)
    failures = []
    for name, tensor in wanted.items():
        other = got[name].detach()
        if other.shape != tensor.shape:
            failures.append(f"{name}: shape {tuple(other.shape)} instead of {tuple(tensor.shape)}")
        elif not (tensor.is_floating_point() or tensor.is_complex()):
            if not torch.equal(other, tensor):
                failures.append(f"{name}: {other.flatten()[:8].tolist()} instead of {tensor.flatten()[:8].tolist()}")
        elif tensor.numel():
            wide = torch.promote_types(tensor.dtype, torch.float64)
            error = float((other.to(wide) - tensor.detach().to(wide)).abs().max())
            scale = max(magnitudes[name], 1e-2 * largest)
            if not error <= tolerance * scale:  # written so that NaN fails
                relative = error / scale if scale else float("inf")
                failures.append(f"{name}: error {relative:.1e} of the magnitude {scale:.1e}")
    assert not failures, f"{what} differ by more than {tolerance:.0e}:\n  " + "\n  ".join(failures)


@dataclass
class Results:
    """A program's outputs, final state and gradients, by name."""

    outputs: dict[str, Tensor]
    state: dict[str, Tensor]
    gradients: dict[str, Tensor]


def differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def results_of(mixers: Sequence[Mixer], programs: Sequence[Program], x: Tensor, state: State) -> list[Results]:
    """Run each program on leaves of its own, and back from one random combination of outputs and final states."""
    inputs, finals = [], []
    for mixer, program in zip(mixers, programs, strict=True):
        dtype = next(mixer.parameters()).dtype
        own_x = x.detach().to(dtype).clone().requires_grad_()
        own_state = state.to(dtype).map(lambda t: t.detach().clone().requires_grad_(differentiable(t)))
        inputs.append({"x": own_x, **{f"state/{p}": t for p, t in own_state.tensors().items() if differentiable(t)}})
        inputs[-1] |= dict(mixer.named_parameters())
        finals.append(program(own_x, own_state))
    states = tensors_of(mixers[0], *(final for _, final in finals))

    results = []
    for (y, _), final, leaves in zip(finals, states, inputs, strict=True):
        draw = torch.Generator().manual_seed(3)
        loss = torch.zeros((), dtype=torch.float64)
        for tensor in (y, *final.values()):
            if differentiable(tensor):
                real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                # A cotangent of the same numbers whichever the dtype.
                loss = loss + (real * torch.randn(real.shape, generator=draw).to(real.dtype)).sum().double()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
        }
        results.append(Results({"y": y}, final, gradients))
    return results


def assert_same(got: Results, wanted: Results, tolerance: float) -> None:
    assert_near(got.outputs, wanted.outputs, tolerance, "outputs")
    assert_near(got.state, wanted.state, tolerance, "final states")
    assert_near(got.gradients, wanted.gradients, tolerance, "gradients")


def check_equal(mixer: Mixer, got: Program, wanted: Program, x: Tensor, state: State) -> tuple[Results, Results]:
    """Outputs, final states and all gradients of two programs over one mixer are equal."""
    first, second = results_of((mixer, mixer), (got, wanted), x, state)
    assert_same(first, second, EQUAL[x.dtype])
    return first, second


def assert_bitwise(got: State, wanted: State, what: str) -> None:
    a, b = got.tensors(), wanted.tensors()
    assert list(a) == list(b)
    for path, tensor in b.items():
        assert a[path].dtype == tensor.dtype, f"{what}: {path} has dtype {a[path].dtype} instead of {tensor.dtype}"
        assert torch.equal(a[path], tensor), f"{what}: {path} has changed"
