"""Nonlinear cells: their weights at initialisation, in training, and how many there are."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.mixers.cells import ONE, D, draw, near
from tidegate import State, mixers
from tidegate.nn.weight_decay import weight_decay_groups
from tidegate.tasks.fit import fit


@pytest.mark.parametrize("name", ["lstm", "gru", "janet"])
def test_biases_at_initialisation(name):
    dim = 400
    row = 0 if name == "janet" else 1

    def biases(cell):
        return (cell.bias_ih if cell.bias_hh is None else cell.bias_ih + cell.bias_hh).detach().chunk(gates)

    cell = mixers.build(name, dim, forget_bias=2.5)
    gates = len(cell.cell.inputs)
    assert (biases(cell)[row] == 2.5).all()  # exactly, although PyTorch adds two biases
    if name == "janet":
        assert not biases(cell)[1].any()
    others = torch.cat([cell.weight_ih.flatten(), cell.weight_hh.flatten()]).detach()
    assert others.abs().max() <= dim**-0.5
    assert abs(float(others.std()) * (3 * dim) ** 0.5 - 1) < 0.02

    cell = mixers.build(name, dim, chrono_length=100)
    lags = torch.exp(biases(cell)[row])
    assert lags.min() >= 1 - 1e-4
    assert lags.max() <= 99 + 1e-2
    assert abs(float(lags.mean()) - 50) < 5
    if name == "lstm":
        assert torch.equal(biases(cell)[0], -biases(cell)[1])


def test_lstm_biases_where_gates_are_missing():
    for gate, row, value in (("input_gate", 0, 2.5), ("output_gate", 1, 2.5)):
        cell = mixers.build("lstm", 16, forget_bias=2.5, **{gate: False})
        assert ((cell.bias_ih + cell.bias_hh).chunk(3)[row] == value).all()
    cell = mixers.build("lstm", 16, chrono_length=50, forget_gate=False)
    lags = torch.exp(-(cell.bias_ih + cell.bias_hh).chunk(3)[0])  # the input gate's
    assert 1 - 1e-4 <= lags.min() <= lags.max() <= 49 + 1e-3
    wide = mixers.build("lstm", 16, hidden_size=400)
    assert max(p.abs().max() for n, p in wide.named_parameters() if n.startswith("weight")) <= 400**-0.5


@pytest.mark.parametrize(("name", "num_heads"), [("li-gru", 1), ("li-gru", 4), ("star", 1), ("star", 4)])
def test_orthogonal_recurrent_matrices_at_initialisation(name, num_heads):
    identity = torch.eye(16 // num_heads)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cell = mixers.build(name, 16, num_heads=num_heads, dtype=dtype)
        blocks = cell.weight_hh.detach().float().view(-1, *identity.shape)
        assert len(blocks) == len(cell.cell.matrices) * num_heads
        for block in blocks:
            near(block @ block.T, identity, tolerance)


def test_light_grus_other_weights_at_initialisation():
    cell = mixers.build("li-gru", 100, forget_bias=2.5)
    assert (cell.bias_ih[:100] == 2.5).all()
    assert not cell.bias_ih[100:].any()
    for inputs in (100, 20):
        bound = (6 / (100 + inputs)) ** 0.5
        weight = cell.with_input_size(inputs).weight_ih.detach()
        assert bound - 0.01 < weight.abs().max() <= bound


def test_stackable_cells_other_weights_at_initialisation():
    cell = mixers.build("star", 400, forget_bias=2.5)
    assert not cell.bias_ih[:400].any()
    assert (cell.bias_ih[400:] == -2.5).all()
    for weight in cell.weight_ih.detach().chunk(2):
        near(weight @ weight.T, torch.eye(400), 1e-5)
    lags = torch.exp(-mixers.build("star", 400, chrono_length=100).bias_ih.detach()[400:])
    assert 1 - 1e-4 <= lags.min() <= lags.max() <= 99 + 1e-2
    assert abs(float(lags.mean()) - 50) < 5


def test_chaos_free_and_additive_networks_at_initialisation():
    cell = mixers.build("cfn", 200, forget_bias=2.5)
    weights = torch.cat([cell.weight_ih, cell.weight_hh[:, :200]]).detach()
    assert 0.0699 < weights.abs().max() <= 0.07
    assert (cell.bias_ih[:200] == 2.5).all()
    assert (cell.bias_ih[200:] == -1).all()
    assert (mixers.build("cfn", D, input_bias=0.5).bias_ih[D:] == 0.5).all()
    cell = mixers.build("ran", 200, forget_bias=2.5)
    assert torch.cat([cell.weight_ih, cell.weight_hh]).abs().max() <= 200**-0.5
    assert not cell.bias_ih[:200].any()
    assert (cell.bias_ih[200:] == 2.5).all()


def test_fast_rnns_at_initialisation():
    for gated in (False, True):
        cell = mixers.build("fast-rnn", 200, gated=gated, forget_bias=2.5, alpha_logit=-2.0)
        weights = torch.cat([cell.weight_ih, cell.weight_hh]).detach()
        assert abs(float(weights.std()) - 0.1) < 0.002
        assert (cell.bias_ih == 1).all()
        assert cell.shares.tolist() == ([1.0, -4.0] if gated else [-2.0, 2.0])
        assert not gated or (cell.gate_bias == 2.5).all()


def test_minimal_rnns_encoder_takes_the_width_of_the_input():
    cell = mixers.build("minimal-rnn", 200, forget_bias=2.5).with_input_size(3)
    assert cell.encoder.weight.shape == (200, 3)
    assert (cell.bias_ih == 2.5).all()
    weights = torch.cat([cell.weight_ih, cell.weight_hh, cell.encoder.weight], 1).detach()
    assert 200**-0.5 - 1e-4 < weights.abs().max() <= 200**-0.5


@pytest.mark.parametrize("num_heads", [1, 4])
def test_elmans_recurrent_matrix_at_initialisation(num_heads):
    identity = torch.eye(16 // num_heads)
    cell = mixers.build("elman", 16, preset="irnn", num_heads=num_heads)
    assert all(torch.equal(block, identity) for block in cell.weight_hh.view(num_heads, *identity.shape))
    assert not torch.cat([cell.bias_ih, cell.bias_hh]).any()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cell = mixers.build("elman", 16, recurrent_init="orthogonal", num_heads=num_heads, dtype=dtype)
        for block in cell.weight_hh.detach().float().view(num_heads, *identity.shape):
            near(block @ block.T, identity, tolerance)


def test_an_irnn_starts_as_a_sum_over_time():
    cell, x = mixers.build("elman", D, preset="irnn", dtype=torch.float64), draw(1, 9, D)
    with torch.no_grad():
        cell.weight_ih.abs_()
        near(cell(x.abs())[0], functional.linear(x.abs(), cell.weight_ih).cumsum(1))


@pytest.mark.parametrize(
    ("name", "options", "keeps"),
    [
        ("mgu", {"forget_bias": 2.0}, 2.0),
        ("mgu", {"forget_bias": 2.0, "gate": "bias"}, 2.0),
        ("mgu", {"forget_bias": 2.0, "gate": "state-bias", "convention": "flax"}, 2.0),
        ("mgu", {"forget_bias": 2.0, "convention": "flax"}, 2.0),
        ("ugrnn", {"forget_bias": 2.0}, 2.0),
        ("rhn", {"depth": 1}, 2.0),
        ("rhn", {"depth": 1, "coupled": False}, 2.0),
    ],
)
def test_how_much_a_new_cell_keeps(name, options, keeps):
    """From h, without input and recurrent weights, the next h is sigmoid(keeps) h: whichever way round the gate is."""
    cell = mixers.build(name, D, dtype=torch.float64, **options)
    with torch.no_grad():
        cell.weight_hh.zero_()
        cell.weight_ih.zero_()
        if name != "rhn":
            cell.bias_ih[-D:] = 0.0  # the candidate's
        else:
            cell.bias_ih[:D] = 0.0
        h = draw(1, D)
        y, _ = cell(torch.zeros(1, 1, D, dtype=torch.float64), State(dict.fromkeys(cell.cell.states, h)))
    near(y[:, 0], h / (1 + math.exp(-keeps)))


@pytest.mark.parametrize(
    ("name", "options", "keeps"),
    [
        ("cfn", {"forget_bias": 2.0}, lambda h, share: share * torch.tanh(h)),
        ("fast-rnn", {"gated": True, "forget_bias": 2.0}, lambda h, share: share * h),
        ("fast-rnn", {"alpha_logit": -2.0}, lambda h, share: share * h),
        ("li-gru", {"forget_bias": 2.0}, lambda h, share: share * h),
        ("minimal-rnn", {"forget_bias": 2.0}, lambda h, share: share * h),
        ("ran", {"forget_bias": 2.0, "nonlinearity": "identity"}, lambda h, share: share * h),
        ("star", {"forget_bias": 2.0}, lambda h, share: torch.tanh(share * h)),
    ],
)
def test_how_much_a_new_light_cell_keeps(name, options, keeps):
    """The same, of cells whose candidate has no bias, or one that is zero or beside the gate's."""
    cell = mixers.build(name, D, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in cell.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        if name == "minimal-rnn":
            cell.encoder.bias.zero_()
        if name == "fast-rnn":
            cell.bias_ih.zero_()
        h = draw(1, D)
        y, _ = cell(torch.zeros(1, 1, D, dtype=torch.float64), State({cell.cell.states[0]: h}))
    near(y[:, 0], keeps(h, 1 / (1 + math.exp(-2.0))))


@pytest.mark.parametrize("coupled", [True, False])
def test_every_layer_of_a_new_highway_network_carries(coupled):
    cell = mixers.build("rhn", D, depth=4, coupled=coupled, transform_bias=-ONE, dtype=torch.float64)
    h = draw(1, D)
    near(cell(draw(1, 1, D), State(s=h))[0][:, 0], h)


def test_ind_rnns_recurrent_weights():
    high = 2 ** (1 / 50)
    u = mixers.build("ind-rnn", 1000, length=50).u.detach()
    assert 0 <= u.min() < 0.02
    assert high - 0.02 < u.max() <= high
    u = mixers.build("ind-rnn", 1000, length=50, only_last=True).u.detach()
    assert 1 / high <= u.min() < 1 / high + 0.002
    assert high - 0.002 < u.max() <= high
    assert mixers.build("ind-rnn", 1000, max_recurrent=0.3).u.max() <= 0.3
    assert mixers.build("ind-rnn", D, only_last=True).u.eq(1).all()
    cell = mixers.build("ind-rnn", D, length=50, gamma=10.0)
    with torch.no_grad():
        cell.u.copy_(torch.linspace(-2, 2, D))
    cell.constrain_()
    near(cell.u.detach(), torch.linspace(-2, 2, D).clamp(-(10 ** (1 / 50)), 10 ** (1 / 50)), 1e-6)
    assert any(p is cell.u for p in weight_decay_groups(cell, 0.1)[1]["params"])


def test_training_keeps_ind_rnns_within_their_bound(monkeypatch):
    def largest():
        torch.manual_seed(0)
        model, x = mixers.build("ind-rnn", D, only_last=True), torch.randn(2, 9, D)  # u is 1 to begin with
        fit(model, lambda: (x, torch.full((2, 9, D), 30.0)), steps=3, lr=1e-2, warmup=1)
        return float(model.u.detach().max())

    assert largest() == 1
    monkeypatch.setattr(type(mixers.build("ind-rnn", D)), "constrain_", lambda mixer: None)
    assert largest() > 1.01  # larger outputs were wanted


def test_an_antisymmetric_network_at_initialisation():
    dim = 256
    for num_heads in (1, 4):
        cell, width = mixers.build("antisymmetric-rnn", dim, num_heads=num_heads), dim // num_heads
        A = cell._matrices().detach()[0]
        near(A, -A.mT, 1e-7)  # gamma is a term of the equation
        upper = A[:, *torch.triu_indices(width, width, 1)]
        assert abs(float(upper.std()) * width**0.5 - 1) < 0.03
        assert 1.7 < torch.linalg.eigvals(A).imag.max() < 2.2
        assert abs(float(cell.weight_ih.detach().std()) * dim**0.5 - 1) < 0.03
        assert not cell.bias_ih.any()


def test_a_bistable_cell_at_initialisation():
    cell = mixers.build("brc", 16)
    assert cell.vectors.eq(1).all()
    assert not cell.bias_ih.any()
    assert cell.weight_hh is None
    bound = (6 / 32) ** 0.5
    assert 0.95 * bound < cell.weight_ih.abs().max() <= bound
    assert 0.95 * (6 / 40) ** 0.5 < cell.with_input_size(24).weight_ih.abs().max() <= (6 / 40) ** 0.5
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cell = mixers.build("brc", 16, neuromodulated=True, num_heads=2, dtype=dtype)
        for block in cell.weight_hh.detach().float().view(4, 8, 8):
            near(block @ block.T, torch.eye(8), tolerance)
        assert cell.vectors is None


@pytest.mark.parametrize(("num_heads", "reads"), [(1, 3 * 64), (4, 1.5 * 64)])
def test_oscillators_at_initialisation(num_heads, reads):
    cell = mixers.build("co-rnn", 64, num_heads=num_heads)
    for parameter in cell.parameters():
        assert parameter.abs().max() <= reads**-0.5
    assert max(parameter.abs().max() for parameter in cell.parameters()) > 0.99 * reads**-0.5
    wider = cell.with_input_size(128)
    assert 0.99 * (reads + 64) ** -0.5 < wider.weight_ih.abs().max() <= (reads + 64) ** -0.5


def test_a_multiplicative_lstm_at_initialisation():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        cell = mixers.build("multiplicative-lstm", 16, num_heads=2, dtype=dtype)
        W = cell.weight_ih.detach().float()
        near(W[:16] @ W[:16].T, torch.eye(16), tolerance)
        near(W[16:].T @ W[16:], torch.eye(16), tolerance)
        for block in cell.weight_hh.detach().float().view(5, 2, 8, 8).transpose(0, 1):
            near(block[0] @ block[0].T, torch.eye(8), tolerance)
            near(block[1:].flatten(0, 1).T @ block[1:].flatten(0, 1), torch.eye(8), tolerance)
    assert cell.bias_ih.view(5, 16).float().tolist() == [[0.0] * 16] * 2 + [[3.0] * 16] + [[0.0] * 16] * 2
    assert mixers.build("multiplicative-lstm", 16, forget_bias=0.5).bias_ih.view(5, 16)[2].eq(0.5).all()


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("antisymmetric-rnn", {}, D * (2 * D + 1)),
        ("antisymmetric-rnn", {"gated": True, "num_heads": 2}, D * D + 2 * D * (D + 1) - D * D // 2),
        ("brc", {}, 3 * D * (D + 1) + 2 * D),
        ("brc", {"neuromodulated": True}, 3 * D * (D + 1) + 2 * D * D),
        ("co-rnn", {}, D * (3 * D + 1)),
        ("lem", {}, 4 * D * (2 * D + 1)),
        ("multiplicative-lstm", {}, 5 * D * (2 * D + 1)),
        ("elman", {}, D * (2 * D + 2)),  # PyTorch has two biases here, and in the next two
        ("gru", {}, 3 * D * (2 * D + 2)),
        ("lstm", {}, 4 * D * (2 * D + 2)),
        ("lstm", {"peephole": True}, 4 * D * (2 * D + 2) + 3 * D),
        ("lstm", {"coupled": True}, 3 * D * (2 * D + 2)),
        ("lstm", {"hidden_size": 13}, 4 * 13 * (2 * D + 2) + 13 * D),
        ("lstm", {"gate_recurrence": True}, 4 * D * (2 * D + 1) + 9 * D * D),
        ("jordan", {}, D * (2 * D + 1) + D * D + D),
        ("mgu", {}, 2 * D * (2 * D + 1)),
        ("mgu", {"gate": "state-bias"}, D * (D + 1) + D * (2 * D + 1)),
        ("mgu", {"gate": "state"}, D * D + D * (2 * D + 1)),
        ("mgu", {"gate": "bias"}, D + D * (2 * D + 1)),
        ("ugrnn", {}, 2 * D * (2 * D + 1)),
        ("ugrnn", {"intersection": True}, 4 * D * (2 * D + 1)),
        ("ugrnn", {"num_heads": 4}, 2 * D * (D + D // 4 + 1)),
        ("cfn", {}, 5 * D * D + 2 * D),
        ("fast-rnn", {}, D * (2 * D + 1) + 2),  # two numbers more than an Elman network with one bias
        ("fast-rnn", {"gated": True}, 2 * D * D + 2 * D + 2),
        ("li-gru", {}, 2 * D * (2 * D + 1)),
        ("minimal-rnn", {}, 3 * D * D + 2 * D),
        ("ran", {}, 5 * D * D + 2 * D),
        ("star", {}, 3 * D * D + 2 * D),
        ("star", {"num_heads": 4}, 2 * D * D + D * D // 4 + 2 * D),
        ("janet", {}, 2 * D * (2 * D + 1)),
        ("rhn", {"depth": 3}, 2 * D * D + 2 * 3 * D * (D + 1)),
        ("ind-rnn", {}, D * (D + 2)),
    ],
)
def test_the_number_of_parameters(name, options, wanted):
    assert sum(p.numel() for p in mixers.build(name, D, **options).parameters()) == wanted


def test_shares_of_a_fast_rnn_stay_below_one_in_half_precision():
    cell = mixers.build("fast-rnn", 16, alpha_logit=-7.0, dtype=torch.bfloat16)
    beta = cell._biases()[1][1]
    assert beta.dtype == torch.float32
    near(beta, torch.full((16,), 7.0).sigmoid(), 1e-6)
