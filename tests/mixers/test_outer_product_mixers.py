"""hgrn2, transnormer, rwkv6, gated-slot-attention, lightnet, deltaproduct and kimi-delta-attention.

Each against its equations written out twice: one token after the other, and in a form without a recurrence.
"""

import math

import pytest
import torch
from torch.nn import functional

from tests.contract import test_equality, test_gradients, test_numerics
from tests.contract.helpers import Subject
from tidegate import registry
from tidegate.mixers import build

B, T, D = 2, 21, 32
NEAR = dict(rtol=1e-9, atol=1e-11)


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def awake(name, **options):
    """A mixer none of whose parameters are zero: at their initial values some of these layers return zeros."""
    mixer = build(name, D, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return mixer


def heads(x, n):
    return x.reshape(*x.shape[:-1], n, -1)


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolve(x, weight):
    """sum_j weight[:, j] x_{t - (W - 1) + j}"""
    width = weight.shape[1]
    padded = functional.pad(x, (0, 0, width - 1, 0))
    return sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(width))


# -- decayed outer products --------------------------------------------------------------------------------------------
def step_by_step(q, k, v, decay):
    """S_t = decay_t * S_{t-1} + k_t v_t^T, o_t = S_t^T q_t; decay (B, T, H, 1 or K)."""
    S, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = decay[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * S).sum(-2))
    return torch.stack(outputs, 1)


def all_pairs(q, k, v, decay):
    """o_t = sum_{s <= t} sum_c q_tc k_sc prod_{s < r <= t} decay_rc v_s."""
    G = decay.log().cumsum(1).expand_as(q)
    scores = torch.einsum("bthk,bshk,btshk->bhts", q, k, (G[:, :, None] - G[:, None]).exp()).tril()
    return torch.einsum("bhts,bshv->bthv", scores, v)


ORACLES = pytest.mark.parametrize("oracle", [step_by_step, all_pairs])


@ORACLES
@pytest.mark.parametrize("bound", [0.0, 0.3])
@pytest.mark.parametrize("width", [None, 4])
def test_hgrn2(x, oracle, bound, width):
    mixer = awake("hgrn2", expand_ratio=6, num_heads=2, lower_bound=bound, conv_width=width)
    qfi = x @ mixer.qkv_proj.weight.T
    qfi = convolve(qfi, mixer.convolution.weight) if width else qfi
    q, f, i = qfi.split([12, 12, D], -1)
    gamma = torch.sigmoid(mixer.lower_bound_logit) if bound else torch.zeros(12)
    forget = gamma + (1 - gamma) * torch.sigmoid(f)
    parts = (heads(part, 2) for part in (functional.silu(q) / math.sqrt(6), 1 - forget, i, forget))
    o = rms(oracle(*parts).flatten(-2), mixer.norm.weight)
    torch.testing.assert_close(mixer(x)[0], o @ mixer.o_proj.weight.T, **NEAR)


def test_hgrn2_bounds_rise_with_the_layer():
    bounds = [build("hgrn2", D, expand_ratio=8, layer_index=n, num_layers=4) for n in range(4)]
    assert bounds[0].lower_bound_logit is None
    for n in (1, 2, 3):
        torch.testing.assert_close(bounds[n].lower_bound_logit.sigmoid(), torch.full((D,), n / 4))


