"""RG-LRU: the paper's block, step by step; what a document's start means; initialisation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tidegate import Segments, State, mixers
from tidegate.ops.rg_lru.parallel import _clipped_sqrt


def build(dim=8, **options):
    torch.manual_seed(0)
    mixer = mixers.build("rg-lru", dim, **{"lru_width": 12, "num_heads": 3, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def literal(mixer, x):
    """The equations for one document, one token and one block of the gates at a time."""
    W, heads, width = mixer.width, mixer.num_heads, mixer.conv_width
    both = x @ mixer.xy_proj.weight.T + mixer.xy_proj.bias
    inner, branch = both[:, :W], functional.gelu(both[:, W:], approximate="tanh")
    past = torch.cat([torch.zeros(width - 1, W, dtype=x.dtype), inner])
    h, outputs, size = torch.zeros(W, dtype=x.dtype), [], W // heads
    for t in range(len(x)):
        u = mixer.convolution.bias + sum(mixer.convolution.weight[:, j] * past[t + j] for j in range(width))
        r, i = torch.empty_like(u), torch.empty_like(u)
        for block in range(heads):
            own = slice(block * size, (block + 1) * size)
            weight, bias = mixer.gate_weight[block], mixer.gate_bias[block]
            r[own] = torch.sigmoid(u[own] @ weight[:, :size] + bias[:size])
            i[own] = torch.sigmoid(u[own] @ weight[:, size:] + bias[size:])
        a = torch.sigmoid(-mixer.a_param) ** (mixer.c * r)  # the paper's form: a^(c r)
        h = i * u if t == 0 else a * h + torch.sqrt(1 - a**2) * i * u
        outputs.append((h * branch[t]) @ mixer.o_proj.weight.T + mixer.o_proj.bias)
    return torch.stack(outputs), h


@pytest.mark.parametrize("options", [{}, {"conv_width": 1}, {"num_heads": 1, "c": 4.0}])
def test_equals_the_equations(options):
    mixer = build(**options)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        for row in range(2):
            expected, h = literal(mixer, x[row])
            torch.testing.assert_close(y[row], expected, atol=1e-11, rtol=1e-11)
            torch.testing.assert_close(state["memory"][row], h, atol=1e-11, rtol=1e-11)


def test_equals_the_weighted_sum():
    """Second form: h_t = sum_s exp(A_t - A_s) m_s i_s u_s with A = cumsum(log a), for a block without its frame."""
    mixer = build(conv_width=1)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    with torch.no_grad():
        u = mixer.xy_proj(x).chunk(2, -1)[0] * mixer.convolution.weight[:, 0] + mixer.convolution.bias
        gates = torch.einsum("bthi,hij->bthj", u.unflatten(-1, (mixer.num_heads, -1)), mixer.gate_weight)
        r, i = (gate.flatten(-2) for gate in (gates + mixer.gate_bias).sigmoid().chunk(2, -1))
        log_a, gated = -mixer.c * r * functional.softplus(mixer.a_param), i * u
        multiplier = torch.sqrt(1 - torch.exp(2 * log_a))
        multiplier[:, 0] = 1
        total = log_a.cumsum(1)
        weights = torch.exp((total[:, :, None] - total[:, None]).clamp(max=0)) * torch.ones(20, 20).tril()[..., None]
        expected = torch.einsum("btsw,bsw->btw", weights.double(), multiplier * gated)
        torch.testing.assert_close(mixer(x)[1]["memory"], expected[:, -1], atol=1e-11, rtol=1e-11)


def test_only_the_first_token_of_a_document_is_taken_in_full():
    mixer = build()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        whole, whole_state = mixer(x)
        # A zero state that has begun is another thing than a state that has not.
        empty = mixer.init_state(2)
        begun = State({**empty, "started": torch.ones_like(empty["started"])})
        torch.testing.assert_close(mixer(x, empty)[0], whole)
        assert not torch.allclose(mixer(x, begun)[0][:, 0], whole[:, 0])
        # A first call that is all padding for a row leaves that row as new as it was.
        blank = Segments.padded(torch.tensor([[0, 0], [1, 1]]))
        _, state = mixer(torch.cat([torch.full_like(x[:1, :2], torch.nan), x[1:, :2]]), segments=blank)
        assert state["started"].tolist() == [[0], [1]]
        y, state = mixer(x[:1], state.select(0))
        torch.testing.assert_close(y, whole[:1])
        torch.testing.assert_close(state["memory"], whole_state["memory"][:1])
        # Padding in front, and a document behind another, begin as a row does.
        padded = torch.cat([torch.full_like(x[:, :3], torch.nan), x], 1)
        real = torch.arange(10).expand(2, -1) >= 3
        y, _ = mixer(padded, segments=Segments.padded(real))
        torch.testing.assert_close(y[:, 3:], whole)
        assert (y[:, :3] == 0).all()
        y, _ = mixer(torch.cat([x[:1], x[1:]], 1), segments=Segments.packed([[7, 7]]))
        torch.testing.assert_close(y.reshape(2, 7, 8), whole)


def test_initialisation():
    mixer = mixers.build("rg-lru", 256, lru_width=2048, num_heads=8, num_layers=4)
    with torch.no_grad():
        a = torch.exp(-functional.softplus(mixer.a_param.double()))
        assert a.min() >= 0.9 - 1e-6
        assert a.max() <= 0.999 + 1e-6
        area = (a**2 - 0.9**2) / (0.999**2 - 0.9**2)
        assert abs(float(area.mean()) - 0.5) < 0.03
        assert abs(float(area.std()) - 12**-0.5) < 0.02
        for weight, variance in (
            (mixer.xy_proj.weight, 1 / 256),
            (mixer.o_proj.weight, 2 / 4 / 2048),
            (mixer.gate_weight, 8 / 2048),
            (mixer.convolution.weight, 0.01 / 4),
        ):
            assert abs(float(weight.var()) / variance - 1) < 0.1
        for bias in (mixer.xy_proj.bias, mixer.o_proj.bias, mixer.gate_bias, mixer.convolution.bias):
            assert (bias == 0).all()


def test_the_gradient_of_the_root_is_clipped():
    z = torch.tensor([0.0, 1e-12, 2.4e-7, 2.6e-7, 0.01, 1.0], dtype=torch.float64, requires_grad=True)
    root = _clipped_sqrt(z)
    torch.testing.assert_close(root, z.detach().sqrt(), atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(root.sum(), z)
    torch.testing.assert_close(gradient, 1 / torch.sqrt((4 * z.detach()).clamp(min=1e-6)))
    # A gate that is shut for good: a = 1, and nothing is taken in.
    mixer = build()
    with torch.no_grad():
        mixer.a_param.fill_(-800.0)
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    mixer(x)[0].sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


def test_half_precision_keeps_a_wide_state():
    mixer = mixers.build("rg-lru", 8, lru_width=12, num_heads=3)
    x = torch.randn(2, 9, 8)
    expected, _ = mixer(x)
    y, state = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == state["convolution"].dtype == torch.bfloat16
    assert state["memory"].dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


def test_errors_name_the_option():
    for match, options in (
        ("lru_width: seen 0", {"lru_width": 0}),
        ("num_heads", {"num_heads": 3}),
        ("conv_width: seen 0", {"conv_width": 0}),
        ("c: seen -1", {"c": -1}),
        ("a_min, a_max: seen 0.9 and 1.0", {"a_max": 1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            mixers.build("rg-lru", 8, **options)
