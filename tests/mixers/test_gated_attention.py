"""Gated attention units and SeqBoat against their equations, token by token and as whole matrices."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from tests.contract.helpers import Subject, alone, check_equal, pieces, segments_of, whole
from tidegate import Segments, mixers
from tidegate.infer import Unsupported, compile_step
from tidegate.mixers import seqboat
from tidegate.mixers.seqboat import SeqBoat
from tidegate.nn.ema import MovingAverage
from tidegate.nn.rotary import rotary

GAU, BOAT = Subject.registered("gated-attention-unit"), Subject.registered("seqboat")
KERNELS = ("softmax", "relu2", "laplace")


def close(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def worth(kernel, score, seen, width, bias):
    """The weights of a list of scores, from the formulas; `seen` tokens are in sight."""
    score = [s / (math.sqrt(width) if kernel == "softmax" else seen) + b for s, b in zip(score, bias, strict=True)]
    if kernel == "softmax":
        return [torch.exp(s) / sum(map(torch.exp, score)) for s in score]
    if kernel == "relu2":
        return [max(s, s * 0) ** 2 for s in score]
    law = torch.distributions.Normal(math.sqrt(0.5), math.sqrt(1 / (4 * math.pi)))
    return [law.cdf(s) for s in score]


def unit_by_loop(unit, rows, times):
    """A unit over one document: `rows` are its tokens, `times` their positions."""
    keys, values, outputs = [], [], []
    for x, time in zip(rows, times, strict=True):
        z, r, v = silu(unit.in_proj.weight @ x + unit.in_proj.bias).split([unit.key_dim, unit.width, unit.width])
        q, k = (z * scale + bias for scale, bias in zip(unit.qk_scale, unit.qk_bias, strict=True))
        if unit.positions == "rotary":
            q, k = (rotary(a.view(1, 1, 1, -1), torch.tensor([[time]])).flatten() for a in (q, k))
        keys.append(k)
        values.append(v)
        now = len(keys) - 1
        near = range(max(0, now + 1 - (unit.window or now + 1)), now + 1)
        bias = [unit.offset_bias[now - s] if unit.positions == "offset" else 0.0 for s in near]
        weights = worth(unit.kernel, [q @ keys[s] for s in near], unit.window or now + 1, unit.key_dim, bias)
        o = sum(w * values[s] for w, s in zip(weights, near, strict=True))
        outputs.append(unit.o_proj.weight @ (r * o) + unit.o_proj.bias)
    return outputs


# -- the unit ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kernel", "positions", "window"),
    [("relu2", "rotary", None), ("laplace", "none", 4), ("softmax", "offset", 4), ("relu2", "offset", 4)],
)
def test_a_unit_is_its_equation(kernel, positions, window):
    unit = replace(GAU, options=dict(key_dim=8, kernel=kernel, positions=positions, window=window)).build()
    with torch.no_grad():
        unit.qk_scale.mul_(20)  # scores of some size
    x = GAU.input(1, 11)
    close(unit(x)[0][0], torch.stack(unit_by_loop(unit, x[0], range(11))))


def test_a_unit_by_matrices():
    unit = replace(GAU, options=dict(key_dim=8, positions="none")).build()
    x, T = GAU.input(2, 13), 13
    z, r, v = silu(unit.in_proj(x)).split([8, 64, 64], -1)
    q, k = (z * unit.qk_scale[i] + unit.qk_bias[i] for i in (0, 1))
    seen = torch.arange(1, T + 1)[:, None]
    close(unit(x)[0], unit.o_proj(r * (torch.relu(q @ k.mT / seen).square().tril() @ v)))


@pytest.mark.parametrize("subject", [GAU, BOAT], ids=["unit", "seqboat"])
def test_every_kind_keeps_the_contract(subject):
    for kernel, positions, window in itertools.product(KERNELS, ("rotary", "offset", "none"), (None, 5)):
        if positions == "offset" and window is None:
            continue
        own = replace(subject, options=subject.options | dict(kernel=kernel, positions=positions, window=window))
        mixer = own.build()
        x, state = own.input(3, 33), own.state(mixer, 3)
        segments = segments_of("packed_with_holes", 3, 33, random.Random(f"{kernel}-{positions}-{window}"))
        x[~segments.valid] = float("nan")
        check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
        check_equal(mixer, pieces(mixer, (1, 17), segments), whole(mixer, segments), x, state)


@pytest.mark.parametrize("kernel", ["relu2", "laplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(kernel, dtype):
    unit = replace(GAU, options=dict(key_dim=16, kernel=kernel)).build(dtype)
    x = (30 * GAU.input(2, 33)).to(dtype).requires_grad_()
    y, _ = unit(x)
    y.float().mean().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


def test_a_unit_starts_as_published():
    unit = mixers.build("gated-attention-unit", dim=256)
    for weight in (unit.in_proj.weight, unit.qk_scale, unit.o_proj.weight):
        assert 0.015 < weight.std() < 0.02  # a normal distribution of 0.02, cut off
        assert weight.abs().max() <= 0.04
    assert not any(b.any() for b in (unit.in_proj.bias, unit.qk_bias, unit.o_proj.bias))


# -- the average -------------------------------------------------------------------------------------------------------
def test_the_average_is_its_equation():
    ema, x = MovingAverage(3, 4, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
    p = torch.sigmoid(ema.delta)
    q = 1 - p * torch.sigmoid(ema.alpha)
    h, outputs = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for t in range(9):
        h = q * h + p * ema.beta * x[:, t, :, None]
        outputs.append((ema.gamma * h).sum(-1) / 2 + ema.omega * x[:, t])
    y, state = ema(x)
    close(y, torch.stack(outputs, 1))
    close(p * ema.beta * state, h)


def test_the_average_is_a_convolution():
    ema, x, T = MovingAverage(3, 4, dtype=torch.float64), torch.randn(1, 12, 3, dtype=torch.float64), 12
    p = torch.sigmoid(ema.delta)
    powers = torch.exp(torch.log(1 - p * torch.sigmoid(ema.alpha))[..., None] * torch.arange(T))
    kernel = torch.einsum("dn,dnl->dl", ema.gamma * p * ema.beta, powers) / 2
    wanted = torch.stack([(kernel[:, : t + 1].flip(1).T * x[0, : t + 1]).sum(0) for t in range(T)])
    close(ema(x)[0][0], wanted + ema.omega * x[0])


def test_the_average_starts_as_published():
    ema = MovingAverage(500, 16)
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    assert (ema.beta - signs).abs().max() <= 0.04
    for weight, std in ((ema.delta, 0.2), (ema.alpha, 0.2), (ema.gamma, 1.0)):
        assert 0.8 * std < weight.std() < std
        assert abs(weight.mean()) < 0.05 * std
    assert 0.9 < ema.omega.std() < 1.1
    with pytest.raises(ValueError, match="states: seen 0"):
        MovingAverage(4, 0)


# -- SeqBoat -----------------------------------------------------------------------------------------------------------
def boat(dtype=torch.float64, **options):
    return replace(BOAT, options=BOAT.options | options).build(dtype)


@pytest.mark.parametrize(
    ("kernel", "positions", "router"),
    [("softmax", "rotary", "softmax"), ("relu2", "none", "sigmoid"), ("softmax", "offset", "softmax")],
)
def test_seqboat_is_its_equation(kernel, positions, router):
    """Token by token, with a list of the active ones."""
    mixer = boat(kernel=kernel, positions=positions, router=router)
    x, T = BOAT.input(1, 40), 40
    m = silu(mixer.average(x)[0])[0]
    u = m @ mixer.router_proj.weight.T + mixer.router_proj.bias
    u = u / torch.exp(mixer.log_temperature)
    p = torch.softmax(u, -1)[:, 1] if router == "softmax" else 1 / (1 + torch.exp(-u[:, 0]))
    active = [t for t in range(T) if p[t] > 0.5]
    assert 7 < len(active) < 33
    h = dict(zip(active, unit_by_loop(mixer.unit, m[active], active), strict=True))
    y = [m[t] @ mixer.x_proj.weight.T + mixer.x_proj.bias + (p[t] * h[t] if t in h else 0) for t in range(T)]
    close(mixer(x)[0][0], torch.stack(y))
    assert mixer.active_tokens(x)[0].nonzero().flatten().tolist() == active


def test_seqboat_by_matrices():
    """Attention over all tokens, under a mask that counts the active ones in between."""
    mixer, x = boat(positions="none"), BOAT.input(2, 40)
    m = silu(mixer.average(x)[0])
    p = torch.softmax(mixer.router_proj(m) / torch.exp(mixer.log_temperature), -1)[..., 1]
    active = p > 0.5
    unit, number = mixer.unit, active.cumsum(1)
    z, r, v = silu(unit.in_proj(m)).split([unit.key_dim, unit.width, unit.width], -1)
    q, k = (z * unit.qk_scale[i] + unit.qk_bias[i] for i in (0, 1))
    distance = number[:, :, None] - number[:, None, :]
    sees = active[:, None, :] & (distance >= 0) & (distance < unit.window) & torch.ones(40, 40).tril().bool()
    sees |= ~active[:, :, None]  # rows that nobody reads
    o = (q @ k.mT / math.sqrt(unit.key_dim)).masked_fill(~sees, -torch.inf).softmax(-1) @ v
    h = torch.where(active[..., None], p[..., None] * unit.o_proj(r * o), 0)
    close(mixer(x)[0], mixer.x_proj(m) + h)


@pytest.mark.parametrize("kind", ["whole", "packed_with_holes", "blank_row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compressed_is_masked(monkeypatch, kind, dtype):
    """The same outputs, states and gradients whether inactive tokens are left out or masked."""
    mixer = boat(dtype)
    x, state = BOAT.input(3, 65, dtype), BOAT.state(mixer, 3, dtype)
    segments = segments_of(kind, 3, 65, random.Random(kind))

    def masked(x, state):
        with monkeypatch.context() as patch:
            patch.setattr(seqboat, "leaves_out", lambda x: False)
            return mixer(x, state, segments=segments)

    check_equal(mixer, whole(mixer, segments), masked, x, state)


def test_what_is_inactive_costs_nothing():
    mixer, seen = boat(torch.float32), []
    mixer.unit.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    x, active = torch.randn(2, 50, 32), torch.zeros(2, 50, dtype=torch.bool)
    _, state = mixer(x, active=active)
    assert seen == []
    active[0, 3] = active[1, 7:11] = True
    mixer(x, state, active=active)
    assert seen == [(2, 4, 32)]


def test_all_active_is_always_active():
    mixer = boat(act_bias=1e4)
    with torch.no_grad():
        mixer.router_proj.bias[1] = 1e4
    always = boat(always_active=True)
    missing = always.load_state_dict(mixer.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert set(missing.unexpected_keys) == {"router_proj.weight", "router_proj.bias", "log_temperature"}
    x = BOAT.input(2, 33)
    assert mixer.active_tokens(x).all()
    close(mixer(x)[0], always(x)[0])
    close(mixer(x, active=torch.ones(2, 33, dtype=torch.bool))[0], always(x)[0])


def test_without_attention_it_is_the_average():
    mixer, x = boat(attention=False), BOAT.input(2, 17)
    close(mixer(x)[0], mixer.x_proj(silu(mixer.average(x)[0])))
    assert not mixer.active_tokens(x).any()
    assert list(mixer.state_spec()) == ["average"]


def test_a_window_reaches_past_what_is_inactive():
    """Of 60 tokens between two active ones the unit sees nothing; of four active ones more, only the last four."""
    mixer = boat(positions="none")
    with torch.no_grad():
        mixer.average.gamma.zero_()  # so that the past comes through the unit alone
    x, active = BOAT.input(1, 70).requires_grad_(), torch.zeros(1, 70, dtype=torch.bool)
    for between, wanted in ((0, True), (3, True), (4, False)):
        active[0, [2, 63]] = True
        active[0, 20 : 20 + between] = True
        y, _ = mixer(x, active=active)
        assert torch.autograd.grad(y[0, 63].sum(), x)[0][0, 2].any() == wanted


def test_a_document_that_begins_inactive_has_begun():
    """Its first token drops the cache, even if it takes until another call that a token enters the unit."""
    mixer = boat()
    x = BOAT.input(2, 12)
    active = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 1]] * 2).bool()
    segments = Segments.packed([[4, 8], [12]])
    y, last = mixer(x, segments=segments, active=active)
    _, state = mixer(x[:, :7], segments=segments[:7], active=active[:, :7])
    assert state["length"].tolist() == [0, 3]
    assert not state["keys"][0].any()
    second, state = mixer(x[:, 7:], state, active=active[:, 7:])
    close(second, y[:, 7:])
    close(state["values"], last["values"])
    close(second[:1], mixer(x[:1, 4:], active=active[:1, 4:])[0][:, 3:])


def test_the_two_routers_are_one():
    softmax, sigmoid = boat(), boat(router="sigmoid")
    weights = softmax.state_dict()
    for name in ("router_proj.weight", "router_proj.bias"):
        weights[name] = weights[name][1:] - weights[name][:1]
    sigmoid.load_state_dict(weights)
    x = BOAT.input(2, 33)
    close(sigmoid(x)[0], softmax(x)[0])


def test_threshold_and_temperature():
    x, mixer = BOAT.input(2, 65), boat()
    p = torch.softmax(mixer.router_proj(silu(mixer.average(x)[0])) / mixer.log_temperature.exp(), -1)[..., 1]
    for threshold in (0.45, 0.5, 0.55):
        other = boat(threshold=threshold)
        other.load_state_dict(mixer.state_dict())
        assert torch.equal(other.active_tokens(x), p > threshold)
    fixed = boat(learn_temperature=False, temp_scale=0.3)
    assert "log_temperature" not in fixed.state_dict()
    assert mixers.build("seqboat", dim=64, temp_scale=0.5).log_temperature.exp().item() == pytest.approx(4.0)


def test_gradient_flows_through_the_probability_alone():
    """A router that lets nothing in is taught nothing; how far the bias moves it is up to `act_bias`."""
    x = BOAT.input(4, 64, torch.float32)
    rates = []
    for act_bias in (-100.0, -0.5, 0.0, 0.5, 100.0):
        torch.manual_seed(0)
        mixer = SeqBoat(32, act_bias=act_bias, **BOAT.options)
        rates.append(mixer.active_tokens(x).float().mean().item())
        mixer(x)[0].square().sum().backward()
        gradient = mixer.router_proj.weight.grad
        assert (gradient is None or not gradient.any()) == (rates[-1] == 0)
    assert rates[0] == 0
    assert rates[-1] == 1
    assert rates == sorted(rates)
    assert 0.2 < rates[2] < 0.8


def test_the_compiled_step_and_its_refusal():
    with pytest.raises(Unsupported, match=r"index\.Tensor"):
        compile_step(boat(torch.float32, positions="offset"))
    with pytest.raises(Unsupported, match="grows with the sequence"):
        compile_step(boat(torch.float32, window=None))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gated-attention-unit", dict(key_dim=7), "key_dim: seen 7, wanted an even number"),
        ("gated-attention-unit", dict(expand=0.01), "expand: 0.01"),
        ("gated-attention-unit", dict(window=0), "window: seen 0"),
        ("gated-attention-unit", dict(kernel="cosine"), "kernel: seen 'cosine'"),
        ("gated-attention-unit", dict(positions="learned"), "positions: seen 'learned'"),
        ("gated-attention-unit", dict(positions="offset"), "positions: 'offset' .* set a window"),
        ("gated-attention-unit", dict(activation="tanh"), "activation: seen 'tanh'"),
        ("gated-attention-unit", dict(rope_theta=0.0), "rope_theta: seen 0.0"),
        ("seqboat", dict(router="hard"), "router: seen 'hard'"),
        ("seqboat", dict(threshold=1.0), "threshold: seen 1.0"),
        ("seqboat", dict(temp_scale=0.0), "temp_scale: seen 0.0"),
        ("seqboat", dict(router_std=-1.0), "router_std: seen -1.0"),
        ("seqboat", dict(activation="tanh"), "activation: seen 'tanh'"),
        ("seqboat", dict(state_dim=0), "states: seen 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build(name, dim=16, **options)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"active: seen shape \(2, 4\)"):
        boat()(BOAT.input(2, 5), active=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("window", [1, 5, 40, None])
def test_an_empty_batch(window):
    y, _ = mixers.build("gated-attention-unit", 32, window=window)(torch.zeros(0, 40, 32))
    assert y.shape == (0, 40, 32)
