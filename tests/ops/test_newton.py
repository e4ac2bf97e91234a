"""Cells for all tokens at once: the same results and gradients as token by token."""

from functools import partial

import pytest
import torch

from tidegate import backend
from tidegate.ops.block_scan import block_scan
from tidegate.ops.cell import Cell, newton
from tidegate.segments import Segments

CELLS = {
    "one state": Cell(
        """z = sigmoid(a_z * h + W_z @ x)
           c = tanh(a_c * h * z + W_c @ x)
           h = (1 - z) * h + z * c""",
        "h",
    ),
    "two states": Cell(
        """f = sigmoid(a_f * h + p_f * c + W_f @ x)
           c = f * c + (1 - f) * tanh(a_z * h + W_z @ x)
           h = sigmoid(W_o @ x + a_o * h + p_o * c) * tanh(c)""",
        "h c",
    ),
    "matrices": Cell(
        """r = sigmoid(W_r @ x + U_r @ h)
           h = tanh(W_n @ x + U_n @ (r * h)) - h / 2""",
        "h",
    ),
    "means": Cell(
        """u = W @ x + U @ h
           c = 0.5 * c + (u - mean(u)) / sqrt(mean(u ** 2) + 0.1)
           h = tanh(c)""",
        "h c",
    ),
}
B, T, D, H = 3, 23, 6, 2


def arguments(cell, dtype=torch.float64, scale=0.5):
    torch.manual_seed(0)
    made = {
        "inputs": torch.randn(B, T, len(cell.inputs), D, dtype=dtype),
        "matrices": scale * torch.randn(len(cell.matrices), H, D // H, D // H, dtype=dtype),
        "vectors": scale * torch.randn(len(cell.vectors), D, dtype=dtype),
        "state": torch.randn(B, len(cell.states), D, dtype=dtype),
    }
    return {name: x.requires_grad_() for name, x in made.items()}


def segments():
    torch.manual_seed(1)
    return Segments(torch.rand(B, T) < 0.15, torch.rand(B, T) < 0.8)


def _new_states(sequence, before):
    return sequence.step(before)[1]


def results(cell, given, method, **options):
    y, last = cell(**given, method=method, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [x for x in given.values() if x.numel()]
    return y, last, *torch.autograd.grad((y * weights).sum() + last.square().sum(), wanted)


@pytest.mark.parametrize("truncate", [None, 1, 5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_equals_token_by_token(name, packed, truncate):
    cell = CELLS[name]
    given = arguments(cell)
    options = {"segments": segments() if packed else None, "truncate": truncate}
    solved, looped = (results(cell, given, method, **options) for method in ("newton", "sequential"))
    for a, b in zip(solved, looped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_float32(name):
    cell = CELLS[name]
    given, exact = arguments(cell, torch.float32), arguments(cell)
    exact = {key: given[key].detach().double().requires_grad_() for key in exact}
    for a, b in zip(results(cell, given, "newton"), results(cell, exact, "sequential"), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_the_blocks_are_the_jacobian():
    """Against autograd, channel by channel; with matrices it is their diagonals that count."""
    for name in ("one state", "two states"):
        cell = CELLS[name]
        given = {key: x.detach() for key, x in arguments(cell).items()}
        sequence = newton._Sequence(cell, given["inputs"], given["matrices"], given["vectors"], None, 0)
        before = torch.randn(B, T, len(cell.states), D, dtype=torch.float64)
        after, blocks = sequence.linearised(before)
        torch.testing.assert_close(after, sequence.step(before)[1])
        for k in range(len(cell.states)):
            ones = torch.zeros_like(before)
            ones[:, :, k] = 1
            _, column = torch.autograd.functional.jvp(partial(_new_states, sequence), before, ones)
            torch.testing.assert_close(blocks[:, :, :, k], column, rtol=1e-12, atol=1e-12)


def test_few_iterations_where_the_recurrence_is_weak_and_exact_prefixes():
    cell = CELLS["one state"]
    given = {key: x.detach() for key, x in arguments(cell, scale=0.1).items()}
    found = newton.solve(cell, *given.values())
    assert found.converged
    assert found.iterations <= 4
    exact, _ = cell(**given, method="sequential")
    part = newton.solve(cell, *given.values(), max_iterations=2, tolerance=0.0)
    assert not part.converged
    torch.testing.assert_close(part.states[:, :2, 0], exact[:, :2], rtol=1e-12, atol=1e-12)


def test_where_it_does_not_converge_the_loop_takes_over():
    cell = Cell("h = where(h < 0, 9 * h + 1, -9 * h) + sigmoid(W @ x) - 0.5", "h")
    given = {key: x.detach() for key, x in arguments(cell).items()}
    assert not newton.solve(cell, *given.values(), max_iterations=3).converged
    for a, b in zip(cell(**given, method="newton"), cell(**given, method="sequential"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_which_method_by_default(monkeypatch):
    seen = []
    monkeypatch.setattr(newton, "run", lambda cell, *rest: seen.append(cell))
    for name, used in (("one state", True), ("two states", True), ("matrices", False), ("means", False)):
        cell, seen[:] = CELLS[name], []
        given = arguments(cell)
        with backend("parallel"):
            cell(**given)
            assert bool(seen) == used, name
            seen.clear()
            cell(**given, gradient_clip=1.0)
            cell(**given, method="sequential")
            cell(**{**given, "inputs": given["inputs"][:, :1]})
        with backend("reference"):
            cell(**given)
        assert not seen


def test_gradients_of_gradients():
    cell = CELLS["two states"]
    given = arguments(cell)
    del given["matrices"]
    small = {**given, "inputs": given["inputs"].detach()[:1, :4].requires_grad_(), "state": given["state"][:1].detach()}

    def function(inputs, vectors):
        return cell(inputs, None, vectors, small["state"], method="newton")

    assert torch.autograd.gradgradcheck(function, (small["inputs"], small["vectors"]), fast_mode=True)


def test_errors():
    given = arguments(CELLS["one state"])
    with pytest.raises(ValueError, match="method: seen 'fast', wanted 'sequential', 'newton' or None"):
        CELLS["one state"](**given, method="fast")
    with pytest.raises(ValueError, match="gradient_clip: the method 'newton'"):
        CELLS["one state"](**given, method="newton", gradient_clip=1.0)


@pytest.mark.parametrize("form", ["reference", "parallel", "numba"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_block_scan(size, reverse, form):
    torch.manual_seed(0)
    A = torch.randn(2, 37, size, size, 70) / size
    b, x = torch.randn(2, 37, size, 70), torch.zeros(2, size, 70, dtype=torch.float64)
    with backend(form):
        found = block_scan(A, b, reverse=reverse)
    for t in reversed(range(37)) if reverse else range(37):
        x = torch.einsum("bskd,bkd->bsd", A[:, t].double(), x) + b[:, t]
        torch.testing.assert_close(found[:, t].double(), x, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    cell = Cell("h = tanh(W @ x + U @ h)", "h")
    y, state = cell(torch.zeros(0, 3, 1, 4), torch.randn(1, 1, 4, 4), method="newton")
    assert y.shape == (0, 3, 4)
    assert state.shape == (0, 1, 4)
