"""linear-attention, retnet, gla and mamba2 against their equations, written out twice: step by step, and all pairs."""

import math

import pytest
import torch
from torch.nn import functional

from tests.contract import test_equality, test_gradients, test_numerics, test_transforms
from tests.contract.helpers import Subject
from tidegate.mixers import build
from tidegate.mixers.mamba2 import Mamba2

B, T, D = 2, 21, 32


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def heads(x, n):
    return x.reshape(*x.shape[:-1], n, -1)


def step_by_step(q, k, v, decay):
    """S_t = decay_t * S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; decay (B, T, H, 1 or K)."""
    state = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype)
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t][..., None] * state + k[:, t][..., None] * v[:, t][:, :, None]
        outputs.append((q[:, t][..., None] * state).sum(-2))
    return torch.stack(outputs, 1)


def all_pairs(q, k, v, decay):
    """o_t = sum_{s <= t} sum_c q_tc k_sc prod_{s < r <= t} decay_rc v_s."""
    G = decay.log().cumsum(1).expand_as(q)
    scores = torch.einsum("bthk,bshk,btshk->bhts", q, k, (G[:, :, None] - G[:, None]).exp()).tril()
    return torch.einsum("bhts,bshv->bthv", scores, v)


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


ORACLES = pytest.mark.parametrize("oracle", [step_by_step, all_pairs])


@ORACLES
@pytest.mark.parametrize("feature_map", ["elu+1", "relu", "softmax"])
def test_linear_attention(x, oracle, feature_map):
    mixer = build("linear-attention", D, num_heads=2, feature_map=feature_map).double()
    q, k, v = (heads(part, 2) for part in (x @ mixer.qkv_proj.weight.T).chunk(3, -1))
    phi = {
        "elu+1": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "relu": torch.relu,
        "softmax": lambda x: x.softmax(-1),
    }
    q, k = phi[feature_map](q), phi[feature_map](k)
    ones = torch.ones(B, T, 2, 1, dtype=torch.float64)
    numerator, denominator = oracle(q, k, v, ones), oracle(q, k, ones, ones)
    expected = (numerator / (denominator + 1e-6)).flatten(-2) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_linear_attention_without_normaliser(x):
    mixer = build("linear-attention", D, num_heads=2, feature_map="identity", normaliser="none").double()
    q, k, v = (heads(part, 2) for part in (x @ mixer.qkv_proj.weight.T).chunk(3, -1))
    expected = rms(all_pairs(q, k, v, torch.ones(B, T, 2, 1, dtype=torch.float64)), mixer.norm.weight)
    torch.testing.assert_close(mixer(x)[0], expected.flatten(-2) @ mixer.o_proj.weight.T, rtol=1e-10, atol=1e-10)


@ORACLES
def test_retnet(x, oracle):
    mixer = build("retnet", D, num_heads=2).double()
    q, k, v = (x @ mixer.qkv_proj.weight.T).split([D, D, 2 * D], -1)
    angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(T, 8, dtype=torch.float64), angle)[None, :, None]

    def rotated(x):
        turned = torch.complex(*heads(x, 2).chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    decay = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64).expand(B, T, 2)[..., None]
    o = rms(oracle(rotated(q) / 4, rotated(k), heads(v, 2), decay), mixer.norm.weight)
    expected = (functional.silu(x @ mixer.output_gate.weight.T) * o.flatten(-2)) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-8, atol=1e-10)


@ORACLES
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("gate", ["key", "scalar", "fixed", "none"])
def test_gla(x, oracle, gate, kv_heads):
    mixer = build("gla", D, num_heads=2, num_kv_heads=kv_heads, gate=gate).double()
    q, k, v = (x @ mixer.qkv_proj.weight.T).split([16, 8 * kv_heads, 16 * kv_heads], -1)
    q, k, v = heads(q, 2), heads(k, kv_heads), heads(v, kv_heads)
    if gate in ("key", "scalar"):
        logits = x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T + mixer.gate_bias_parameter
        decay = heads(torch.sigmoid(logits) ** (1 / 16), kv_heads)
        decay = decay.repeat_interleave(2 // kv_heads, 2)
    else:
        decay = torch.tensor([1 - 2**-5, 1 - 2**-6] if gate == "fixed" else [1.0, 1.0], dtype=torch.float64)
        decay = decay.expand(B, T, 2)[..., None]
    k, v = k.repeat_interleave(2 // kv_heads, 2), v.repeat_interleave(2 // kv_heads, 2)
    o = rms(oracle(q / math.sqrt(8), k, v, decay), mixer.norm.weight).flatten(-2)
    expected = (functional.silu(x @ mixer.output_gate.weight.T) * o) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-12)


@ORACLES
@pytest.mark.parametrize("feature_map", ["relu", "elu+1", "softmax"])
def test_gla_options(x, oracle, feature_map):
    options = {"feature_map": feature_map, "gate_activation": "sigmoid", "min_log_decay": -0.05, "num_heads": 2}
    mixer = build("gla", D, **options).double()
    with torch.no_grad():
        mixer.qkv_proj.weight *= 20
        mixer.gate_up.weight *= 50
    phi = {"relu": torch.relu, "elu+1": lambda y: functional.elu(y) + 1, "softmax": lambda y: y.softmax(-1)}
    q, k, v = (x @ mixer.qkv_proj.weight.T).split([16, 16, 32], -1)
    q, k, v = phi[feature_map](heads(q, 2)), phi[feature_map](heads(k, 2)), heads(v, 2)
    logits = x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T
    decay = torch.sigmoid(logits) ** (1 / 16)
    held = decay < math.exp(-0.05)
    assert 0.1 < held.double().mean() < 0.9
    decay = heads(torch.where(held, math.exp(-0.05), decay), 2)
    o = rms(oracle(q / math.sqrt(8), k, v, decay), mixer.norm.weight).flatten(-2)
    expected = (torch.sigmoid(x @ mixer.output_gate.weight.T) * o) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-9, atol=1e-12)
    subject = Subject("gla", type(mixer), D, options)
    test_equality.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", torch.float32)
    test_equality.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")


