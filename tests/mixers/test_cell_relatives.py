"""Nonlinear cells: in which limits they are other cells or simpler things, and what each is known for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.mixers.cells import ONE, D, assign, build, draw, near
from tidegate import State, ops


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


def test_a_light_gru_is_a_gru_that_never_resets():
    light, gru, x = build("li-gru", nonlinearity="tanh"), build("gru"), draw(2, 9, D)
    for key in ("weight_ih", "weight_hh"):
        assign(getattr(gru, key), torch.zeros(D, D), getattr(light, key).detach())
    assign(gru.bias_ih, torch.full((D,), ONE), light.bias_ih.detach())
    assign(gru.bias_hh, torch.zeros(3 * D))
    near(light(x)[0], gru(x)[0])


def test_a_light_gru_that_always_writes_is_elmans():
    light, elman, x = build("li-gru"), build("elman", nonlinearity="relu"), draw(2, 9, D)
    assign(light.bias_ih, torch.full((D,), -ONE), (elman.bias_ih + elman.bias_hh).detach())
    for key in ("weight_ih", "weight_hh"):
        assign(getattr(light, key), torch.zeros(D, D), getattr(elman, key).detach())
    near(light(x)[0], elman(x)[0])


def test_a_minimal_rnn_is_a_ugrnn_whose_candidate_does_not_see_the_state():
    """The other's gate sees x, not z: alike where the gate looks at the state alone."""
    minimal, ugrnn, x = build("minimal-rnn"), build("ugrnn"), draw(2, 9, D)
    zeros = torch.zeros(D, D)
    assign(minimal.weight_ih, zeros)
    assign(ugrnn.weight_ih, zeros, minimal.encoder.weight.detach())
    assign(ugrnn.weight_hh, minimal.weight_hh.detach(), zeros)
    assign(ugrnn.bias_ih, minimal.bias_ih.detach(), minimal.encoder.bias.detach())
    near(minimal(x)[0], ugrnn(x)[0])


def test_a_minimal_rnn_stays_among_what_it_has_encoded():
    minimal, x = build("minimal-rnn"), draw(2, 30, D)
    z = torch.tanh(minimal.encoder(x))
    y, _ = minimal(x, State(h=z[:, 0]))
    assert (y <= z.cummax(1).values + 1e-12).all()
    assert (y >= z.cummin(1).values - 1e-12).all()


def test_a_chaos_free_network_without_input_goes_to_zero():
    """Whatever the weights, and every channel at every token."""
    cell = build("cfn", forget_bias=3.0)
    assign(cell.weight_hh, 3 * draw(2 * D, D))
    y, _ = cell(torch.zeros(1, 200, D, dtype=torch.float64), State(h=10 * draw(1, D)))
    assert (y[:, 1:].abs() < y[:, :-1].abs()).all()
    assert y[:, -1].abs().max() < 0.1
    assert cell(1e3 * draw(2, 50, D))[0].abs().max() < 2


def test_an_additive_networks_state_is_a_weighted_sum_of_its_inputs():
    """With weights that are products of the gates, which see the state."""
    for nonlinearity in ("identity", "tanh"):
        cell, x = build("ran", nonlinearity=nonlinearity), draw(2, 9, D)
        y, state = cell(x)
        h = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        Wi, Wf, Wc = cell.weight_ih.chunk(3)
        i, f = (
            torch.sigmoid(functional.linear(x, W, b) + functional.linear(h, U))
            for W, b, U in zip((Wi, Wf), cell.bias_ih.chunk(2), cell.weight_hh.chunk(2), strict=True)
        )
        kept = torch.stack([f[:, t + 1 :].prod(1) for t in range(9)], 1)
        c = (kept * i * functional.linear(x, Wc)).sum(1)
        near(state["c"], c)
        near(y[:, -1], torch.tanh(c) if nonlinearity == "tanh" else c)


def test_an_additive_network_is_an_lstm_with_less():
    lstm, ran, x = build("lstm", input_activation=False, output_gate=False), build("ran"), draw(2, 9, D)
    with torch.no_grad():  # the LSTM has i, f, g
        lstm.weight_ih.copy_(ran.weight_ih)
        assign(lstm.weight_hh, ran.weight_hh.detach(), torch.zeros(D, D))
        assign(lstm.bias_ih, ran.bias_ih.detach(), torch.zeros(D))
        lstm.bias_hh.zero_()
    y, state = ran(x)
    expected, last = lstm(x)
    near(y, expected)
    near(state["c"], last["c"])


