"""The framework's parts that the paper's file writes out: Taylor features, the narrow softmax, the members."""

from __future__ import annotations

import math

import pytest
import torch

from tidegate import ops
from tidegate.papers import Situation, dsf


def test_products_of_taylor_features_are_the_polynomial():
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    for order in range(5):
        phi, psi = dsf.taylor(x, order), dsf.taylor(y, order)
        assert phi.shape == (5, sum(3**p for p in range(order + 1)))
        wanted = sum((x * y).sum(-1) ** p / math.factorial(p) for p in range(order + 1))
        torch.testing.assert_close((phi * psi).sum(-1), wanted)


def test_the_members_are_exact_and_the_limit_is_approached():
    torch.manual_seed(0)
    numbers = dsf.one_system(0, Situation(smoke=True)).numbers
    assert list(numbers) == [*dsf.MEMBERS, dsf.IDENTITY]
    for name in dsf.MEMBERS:
        assert max(numbers[name][error] for error in dsf.ERRORS) < 1e-9, name
    assert numbers[dsf.IDENTITY]["identity"] < 1e-12
    errors = [row["error"] for row in dsf.limit(0, Situation(smoke=True)).numbers.values()]
    assert errors[1:] == sorted(errors[1:], reverse=True)
    assert errors[-1] < 1e-3


def test_the_narrow_softmax_is_attention_without_positions():
    torch.manual_seed(0)
    mixer = dsf.Softmax(8, n=3).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    q, k, v = (part.unsqueeze(2) for part in mixer.qkv_proj(x).split((3, 3, 8), -1))
    wanted = mixer.o_proj(ops.attention(q, k, v)[0].flatten(-2))
    y, _ = mixer(x)
    torch.testing.assert_close(y, wanted)
    first, state = mixer(x[:, :4])
    second, _ = mixer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), wanted)


@pytest.mark.parametrize("system", dsf.RUNS)
def test_the_nets_differ_in_their_mixer_alone(system):
    torch.manual_seed(0)
    model = dsf.build(system)
    ids, targets = dsf.draw(2, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (2, 32)
    assert model(ids)[0].shape == (2, 32, 64)
    outside = sum(p.numel() for name, p in model.named_parameters() if ".mixer." not in name)
    assert outside == 64 * 64 + 32 * 64 + 64 * 65 + 3 * 64
    if system == dsf.SOFTMAX:
        like = dsf.build(dsf.LINEAR)
        assert model.num_parameters == like.num_parameters


def test_positions_are_added_to_tokens():
    torch.manual_seed(0)
    model = dsf.build(dsf.LINEAR)
    ids = torch.zeros(1, 5, dtype=torch.long)
    seen = model.embedding(ids) - model.embedding.tokens(ids)
    torch.testing.assert_close(seen[0], model.embedding.positions.weight[:5])