@ORACLES
@pytest.mark.parametrize("options", [{}, {"slopes": "linear", "norm": "layer", "rope_theta": None}], ids=str)
def test_transnormer(x, oracle, options):
    mixer = awake("transnormer", num_heads=2, gate_rank=4, **options)
    q, k, v = (heads(part, 2) for part in functional.silu(x @ mixer.qkv_proj.weight.T).chunk(3, -1))
    if not options:
        angle = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
        turn = torch.polar(torch.ones(T, 8, dtype=torch.float64), angle)[None, :, None]
        q, k = (torch.view_as_real(torch.complex(*p.chunk(2, -1)) * turn).mT.flatten(-2) for p in (q, k))
    slopes = [0.0, 4.0] if options else [2**-4 * (1 + 1e-5), 2**-8 * (1 + 1e-5)]
    decay = torch.exp(-torch.tensor(slopes, dtype=torch.float64)).expand(B, T, 2)[..., None]
    o = oracle(q, k, v, decay).flatten(-2)
    if options:
        centred = o - o.mean(-1, keepdim=True)
        o = rms(centred, mixer.layer_norm.weight, 1e-6) + mixer.layer_norm.bias
    else:
        o = rms(o, 1.0, 1e-6)
    o = o * torch.sigmoid(x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T)
    torch.testing.assert_close(mixer(x)[0], o @ mixer.o_proj.weight.T, **NEAR)


def test_transnormer_slopes():
    def slopes(**options):
        return [-g for g in build("transnormer", 96, rope_theta=None, **options).log_decay()]

    assert slopes(num_heads=6, num_layers=2) == pytest.approx(
        [2 ** -(2 * h + 2) * (1 + 1e-5) for h in range(4)] + [(1 + 1e-5) / 2, (1 + 1e-5) / 8]
    )  # for six heads ALiBi takes four, and the first and third of eight
    assert slopes(num_heads=2, layer_index=2, num_layers=3) == pytest.approx([2**-4 * 1e-5, 2**-8 * 1e-5])
    assert slopes(num_heads=2, slopes="linear", layer_index=1, num_layers=4) == pytest.approx([0, 3])
    assert "position" not in build("transnormer", 32, layer_index=1, num_layers=2).state_spec()