def test_a_fast_rnn_that_writes_all_and_keeps_nothing_is_elmans():
    elman, x = build("elman"), draw(2, 9, D)
    for gated in (False, True):
        fast = build("fast-rnn", gated=gated)
        with torch.no_grad():
            fast.weight_ih.copy_(elman.weight_ih)
            fast.weight_hh.copy_(elman.weight_hh)
            fast.bias_ih.copy_(elman.bias_ih + elman.bias_hh)
            fast.shares.copy_(torch.tensor([ONE, -ONE]))  # alpha = 1, beta = 0; gated, zeta = 1, nu = 0
            if gated:
                fast.gate_bias.fill_(-ONE)
        near(fast(x)[0], elman(x)[0])


def test_a_gated_fast_rnn_is_a_ugrnn_with_one_matrix():
    fast, ugrnn, x = build("fast-rnn", gated=True), build("ugrnn"), draw(2, 9, D)
    with torch.no_grad():
        fast.shares.copy_(torch.tensor([ONE, -ONE]))  # zeta = 1, nu = 0
        for key in ("weight_ih", "weight_hh"):
            assign(getattr(ugrnn, key), *[getattr(fast, key).detach()] * 2)
        assign(ugrnn.bias_ih, fast.gate_bias.detach(), fast.bias_ih.detach())
    near(fast(x)[0], ugrnn(x)[0])


def test_a_fast_rnn_whose_gate_is_constant_is_not_gated():
    """With z = beta and zeta (1 - z) + nu = alpha."""
    plain, gated, x = build("fast-rnn"), build("fast-rnn", gated=True, gate_nonlinearity="tanh"), draw(2, 9, D)
    with torch.no_grad():
        plain.shares.copy_(torch.tensor([-1.0, ONE]))  # beta = 1
        gated.shares.copy_(torch.tensor([0.3, -1.0]))
        gated.gate_bias.fill_(ONE)
        for key in ("weight_ih", "weight_hh", "bias_ih"):
            getattr(gated, key).copy_(getattr(plain, key))
    near(gated(x)[0], plain(x)[0])


def test_a_stackable_cell_is_a_minimal_update_within_a_tanh():
    """One step of it, from any state, with beta what it lets in beside what it lets go."""
    x, h = draw(2, 1, D), draw(2, D)
    for beta in (0.0, 1.0, ONE):
        cell = build("star", beta=beta)
        z, s = functional.linear(x[:, 0], cell.weight_ih, cell.bias_ih).chunk(2, -1)
        s = s + functional.linear(h, cell.weight_hh)
        kept, let_in = torch.sigmoid(-s), torch.sigmoid(s + beta)
        assert beta == 0 or (kept + let_in > 1).all()
        near(cell(x, State(h=h))[0][:, 0], torch.tanh(kept * h + let_in * torch.tanh(z)))


def test_a_stackable_cell_that_always_writes_forgets():
    cell, x = build("star"), draw(2, 9, D)
    with torch.no_grad():
        cell.bias_ih[D:] = ONE
    z = functional.linear(x, cell.weight_ih[:D], cell.bias_ih[:D])
    near(cell(x)[0], torch.tanh(torch.tanh(z)))


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


# -- what a cell is known for ------------------------------------------------------------------------------------------
def jacobian(cell, x, h):
    """Of the states of one sequence after a token by those before it."""
    return torch.autograd.functional.jacobian(lambda h: cell(x, State(h=h[None]))[1]["h"][0], h)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("num_heads", [1, 2])
def test_states_of_an_antisymmetric_network_turn_and_never_grow(gamma, num_heads):
    """Its Jacobian in continuous time is D A, 0 < D < 1 diagonal: no eigenvalue has a real part outside [-gamma, 0]."""
    cell = build("antisymmetric-rnn", gamma=gamma, num_heads=num_heads)
    for _ in range(5):
        x, h = 0.3 * draw(1, 1, D), 0.3 * draw(D)
        values = torch.linalg.eigvals((jacobian(cell, x, h) - torch.eye(D, dtype=torch.float64)) / cell.epsilon)
        assert values.real.max() <= 1e-12
        assert values.real.min() >= -gamma - 1e-12
        assert values.imag.max() > 0.2
        assert not gamma or values.real.max() < -1e-3


