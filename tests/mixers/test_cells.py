"""Nonlinear cells: each against its equation as a loop, its relatives and limits, and PyTorch's where it has one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import tidegate
from tests.mixers import cell_equations
from tidegate import Segments, State, mixers, ops
from tidegate.nn.weight_decay import weight_decay_groups
from tidegate.tasks.fit import fit

D = 8
ONE = 1e3  # as the bias of a gate: its sigmoid is 1 to the last digit, and 0 with the sign changed

CASES = [
    ("elman", {}),
    ("elman", {"nonlinearity": "relu", "num_heads": 2}),
    ("gru", {}),
    ("gru", {"reset": "before", "num_heads": 2}),
    ("ind-rnn", {}),
    ("ind-rnn", {"nonlinearity": "tanh"}),
    ("janet", {}),
    ("janet", {"beta": -0.5, "num_heads": 4}),
    ("jordan", {}),
    ("jordan", {"alpha": 0.5, "nonlinearity": "sigmoid", "output_activation": "sigmoid"}),
    ("jordan", {"alpha": 0.25, "nonlinearity": "relu", "output_activation": "tanh", "num_heads": 2}),
    ("lstm", {}),
    ("lstm", {"peephole": True, "num_heads": 2}),
    ("lstm", {"peephole": True, "coupled": True}),
    ("lstm", {"layer_norm": True, "num_heads": 2}),
    ("lstm", {"hidden_size": 13}),
    ("lstm", {"hidden_size": 13, "peephole": True, "layer_norm": True, "forget_gate": False}),
    ("lstm", {"forget_gate": False}),
    ("lstm", {"input_gate": False, "output_activation": False}),
    ("lstm", {"output_gate": False, "input_activation": False, "peephole": True}),
    *(("mgu", {"gate": gate}) for gate in ("full", "state-bias", "state", "bias")),
    *(("mgu", {"gate": gate, "convention": "flax"}) for gate in ("full", "state", "bias")),
    ("mgu", {"num_heads": 4}),
    ("rhn", {"depth": 1}),
    ("rhn", {"depth": 3, "num_heads": 2}),
    ("rhn", {"depth": 2, "coupled": False}),
    ("ugrnn", {}),
    ("ugrnn", {"intersection": True, "num_heads": 2}),
]


def build(name, dim=D, seed=0, **options):
    """The cell, with every weight moved: what starts at zero would hide what flows through it."""
    torch.manual_seed(seed)
    cell = mixers.build(name, dim, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def near(seen, wanted, tolerance=1e-12):
    torch.testing.assert_close(seen, wanted, atol=tolerance, rtol=tolerance)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assign(parameter, *blocks):
    """Overwrite a parameter by blocks of its rows."""
    with torch.no_grad():
        parameter.copy_(torch.cat([torch.as_tensor(block) for block in blocks]))


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves)


# -- each against its equation -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value) if value else "")
def test_equals_the_equation(name, options):
    """Outputs, final states, and gradients of everything."""
    cell, x = build(name, **options), draw(2, 6, D).requires_grad_()
    state = cell.init_state(2).map(lambda entry: torch.randn_like(entry).requires_grad_())
    leaves = [x, *state.values(), *cell.parameters()]
    y, last = cell(x, state)
    expected, *final = cell_equations.run(name, cell, x, *state.values())
    for seen, wanted in zip([y, *last.values()], [expected, *final], strict=True):
        near(seen, wanted)
    for seen, wanted in zip(gradients([y, *last.values()], leaves), gradients([expected, *final], leaves), strict=True):
        near(seen, wanted, 1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [("lstm", {}), ("gru", {"reset": "before"}), ("ugrnn", {"intersection": True}), ("lstm", {"hidden_size": 13})],
)
def test_kernels_equal_the_equation(name, options):
    """In float32, where kernels run: packed, padded and whole, outputs, states and gradients."""
    cell, single = build(name, **options), build(name, **options).float()
    T = 13
    holes = torch.rand(4, T) > 0.3
    holes[2] = False  # a row without a token
    holes[:2, 0] = False
    packed = Segments.packed([[5, 1, 7], [13], [4, 9], [13]], continues=True)
    for segments in (None, packed, packed & Segments.padded(holes)):
        x, state = draw(4, T, D).float().double(), cell.init_state(4).map(torch.randn_like).map(lambda e: e.float())
        found = []
        for own, form in ((single, "numba"), (cell, "reference")):
            dtype = own.weight_ih.dtype
            leaves = [entry.to(dtype).detach().requires_grad_() for entry in (x, *state.values())]
            with tidegate.backend(form):
                y, last = own(leaves[0], State(dict(zip(state, leaves[1:], strict=True))), segments=segments)
            outputs = [y, *last.values()]
            found.append([*outputs, *gradients(outputs, [*leaves, *own.parameters()])])
        for seen, wanted in zip(*found, strict=True):
            near(seen.double() / wanted.abs().max().clamp(min=1), wanted / wanted.abs().max().clamp(min=1), 2e-5)
        if segments is not None:
            assert (y[~segments.valid] == 0).all()


@pytest.mark.parametrize(("name", "options"), [("lstm", {}), ("gru", {}), ("gru", {"reset": "before"})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_wide_state(name, options, dtype):
    torch.manual_seed(0)
    cell, x = mixers.build(name, D, **options), torch.randn(2, 9, D)
    expected, _ = cell(x)
    for segments in (None, Segments.packed([[9], [9]])):
        y, state = cell.to(dtype)(x.to(dtype), segments=segments)
        assert y.dtype == dtype
        assert all(entry.dtype == torch.float32 for entry in state.values())
        torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


# -- PyTorch's ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "module", "more"),
    [
        ("elman", {}, nn.RNN, {}),
        ("elman", {"nonlinearity": "relu"}, nn.RNN, {"nonlinearity": "relu"}),
        ("lstm", {}, nn.LSTM, {}),
        ("lstm", {"hidden_size": 13}, nn.LSTM, {"proj_size": D}),
        ("gru", {}, nn.GRU, {}),
    ],
)
def test_equals_torch_with_torch_weights(name, options, module, more):
    x = draw(3, 11, D)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        if dtype == torch.float32 and "nonlinearity" in options:
            continue  # kernels that nothing else needs, two seconds to compile
        cell = build(name, **options).to(dtype)
        peer = module(D, options.get("hidden_size", D), batch_first=True, dtype=dtype, **more)
        own, others = dict(cell.named_parameters()), dict(peer.named_parameters())
        cell.load_state_dict({key.removesuffix("_l0"): value for key, value in peer.state_dict().items()})
        expected, last = peer(x.to(dtype))
        y, state = cell(x.to(dtype))
        near(y, expected, tolerance)
        for entry, other in zip(state.values(), last if name == "lstm" else (last,), strict=True):
            near(entry, other[0], tolerance)
        found = gradients([y], list(own.values()))
        wanted = gradients([expected], [others[f"{key}_l0"] for key in own])
        for gradient, other in zip(found, wanted, strict=True):
            near(gradient, other, tolerance)


# -- relatives and limits ----------------------------------------------------------------------------------------------
def test_a_jordan_network_whose_output_is_its_hidden_layer_is_elmans():
    jordan, elman, x = build("jordan"), build("elman"), draw(2, 9, D)
    U = elman.weight_hh.detach()
    assign(jordan.weight_hh, U, torch.eye(D, dtype=torch.float64))  # of U and V
    assign(jordan.vectors, torch.zeros(1, D, dtype=torch.float64))
    assign(jordan.weight_ih, elman.weight_ih.detach())
    assign(jordan.bias_ih, (elman.bias_ih + elman.bias_hh).detach())
    near(jordan(x)[0], elman(x)[0])


def test_jordans_context_is_a_fading_sum_of_outputs():
    jordan = build("jordan", alpha=0.5)
    y, state = jordan(draw(2, 9, D))
    near(state["s"], sum(0.5 ** (8 - t) * y[:, t] for t in range(9)))


def test_an_mgu_is_a_gru_with_tied_gates():
    x = draw(2, 9, D)
    for convention, reset, sign in (("paper", "before", -1), ("flax", "after", 1)):  # z is what is kept
        mgu, gru = build("mgu", convention=convention), build("gru", reset=reset)
        for own, tied in ((mgu.weight_ih, gru.weight_ih), (mgu.weight_hh, gru.weight_hh), (mgu.bias_ih, gru.bias_ih)):
            f, n = own.detach().chunk(2)
            assign(tied, f, sign * f, n)
        zeros = torch.zeros(2 * D, dtype=torch.float64)
        assign(gru.bias_hh, zeros, zeros[:D] if convention == "paper" else mgu.vectors[0].detach())
        near(mgu(x)[0], gru(x)[0])


def test_an_mgu_that_always_writes_is_elmans():
    mgu, elman, x = build("mgu", gate="bias"), build("elman"), draw(2, 9, D)
    assign(mgu.vectors, torch.full((1, D), ONE))
    for key in ("weight_ih", "weight_hh"):
        assign(getattr(mgu, key), getattr(elman, key).detach())
    assign(mgu.bias_ih, (elman.bias_ih + elman.bias_hh).detach())
    near(mgu(x)[0], elman(x)[0])


def test_a_ugrnn_is_a_gru_that_never_resets():
    ugrnn, gru, x = build("ugrnn"), build("gru"), draw(2, 9, D)
    for key in ("weight_ih", "weight_hh"):
        assign(getattr(gru, key), torch.zeros(D, D), getattr(ugrnn, key).detach())
    assign(gru.bias_ih, torch.full((D,), ONE), ugrnn.bias_ih.detach())
    assign(gru.bias_hh, torch.zeros(3 * D))
    near(ugrnn(x)[0], gru(x)[0])


def test_an_intersection_network_hands_on_its_input_or_its_candidate():
    both, plain, x = build("ugrnn", intersection=True), build("ugrnn"), draw(2, 9, D)
    with torch.no_grad():
        for key in ("weight_ih", "weight_hh", "bias_ih"):
            getattr(plain, key).copy_(getattr(both, key).chunk(2)[0])
        h, last = plain(x)
        both.bias_ih[2 * D : 3 * D] = ONE
        y, state = both(x)
        near(y, x)
        near(state["h"], last["h"])
        both.bias_ih[2 * D : 3 * D] = -ONE
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        W, b, U = both.weight_ih[3 * D :], both.bias_ih[3 * D :], both.weight_hh[3 * D :]
        near(both(x)[0], torch.relu(functional.linear(x, W, b) + functional.linear(before, U)))


def test_janet_without_beta_is_coupled():
    janet, ugrnn, x = build("janet", beta=0.0), build("ugrnn"), draw(2, 9, D)
    janet.load_state_dict(ugrnn.state_dict())
    near(janet(x)[0], ugrnn(x)[0])


def test_janet_with_a_large_beta_adds():
    janet, x = build("janet", beta=ONE), draw(2, 9, D)
    assign(janet.weight_hh, torch.zeros(2 * D, D))
    f, g = functional.linear(x, janet.weight_ih, janet.bias_ih).chunk(2, -1)
    near(janet(x)[0], ops.scan(torch.sigmoid(f), torch.tanh(g))[0])


def test_a_highway_network_that_does_not_look_at_its_state_is_a_moving_average():
    rhn, x = build("rhn", depth=1), draw(2, 9, D)
    assign(rhn.weight_hh, torch.zeros(2 * D, D))
    h, t = functional.linear(x, rhn.weight_ih, rhn.bias_ih).chunk(2, -1)
    near(rhn(x)[0], ops.scan(torch.sigmoid(-t), torch.sigmoid(t) * torch.tanh(h))[0])


def test_a_shallow_highway_network_is_a_ugrnn():
    rhn, ugrnn, x = build("rhn", depth=1), build("ugrnn"), draw(2, 9, D)
    for key in ("weight_ih", "weight_hh", "bias_ih"):
        g, c = getattr(ugrnn, key).detach().chunk(2)
        assign(getattr(rhn, key), c, -g)
    near(rhn(x)[0], ugrnn(x)[0])


@pytest.mark.parametrize("coupled", [True, False])
def test_highway_layers_that_only_carry_change_nothing(coupled):
    deep, shallow, x = build("rhn", depth=3, coupled=coupled), build("rhn", depth=1, coupled=coupled), draw(2, 9, D)
    with torch.no_grad():
        rows = shallow.weight_hh.shape[0]
        for key in ("weight_ih", "bias_ih"):
            getattr(shallow, key).copy_(getattr(deep, key))
        shallow.weight_hh.copy_(deep.weight_hh[:rows])
        for name in deep.cell.vectors:
            if not name.startswith("b_h"):
                deep._set_vector(name, ONE if name.startswith("b_c") else -ONE)
    near(deep(x)[0], shallow(x)[0])


def test_an_ind_rnn_that_stays_positive_is_a_scan():
    cell, x = build("ind-rnn"), draw(2, 40, D)
    with torch.no_grad():
        cell.u.abs_()
        cell.constrain_()
        cell.bias_ih.fill_(50.0)
    y, state = cell(x)
    expected, last = ops.scan(cell.u.detach(), functional.linear(x, cell.weight_ih, cell.bias_ih))
    near(y, expected)
    near(state["h"], last)


GATES = {"input_gate": 0, "forget_gate": 1, "output_gate": 3}


@pytest.mark.parametrize("gate", GATES)
def test_an_lstm_without_a_gate_is_one_whose_gate_is_open(gate):
    whole, less, x = build("lstm"), build("lstm", **{gate: False}), draw(2, 9, D)
    left = [k for k in range(4) if k != GATES[gate]]
    with torch.no_grad():
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            blocks = getattr(whole, key).chunk(4)
            getattr(less, key).copy_(torch.cat([blocks[k] for k in left]))
        k = GATES[gate]
        whole.weight_hh[k * D : (k + 1) * D] = 0.0
        whole.bias_ih[k * D : (k + 1) * D] = ONE
    y, state = less(x)
    expected, last = whole(x)
    near(y, expected)
    near(state["c"], last["c"])


def test_an_lstm_without_its_tanhs_nor_recurrent_weights_is_a_scan():
    cell, x = build("lstm", input_activation=False, output_activation=False), draw(2, 9, D)
    assign(cell.weight_hh, torch.zeros(4 * D, D))
    i, f, g, o = functional.linear(x, cell.weight_ih, cell.bias_ih + cell.bias_hh).chunk(4, -1)
    c, _ = ops.scan(torch.sigmoid(f), torch.sigmoid(i) * g)
    near(cell(x)[0], torch.sigmoid(o) * c)


# -- initialisation ----------------------------------------------------------------------------------------------------
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
        return float(model.u.max())

    assert largest() == 1
    monkeypatch.setattr(type(mixers.build("ind-rnn", D)), "constrain_", lambda mixer: None)
    assert largest() > 1.01  # larger outputs were wanted


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("elman", {}, D * (2 * D + 2)),  # PyTorch has two biases here, and in the next two
        ("gru", {}, 3 * D * (2 * D + 2)),
        ("lstm", {}, 4 * D * (2 * D + 2)),
        ("lstm", {"peephole": True}, 4 * D * (2 * D + 2) + 3 * D),
        ("lstm", {"coupled": True}, 3 * D * (2 * D + 2)),
        ("lstm", {"hidden_size": 13}, 4 * 13 * (2 * D + 2) + 13 * D),
        ("jordan", {}, D * (2 * D + 1) + D * D + D),
        ("mgu", {}, 2 * D * (2 * D + 1)),
        ("mgu", {"gate": "state-bias"}, D * (D + 1) + D * (2 * D + 1)),
        ("mgu", {"gate": "state"}, D * D + D * (2 * D + 1)),
        ("mgu", {"gate": "bias"}, D + D * (2 * D + 1)),
        ("ugrnn", {}, 2 * D * (2 * D + 1)),
        ("ugrnn", {"intersection": True}, 4 * D * (2 * D + 1)),
        ("ugrnn", {"num_heads": 4}, 2 * D * (D + D // 4 + 1)),
        ("janet", {}, 2 * D * (2 * D + 1)),
        ("rhn", {"depth": 3}, 2 * D * D + 2 * 3 * D * (D + 1)),
        ("ind-rnn", {}, D * (D + 2)),
    ],
)
def test_the_number_of_parameters(name, options, wanted):
    assert sum(p.numel() for p in mixers.build(name, D, **options).parameters()) == wanted


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("elman", {"nonlinearity": "gelu"}, "nonlinearity: seen 'gelu', wanted 'tanh' or 'relu'"),
        ("elman", {"recurrent_init": "zero"}, "recurrent_init: seen 'zero', wanted one of 'uniform', 'orthogonal'"),
        ("elman", {"num_heads": 3}, "num_heads: seen 3, wanted a divisor of dim = 8"),
        ("gru", {"reset": "never"}, "reset: seen 'never'"),
        ("gru", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("ind-rnn", {"nonlinearity": "sigmoid"}, "nonlinearity: seen 'sigmoid', wanted 'relu' or 'tanh'"),
        ("ind-rnn", {"length": 0}, "length: seen 0, wanted at least 1"),
        ("ind-rnn", {"gamma": 0.5}, "gamma: seen 0.5, wanted at least 1"),
        ("ind-rnn", {"max_recurrent": 1.5}, "max_recurrent: seen 1.5, wanted more than 0 and at most the bound, 1"),
        ("ind-rnn", {"max_recurrent": 0.0}, "max_recurrent: seen 0.0"),
        ("janet", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("jordan", {"alpha": 1.0}, r"alpha: seen 1.0, wanted a number in \[0, 1\)"),
        ("jordan", {"nonlinearity": "gelu"}, "nonlinearity: seen 'gelu', wanted one of 'tanh', 'relu', 'sigmoid'"),
        ("jordan", {"output_activation": "relu"}, "output_activation: seen 'relu', wanted one of 'identity'"),
        ("lstm", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("lstm", {"coupled": True, "forget_gate": False}, "coupled: seen True with forget_gate=False"),
        ("lstm", {"coupled": True, "input_gate": False}, "coupled: seen True with input_gate=False"),
        ("lstm", {"hidden_size": 8}, "hidden_size: seen 8, wanted more than dim = 8"),
        ("lstm", {"hidden_size": 16, "num_heads": 2}, "num_heads: seen 2 with hidden_size"),
        ("mgu", {"convention": "keras"}, "convention: seen 'keras', wanted 'paper' or 'flax'"),
        ("mgu", {"gate": "input"}, "gate: seen 'input', wanted one of 'full', 'state-bias'"),
        ("rhn", {"depth": 0}, "depth: seen 0, wanted at least 1"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, D, **options)


# -- how it is run -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lstm", "slstm", "para-lstm"])
def test_gradients_are_cut_and_clipped_and_the_method_chosen(name):
    torch.manual_seed(0)
    preset = {"lstm": None, "slstm": "cell", "para-lstm": "state-tracking"}[name]
    mixer = mixers.build(name, 16, **({"preset": preset} if preset else {}))
    mixer = mixer.double()
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)

    def flow():
        return torch.autograd.grad(1e6 * mixer(x)[0][:, -1].sum(), x)[0].abs().amax(-1)[0]

    whole = flow()
    assert (whole > 0).all()
    mixer.truncate = 5
    cut = flow()
    assert not cut[:10].any()
    assert (cut[10:] > 0).all()
    mixer.truncate, mixer.gradient_clip = None, 1.0
    assert (flow()[:-1] < whole[:-1]).all()
    mixer.gradient_clip, mixer.method = None, "newton"
    torch.testing.assert_close(flow(), whole, rtol=1e-8, atol=1e-8)