def reading_first(q, k, v, decay, bonus):
    S, outputs = torch.zeros(*q.shape[:1], *q.shape[2:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        written = k[:, t, ..., None] * v[:, t, :, None]
        outputs.append((q[:, t, ..., None] * (S + bonus[..., None] * written)).sum(-2))
        S = decay[:, t, ..., None] * S + written
    return torch.stack(outputs, 1)


def pairs_reading_first(q, k, v, decay, bonus):
    """For s < t the decays strictly between count; for s = t the bonus."""
    G = decay.log().cumsum(1)
    between = torch.cat([torch.zeros_like(G[:, :1]), G[:, :-1]], 1)[:, :, None] - G[:, None]
    before = torch.ones(T, T).tril(-1)[None, :, :, None, None].bool()
    weights = torch.where(before, between.masked_fill(~before, 0).exp(), 0)
    weights = weights + torch.eye(T, dtype=q.dtype)[None, :, :, None, None] * bonus
    return torch.einsum("bthk,bshk,btshk,bshv->bthv", q, k, weights, v)


@pytest.mark.parametrize("oracle", [reading_first, pairs_reading_first])
def test_rwkv6(x, oracle):
    mixer = awake("rwkv6", head_dim=8, mix_rank=4, decay_rank=4, layer_index=1, num_layers=3)
    d = functional.pad(x, (0, 0, 1, 0))[:, :-1] - x
    low = torch.tanh((x + d * mixer.mix_x) @ mixer.mix_down).chunk(5, -1)
    xw, xk, xv, xr, xg = (x + d * (mix + part @ up) for mix, part, up in zip(mixer.mix, low, mixer.mix_up, strict=True))
    w = torch.exp(-torch.exp(mixer.decay_bias + torch.tanh(xw @ mixer.decay_down) @ mixer.decay_up))
    r, k, v = xr @ mixer.r_proj.weight.T, xk @ mixer.k_proj.weight.T, xv @ mixer.v_proj.weight.T
    o = oracle(*(heads(part, 4) for part in (r, k, v, w)), mixer.bonus).flatten(-2)
    o = functional.group_norm(o.flatten(0, 1), 4, mixer.norm_weight, mixer.norm_bias, eps=64e-5).view(B, T, D)
    y, state = mixer(x)
    expected = (o * functional.silu(xg @ mixer.g_proj.weight.T)) @ mixer.o_proj.weight.T
    torch.testing.assert_close(y, expected, **NEAR)
    torch.testing.assert_close(state["x_prev"], x[:, -1])


def test_rwkv6_starts_as_the_authors_do():
    mixer = build("rwkv6", 64, head_dim=16, layer_index=2, num_layers=5)
    for part in (mixer.o_proj.weight, mixer.mix_down, mixer.decay_down):
        assert not part.any()
    assert mixer.mix_up.abs().max() <= 0.01
    for part, gain in ((mixer.r_proj, 1.0), (mixer.k_proj, 0.1), (mixer.v_proj, 1.0), (mixer.g_proj, 0.1)):
        torch.testing.assert_close(part.weight @ part.weight.T, gain**2 * torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixer.decay_bias[[0, -1]].detach(), torch.tensor([-6.0, -1.0]))
    torch.testing.assert_close(mixer.mix_x[16].item(), 1 - 0.25**0.6)
    torch.testing.assert_close(mixer.mix[2, 0].item(), 1 - 0.3 * 0.5)
    torch.testing.assert_close(
        mixer.bonus.flatten()[:3].detach(), 0.5 * (1 - torch.arange(3) / 63) + torch.tensor([0, 0.1, -0.1])
    )
    torch.testing.assert_close(mixer.norm_weight.mean().item(), (3 / 5) ** 0.7)


def slots_step_by_step(q, k, v, decay):
    S = torch.zeros(B, q.shape[2], decay.shape[-1], k.shape[-1]).double()
    R, outputs = torch.zeros(B, q.shape[2], decay.shape[-1], v.shape[-1]).double(), []
    for t in range(T):
        alpha = decay[:, t, ..., None]
        S = alpha * S + (1 - alpha) * k[:, t, :, None]
        R = alpha * R + (1 - alpha) * v[:, t, :, None]
        p = (S @ q[:, t, ..., None]).squeeze(-1).softmax(-1)
        outputs.append((p[..., None] * R).sum(-2))
    return torch.stack(outputs, 1)


def slots_as_means(q, k, v, decay):
    """A slot is sum_s (1 - alpha_s) prod_{s < r <= t} alpha_r x_s, for its key as for its value."""
    G = decay.log().cumsum(1)
    within = torch.ones(T, T).tril()[None, :, :, None, None].bool()
    weights = torch.where(within, (G[:, :, None] - G[:, None]).masked_fill(~within, 0).exp(), 0) * (1 - decay)[:, None]
    keys, values = (torch.einsum("btshm,bshd->bthmd", weights, part) for part in (k, v))
    p = torch.einsum("bthmd,bthd->bthm", keys, q).softmax(-1)
    return torch.einsum("bthm,bthmd->bthd", p, values)


@pytest.mark.parametrize("oracle", [slots_step_by_step, slots_as_means])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 2, "num_slots": 5, "conv_width": 3}, {"feature_map": "identity", "gate_temperature": 2.0}],
    ids=str,
)
def test_gated_slot_attention(x, oracle, options):
    mixer = awake("gated-slot-attention", num_heads=4, **options)
    kv = mixer.kv_heads
    qkv = x @ mixer.qkv_proj.weight.T
    if "conv_width" in options:
        qkv = functional.silu(convolve(qkv, mixer.convolution.weight))
    q, k, v = qkv.split([32, 8 * kv, 8 * kv], -1)
    if "feature_map" not in options:
        q, k = functional.silu(q), functional.silu(k)
    decay = heads(torch.sigmoid(x @ mixer.gate_proj.weight.T) ** (1 / mixer.gate_temperature), kv)
    shared = torch.arange(4) // (4 // kv)
    k, v, decay = heads(k, kv)[:, :, shared], heads(functional.silu(v), kv)[:, :, shared], decay[:, :, shared]
    o = rms(functional.silu(oracle(heads(q, 4), k, v, decay).flatten(-2)), mixer.norm.weight)
    torch.testing.assert_close(mixer(x)[0], o @ mixer.o_proj.weight.T, **NEAR)


