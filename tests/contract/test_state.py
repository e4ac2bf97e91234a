"""State in, state out: fork, select, concat, files, size."""

from __future__ import annotations

import pytest
import torch

from tests.contract.helpers import (
    Subject,
    assert_bitwise,
    assert_near,
    growing,
    segments_of,
    tensors_of,
    unless_excused,
)
from tests.contract.test_equality import drawn
from tests.contract.tolerances import EQUAL
from tidegate import State

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
def test_a_state_can_be_continued_twice(subject: Subject, dtype: torch.dtype):
    mixer = subject.build(dtype)
    state = subject.state(mixer, 2, dtype)
    before = state.map(torch.clone)
    with torch.no_grad():
        for time, seed in ((17, 5), (1, 6)):
            one, other = subject.input(2, time, dtype, seed), subject.input(2, time, dtype, seed + 10)
            segments = segments_of("packed_with_holes", 2, time, drawn("fork", subject.name, time))
            y, last = mixer(one, state)
            kept = last.map(torch.clone)
            mixer(other, state)
            mixer(other, state, segments=segments)
            again, last_again = mixer(one, state)
            assert torch.equal(y, again), "the same state and input give another output the second time"
            assert_bitwise(last_again, last, "the second time the final state")
            assert_bitwise(last, kept, "a final state that was given out")
    assert_bitwise(state, before, "the state that was passed in")


def test_a_call_does_not_write_to_its_input(subject: Subject):
    mixer = subject.build(torch.float32)
    x = subject.input(2, 17, torch.float32)
    before = x.clone()
    y, state = mixer(x)
    (y.sum() + sum(t.sum() for t in state.tensors().values() if t.is_floating_point())).backward()
    assert torch.equal(x, before)


@DTYPES
def test_rows_can_be_selected_and_joined(subject: Subject, dtype: torch.dtype):
    """Streams of different age are stepped together, and taken apart again."""
    mixer = subject.build(dtype)
    with torch.no_grad():
        _, young = mixer(subject.input(2, 3, dtype, seed=4))
        _, old = mixer(subject.input(1, 21, dtype, seed=5))
        x = subject.input(3, 9, dtype, seed=6)
        y_young, young_last = mixer(x[:2], young)
        y_old, old_last = mixer(x[2:], old)
        y, last = mixer(x, State.concat([young, old]))
        mixed, _ = mixer(x[[2, 0]], State.concat([young, old]).select([2, 0]))
    tolerance = EQUAL[dtype]
    assert_near({"y": y}, {"y": torch.cat([y_young, y_old])}, tolerance, "outputs of joined streams")
    got, wanted = tensors_of(mixer, last, State.concat([young_last, old_last]))
    assert_near(got, wanted, tolerance, "final states of joined streams")
    assert_near({"y": mixed}, {"y": y[[2, 0]]}, tolerance, "outputs of selected streams")


def test_a_saved_state_continues_bitwise(subject: Subject, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        mixer = subject.build(dtype)
        state = subject.state(mixer, 2, dtype)
        state.save(tmp_path / "state.safetensors")
        loaded = State.load(tmp_path / "state.safetensors")
        assert_bitwise(loaded, state, "the loaded state")
        x = subject.input(2, 5, dtype)
        with torch.no_grad():
            y, last = mixer(x, state)
            again, last_again = mixer(x, loaded)
        assert torch.equal(y, again)
        assert_bitwise(last_again, last, "the final state after loading")


def test_the_size_of_the_state_is_constant(subject: Subject):
    mixer = subject.build(torch.float32)
    with torch.no_grad():
        _, early = mixer(subject.input(1, 10, torch.float32))
        _, late = mixer(subject.input(1, 990, torch.float32), early)
    with unless_excused(subject, "constant_state"):
        assert late.nbytes == early.nbytes
        assert not growing(mixer.state_spec())


def test_the_state_is_as_the_specification_says(subject: Subject):
    """Names, order, shapes and dtypes; what accumulates is at least float32."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mixer = subject.build(dtype)
        initial = mixer.init_state(3, dtype=dtype)
        grows = growing(mixer.state_spec())
        with torch.no_grad():
            _, last = mixer(subject.input(3, 5, dtype))
        wanted = initial.tensors()
        assert list(last.tensors()) == list(wanted)
        for path, tensor in last.tensors().items():
            assert tensor.dtype == wanted[path].dtype, f"{path}: {tensor.dtype} instead of {wanted[path].dtype}"
            if path not in grows:
                assert tensor.shape == wanted[path].shape, f"{path}: {tensor.shape} instead of {wanted[path].shape}"
        assert set(mixer.state_spec()) == set(last)
        accumulators = [t for name, t in last.items() if isinstance(t, torch.Tensor) and not _declared(mixer, name)]
        for tensor in accumulators:
            assert tensor.dtype.itemsize >= 4, f"an accumulator of dtype {tensor.dtype}"


def _declared(mixer, name: str) -> bool:
    """The specification names a dtype for this entry."""
    spec = mixer.state_spec()[name]
    return len(spec) == 2 and isinstance(spec[1], torch.dtype | str)


def test_the_initial_state_is_zero_and_new(subject: Subject):
    mixer = subject.build()
    first, second = mixer.init_state(2), mixer.init_state(2)
    for path, tensor in first.tensors().items():
        assert not tensor.any(), path
        assert tensor.numel() == 0 or tensor.data_ptr() != second.tensors()[path].data_ptr(), path
