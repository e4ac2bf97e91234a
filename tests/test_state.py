"""State: a frozen tree of tensors, batch first."""

import copy
import os
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from tidegate import State
from tidegate.state import write_atomically


def nested(batch: int = 2, length: int = 3) -> State:
    return State(
        memory=torch.randn(batch, 2, 4),
        positions=torch.arange(1000, 1000 + batch),
        inner=State(phase=torch.randn(batch, 3, dtype=torch.complex64), keys=torch.randn(batch, length, 2, 5)),
    )


def same(a: State, b: State) -> bool:
    a_flat, b_flat = a.tensors(), b.tensors()
    return list(a_flat) == list(b_flat) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a_flat.values(), b_flat.values(), strict=True)
    )


# -- mapping -----------------------------------------------------------------------------------------------------------
def test_it_is_a_mapping_that_cannot_be_written_to():
    state = nested()
    assert list(state) == ["memory", "positions", "inner"]
    assert len(state) == 3
    assert "memory" in state
    with pytest.raises(TypeError):
        state["memory"] = torch.zeros(1)  # type: ignore[index]


def test_it_does_not_share_the_mapping_it_was_made_from():
    entries = {"a": torch.zeros(1)}
    state = State(entries)
    entries["b"] = torch.zeros(1)
    assert list(state) == ["a"]


def test_paths_of_nested_tensors_and_their_memory():
    state = nested()
    assert list(state.tensors()) == ["memory", "positions", "inner/phase", "inner/keys"]
    assert state.nbytes == 4 * 16 + 8 * 2 + 8 * 6 + 4 * 60
    assert repr(state).startswith("State(memory=(2, 2, 4), positions=(2,), inner=State(")


def test_a_name_may_not_contain_the_separator():
    with pytest.raises(ValueError, match="'a/b' contains '/'"):
        State({"a/b": torch.zeros(1)})


# -- whole-tree operations ---------------------------------------------------------------------------------------------
def test_detach_cuts_the_graph_and_keeps_the_values():
    x = torch.ones(1, 2, requires_grad=True)
    state = State(inner=State(h=2 * x))
    assert not state.detach()["inner"]["h"].requires_grad
    assert state["inner"]["h"].requires_grad
    assert torch.equal(state.detach()["inner"]["h"], torch.full((1, 2), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_keeps_integers_exact_and_complex_numbers_complex(dtype):
    moved = nested().to(dtype)
    assert moved["memory"].dtype == dtype
    assert moved["positions"].tolist() == [1000, 1001]  # 1001 is not a number in bfloat16
    assert moved["inner"]["phase"].dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    assert moved["inner"]["keys"].dtype == dtype


def test_to_takes_a_device():
    moved = nested().to("meta", torch.float64)
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert moved["memory"].dtype == torch.float64


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (0, [0]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([2, 0, 2], [2, 0, 2]),
        (torch.tensor([1, 0]), [1, 0]),
        (torch.tensor(1), [1]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
        ([], []),
    ],
)
def test_select(index, rows):
    state = nested(batch=3)
    chosen = state.select(index)
    assert chosen.batch_size == len(rows)
    for path, tensor in chosen.tensors().items():
        assert torch.equal(tensor, state.tensors()[path][torch.tensor(rows, dtype=torch.long)])


@pytest.mark.parametrize("index", [3, -4])
def test_select_outside_the_batch_names_the_index(index):
    with pytest.raises(IndexError, match=f"index: {index} is outside this state's batch of 3"):
        nested(batch=3).select(index)


def test_a_state_without_tensors_has_the_same_for_every_row():
    empty = State(layer=State())
    assert same(empty.select(5), empty)
    assert same(empty.select([0, 2]), empty)
    assert same(State.concat([empty, empty]), empty)


def test_concat_undoes_select():
    state = nested(batch=3)
    assert same(State.concat([state.select(0), state.select(slice(1, 3))]), state)


def test_concat_pads_the_axis_that_grows():
    short, long = nested(1, length=2), nested(1, length=5)
    keys = State.concat([short, long])["inner"]["keys"]
    assert keys.shape == (2, 5, 2, 5)
    assert torch.equal(keys[0, :2], short["inner"]["keys"][0])
    assert not keys[0, 2:].any()
    assert torch.equal(keys[1:], long["inner"]["keys"])


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([], "empty"),
        ([State(a=torch.zeros(1)), State(b=torch.zeros(1))], "entry 1 has the names"),
        ([State(a=torch.zeros(1, 2, 3)), State(a=torch.zeros(1, 2, 4))], "'a' has the shapes"),
        ([State(a=torch.zeros(1, 2)), State(a=torch.zeros(1))], "'a' has the shapes"),
        ([State(a=torch.zeros(1)), State(a=State(b=torch.zeros(1)))], "'a' is a tensor in one"),
        ([State(a=State(b=torch.zeros(1))), State(a=torch.zeros(1))], "'a' is a tensor in one"),
    ],
)
def test_concat_of_states_of_different_layers_is_refused(states, message):
    with pytest.raises(ValueError, match=f"states: .*{message}"):
        State.concat(states)