def lightnet_step_by_step(q, k, v, e):
    """The paper's recurrence, z from the token before; a first token has nothing to decay."""
    z, S = torch.full_like(e[:, 0], -math.inf), torch.zeros(B, *q.shape[2:], v.shape[-1]).double()
    outputs = []
    for t in range(T):
        new = torch.logaddexp(z, e[:, t])
        written = torch.exp(e[:, t] - new)[..., None] * k[:, t, ..., None] * v[:, t, :, None]
        S, z = torch.exp(z - new)[..., None] * S + written, new
        outputs.append((q[:, t, ..., None] * S).sum(-2))
    return torch.stack(outputs, 1)


def softmax_over_time(q, k, v, e):
    outputs = []
    for t in range(T):
        weights = e[:, : t + 1].softmax(1) * k[:, : t + 1]
        outputs.append(torch.einsum("bhk,bshk,bshv->bhv", q[:, t], weights, v[:, : t + 1]))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("oracle", [lightnet_step_by_step, softmax_over_time])
@pytest.mark.parametrize(
    "options",
    [{}, {"decay": "scalar", "gate": "sigmoid"}, {"position": "cosine"}, {"position": "cosine", "decay": "scalar"}],
    ids=str,
)
def test_lightnet(x, oracle, options):
    mixer = awake("lightnet", expand_ratio=6, num_heads=2, gate_rank=4, **options)
    q, k, v = (x @ mixer.qkv_proj.weight.T).split([12, 12, D], -1)
    q, k, v = heads(functional.silu(q), 2) / math.sqrt(6), heads(k, 2), heads(v, 2)
    if "decay" in options:
        k, e = functional.silu(k), heads(x @ mixer.weight_proj.weight.T, 2).expand_as(k)
    else:
        k, e = torch.ones_like(k), k
    if "position" in options:
        angle = torch.arange(T)[:, None, None] * 10000.0 ** (-torch.arange(6, dtype=torch.float64) / 6)
        q, k = (torch.cat([part * angle.cos(), part * angle.sin()], -1) for part in (q, k))
        e = torch.cat([e, e], -1)
    gate = x @ mixer.gate_down.weight.T @ mixer.gate_up.weight.T
    gate = torch.sigmoid(gate) if "gate" in options else functional.silu(gate)
    o = rms(oracle(q, k, v, e).flatten(-2), mixer.norm_weight, 1e-6) * gate
    torch.testing.assert_close(mixer(x)[0], o @ mixer.o_proj.weight.T, **NEAR)


def test_lightnet_without_positions_does_not_know_the_order(x):
    mixer = awake("lightnet", expand_ratio=16)
    shuffled = torch.cat([x[:, torch.randperm(T - 1)], x[:, -1:]], 1)
    torch.testing.assert_close(mixer(x)[0][:, -1], mixer(shuffled)[0][:, -1], **NEAR)
    placed = awake("lightnet", expand_ratio=16, position="rotary")
    assert not torch.allclose(placed(x)[0][:, -1], placed(shuffled)[0][:, -1])


