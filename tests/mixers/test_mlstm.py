"""mlstm and mlstm-pre-up against their equations, written out twice: step by step, and all pairs."""

import math

import pytest
import torch
from torch.nn import functional

from tests.contract import test_equality, test_numerics
from tests.contract.helpers import Subject
from tidegate.mixers import build
from tidegate.mixers.mlstm import MLSTM
from tidegate.mixers.mlstm_pre_up import MLSTMPreUp

B, T, D, H = 2, 21, 32, 2


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


def heads(x):
    return x.reshape(*x.shape[:-1], H, -1)


def step_by_step(q, k, v, i, log_f):
    """The cell's own equations, with its running maximum; i~ and log f (B, T, H)."""
    C, n = torch.zeros(B, H, k.shape[-1], v.shape[-1]).to(q), torch.zeros(B, H, k.shape[-1]).to(q)
    m, outputs = torch.zeros(B, H).to(q), []
    for t in range(T):
        m_new = torch.maximum(log_f[:, t] + m, i[:, t])
        forget, write = torch.exp(log_f[:, t] + m - m_new), torch.exp(i[:, t] - m_new)
        C = forget[..., None, None] * C + write[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        n = forget[..., None] * n + write[..., None] * k[:, t]
        asked = q[:, t] / math.sqrt(k.shape[-1])
        floor = torch.maximum((n * asked).sum(-1).abs(), torch.exp(-m_new)) + 1e-6
        outputs.append((C * asked[..., None]).sum(-2) / floor[..., None])
        m = m_new
    return torch.stack(outputs, 1)


def all_pairs(q, k, v, i, log_f):
    """h = (S / max(|sum S|, 1)) V: no maximum at all, which float64 can afford for gates of moderate size."""
    F = log_f.cumsum(1).mT
    log_d = F[..., :, None] - F[..., None, :] + i.mT[..., None, :]
    scores = (torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(k.shape[-1]) * log_d.exp()).tril()
    return torch.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdim=True).abs().clamp(min=1), v)


def without_normaliser(q, k, v, i, log_f):
    F = log_f.cumsum(1).mT
    log_d = F[..., :, None] - F[..., None, :] + i.mT[..., None, :]
    scores = (torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(k.shape[-1]) * log_d.exp()).tril()
    return torch.einsum("bhts,bshv->bthv", scores, v)


def normalised(h, kind, eps):
    if kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    return (h / (h.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def awake(name, **options):
    """A mixer whose gates depend on the input and stand open enough for the floor and the quotient to both occur."""
    mixer = build(name, D, num_heads=H, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        mixer.gate_bias[:H] += 10 if mixer.gate_bias[0] < -5 else 0
    return mixer


def gates(logits, bias, cap):
    logits = logits + bias
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    i, f = logits.chunk(2, -1)
    return i, torch.log(torch.sigmoid(f))


@pytest.mark.parametrize("oracle", [step_by_step, all_pairs])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "gate_cap": None, "expand_k": 1.0},
        {"use_output_gate": False, "gate_cap": 2.0},
        {"input_gate": "sigmoid", "normalise": True},
    ],
    ids=str,
)
def test_mlstm(x, oracle, options):
    mixer = awake("mlstm", **options)
    keys = H * mixer.key_dim
    widths = [keys, keys, D, D if mixer.use_output_gate else 0, 2 * H]
    q, k, v, o, logits = (x @ mixer.in_proj.weight.T).split(widths, -1)
    i, log_f = gates(logits, mixer.gate_bias, mixer.gate_cap)
    if mixer.input_gate == "sigmoid":
        i = torch.log(torch.sigmoid(i))
    h = normalised(oracle(heads(q), heads(k), heads(v), i, log_f), mixer.norm, 1e-6) * mixer.norm_weight
    expected = (torch.sigmoid(o) * h if mixer.use_output_gate else h) @ mixer.o_proj.weight.T
    tolerance = 1e-9 if oracle is step_by_step else 1e-4  # eps stands beside a floor that only one of them has
    torch.testing.assert_close(mixer(x)[0], expected, rtol=tolerance, atol=tolerance)