def test_the_gate_of_an_antisymmetric_network_leaves_the_form_of_its_jacobian():
    cell = build("antisymmetric-rnn", gated=True)
    A = cell._matrices().detach()[0, 0]
    near(A, -A.T)
    A = A - cell.gamma * torch.eye(D, dtype=torch.float64)
    J = (jacobian(cell, draw(1, 1, D), draw(D)) - torch.eye(D, dtype=torch.float64)) / cell.epsilon
    ratio = J @ torch.linalg.inv(A)
    near(ratio, torch.diag(torch.diag(ratio)), 1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.15])
def test_small_states_of_an_antisymmetric_network_spiral(gamma):
    """The paper's simulation, two channels and omega = 2: each token turns, and multiplies by |1 + epsilon lambda|."""
    cell = build("antisymmetric-rnn", 2, gamma=gamma)
    assign(cell.weight_hh, torch.tensor([[0.0, -2.0], [0.0, 0.0]]))
    assign(cell.bias_ih, torch.zeros(2))
    start = torch.tensor([[3e-9, -4e-9]], dtype=torch.float64)
    y, _ = cell(torch.zeros(1, 50, 2, dtype=torch.float64), State(h=start))
    per_token = 1 + cell.epsilon * (2j - gamma)
    expected = torch.tensor([complex(*start[0]) * per_token**t for t in range(1, 51)], dtype=torch.complex128)
    near(torch.view_as_complex(y[0]) / expected, torch.ones(50, dtype=torch.complex128), 1e-10)


LONG = {"implicit": True, "dt": 1.5, "gamma": 1.0, "epsilon": 1.0}
OSCILLATORS = [{}, {"preset": "adding"}, {"implicit": True}, LONG]


def response(cell, T):
    """Position and velocity of an oscillator that is pushed once, dt times a force of 1, after each of T tokens."""
    dt, gamma, epsilon = cell.dt, cell.gamma, cell.epsilon
    damped = 1 / (1 + dt * epsilon) if cell.implicit else 1.0
    kept = damped if cell.implicit else 1 - dt * epsilon
    turn = torch.tensor([[1 - dt**2 * gamma * damped, dt * kept], [-dt * gamma * damped, kept]], dtype=torch.float64)
    pushed = torch.tensor([dt**2 * damped, dt * damped], dtype=torch.float64)
    return torch.stack([torch.linalg.matrix_power(turn, t) @ pushed for t in range(T)])


@pytest.mark.parametrize("options", OSCILLATORS)
def test_uncoupled_oscillators_answer_to_a_push_as_the_linear_ones_they_are(options):
    cell, T = build("co-rnn", **options), 200
    assign(cell.weight_hh, torch.zeros(2 * D, D))
    assign(cell.bias_ih, torch.zeros(D))
    x = draw(1, T, D)
    force = torch.tanh(functional.linear(x, cell.weight_ih))[0]
    pushes = response(cell, T)
    y, state = cell(x)
    expected = torch.stack([(pushes[: t + 1].flip(0)[:, :1] * force[: t + 1]).sum(0) for t in range(T)])
    near(y[0], expected, 1e-10)
    near(state["z"][0], (pushes.flip(0)[:, 1:] * force).sum(0), 1e-10)


@pytest.mark.parametrize("options", OSCILLATORS)
def test_nothing_drives_oscillators_beyond_their_bound(options):
    """No force exceeds 1, so that no position exceeds the sum of what pushes do; the worst forces reach it."""
    T = 200
    cell = build("co-rnn", **options)
    pushes = response(cell, T)
    bounds = pushes.abs().sum(0)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(10)
        y, state = cell(5 * draw(3, T, D))
        assert y.abs().max() <= bounds[0] + 1e-12
        assert state["z"].abs().max() <= bounds[1] + 1e-12
        if cell.implicit:  # the paper's bound on the energy, for any gamma and epsilon
            energy = cell.gamma * y[:, -1].square().sum(-1) + state["z"].square().sum(-1)
            assert (energy <= T * D * cell.dt / (2 * cell.epsilon - cell.dt * cell.gamma)).all()
        assign(cell.weight_ih, ONE * torch.eye(D))
        assign(cell.weight_hh, torch.zeros(2 * D, D))
        assign(cell.bias_ih, torch.zeros(D))
        for k, name in enumerate("hz"):
            worst = pushes[:, k].flip(0).sign()[None, :, None].expand(1, T, D)
            near(cell(worst)[1][name], bounds[k].expand(1, D), 1e-10)