def test_gla_starts_with_a_half_life_of_sixteen_tokens(x):
    mixer = build("gla", D, num_heads=2).double()
    half_life = math.log(0.5) / mixer._log_decay(0 * x)
    torch.testing.assert_close(half_life, torch.full_like(half_life, 16.0))
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    bound = 2**-2.5 * math.sqrt(6 / (16 + 32))
    assert 0.9 * bound < mixer.qkv_proj.weight[:16].abs().max() <= bound


def test_gla_short_convolution_sees_the_token_before(x):
    mixer = build("gla", D, num_heads=2, conv_width=4).double()
    near = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixer.convolution(mixer.qkv_proj(near))[0][:, 10].sum(), near)
    reached = gradient.abs().sum((0, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [7, 8, 9, 10]


@ORACLES
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2(x, oracle, norm_before_gate):
    options = dict(state_dim=8, head_dim=16, num_groups=2, dt_limit=(0.005, 0.05), norm_before_gate=norm_before_gate)
    mixer = build("mamba2", D, **options).double()
    z, xbc, dt = (x @ mixer.in_proj.weight.T).split([64, 64 + 32, 4], -1)
    padded = functional.pad(xbc.mT, (3, 0))
    conv = functional.conv1d(padded, mixer.convolution.weight[:, None], mixer.convolution.bias, groups=96).mT
    u, b, c = functional.silu(conv).split([64, 16, 16], -1)
    delta = functional.softplus(dt + mixer.dt_bias).clamp(0.005, 0.05)
    decay = torch.exp(-delta * mixer.log_a.exp())[..., None]
    u = heads(u, 4)
    b, c = (heads(part, 2).repeat_interleave(2, 2) for part in (b, c))
    o = (oracle(c, b, delta[..., None] * u, decay) + mixer.d[:, None] * u).flatten(-2)
    if norm_before_gate:
        y = rms(heads(o, 2), 1.0).flatten(-2) * mixer.norm_weight * functional.silu(z)
    else:
        y = rms(heads(o * functional.silu(z), 2), 1.0).flatten(-2) * mixer.norm_weight
    torch.testing.assert_close(mixer(x)[0], y @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("skip_per_channel", [False, True])
@pytest.mark.parametrize("rule", ["euler", "zoh", "trapezoid"])
def test_mamba2_rules(x, rule, skip_per_channel):
    """Token by token as the rules are written; the trapezoid also as the sum over all pairs that Mamba-3 computes."""
    mixer = build(
        "mamba2", D, state_dim=8, head_dim=16, num_groups=2, rule=rule, skip_per_channel=skip_per_channel
    ).double()
    with torch.no_grad():
        mixer.d.copy_(torch.randn_like(mixer.d))
    z, xbc, dt, ends = (x @ mixer.in_proj.weight.T).split([64, 64 + 32, 4, 4 * (rule == "trapezoid")], -1)
    xbc = mixer.convolution(xbc)[0]
    u, b, c = xbc.split([64, 16, 16], -1)
    u, b, c = heads(u, 4), heads(b, 2).repeat_interleave(2, 2), heads(c, 2).repeat_interleave(2, 2)
    delta, rate = functional.softplus(dt + mixer.dt_bias), mixer.log_a.exp()
    decay, share = torch.exp(-delta * rate), torch.sigmoid(ends)
    state, outputs = torch.zeros(B, 4, 8, 16, dtype=x.dtype), []

    def outer(t):
        return b[:, t, :, :, None] * u[:, t, :, None, :]

    def per_head(number):
        return number[..., None, None]

    for t in range(T):
        state = per_head(decay[:, t]) * state
        if rule == "euler":
            state = state + per_head(delta[:, t]) * outer(t)
        elif rule == "zoh":  # the integral of e^(-rate s) over a step
            state = state + per_head((1 - decay[:, t]) / rate) * outer(t)
        else:
            state = state + per_head(share[:, t] * delta[:, t]) * outer(t)
            if t:
                state = state + per_head((1 - share[:, t]) * delta[:, t] * decay[:, t]) * outer(t - 1)
        outputs.append(torch.einsum("bhn,bhnp->bhp", c[:, t], state))
    o = torch.stack(outputs, 1)
    if rule == "trapezoid":
        now, later = share * delta, functional.pad(((1 - share) * delta)[:, 1:], (0, 0, 0, 1))
        full = all_pairs(c, b, (now + later)[..., None] * u, decay[..., None])
        closed = full - later[..., None] * (c * b).sum(-1, keepdim=True) * u
        torch.testing.assert_close(closed, o, rtol=1e-9, atol=1e-10)
    o = (o + mixer.d.reshape(4, -1) * u).flatten(-2)
    y = rms(heads(o * functional.silu(z), 2), 1.0).flatten(-2) * mixer.norm_weight
    got, after = mixer(x)
    torch.testing.assert_close(got, y @ mixer.o_proj.weight.T, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(after["memory"], state, rtol=1e-9, atol=1e-10)


def test_mamba2_zoh_does_not_care_how_often_a_held_input_is_sampled():
    """Second oracle of the rule: two half steps with the same input are one whole step."""
    mixer = build("mamba2", D, state_dim=8, head_dim=16, rule="zoh", conv_width=1).double()
    x = torch.randn(1, 1, D, dtype=torch.float64)
    with torch.no_grad():
        mixer.in_proj.weight[-4:] = 0  # the steps are their biases'
        steps = functional.softplus(mixer.dt_bias)
        once = mixer(x)[1]["memory"]
        mixer.dt_bias.copy_(torch.log(torch.expm1(steps / 2)))
        twice = mixer(x.repeat(1, 2, 1))[1]["memory"]
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"rule": "zoh", "dt_limit": (0.001, 0.2)}, {"rule": "trapezoid", "num_groups": 2}])
def test_mamba2_rules_keep_the_contract(options):
    subject = Subject("mamba2", Mamba2, D, {"head_dim": 16, "state_dim": 8, **options})
    test_equality.test_any_split_is_the_whole(subject, 65)
    test_equality.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")
    test_gradients.test_second_derivatives_in_single_precision(subject)
    test_gradients.test_the_backends_agree(subject, "packed_with_holes")
    test_transforms.test_compile_as_one_graph(subject)
    test_transforms.test_export_for_any_length(subject, with_segments=True)
    for dtype in (torch.float64, torch.float32):
        test_equality.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", dtype)
        test_numerics.test_extreme_gates_stay_finite(subject, "both", dtype)


def test_mamba2_starts_within_the_paper_s_ranges():
    mixer = build("mamba2", 512, head_dim=4)
    assert 1 <= mixer.log_a.exp().min() < 2
    assert 15 < mixer.log_a.exp().max() <= 16
    steps = functional.softplus(mixer.dt_bias)
    assert 0.99e-3 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.101
    assert torch.equal(mixer.d, torch.ones(256))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear-attention", {"num_heads": 5}, "num_heads"),
        ("linear-attention", {"feature_map": "tanh"}, "feature_map: seen 'tanh'"),
        ("linear-attention", {"feature_map": "identity"}, "normaliser: with the identity"),
        ("gla", {"gate": "vector"}, "gate: seen 'vector'"),
        ("gla", {"num_kv_heads": 3}, "num_kv_heads: seen 3"),
        ("gla", {"min_log_decay": 0.0}, "min_log_decay: seen 0.0"),
        ("gla", {"feature_map": "taylor"}, "feature_map: seen 'taylor', wanted one of identity, relu"),
        ("gla", {"gate_activation": "relu"}, "gate_activation: seen 'relu', wanted one of silu, sigmoid"),
        ("gla", {"expand_k": 0.3}, "expand_k: "),
        ("retnet", {"num_heads": 32}, "rope_theta: rotation needs an even number"),
        ("mamba2", {"head_dim": 48}, "head_dim: expand"),
        ("mamba2", {"head_dim": 16, "num_groups": 3}, "num_groups: seen 3"),
        ("mamba2", {"head_dim": 16, "dt_limit": (1.0, 0.5)}, "dt_limit: seen"),
        ("mamba2", {"head_dim": 16, "rule": "bilinear"}, "rule: seen 'bilinear', wanted one of euler, zoh, trapezoid"),
    ],
)
def test_bad_options_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, D, **options)