def test_map_select_and_concat_carry_gradients():
    x = torch.ones(2, 3, requires_grad=True)
    state = State(h=x)
    State.concat([state.select(1), state.select(1)])["h"].sum().backward()
    assert x.grad.tolist() == [[0, 0, 0], [2, 2, 2]]


# -- as a pytree -------------------------------------------------------------------------------------------------------
def test_pytree_round_trip():
    state = nested()
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 4
    assert same(pytree.tree_unflatten(leaves, spec), state)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert repr(pytree.tree_map(lambda leaf: 1, state)) == "State(memory=1, positions=1, inner=State(phase=1, keys=1))"
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(state)[0]]
    assert paths == ["['memory']", "['positions']", "['inner']['phase']", "['inner']['keys']"]


def test_torch_sees_through_it():
    state = State(h=torch.randn(4, 2), inner=State(n=torch.arange(4)))

    def double(state: State) -> State:
        return State(h=2 * state["h"], inner=State(n=state["inner"]["n"] + 1))

    expected = double(state)
    assert same(torch.vmap(double)(state), expected)
    assert same(torch.compile(double, fullgraph=True, backend="eager")(state), expected)


def test_pickle_and_deepcopy():
    state = nested()
    assert same(pickle.loads(pickle.dumps(state)), state)
    assert same(copy.deepcopy(state), state)


# -- files -------------------------------------------------------------------------------------------------------------
def test_save_and_load_are_bitwise(tmp_path):
    state = nested()
    state.save(tmp_path / "state.safetensors")
    assert same(State.load(tmp_path / "state.safetensors"), state)


def test_unusual_tensors_survive_a_file(tmp_path):
    shared = torch.randn(2, 6)
    phase = torch.randn(2, 3, dtype=torch.complex128)
    state = State(
        a=shared[:, ::2],
        b=shared[:, ::2],  # the same memory twice
        c=phase.conj(),
        d=phase.conj().imag,
        e=torch.randn(2, 0, 3),
        f=torch.randn(2, 3).bfloat16(),
        g=torch.tensor([[True], [False]]),
        h=torch.tensor([[float("nan"), float("inf"), -0.0]]),
        i=torch.ones(2, 1, requires_grad=True) * 2,
        empty=State(),
    )
    state.save(tmp_path / "s")
    loaded = State.load(tmp_path / "s")
    assert list(loaded) == list(state)
    for name, tensor in state.tensors().items():
        got = loaded.tensors()[name]
        assert got.dtype == tensor.dtype
        torch.testing.assert_close(got, tensor.detach().resolve_conj(), rtol=0, atol=0, equal_nan=True)
    assert len(loaded["empty"]) == 0


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such state file"):
        State.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such state file"):
        State.load(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "state"
    nested().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match="not a readable state file"):
        State.load(path)


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"not one written by State\.save"):
        State.load(tmp_path / "weights")
    meta = {"format": "tidegate.State", "names": '[["b", null]]', "complex": "[]"}
    save_file({"a": torch.zeros(1)}, tmp_path / "damaged", metadata=meta)
    with pytest.raises(ValueError, match="it is damaged"):
        State.load(tmp_path / "damaged")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