def test_mlstm_with_the_sigmoid_gate_is_gated_linear_attention(x):
    mixer = awake("mlstm", preset="sigmoid")
    q, k, v, o, logits = (x @ mixer.in_proj.weight.T).split([D // 2, D // 2, D, D, 2 * H], -1)
    i, log_f = gates(logits, mixer.gate_bias, 15.0)
    h = without_normaliser(heads(q), heads(k), heads(v), torch.log(torch.sigmoid(i)), log_f)
    expected = (torch.sigmoid(o) * normalised(h, "layer", 1e-6) * mixer.norm_weight) @ mixer.o_proj.weight.T
    y, state = mixer(x)
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)
    assert list(state) == ["memory"]


@pytest.mark.parametrize("oracle", [step_by_step, all_pairs])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "rms", "gate_cap": 3.0, "block_width": 8},
        {"input_gate": "sigmoid", "normalise": True},
        {"preset": "sigmoid"},
    ],
    ids=str,
)
def test_mlstm_pre_up(x, oracle, options):
    mixer = awake("mlstm-pre-up", **options)
    oracle = oracle if mixer.normalised else without_normaliser
    u, z = (x @ mixer.up_proj.weight.T).chunk(2, -1)
    window = functional.pad(u.mT, (3, 0))
    c = functional.conv1d(window, mixer.convolution.weight[:, None], mixer.convolution.bias, groups=64).mT
    c = functional.silu(c)
    q, k, v = (part @ torch.block_diag(*w) for part, w in zip((c, c, u), mixer.qkv_blocks, strict=True))
    i, log_f = gates(torch.cat([q, k, v], -1) @ mixer.gates.weight.T, mixer.gate_bias, mixer.gate_cap)
    if mixer.input_gate == "sigmoid":
        i = torch.log(torch.sigmoid(i))
    h = normalised(oracle(heads(q), heads(k), heads(v), i, log_f), mixer.norm, 1e-5) * mixer.norm_weight
    expected = ((h + mixer.skip * c) * functional.silu(z)) @ mixer.down_proj.weight.T
    tolerance = 1e-9 if oracle is step_by_step else 1e-4
    torch.testing.assert_close(mixer(x)[0], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (MLSTM, {"input_gate": "sigmoid"}),
        (MLSTM, {"input_gate": "sigmoid", "normalise": True}),
        (MLSTM, {"gate_cap": None, "norm": "rms"}),
        (MLSTMPreUp, {"gate_cap": 15.0, "norm": "rms"}),
        (MLSTMPreUp, {"input_gate": "sigmoid"}),
    ],
    ids=str,
)
def test_the_variants_keep_the_contract(cls, options):
    subject = Subject(cls.__name__, cls, D, {"num_heads": H, **options})
    test_equality.test_any_split_is_the_whole(subject, 65)
    test_equality.test_splits_of_packed_and_padded_batches(subject, "packed_with_holes")
    for dtype in (torch.float64, torch.float32):
        test_equality.test_a_batch_is_its_documents_alone(subject, "packed_with_holes", dtype)
        test_numerics.test_extreme_gates_stay_finite(subject, "both", dtype)


def test_initialisation_of_mlstm():
    mixer = build("mlstm", 256, num_heads=4, num_layers=3)
    assert mixer.in_proj.weight.shape == (128 + 128 + 256 + 256 + 8, 256)
    assert not mixer.in_proj.weight[-8:].any()
    assert mixer.gate_bias.tolist() == [-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]
    assert mixer.in_proj.weight[:-8].std().item() == pytest.approx(math.sqrt(2 / (5 * 256)), rel=0.02)
    assert mixer.o_proj.weight.std().item() == pytest.approx(2 / (3 * 16), rel=0.02)
    assert torch.equal(mixer.norm_weight, torch.ones(256))
    assert build("mlstm", 256, input_bias=-1.0, forget_bias=(1.0, 2.0), num_heads=2).gate_bias.tolist() == [
        -1,
        -1,
        1,
        2,
    ]


def test_initialisation_of_mlstm_pre_up():
    mixer = build("mlstm-pre-up", 250, num_heads=64)
    assert mixer.width == 512
    assert not mixer.gates.weight.any()
    assert mixer.gate_bias[:64].std().item() == pytest.approx(0.1, rel=0.5)
    torch.testing.assert_close(mixer.gate_bias[64:], torch.linspace(3, 6, 64))
    assert mixer.qkv_blocks.shape == (3, 128, 4, 4)
    assert mixer.qkv_blocks.std().item() == pytest.approx(math.sqrt(2 / (5 * 250)), rel=0.05)
    assert mixer.down_proj.weight.std().item() == pytest.approx(2 / math.sqrt(250), rel=0.02)
    assert torch.equal(mixer.skip, torch.ones(512))


def test_a_closed_input_gate_is_suppressed_by_the_norm():
    """With the biases of the start the memory is almost empty, and the norm's eps keeps the output small."""
    x = torch.randn(1, 8, 64)
    closed, opened = (build("mlstm", 64, input_bias=bias, num_heads=2) for bias in (-10.0, 0.0))
    opened.load_state_dict({**closed.state_dict(), "gate_bias": opened.gate_bias.detach()})
    assert closed(x)[0].abs().mean() < 0.2 * opened(x)[0].abs().mean()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlstm", {"num_heads": 5}, "expand_k: "),
        ("mlstm", {"input_gate": "tanh"}, "input_gate: seen 'tanh'"),
        ("mlstm", {"normalise": False}, "normalise: the exponential gate"),
        ("mlstm", {"norm": "group"}, "norm: seen 'group'"),
        ("mlstm", {"gate_cap": 0.0}, "gate_cap: seen 0.0"),
        ("mlstm-pre-up", {"num_heads": 3}, "num_heads: "),
        ("mlstm-pre-up", {"block_width": 7}, "block_width: seen 7"),
        ("mlstm-pre-up", {"norm": "group"}, "norm: seen 'group'"),
        ("mlstm-pre-up", {"input_gate": "tanh"}, "input_gate: seen 'tanh'"),
        ("mlstm-pre-up", {"normalise": False}, "normalise: the exponential gate"),
    ],
)
def test_bad_options_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, D, **options)
