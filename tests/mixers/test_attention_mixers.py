"""What the contract suite cannot know of attention: rotary positions, grouped queries, windows, a second opinion."""

from __future__ import annotations

import pytest
import torch

from tidegate import Segments, mixers
from tidegate.nn.rotary import rotary

NAMES = ("attention", "sliding-window-attention")


def test_against_torch_multihead_attention():
    dim, heads, T = 24, 3, 11
    theirs = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=torch.float64)
    ours = mixers.build("attention", dim=dim, num_heads=heads, qkv_bias=True, rope_theta=None, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_bias.normal_()
        theirs.out_proj.bias.zero_()
        ours.qkv_proj.weight.copy_(theirs.in_proj_weight)
        ours.qkv_proj.bias.copy_(theirs.in_proj_bias)
        ours.o_proj.weight.copy_(theirs.out_proj.weight)
    x = torch.randn(2, T, dim, dtype=torch.float64)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x)[0], theirs(x, x, x, attn_mask=hidden, need_weights=False)[0])


def test_grouped_queries_equal_repeated_keys():
    grouped = mixers.build("attention", dim=16, num_heads=4, num_kv_heads=2, dtype=torch.float64)
    full = mixers.build("attention", dim=16, num_heads=4, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = grouped.qkv_proj.weight.split(grouped.widths)
        k, v = (w.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for w in (k, v))
        full.qkv_proj.weight.copy_(torch.cat([q, k, v]))
        full.o_proj.weight.copy_(grouped.o_proj.weight)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(grouped(x)[0], full(x)[0])


def test_a_window_as_long_as_the_sequence_is_full_attention():
    full = mixers.build("attention", dim=16)
    windowed = mixers.build("sliding-window-attention", dim=16, window=12)
    windowed.load_state_dict(full.state_dict())
    x = torch.randn(2, 12, 16)
    torch.testing.assert_close(windowed(x)[0], full(x)[0])


def test_a_window_forgets_what_is_older():
    mixer = mixers.build("sliding-window-attention", dim=8, num_heads=2, window=3, dtype=torch.float64)
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    y, _ = mixer(x)
    (gradient,) = torch.autograd.grad(y[0, 7].sum(), x)
    assert gradient[0].abs().sum(-1).ne(0).tolist() == [False] * 5 + [True] * 3 + [False]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, dict(qk_norm=True), dict(rope_theta=None), dict(head_dim=6, qkv_bias=True)])
def test_documents_restart_positions(name, options):
    mixer = mixers.build(name, dim=16, **options, dtype=torch.float64)
    with torch.no_grad():
        if mixer.qkv_proj.bias is not None:
            mixer.qkv_proj.bias.normal_()  # a bias gives padding a key, which nobody may see
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    holes = torch.ones(1, 20).index_fill(1, torch.tensor([0, 4, 10, 19]), 0)
    packed, state = mixer(x, segments=Segments.packed([[7, 13]]) & Segments.padded(holes))
    second = [t for t in range(7, 20) if holes[0, t]]
    alone, alone_state = mixer(x[:, second])
    torch.testing.assert_close(packed[:, second], alone)
    assert state["length"].tolist() == alone_state["length"].tolist() == [11]
    torch.testing.assert_close(state["keys"][:, :11], alone_state["keys"][:, :11])
    following = torch.randn(1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(following, state)[0], mixer(following, alone_state)[0])


def test_rotary_depends_on_distance_alone_and_far_out():
    q, k = torch.randn(2, 1, 1, 2, 16, dtype=torch.float64)

    def score(a, b):
        return (rotary(q, torch.tensor([[a]])) * rotary(k, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score(5, 2), score(1_000_005, 1_000_002), rtol=1e-8, atol=1e-8)
    assert not torch.isclose(score(5, 2), score(5, 1))
    assert torch.equal(rotary(q, torch.zeros(1, 1, dtype=torch.int64)), q)
    exact = rotary(q, torch.tensor([[3_000_000]]))
    torch.testing.assert_close(rotary(q.float(), torch.tensor([[3_000_000]])), exact.float(), rtol=1e-5, atol=1e-5)


def test_rotary_by_complex_numbers():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    positions = torch.randint(0, 50, (2, 7))
    turn = torch.exp(1j * positions[..., None] * 100.0 ** (-torch.arange(4) / 4.0).double())
    z = torch.complex(x[..., :4], x[..., 4:]) * turn[:, :, None]
    torch.testing.assert_close(rotary(x, positions, theta=100.0), torch.cat([z.real, z.imag], -1))


@pytest.mark.parametrize("name", NAMES)
def test_scores_start_with_unit_variance(name):
    mixer = mixers.build(name, dim=256, num_layers=8)
    q, k, _ = mixer.qkv_proj(torch.randn(4, 64, 256)).split(mixer.widths, -1)
    scores = torch.einsum("bthk,bshk->bhts", q.unflatten(-1, (4, 64)), k.unflatten(-1, (4, 64))) / 8
    assert 0.8 < scores.std() < 1.25
    assert mixer.o_proj.weight.std() < 0.3 * mixer.qkv_proj.weight.std()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", dict(num_heads=3), "num_heads: seen 3, wanted a divisor of dim = 16"),
        ("attention", dict(num_heads=0), "num_heads: seen 0"),
        ("attention", dict(num_heads=4, num_kv_heads=3), "num_kv_heads: seen 3"),
        ("attention", dict(head_dim=5), "head_dim: seen 5, wanted an even number"),
        ("attention", dict(rope_theta=-1.0), "rope_theta: seen -1.0"),
        ("sliding-window-attention", dict(window=0), "window: seen 0"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build(name, dim=16, **options)


def test_a_state_of_another_window_is_refused():
    x = torch.randn(1, 3, 16)
    _, state = mixers.build("sliding-window-attention", dim=16, window=4)(x)
    with pytest.raises(ValueError, match="belongs to another layer"):
        mixers.build("sliding-window-attention", dim=16, window=5)(x, state)
