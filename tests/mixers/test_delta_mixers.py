"""deltanet, gated-deltanet and rwkv7 against their equations written out token by token, and their streaming state."""

import math

import pytest
import torch
from torch.nn import functional

from tidegate import Segments
from tidegate.mixers import build
from tidegate.nn.channel_mix import ChannelMix
from tidegate.nn.parts import token_shift

B, T, D = 2, 19, 16
MIXERS = {
    "deltanet": dict(num_heads=2),
    "gated-deltanet": dict(num_heads=2, head_dim=4, num_value_heads=4),
    "rwkv7": dict(head_dim=8, decay_rank=4, a_rank=4, v_rank=4, gate_rank=4, layer_index=1, num_layers=3),
    "channel-mix": dict(layer_index=1, num_layers=3),
}


def make(name, dtype=torch.float64, **options):
    """A mixer none of whose parameters are zero: at their initial values some of these layers return zeros."""
    options = {**MIXERS[name], **options}
    mixer = ChannelMix(D, **options) if name == "channel-mix" else build(name, D, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer.to(dtype)


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def unit(x, eps=1e-6):
    return x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def convolve(x, weight):
    """SiLU of sum_j weight[:, j] x_{t - (W - 1) + j}."""
    width = weight.shape[1]
    padded = functional.pad(x, (0, 0, width - 1, 0))
    return functional.silu(sum(padded[:, j : j + x.shape[1]] * weight[:, j] for j in range(width)))


def delta_step(S, k, v, beta, alpha=1.0):
    S = alpha * S
    return S + k[..., None] * (beta[..., None] * (v - (k[..., None] * S).sum(-2)))[..., None, :]


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("width", [4, None])
@pytest.mark.parametrize("gate", [False, True])
def test_deltanet(x, width, negative, gate):
    mixer = make("deltanet", conv_width=width, negative_eigenvalues=negative, use_gate=gate)
    qkv = x @ mixer.qkv_proj.weight.T
    qkv = convolve(qkv, mixer.convolution.weight) if width else functional.silu(qkv)
    q, k, v = (part.unflatten(-1, (2, 8)) for part in qkv.chunk(3, -1))
    q, k = unit(q), unit(k)
    beta = torch.sigmoid(x @ mixer.beta_proj.weight.T) * (1 + negative)
    S, outputs = torch.zeros(B, 2, 8, 8, dtype=x.dtype), []
    for t in range(T):
        S = delta_step(S, k[:, t], v[:, t], beta[:, t])
        outputs.append((q[:, t, ..., None] * S).sum(-2) / math.sqrt(8))
    o = rms(torch.stack(outputs, 1), mixer.norm.weight).flatten(-2)
    if gate:
        o = o * functional.silu(x @ mixer.gate_proj.weight.T)
    y, state = mixer(x)
    torch.testing.assert_close(y, o @ mixer.o_proj.weight.T)
    torch.testing.assert_close(state["memory"], S)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_gated_deltanet(x, negative, gate):
    mixer = make("gated-deltanet", negative_eigenvalues=negative, use_gate=gate)
    qkv = convolve(x @ mixer.qkv_proj.weight.T, mixer.convolution.weight)
    q, k, v = qkv.split([8, 8, 32], -1)
    q, k, v = unit(q.unflatten(-1, (2, 4))), unit(k.unflatten(-1, (2, 4))), v.unflatten(-1, (4, 8))
    beta = torch.sigmoid(x @ mixer.beta_proj.weight.T) * (1 + negative)
    step = functional.softplus(x @ mixer.decay_proj.weight.T + mixer.dt_bias)
    alpha = torch.exp(-mixer.log_a.exp() * step)[..., None, None]
    S, outputs = torch.zeros(B, 4, 4, 8, dtype=x.dtype), []
    shared = [0, 0, 1, 1]  # value heads 0 and 1 use query and key head 0
    for t in range(T):
        S = delta_step(S, k[:, t, shared], v[:, t], beta[:, t], alpha[:, t])
        outputs.append((q[:, t, shared, :, None] * S).sum(-2) / 2)
    o = rms(torch.stack(outputs, 1), mixer.norm.weight).flatten(-2)
    if gate:
        o = o * functional.silu(x @ mixer.gate_proj.weight.T)
    torch.testing.assert_close(mixer(x)[0], o @ mixer.o_proj.weight.T)


@pytest.mark.parametrize("negative", [False, True])
def test_rwkv7(x, negative):
    """In the paper's own layout: S is V x K and stands to the left of its transition."""
    mixer = make("rwkv7", negative_eigenvalues=negative)
    v_first = torch.randn(B, T, D, dtype=torch.float64)
    before = functional.pad(x, (0, 0, 1, 0))[:, :-1]
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mix for mix in mixer.mix)
    r, k, v = xr @ mixer.r_proj.weight.T, xk @ mixer.k_proj.weight.T, xv @ mixer.v_proj.weight.T
    d = mixer.decay_bias + torch.tanh(xw @ mixer.decay_down) @ mixer.decay_up
    w = torch.exp(-torch.exp(-functional.softplus(-d) - 0.5))  # as the authors' code writes it
    assert ((w > 0.545) & (w < 1)).all()
    a = torch.sigmoid(mixer.a_bias + xa @ mixer.a_down @ mixer.a_up)
    v = v + (v_first - v) * torch.sigmoid(mixer.v_bias + xv @ mixer.v_down @ mixer.v_up)
    g = torch.sigmoid(xg @ mixer.gate_down) @ mixer.gate_up
    kappa = functional.normalize((k * mixer.k_k).unflatten(-1, (2, 8)), dim=-1)
    k = k * (1 + (a - 1) * mixer.k_a)
    r, w, k, v, a = (part.unflatten(-1, (2, 8)) for part in (r, w, k, v, a))
    S, outputs = torch.zeros(B, 2, 8, 8, dtype=x.dtype), []
    for t in range(T):
        removal = (1 + negative) * kappa[:, t, ..., None] * (a * kappa)[:, t, ..., None, :]
        S = S @ (torch.diag_embed(w[:, t]) - removal) + v[:, t, ..., None] * k[:, t, ..., None, :]
        outputs.append((S @ r[:, t, ..., None]).squeeze(-1))
    o = torch.stack(outputs, 1).flatten(-2)
    o = functional.group_norm(o.flatten(0, 1), 2, mixer.norm_weight, mixer.norm_bias, eps=8e-5).view(B, T, D)
    o = o + ((r * k * mixer.bonus).sum(-1, keepdim=True) * v).flatten(-2)
    y, state = mixer(x, side={"v_first": v_first})
    torch.testing.assert_close(y, (o * g) @ mixer.o_proj.weight.T)
    torch.testing.assert_close(state["memory"], S.mT)
    torch.testing.assert_close(state["x_prev"], x[:, -1])