def test_a_bistable_cell_stays_where_it_was_put():
    """Without input: on its side of zero, at h = tanh(a h), where a > 1; back at zero where a < 1."""
    cell, h = build("brc"), torch.tensor([[-0.9, -0.3, -1e-3, -1e-6, 1e-6, 1e-3, 0.3, 0.9]], dtype=torch.float64)
    x = torch.zeros(1, 400, D, dtype=torch.float64)
    place = 1.0
    for _ in range(100):
        place = math.tanh(1.5 * place)
    with torch.no_grad():
        cell.vectors.zero_()
        cell.bias_ih.zero_()  # c = 1 / 2
        for a in (1.5, 0.5):
            cell.bias_ih[:D] = math.atanh(a - 1)
            y, state = cell(x, State(h=h))
            near(state["h"], h.sign() * (place if a > 1 else 0.0))
            assert (y.sign() == h.sign()).all()  # never across
        cell.bias_ih[:D] = math.atanh(0.5)
        pushed = torch.zeros(1, 60, D, dtype=torch.float64)
        pushed[:, 20:30] = 1.0  # ten tokens that say another thing change sides for good
        assign(cell.weight_ih, torch.zeros(2 * D, D), -torch.eye(D) * h.sign().squeeze(0) * 2)
        near(cell(pushed, State(h=h.sign() * place))[1]["h"], -h.sign() * place, 1e-4)


def test_channels_of_a_bistable_cell_meet_only_with_neuromodulation():
    for neuromodulated in (False, True):
        cell = build("brc", neuromodulated=neuromodulated)
        J = jacobian(cell, draw(1, 1, D), draw(D))
        others = J - torch.diag(torch.diag(J))
        assert bool(others.any()) is neuromodulated


def test_a_neuromodulated_cell_with_diagonal_matrices_is_the_plain_one():
    plain, whole, x = build("brc"), build("brc", neuromodulated=True), draw(2, 9, D)
    for key in ("weight_ih", "bias_ih"):
        assign(getattr(whole, key), getattr(plain, key).detach())
    assign(whole.weight_hh, *(torch.diag(own) for own in plain.vectors.detach()))
    near(whole(x)[0], plain(x)[0])


def test_a_neuromodulated_cell_is_a_gru_whose_candidate_sees_its_own_channel():
    """1 + tanh(v) is 2 sigmoid(2 v)."""
    cell, gru, x = build("brc", neuromodulated=True), build("gru", reset="before"), draw(2, 9, D)
    for key, last in (("weight_ih", ()), ("bias_ih", ()), ("weight_hh", (2 * torch.eye(D),))):
        a, *others = getattr(cell, key).detach().split(D)
        assign(getattr(gru, key), 2 * a, *others, *last)
    assign(gru.bias_hh, torch.zeros(3 * D))
    near(cell(x)[0], gru(x)[0])


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_lem_that_does_not_look_at_its_output_is_two_moving_averages(dt):
    cell, x = build("lem", dt=dt), draw(2, 9, D)
    with torch.no_grad():
        cell.weight_hh[: 3 * D] = 0.0
    d, e, z, y = functional.linear(x, cell.weight_ih, cell.bias_ih).chunk(4, -1)
    d, e = dt * torch.sigmoid(d), dt * torch.sigmoid(e)
    expected, _ = ops.scan(1 - d, d * torch.tanh(z))
    expected, _ = ops.scan(1 - e, e * torch.tanh(y + functional.linear(expected, cell.weight_hh[3 * D :])))
    near(cell(x)[0], expected)