# -- delta rule --------------------------------------------------------------------------------------------------------
def deltas_step_by_step(q, k, v, beta, alpha):
    """k, v (B, T, n, H, .), beta (B, T, n, H), alpha (B, T, H, 1 or K): decay, then one correction after the other."""
    S, outputs = torch.zeros(*k.shape[:1], *k.shape[3:], v.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        S = alpha[:, t, ..., None] * S
        for j in range(k.shape[2]):
            error = v[:, t, j] - (k[:, t, j, ..., None] * S).sum(-2)
            S = S + k[:, t, j, ..., None] * (beta[:, t, j, :, None] * error)[..., None, :]
        outputs.append((q[:, t, ..., None] * S).sum(-2))
    return torch.stack(outputs, 1)


def transition(k, beta):
    """I - beta k k^T"""
    return torch.eye(k.shape[-1], dtype=k.dtype) - beta[..., None, None] * k[..., :, None] * k[..., None, :]


def products_of_transitions(q, k, v, beta, alpha):
    """S_t = sum over earlier writes of the product of all transitions behind them: no state at all."""
    outputs = []
    for t in range(q.shape[1]):
        after, total = torch.eye(k.shape[-1], dtype=q.dtype), 0
        for s in range(t, -1, -1):
            for j in range(k.shape[2] - 1, -1, -1):
                write = beta[:, s, j, :, None, None] * k[:, s, j, ..., :, None] * v[:, s, j, ..., None, :]
                total, after = total + after @ write, after @ transition(k[:, s, j], beta[:, s, j])
            after = after * alpha[:, s, :, None, :]
        outputs.append((q[:, t, ..., None] * total).sum(-2))
    return torch.stack(outputs, 1)


DELTA_ORACLES = pytest.mark.parametrize("oracle", [deltas_step_by_step, products_of_transitions])


@DELTA_ORACLES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_steps": 3, "negative_eigenvalues": False, "conv_width": None},
        {"forget_gate": True, "use_gate": True, "num_value_heads": 4, "head_dim": 6, "expand_v": 1.5},
    ],
    ids=str,
)
def test_deltaproduct(x, oracle, options):
    mixer = awake("deltaproduct", num_heads=2, **options)
    n, H, K, V = mixer.num_steps, mixer.heads, mixer.key_dim, mixer.value_dim
    qkv = x @ mixer.qkv_proj.weight.T
    qkv = functional.silu(convolve(qkv, mixer.convolution.weight) if mixer.conv_width else qkv)
    q, k, v = qkv.split([2 * K, n * 2 * K, n * H * V], -1)
    shared = torch.arange(H) // (H // 2)
    q, k = unit(heads(q, 2))[:, :, shared], unit(k.view(B, T, n, 2, K))[:, :, :, shared]
    beta = torch.sigmoid(x @ mixer.beta_proj.weight.T).view(B, T, n, H)
    beta = 2 * beta if mixer.negative_eigenvalues else beta
    alpha = torch.ones(B, T, H, 1, dtype=x.dtype)
    if mixer.forget_gate:
        step = functional.softplus(x @ mixer.decay_proj.weight.T + mixer.dt_bias)
        alpha = torch.exp(-mixer.log_a.exp() * step)[..., None]
    o = oracle(q / math.sqrt(K), k, v.reshape(B, T, n, H, V), beta, alpha)
    y = rms(o, mixer.norm.weight).flatten(-2)
    if mixer.use_gate:
        y = y * functional.silu(x @ mixer.gate_proj.weight.T)
    torch.testing.assert_close(mixer(x)[0], y @ mixer.o_proj.weight.T, **NEAR)


@pytest.mark.parametrize("gated", [False, True])
def test_one_step_of_deltaproduct_is_deltanet(x, gated):
    shape = dict(num_heads=2, negative_eigenvalues=True)
    one = awake("deltaproduct", num_steps=1, forget_gate=gated, use_gate=gated, **shape)
    options = {"head_dim": 16, "expand_v": 1.0} if gated else {}
    other = build("gated-deltanet" if gated else "deltanet", D, **shape, **options).double()
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x)[0], other(x)[0])


