"""FSMN: the paper's sums, PyTorch's convolution, and answers that come late."""

from __future__ import annotations

import pytest
import torch
from torch import relu
from torch.nn import functional

from tidegate import mixers

D = 6
CASES = [
    {"order": 3},
    {"order": 3, "skip": False, "expand": 2.0, "taps": "scalar"},
    {"order": 2, "stride": 3},
    {"order": 3, "stride": 2, "look_ahead": 2, "look_ahead_stride": 3},
    {"order": 1, "look_ahead": 1, "skip": False},
    {"order": 3, "compact": False},
    {"order": 3, "compact": False, "taps": "scalar", "look_ahead": 2},
]


def build(**options):
    torch.manual_seed(0)
    return mixers.build("fsmn", D, dtype=torch.float64, **options)


def near(seen, wanted, tolerance=1e-12):
    torch.testing.assert_close(seen, wanted, atol=tolerance, rtol=tolerance)


def literal(m, x):
    """The equation for all t, with what is later where it is: not causal."""
    p = relu(x @ m.hidden_proj.weight.T + m.hidden_proj.bias) @ m.memory_proj.weight.T if m.compact else x
    a, c = m.taps_weight.T.split([m.order + 1, m.look_ahead])
    outputs = []
    for t in range(x.shape[1]):
        memory = 0
        for i in range(m.order + 1):
            if t - m.stride * i >= 0:
                memory = memory + a[m.order - i] * p[:, t - m.stride * i]
        for j in range(1, m.look_ahead + 1):
            if t + m.look_ahead_stride * j < x.shape[1]:
                memory = memory + c[j - 1] * p[:, t + m.look_ahead_stride * j]
        if m.compact:
            outputs.append(p[:, t] + memory + (x[:, t] if m.skip else 0))
        else:
            outputs.append(relu(torch.cat([x[:, t], memory], -1) @ m.out_proj.weight.T + m.out_proj.bias))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_equation(options):
    """Outputs and gradients; where it looks ahead, the answer for t comes at t + delay."""
    m, x = build(**options), torch.randn(2, 17, D, dtype=torch.float64, requires_grad=True)
    assert m.delay == options.get("look_ahead", 0) * options.get("look_ahead_stride", 1)
    leaves, real = [x, *m.parameters()], 17 - m.delay
    found, wanted = m(x)[0][:, m.delay :], literal(m, x)[:, :real]
    near(found, wanted)
    weight = torch.randn(2, real, D, dtype=torch.float64)
    for seen, other in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (found, wanted)), strict=True):
        near(seen, other, 1e-9)


def test_before_a_document_is_nothing():
    """Before the first answer the sums hold zeros for the tokens there are not, and the real ones ahead."""
    m, x = build(order=2, look_ahead=3, skip=False), torch.randn(1, 9, D, dtype=torch.float64)
    p = m.memory_proj(relu(m.hidden_proj(x)))
    c = m.taps_weight[:, 3:].T
    near(m(x)[0][:, 0], c[2] * p[:, 0])
    near(m(x)[0][:, 1], c[1] * p[:, 0] + c[2] * p[:, 1])


def test_equals_a_depthwise_convolution():
    """As speech front ends have it: y = x + p + conv(p), five taps to either side."""
    m, x = build(order=5, look_ahead=5), torch.randn(2, 30, D, dtype=torch.float64)
    p = m.memory_proj(relu(m.hidden_proj(x))).transpose(1, 2)
    y = x + (p + functional.conv1d(p, m.taps_weight[:, None], padding=5, groups=D)).transpose(1, 2)
    near(m(x)[0][:, 5:], y[:, :-5])


def test_scalar_taps_are_the_same_for_every_channel():
    scalar, vector = build(order=3, taps="scalar"), build(order=3)
    vector.load_state_dict({**scalar.state_dict(), "taps_weight": scalar.taps_weight.detach().expand(D, -1)})
    x = torch.randn(1, 9, D, dtype=torch.float64)
    near(scalar(x)[0], vector(x)[0])


def test_it_forgets_what_its_taps_do_not_reach():
    m = build(order=3, stride=2, skip=False)
    x = torch.randn(1, 20, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(m(x)[0][:, 15].sum(), x)
    assert [t for t in range(20) if gradient[0, t].any()] == [9, 11, 13, 15]


@pytest.mark.parametrize(
    ("options", "shapes", "count"),
    [
        ({"order": 4, "expand": 2.0}, {"memory": (4, D)}, 4 * D * D + 2 * D + 5 * D),
        ({"order": 4, "stride": 3, "taps": "scalar"}, {"memory": (12, D)}, 2 * D * D + D + 5),
        ({"order": 4, "look_ahead": 2, "look_ahead_stride": 3}, {"memory": (10, D), "late": (6, D)}, None),
        ({"order": 4, "look_ahead": 2, "skip": False}, {"memory": (6, D)}, None),
        ({"order": 4, "look_ahead": 2, "compact": False}, {"memory": (6, D), "late": (2, D)}, 2 * D * D + D + 7 * D),
    ],
)
def test_the_state_and_the_parameters(options, shapes, count):
    m = build(**options)
    assert {name: tuple(entry.shape[1:]) for name, entry in m.init_state(2).items()} == shapes
    assert count is None or sum(p.numel() for p in m.parameters()) == count


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"order": 0}, "order: seen 0, wanted at least 1"),
        ({"stride": 0}, "stride: seen 0, wanted at least 1"),
        ({"look_ahead": -1}, "look_ahead: seen -1, wanted at least 0"),
        ({"look_ahead_stride": 0}, "look_ahead_stride: seen 0, wanted at least 1"),
        ({"taps": "matrix"}, "taps: seen 'matrix', wanted 'vector' or 'scalar'"),
        ({"expand": 0.01}, "expand: seen 0.01, wanted at least one hidden unit"),
    ],
)
def test_errors_name_the_option(options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build("fsmn", D, **options)
