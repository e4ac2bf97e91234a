"""torch.compile, torch.export and torch.vmap see the mixer as eager mode does."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tests.contract.helpers import (
    Subject,
    assert_near,
    check_equal,
    growing,
    segments_of,
    tensors_of,
    unless_excused,
    whole,
)
from tests.contract.test_equality import drawn
from tests.contract.tolerances import EQUAL
from tidegate import State


def test_compile_as_one_graph(subject: Subject):
    mixer = subject.build(torch.float32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    x, state = subject.input(2, 17, torch.float32), subject.state(mixer, 2, torch.float32)
    segments = segments_of("packed_with_holes", 2, 17, drawn("compile", subject.name))
    check_equal(mixer, lambda x, state: compiled(x), lambda x, state: mixer(x), x, state)
    check_equal(mixer, whole(compiled, segments), whole(mixer, segments), x, state)  # without them: the next test


def test_compile_for_any_length(subject: Subject):
    mixer = subject.build(torch.float32)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=True)
    state = subject.state(mixer, 2, torch.float32)
    torch._dynamo.utils.counters.clear()
    for time in (23, 37, 70):  # no other axis is 23 long: equal sizes would be taken for the same one
        x = subject.input(2, time, torch.float32)
        check_equal(mixer, whole(compiled), whole(mixer), x, state)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled again for another length"


class _Streaming(torch.nn.Module):
    """Export wants positional arguments only."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x, state=None, segments=None):
        return self.mixer(x, state, segments=segments)


@pytest.mark.parametrize("with_segments", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_for_any_length(subject: Subject, with_segments: bool):
    """Exported from one example, the program takes other lengths and carries its state."""
    mixer = subject.build(torch.float32)
    grows = growing(mixer.state_spec())
    time = Dim("time", min=1, max=1 << 16)

    def dynamic(state: State, prefix: str = "") -> list:
        """Which axes of the state vary; torch.export wants lists in place of registered nodes."""
        return [
            dynamic(leaf, f"{prefix}{name}/")
            if isinstance(leaf, State)
            else ({1: Dim.DYNAMIC} if prefix + name in grows else {})
            for name, leaf in state.items()
        ]

    def program():
        example, state = subject.input(2, 6, torch.float32), subject.state(mixer, 2, torch.float32)
        state = state.map(torch.clone)  # of a view, the program would demand the same base again
        arguments: tuple = (example, state)
        shapes: dict = {"x": {1: time}, "state": dynamic(state)}
        if with_segments:
            segments = segments_of("packed_with_holes", 2, 6, drawn("export", subject.name))
            arguments = (*arguments, segments)
            shapes["segments"] = [{1: time}, {1: time}]
        return torch.export.export(_Streaming(mixer), arguments, dynamic_shapes=shapes).module()

    tolerance = EQUAL[torch.float32]
    exported = program()
    state = wanted = subject.state(mixer, 2, torch.float32, seed=9)
    for length in (11, 1, 67):
        x = subject.input(2, length, torch.float32, seed=length)
        segments = segments_of("packed_with_holes", 2, length, drawn("run", length)) if with_segments else None
        with torch.no_grad():
            y, state = exported(x, state, segments) if with_segments else exported(x, state)
            y_wanted, wanted = mixer(x, wanted, segments=segments)
        assert_near({"y": y}, {"y": y_wanted}, tolerance, f"exported outputs at length {length}")
        assert_near(*tensors_of(mixer, state, wanted), tolerance, f"exported states at length {length}")


def test_vmap_over_an_ensemble(subject: Subject):
    """Weights, inputs, states and segments with an axis in front, as one call."""
    mixer, other = subject.build(), subject.build(seed=3)
    weights = [dict(m.named_parameters()) for m in (mixer, other)]
    xs = [subject.input(2, 17, seed=seed) for seed in (4, 5)]
    states = [subject.state(mixer, 2, seed=seed) for seed in (6, 7)]
    segments = [segments_of("packed_with_holes", 2, 17, drawn("vmap", seed)) for seed in (0, 1)]

    def call(weights, x, state, segments):
        return functional_call(mixer, weights, (x, state), {"segments": segments})

    def stack(several):
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *several)

    with torch.no_grad(), unless_excused(subject, "vmap"):
        for given in (segments, [None, None]):
            in_dims = (0, 0, 0, None if given[0] is None else 0)
            stacked = None if given[0] is None else stack(given)
            y, last = torch.vmap(call, in_dims=in_dims)(stack(weights), stack(xs), stack(states), stacked)
            for index, arguments in enumerate(zip(weights, xs, states, given, strict=True)):
                y_one, last_one = call(*arguments)
                assert_near({"y": y[index]}, {"y": y_one}, EQUAL[torch.float64], "outputs under vmap")
                got = last.map(lambda t, index=index: t[index])
                assert_near(*tensors_of(mixer, got, last_one), EQUAL[torch.float64], "states under vmap")