def test_two_reflections_are_a_rotation():
    """Keys at an angle theta, beta = 2: the transition of a token turns by 2 theta; one reflection cannot."""
    theta = 0.7
    keys = torch.tensor([[1.0, 0.0], [math.cos(theta), math.sin(theta)]], dtype=torch.float64)
    both = transition(keys[1], torch.tensor(2.0)) @ transition(keys[0], torch.tensor(2.0))
    angles = torch.linalg.eigvals(both).angle().sort().values
    torch.testing.assert_close(angles, torch.tensor([-2 * theta, 2 * theta], dtype=torch.float64))


def inverse_silu(y):
    """The z > -1.2 with silu(z) = y, by Newton's method."""
    z = torch.ones_like(y)
    for _ in range(50):
        s = torch.sigmoid(z)
        z = z - (z * s - y) / (s * (1 + z * (1 - s)))
    return z


def test_deltaproduct_counts_to_five_for_ten_thousand_tokens():
    """Weights set by hand: two reflections turn the memory by a fifth of a circle per token, for 2,000 rounds.

    x = (1, 0) is such a token; (1, 1), the first one, writes a value besides, which all others leave as it is.
    """
    mixer = build("deltaproduct", 2, num_heads=1, head_dim=2, conv_width=None)
    angle = math.pi / 5
    keys = torch.tensor([1.0, 0.0, math.cos(angle), math.sin(angle)], dtype=torch.float64)
    with torch.no_grad():
        mixer.qkv_proj.weight.zero_()
        mixer.qkv_proj.weight[2:6, 0] = inverse_silu(keys).float()
        mixer.qkv_proj.weight[6:, 1] = 2.0
        mixer.beta_proj.weight[:, 0] = 40.0  # beta = 2
        _, state = mixer(torch.tensor([[[1.0, 1.0]]]))
        memories = [state["memory"]]
        for count in (1, 4, 9_995):
            _, state = mixer(torch.tensor([1.0, 0.0]).expand(1, count, 2), state)
            memories.append(state["memory"])
    written, once, five, many = memories
    assert not torch.allclose(once, written, atol=0.5)
    torch.testing.assert_close(five, written, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(many, written, rtol=2e-2, atol=2e-2)  # the eps under the keys' norm, 20,000 times


@DELTA_ORACLES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lower_bound": -5.0, "negative_eigenvalues": True, "conv_width": None},
        {"num_value_heads": 4, "head_dim": 6, "expand_v": 1.5, "gate_rank": 3},
    ],
    ids=str,
)
def test_kimi_delta_attention(x, oracle, options):
    mixer = awake("kimi-delta-attention", num_heads=2, **options)
    H, K, V = mixer.heads, mixer.key_dim, mixer.value_dim
    qkv = x @ mixer.qkv_proj.weight.T
    qkv = functional.silu(convolve(qkv, mixer.convolution.weight) if mixer.conv_width else qkv)
    q, k, v = qkv.split([2 * K, 2 * K, H * V], -1)
    shared = torch.arange(H) // (H // 2)
    q, k = (unit(heads(part, 2))[:, :, shared] for part in (q, k))
    decay, gate, beta = (x @ mixer.low_proj.weight.T).split(mixer.low_widths, -1)
    beta = torch.sigmoid(beta) * (1 + mixer.negative_eigenvalues)
    logits, rate = heads(decay @ mixer.decay_up.weight.T + mixer.dt_bias, H), mixer.log_a.exp()[:, None]
    if mixer.lower_bound is None:
        alpha = (1 + logits.exp()) ** -rate
    else:
        alpha = torch.exp(-5 / (1 + torch.exp(-rate * logits)))
    o = oracle(q / math.sqrt(K), k[:, :, None], heads(v, H)[:, :, None], beta[:, :, None], alpha)
    gate = torch.sigmoid(gate @ mixer.gate_up.weight.T + mixer.gate_up.bias)
    expected = (rms(o, mixer.norm_weight).flatten(-2) * gate) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, **NEAR)