def test_lem_that_takes_no_steps_stays():
    cell, h, z = build("lem"), draw(2, D), draw(2, D)
    with torch.no_grad():
        cell.bias_ih[: 2 * D] = -ONE
        y, state = cell(draw(2, 9, D), State(h=h, z=z))
    assert torch.equal(y, h[:, None].expand(2, 9, D))
    assert torch.equal(state["z"], z)


def test_lem_that_takes_whole_steps_is_an_elman_network_of_two_layers():
    cell, elman, x = build("lem"), build("elman", 2 * D), draw(2, 9, D)
    Wz, Wy = cell.weight_ih.detach()[2 * D :].chunk(2)
    bz, by = cell.bias_ih.detach()[2 * D :].chunk(2)
    _, _, Uz, Uy = cell.weight_hh.detach().chunk(4)
    with torch.no_grad():
        cell.bias_ih[: 2 * D] = ONE
    # Token t of the cell is tokens 2 t and 2 t + 1 of the network, whose halves are z and h, each fed when it is due.
    nothing = torch.full((D,), -ONE, dtype=torch.float64)
    zeros = torch.zeros(D, D, dtype=torch.float64)
    assign(elman.weight_ih, torch.eye(2 * D))
    assign(elman.weight_hh, torch.cat([zeros, Uz], 1), torch.cat([Uy, zeros], 1))
    for bias in (elman.bias_ih, elman.bias_hh):
        assign(bias, torch.zeros(2 * D))
    pairs = [torch.cat([functional.linear(x, Wz, bz), nothing.expand(2, 9, D)], -1)]
    pairs += [torch.cat([nothing.expand(2, 9, D), functional.linear(x, Wy, by)], -1)]
    start = State(h=torch.zeros(2, 2 * D, dtype=torch.float64))
    seen = elman(torch.stack(pairs, 2).flatten(1, 2), start)[0]
    near(cell(x)[0], seen[:, 1::2, D:])


@pytest.mark.parametrize("dt", [1.0, 0.3])
def test_states_of_lem_keep_within_their_bound(dt):
    """1 - (1 - dt)^t, which the longest steps in one direction reach."""
    cell, bound = build("lem", dt=dt), 1 - (1 - dt) ** torch.arange(1, 41, dtype=torch.float64)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(10)
        y, state = cell(5 * draw(3, 40, D))
        assert (y.abs() <= bound[:, None] + 1e-12).all()
        assert (state["z"].abs() <= bound[-1] + 1e-12).all()
        cell.bias_ih.fill_(ONE)
        cell.weight_ih.zero_()
        near(cell(draw(3, 40, D))[0], bound[:, None].expand(3, 40, D))


def test_a_multiplicative_lstm_whose_factors_are_one_is_an_lstm():
    cell, lstm, x = build("multiplicative-lstm"), build("lstm"), draw(2, 9, D)
    for key, first in (("weight_ih", torch.zeros(D, D)), ("weight_hh", torch.eye(D)), ("bias_ih", torch.ones(D))):
        assign(getattr(cell, key), first, getattr(lstm, key).detach())
    assign(lstm.bias_hh, torch.zeros(4 * D))
    y, state = cell(x)
    expected, last = lstm(x)
    near(y, expected)
    near(state["c"], last["c"])


def test_a_multiplicative_lstm_has_a_matrix_for_every_input():
    """One token of it, from any state, is one of the LSTM whose matrices are U diag(W_m x) U_m."""
    cell, lstm, h, c = build("multiplicative-lstm"), build("lstm"), draw(2, D), draw(2, D)
    own = cell.weight_ih.detach(), cell.bias_ih.detach(), cell.weight_hh.detach()
    assign(lstm.bias_hh, torch.zeros(4 * D))
    for key, parameter in zip(("weight_ih", "bias_ih"), own[:2], strict=True):
        assign(getattr(lstm, key), parameter[D:])
    for x in draw(3, 1, 1, D):
        factors = functional.linear(x, own[0][:D], own[1][:D])[0, 0]
        assign(lstm.weight_hh, own[2][D:] @ torch.diag(factors) @ own[2][:D])
        near(cell(x.expand(2, 1, D), State(h=h, c=c))[0], lstm(x.expand(2, 1, D), State(h=h, c=c))[0])