def test_rwkv7_passes_its_first_values_on(x):
    first, second = make("rwkv7", layer_index=0), make("rwkv7")
    side = {}
    first(x, side=side)
    assert side["v_first"].shape == x.shape
    assert not torch.allclose(second(x, side=side)[0], second(x)[0])
    torch.testing.assert_close(first(x, side=side)[0], first(x)[0])


def test_channel_mix(x):
    mixer = make("channel-mix")
    before = functional.pad(x, (0, 0, 1, 0))[:, :-1]
    hidden = (x + (before - x) * mixer.mix) @ mixer.in_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], hidden.clamp(min=0).square() @ mixer.out_proj.weight.T)


def test_token_shift_skips_padding_and_stays_in_its_document():
    x = torch.arange(1.0, 8.0)[None, :, None]
    segments = Segments.packed([[4, 3]], continues=True) & Segments.padded(torch.tensor([[0, 1, 0, 1, 1, 0, 1]]))
    shifted, last = token_shift(x, torch.tensor([[9.0]]), segments)
    assert shifted[segments.valid].flatten().tolist() == [9, 2, 0, 5]
    assert last.item() == 7
    _, last = token_shift(x, torch.tensor([[9.0]]), Segments.padded(torch.zeros(1, 7)))
    assert last.item() == 9


