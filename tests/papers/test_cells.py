"""What the papers on nonlinear cells are measured with: the parts of rnn-review, pararnn and flashrnn."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate import registry
from tidegate.backend import choose
from tidegate.ops.cell import newton
from tidegate.papers import flashrnn, pararnn, rnn_review
from tidegate.papers.turns import in_turns


# -- rnn-review --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("window", "reaches"), [(None, 12), (12, 12), (4, 4), (5, 2), (1, 1)])
def test_no_gradient_leaves_a_window(window, reaches):
    model = rnn_review.Reader(8, 4, rnn_review.lag_cell("gru"), window)
    seen = []

    def keep(module, given, x):
        x.retain_grad()
        seen.append(x)

    model.embedding.register_forward_hook(keep)
    model(torch.randint(8, (2, 12)))[0][:, -1].sum().backward()
    assert (seen[0].grad != 0).any(-1).all(0).tolist() == [t >= 12 - reaches for t in range(12)]


@pytest.mark.parametrize("name", ["lstm", "gru", "elman"])
def test_windows_change_no_output(name):
    ids = torch.randint(8, (3, 12))
    model = rnn_review.Reader(8, 4, rnn_review.lag_cell(name))
    whole = model(ids)[0]
    model.window = 5
    torch.testing.assert_close(model(ids)[0], whole, rtol=1e-5, atol=1e-6)


def test_biases_of_the_lag_cells():
    lstm = rnn_review.lag_cell("lstm", 3.0).layers[0]
    i, f, _, _ = (lstm.bias_ih + lstm.bias_hh).chunk(4)
    assert (i == -3).all()
    assert (f == 3).all()
    lstm = rnn_review.lag_cell("lstm", 0.0).layers[0]
    i, f, _, _ = (lstm.bias_ih + lstm.bias_hh).chunk(4)
    assert 0 < i.abs().max() < 1
    assert (f == 0).all()


def test_only_the_first_token_and_the_future_answer():
    ids, targets = rnn_review.first_token(50, torch.Generator().manual_seed(0), length=7)
    assert ids[:, 0].max() < 4 <= ids[:, 1:].min()
    assert torch.equal(targets[:, -1], ids[:, 0])
    assert (targets[:, :-1] == -100).all()
    ids, targets = rnn_review.coming(50, torch.Generator().manual_seed(0), length=7, ahead=2)
    assert torch.equal(targets[:, :-2], ids[:, 2:])
    assert (targets[:, -2:] == -100).all()


# -- pararnn -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(pararnn.CELLS.values()))
def test_the_problem_is_the_layers(name):
    torch.manual_seed(5)
    cell, given = pararnn.problem(name, 2, 9, 8, recurrent_std=0.5)
    y = cell(*given)[0]
    torch.manual_seed(5)
    mixer = registry.build(name, 8, preset="cell", recurrent_std=0.5)
    torch.testing.assert_close(mixer(torch.randn(2, 9, 8))[0], y)


def test_the_gradient_error_sees_a_wrong_gradient(monkeypatch):
    torch.manual_seed(0)
    cell, given = pararnn.problem("para-gru", 2, 40, 8, recurrent_std=0.5)
    assert pararnn.gradient_error(cell, given) < 1e-5
    inputs, matrices, vectors, state = given
    assert not newton.solve(cell, inputs, matrices, 40 * vectors, state).converged
    assert math.isnan(pararnn.gradient_error(cell, (inputs, matrices, 40 * vectors, state)))
    exact = newton.block_scan

    def forward_only(blocks, rest, reverse=False):
        return torch.zeros_like(rest) if reverse else exact(blocks, rest)

    monkeypatch.setattr(newton, "block_scan", forward_only)
    assert pararnn.gradient_error(cell, given) > 1e-3


def test_ratios_pair_what_belongs_together():
    numbers = {
        "G, 1 x 16, Newton": {"a": 6.0, "b": 8.0},
        "G, 1 x 16, loop": {"a": 2.0, "b": 16.0},
        "G, 16 x 64, Newton": {"a": 5.0},
        "G, 16 x 64, loop": {"a": 1.0},
    }
    assert pararnn.ratios(numbers, "loop") == [3.0, 0.5, 5.0]
    assert pararnn.ratios(numbers, "loop", "16 x 64") == [5.0]


# -- flashrnn ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("system", list(flashrnn.CELLS))
def test_kernel_and_loop_are_timed_on_the_same_gradients(system):
    x = torch.randn(2, 20, 16)
    layer = flashrnn.cell(system, 16, 4)
    run = flashrnn.recurrence(layer, x)
    gradients = run()
    assert gradients[0].shape[:2] == (2, 20)
    for ours, theirs in zip(gradients, flashrnn.by_loop(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert flashrnn.gradient_error(layer, x) < 1e-5
    assert layer.weight_hh.dtype == torch.float32


def test_the_gradient_error_of_a_layer_sees_a_wrong_kernel(monkeypatch):
    x, layer = torch.randn(2, 20, 16), flashrnn.cell("LSTM", 16, 4)
    exact = flashrnn.whole

    def wrong(layer, x):
        first, *rest = exact(layer, x)()
        return lambda: (first + 1e-3 * first.abs().max(), *rest)

    monkeypatch.setattr(flashrnn, "whole", wrong)
    assert 5e-4 < flashrnn.gradient_error(layer, x) < 2e-3


def test_the_loop_is_the_reference():
    assert flashrnn.by_loop(lambda: choose(torch.zeros(1))) == "reference"


# -- times -------------------------------------------------------------------------------------------------------------
def test_calls_take_turns():
    order = []
    seen = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, order.append)
    assert order == ["a", "b", "turn 1 of 2", "a", "b", "turn 2 of 2", "a", "b"]
    assert list(seen) == ["a", "b"]
