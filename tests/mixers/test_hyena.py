"""Hyena: the paper's equation in loops, its matrix for order 2, its filters, and options the contract leaves out."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, registry
from tidegate.infer import Unsupported, compile_step

D, T = 5, 13
OPTIONS = [
    dict(),
    dict(order=4, emb_dim=3, bias=False, conv_width=1),
    dict(filter_kind="free", max_length=7, shift=0.05),
    dict(filter_kind="free", max_length=40, modulate=False, normalise=True),
    dict(emb_dim=7, filter_order=3, max_length=6, normalise=True, conv_width=4),
]
VARIANTS = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "-")


def subject(options):
    small = dict(filter_order=8, emb_dim=5, w=2.0, max_length=16)
    return Subject("hyena", registry.info("hyena").cls, D, {**small, **options})


# -- oracles -----------------------------------------------------------------------------------------------------------
def filters_of(mixer, length):
    """h (order - 1, dim, length), number by number from the paper's formulas and the official code's constants."""
    channels, L = (mixer.order - 1) * D, mixer.max_length
    h = torch.zeros(length, channels, dtype=torch.float64)
    for t in range(length):
        if mixer.filter_kind == "free":
            value = mixer.taps[t] if t < L else torch.zeros(channels, dtype=torch.float64)
        else:
            bands = (mixer.emb_dim - 1) // 2
            steps = [1e-4 + (bands - 1 - 1e-4) * i / max(1, bands - 1) for i in range(bands)]
            waves = [torch.exp(torch.tensor(-2j * math.pi * f * t / L, dtype=torch.complex128)) for f in steps]
            z = torch.stack(
                [torch.tensor(t / (L - 1), dtype=torch.float64), *[w.real for w in waves], *[w.imag for w in waves]]
            )
            network = mixer.filter
            for layer in network.layers:
                z = torch.sin(network.freq * (layer.weight @ z + layer.bias))
            value = network.out.weight @ z
        if mixer.modulate:
            low, high = -math.log(0.01) / 1.5, -math.log(0.01) / 0.3
            rates = low + (high - low) * torch.arange(channels, dtype=torch.float64) / (channels - 1)
            value = value * (torch.exp(-t / (L - 1) * rates) + mixer.shift)
        h[t] = value / value.abs().sum() if mixer.normalise else value
    return h.t().unflatten(0, (-1, D))


def projections(mixer, x):
    """x^0 ... x^(O-1), v after the short convolution, (O + 1, B, T, D)."""
    z, width = mixer.in_proj(x), mixer.conv_width
    padded = torch.cat([z.new_zeros(len(x), width - 1, z.shape[2]), z], 1)
    z = mixer.conv.bias + sum(padded[:, j : j + x.shape[1]] * mixer.conv.weight[:, j] for j in range(width))
    return torch.stack(z.split(D, -1))


@VARIANTS
def test_equals_the_equation(options):
    mixer = subject(options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        h, (*gates, v) = filters_of(mixer, T), projections(mixer, x)
        for n, m in enumerate(range(mixer.order - 1, 0, -1)):
            given, v = gates[m] * v, torch.zeros_like(v)
            for t in range(T):
                for s in range(t + 1):
                    v[:, t] += h[n, :, t - s] * given[:, s]
            v = v + mixer.direct[n * D : (n + 1) * D] * given
        y = mixer.o_proj(gates[0] * v)
        torch.testing.assert_close(mixer(x)[0], y, atol=1e-10, rtol=1e-10)


def test_order_two_is_a_matrix_between_two_gates():
    """y = x^0 * (H (x^1 * v)), with H the Toeplitz matrix of h and the direct term on its diagonal."""
    mixer = subject(dict(bias=False)).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        h, (first, second, v) = filters_of(mixer, T)[0], projections(mixer, x)
        matrix = torch.stack([torch.cat([h[:, : t + 1].flip(1), torch.zeros(D, T - t - 1)], 1) for t in range(T)], 1)
        matrix = matrix + torch.diag_embed(mixer.direct[:, None].expand(D, T))
        y = mixer.o_proj(first * (matrix @ (second * v).movedim(1, 2)[..., None])[..., 0].movedim(1, 2))
        torch.testing.assert_close(mixer(x)[0], y, atol=1e-10, rtol=1e-10)


def test_the_window_and_the_grid():
    """exp(-rate) at the end of the grid, rates from 3.07 to 15.35; the filter goes on beyond it."""
    flat = mixers.build("hyena", 64, filter_kind="free", max_length=100)
    with torch.no_grad():
        flat.taps.fill_(1.0)
        window = flat.filters(100)
        torch.testing.assert_close(-window[99].log()[[0, -1]], torch.tensor([3.0701, 15.3506]), atol=2e-4, rtol=0)
        torch.testing.assert_close(window[0], torch.ones(64))
        mixer = mixers.build("hyena", 8, max_length=32, w=1.0)
        longer = mixer.filters(80)
        torch.testing.assert_close(longer[:32], mixer.filters(32), atol=1e-6, rtol=1e-5)
        assert longer[32:].any()
        assert longer[32:].abs().max() < longer[:32].abs().max()
        other = mixers.build("hyena", 8, max_length=64, w=1.0)
        other.load_state_dict(mixer.state_dict())
        assert not torch.allclose(other.filters(32), mixer.filters(32), atol=1e-3)


# -- options the contract's tiny configuration leaves out --------------------------------------------------------------
@VARIANTS
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(options, kind):
    case = subject(options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(kind))
    check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), alone(mixer, segments), x, state)
    single = case.build(torch.float32)
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), x, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


def test_a_sequence_longer_than_the_grid_streams():
    """512 tokens, by FFT, are 4 pieces and then single tokens; nothing ends at max_length."""
    mixer = mixers.build("hyena", 16, max_length=64, w=1.0, emb_dim=5)
    x = torch.randn(2, 512, 16)
    with torch.no_grad():
        y, _ = mixer(x)
        state, outputs = None, []
        for piece in x[:, :508].split(127, 1):
            found, state = mixer(piece, state)
            outputs.append(found)
        for t in range(508, 512):
            found, state = mixer(x[:, t : t + 1], state)
            outputs.append(found)
    torch.testing.assert_close(torch.cat(outputs, 1), y, atol=2e-5 * float(y.abs().max()), rtol=0)
    assert state["past_0"].shape == (2, 512, 16)
    assert state["length"].tolist() == [512, 512]


def test_initialisation_and_weight_decay():
    from tidegate.nn.weight_decay import weight_decay_groups

    mixer = mixers.build("hyena", 512, order=3)
    assert (mixer.filter.freq == 14).all()
    assert abs(float(mixer.direct.detach().std()) - 1) < 0.1
    assert mixer.filter.out.bias is None
    decayed = {id(p) for p in weight_decay_groups(mixer, 0.1)[0]["params"]}
    names = {name for name, p in mixer.named_parameters() if id(p) in decayed}
    assert names == {"in_proj.weight", "conv.weight", "o_proj.weight"}
    free = mixers.build("hyena", 8, filter_kind="free", max_length=64)
    assert float(free.taps.detach().abs().max()) <= 1 / 8


def test_errors_and_refusals():
    for name, options in (
        ("order", dict(order=1)),
        ("filter_kind", dict(filter_kind="s4")),
        ("emb_dim", dict(emb_dim=4)),
        ("filter_order", dict(filter_order=0)),
        ("max_length", dict(max_length=1)),
        ("conv_width", dict(conv_width=0)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: seen"):
            mixers.build("hyena", 8, **options)
    with pytest.raises(Unsupported, match="grows with the sequence"):
        compile_step(mixers.build("hyena", 8))
