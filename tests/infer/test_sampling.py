"""Drawing the next token."""

from __future__ import annotations

import pytest
import torch

from tidegate.infer import row_seeds, sample_next


def frequencies(logits, draws=20000, **options):
    generator = torch.Generator().manual_seed(3)
    tokens = sample_next(logits.expand(draws, -1), generator=generator, **options)
    return torch.bincount(tokens, minlength=logits.shape[-1]).double() / draws


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -torch.inf]])
    for temperature in (0.5, 1.0, 2.0):
        wanted = (logits / temperature).softmax(-1)[0].double()
        assert (frequencies(logits, temperature=temperature) - wanted).abs().max() < 0.015
    assert frequencies(logits)[4] == 0


def test_top_k_and_top_p_keep_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert (frequencies(logits, top_k=2) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.015
    assert (frequencies(logits, top_p=0.6) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.015
    assert frequencies(logits, top_p=0.01).tolist() == [0, 1, 0, 0]
    assert (frequencies(logits, top_k=3, top_p=0.5) - torch.tensor([0, 4 / 7, 0, 3 / 7])).abs().max() < 0.015
    assert (frequencies(logits, top_k=99) - logits.exp()[0]).abs().max() < 0.015


def test_greedy_and_its_neighbourhood():
    logits = torch.randn(5, 30)
    assert torch.equal(sample_next(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(sample_next(logits, temperature=1e-30), logits.argmax(-1))
    assert torch.equal(sample_next(logits, top_k=1), logits.argmax(-1))


def test_a_row_draws_from_its_own_generator():
    logits = torch.randn(3, 50)
    seeds = row_seeds(7, 3)
    together = sample_next(logits, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    for row, seed in enumerate(seeds):
        assert sample_next(logits[row : row + 1], generator=torch.Generator().manual_seed(seed)) == together[row]


def test_row_seeds_are_stable_and_distinct():
    assert row_seeds(0, 3) == row_seeds(0, 5)[:3]
    assert len({*row_seeds(0, 100), *row_seeds(1, 100)}) == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperature=-0.1), "temperature: seen -0.1"),
        (dict(temperature=float("nan")), "temperature: seen nan"),
        (dict(top_k=0), "top_k: seen 0"),
        (dict(top_p=0.0), "top_p: seen 0.0"),
        (dict(top_p=1.5), "top_p: seen 1.5"),
        (dict(generator=[torch.Generator()]), "generator: seen 1 for a batch of 2"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sample_next(torch.zeros(2, 3), **options)