@pytest.mark.parametrize("name", MIXERS)
def test_initialisation(name):
    torch.manual_seed(3)
    options = {**MIXERS[name]}
    mixer = ChannelMix(D, **options) if name == "channel-mix" else build(name, D, **options)
    assert all(torch.isfinite(parameter).all() for parameter in mixer.parameters())
    assert set(mixer.no_weight_decay) <= {name for name, _ in mixer.named_parameters()}
    if name == "gated-deltanet":
        assert (mixer.log_a.exp() <= 16).all()
        steps = functional.softplus(mixer.dt_bias)
        assert ((steps > 0.9e-3) & (steps < 0.101)).all()
    if name == "rwkv7":
        assert not mixer.o_proj.weight.any()
        weight = mixer.r_proj.weight.double()
        torch.testing.assert_close(weight @ weight.T, torch.eye(D).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(mixer.decay_bias[-1].item(), -5.5 + 6 + 2.5, rtol=0, atol=1e-5)
        assert not hasattr(build(name, D, head_dim=8), "v_bias")  # the first layer has no value residual


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MIXERS)
def test_any_split_is_the_whole(name, dtype, x):
    mixer, x = make(name, dtype), x.to(dtype)
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    whole, final = mixer(x)
    for cuts in ([7], [1, 2], range(1, T)):
        state, parts = None, []
        for begin, end in zip([0, *cuts], [*cuts, T], strict=True):
            y, state = mixer(x[:, begin:end], state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **tolerance)
        for key in final:
            torch.testing.assert_close(state[key], final[key], **tolerance)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_and_padded(name, x):
    mixer = make(name)
    segments = Segments.packed([[7, 12], [5, 14]]) & Segments.padded(torch.rand(B, T) > 0.2)
    y, state = mixer(torch.where(segments.valid[..., None], x, float("nan")), segments=segments)
    assert not y[~segments.valid].any()
    documents = segments.documents
    for row in range(B):
        for document in (1, 2):
            here = segments.valid[row] & (documents[row] == document)
            alone, last = mixer(x[row : row + 1, here])
            torch.testing.assert_close(y[row : row + 1, here], alone)
        for key in last:
            torch.testing.assert_close(state[key][row : row + 1], last[key])


@pytest.mark.parametrize("name", MIXERS)
def test_half_precision_keeps_its_dtype(name, x):
    mixer = make(name, torch.bfloat16)
    y, state = mixer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    for key, tensor in state.items():
        assert tensor.dtype == (torch.float32 if key == "memory" else torch.bfloat16)


@pytest.mark.parametrize("name", MIXERS)
def test_compile_and_export(name, x):
    mixer, x = make(name, torch.float32), x.float()
    expected, _ = mixer(x)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], expected, rtol=1e-4, atol=1e-4)
    time = torch.export.Dim("time", min=1)
    program = torch.export.export(mixer, (x,), dynamic_shapes={"x": {1: time}})
    for length in (1, 2, 30):
        longer = torch.randn(B, length, D)
        torch.testing.assert_close(program.module()(longer)[0], mixer(longer)[0], rtol=1e-4, atol=1e-4)


def test_wrong_options_are_explained():
    with pytest.raises(ValueError, match="num_heads"):
        build("deltanet", 16, num_heads=3)
    with pytest.raises(ValueError, match="head_dim"):
        build("gated-deltanet", 10, num_heads=4)
    with pytest.raises(ValueError, match="num_value_heads"):
        build("gated-deltanet", 16, num_heads=2, num_value_heads=3)
    with pytest.raises(ValueError, match="head_dim"):
        build("rwkv7", 20, head_dim=8)
    with pytest.raises(ValueError, match="layer_index"):
        build("rwkv7", 16, head_dim=8, layer_index=2, num_layers=2)