def test_initial_decays_of_the_delta_mixers():
    for name, low in (("deltaproduct", 0.0), ("kimi-delta-attention", 1.0)):
        options = {"forget_gate": True} if name == "deltaproduct" else {}
        mixer = build(name, 512, num_heads=128, **options)
        assert low <= mixer.log_a.exp().min() < low + 1
        assert 14 < mixer.log_a.exp().max() <= 16
        steps = functional.softplus(mixer.dt_bias)
        assert 0.9e-3 < steps.min() < 2e-3
        assert 0.07 < steps.max() < 0.101
    assert not build("kimi-delta-attention", 64, lower_bound=-5.0).log_a.any()


# -- what the tiny options of the registry leave out -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hgrn2", {"expand_ratio": 16}),
        ("transnormer", {"num_heads": 2, "slopes": "linear", "norm": "layer", "rope_theta": None}),
        ("rwkv6", {"head_dim": 16, "layer_index": 1, "num_layers": 2}),
        ("gated-slot-attention", {"num_heads": 2, "num_slots": 7}),
        ("lightnet", {"expand_ratio": 16, "decay": "scalar", "position": "rotary"}),
        ("lightnet", {"expand_ratio": 16}),
        ("deltaproduct", {"num_heads": 2, "num_steps": 3, "conv_width": None}),
        ("kimi-delta-attention", {"num_heads": 2, "lower_bound": -5.0, "conv_width": None}),
    ],
    ids=str,
)
def test_the_variants_keep_the_contract(name, options):
    subject = Subject(name, registry.info(name).cls, D, options)
    test_equality.test_any_split_is_the_whole(subject, 65)
    test_equality.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")
    test_gradients.test_second_derivatives_in_single_precision(subject)
    for dtype in (torch.float64, torch.float32):
        test_equality.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", dtype)
        test_numerics.test_extreme_gates_stay_finite(subject, "both", dtype)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hgrn2", {"expand_ratio": 5}, "expand_ratio: seen 5"),
        ("hgrn2", {"expand_ratio": 8, "lower_bound": 1.0}, "lower_bound: seen 1.0"),
        ("transnormer", {"slopes": "flat"}, "slopes: seen 'flat'"),
        ("transnormer", {"norm": "group"}, "norm: seen 'group'"),
        ("transnormer", {"num_heads": 32}, "rope_theta: "),
        ("transnormer", {"layer_index": 1}, "layer_index: seen 1"),
        ("rwkv6", {"head_dim": 5}, "head_dim: seen 5"),
        ("rwkv6", {"head_dim": 8, "layer_index": 1}, "layer_index: seen 1"),
        ("gated-slot-attention", {"num_slots": 0}, "num_slots: seen 0"),
        ("gated-slot-attention", {"num_kv_heads": 3}, "num_kv_heads: seen 3"),
        ("gated-slot-attention", {"feature_map": "tanh"}, "feature_map: seen 'tanh'"),
        ("lightnet", {"expand_ratio": 5}, "expand_ratio: seen 5"),
        ("lightnet", {"expand_ratio": 8, "decay": "none"}, "decay: seen 'none'"),
        ("lightnet", {"expand_ratio": 8, "position": "tpe"}, "position: seen 'tpe'"),
        ("lightnet", {"expand_ratio": 5, "num_heads": 2, "position": "rotary"}, "position: rotation"),
        ("lightnet", {"expand_ratio": 8, "gate": "relu"}, "gate: seen 'relu'"),
        ("deltaproduct", {"num_steps": 0}, "num_steps: seen 0"),
        ("deltaproduct", {"num_value_heads": 6}, "num_value_heads: seen 6"),
        ("deltaproduct", {"expand_v": 0.3}, "expand_v: "),
        ("kimi-delta-attention", {"lower_bound": 0.5}, "lower_bound: seen 0.5"),
        ("kimi-delta-attention", {"num_value_heads": 6}, "num_value_heads: seen 6"),
    ],
)
def test_wrong_options_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, D, **options)
