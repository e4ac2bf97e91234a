"""Mamba: the paper's block, step by step; its options; initialisation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tidegate import mixers, ops


def build(dim=8, **options):
    torch.manual_seed(0)
    mixer = mixers.build("mamba", dim, **{"state_dim": 3, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer


def literal(mixer, x):
    """The equations for one document, one token and one channel at a time."""
    rank, N, _ = mixer.widths
    inner, width = mixer.inner, mixer.conv_width
    past = torch.cat([torch.zeros(width - 1, inner, dtype=x.dtype), x @ mixer.u_proj.weight.T])
    h, outputs = torch.zeros(inner, N, dtype=x.dtype), []
    for t in range(len(x)):
        u = mixer.convolution.bias + sum(mixer.convolution.weight[:, j] * past[t + j] for j in range(width))
        u = u / (1 + torch.exp(-u))
        r, B, C = (u @ mixer.x_proj.weight.T).split((rank, N, N))
        if mixer.norms is not None:
            r, B, C = (
                v / torch.sqrt((v**2).mean() + mixer.norm_eps) * norm.weight
                for v, norm in zip((r, B, C), mixer.norms, strict=True)
            )
        delta = torch.log1p(torch.exp(mixer.dt_proj.weight @ r + mixer.dt_bias))
        o = torch.empty_like(u)
        for i in range(inner):
            decay = torch.exp(-delta[i] * torch.exp(mixer.log_a[i]))
            if mixer.negative_eigenvalues:
                decay = 2 * decay - 1
            h[i] = decay * h[i] + delta[i] * B * u[i]
            o[i] = C @ h[i] + mixer.d[i] * u[i]
        z = mixer.z_proj.weight @ x[t]
        outputs.append(mixer.o_proj.weight @ (o * z / (1 + torch.exp(-z))))
    return torch.stack(outputs), h


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_width": 1, "expand": 1.5}, {"dt_rank": 3, "use_bcdt_norm": True}, {"negative_eigenvalues": True}],
)
def test_equals_the_equations(options):
    mixer = build(**options)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        for row in range(2):
            expected, h = literal(mixer, x[row])
            torch.testing.assert_close(y[row], expected, atol=1e-11, rtol=1e-11)
            torch.testing.assert_close(state["memory"][row], h, atol=1e-11, rtol=1e-11)


def test_equals_a_block_around_a_plain_scan():
    """Second form: PyTorch's own convolution, and one diagonal recurrence over all D N states."""
    mixer = build(dim=16, state_dim=4)
    x = torch.randn(2, 70, 16, dtype=torch.float64)
    with torch.no_grad():
        u = functional.conv1d(
            mixer.u_proj(x).transpose(1, 2),
            mixer.convolution.weight[:, None],
            mixer.convolution.bias,
            padding=3,
            groups=mixer.inner,
        )
        u = functional.silu(u[..., :70].transpose(1, 2))
        r, B, C = mixer.x_proj(u).split(mixer.widths, -1)
        delta = functional.softplus(functional.linear(r, mixer.dt_proj.weight, mixer.dt_bias))
        decay = torch.exp(torch.einsum("btd,dn->btdn", delta, -mixer.log_a.exp()))
        h, _ = ops.scan(decay.flatten(2), torch.einsum("btd,btd,btn->btdn", delta, u, B).flatten(2))
        o = torch.einsum("btdn,btn->btd", h.view_as(decay), C) + mixer.d * u
        expected = mixer.o_proj(o * functional.silu(mixer.z_proj(x)))
        torch.testing.assert_close(mixer(x)[0], expected, atol=1e-10, rtol=1e-10)


def test_a_sign_can_flip_with_negative_eigenvalues():
    for negative in (False, True):
        mixer = build(negative_eigenvalues=negative)
        with torch.no_grad():
            mixer.log_a.fill_(5.0)  # decays near 0, or near -1
            mixer.x_proj.weight.zero_()  # nothing is taken in
            state = mixer.init_state(1)
            state = type(state)({**state, "memory": torch.ones_like(state["memory"])})
            memory = mixer(torch.randn(1, 1, 8, dtype=torch.float64), state)[1]["memory"]
        assert bool((memory < 0).any()) == negative


def test_initialisation():
    mixer = mixers.build("mamba", 512, num_layers=4)
    assert mixer.widths == (32, 16, 16)
    with torch.no_grad():
        expected = torch.arange(1.0, 17.0).expand(1024, 16)
        torch.testing.assert_close(mixer.log_a.exp(), expected, atol=1e-4, rtol=1e-4)
        steps = functional.softplus(mixer.dt_bias.double())
        assert steps.min() >= 1e-3 * (1 - 1e-3)
        assert steps.max() <= 1e-1 * (1 + 1e-3)
        assert abs(float(steps.log10().mean()) + 2) < 0.1
        assert (mixer.d == 1).all()
        bound = 32**-0.5
        assert mixer.dt_proj.weight.abs().max() <= bound
        assert mixer.dt_proj.weight.abs().max() > 0.99 * bound
        for part, scale in ((mixer.u_proj, 1), (mixer.z_proj, 1), (mixer.x_proj, 1), (mixer.o_proj, 2)):
            bound = part.in_features**-0.5 / scale
            assert 0.99 * bound < part.weight.abs().max() <= bound


def test_options_are_checked():
    for match, options in (
        ("expand: expand \\* dim = 12.5", {"expand": 1.5625}),
        ("state_dim: seen 0", {"state_dim": 0}),
        ("dt_rank: seen 0", {"dt_rank": 0}),
        ("conv_width: seen 0", {"conv_width": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            mixers.build("mamba", 8, **options)
