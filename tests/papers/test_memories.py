"""The parts of the papers on memories: their data, their baselines, what is the same in the nets they compare."""

from __future__ import annotations

import pytest
import torch

from tidegate import LanguageModel, registry
from tidegate.papers import gam, mom
from tidegate.tasks.language.topics import all_windows, random_windows, topics, windows
from tidegate.tasks.recall import PairModel
from tidegate.tasks.targets import IGNORE


def test_the_question_comes_from_beyond_the_reach_of_the_convolution():
    ids, targets = gam.late_induction(200, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (200, 64)
    assert (targets[:, :-1] == IGNORE).all()
    reach = sum(options.get("conv_width", 3) - 1 for _, options in gam.FAR[gam.GAM])
    for row, target in zip(ids.tolist(), targets[:, -1].tolist(), strict=True):
        first = row.index(15)
        assert row[first + 1 : -1].count(15) == 0
        assert row[-1] == 15
        assert row[first + 1] == target
        assert 63 - (first + 1) > reach


def test_scores_in_memory_are_the_same_attention():
    torch.manual_seed(0)
    mixer = registry.build("attention", 16, num_heads=4, rope_theta=None)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(gam.WithScores(mixer)(x)[0], mixer(x)[0])


def test_gam_and_the_transformer_have_as_many_parameters():
    size = {
        system: LanguageModel(256, 64, [layer] * 4, feed_forward="gelu", feed_forward_dim=hidden).num_parameters
        for system, (layer, hidden) in gam.NETS.items()
    }
    assert size[gam.TRANSFORMER] == pytest.approx(size[gam.GAM], rel=0.01)


def test_usage_of_a_layer_is_that_of_what_it_is_given():
    torch.manual_seed(0)
    model = PairModel(8, 4, 16, [("mom", {"num_heads": 2})])
    pairs = torch.randint(4, (3, 7, 2))
    block = model.blocks[0]
    x = model.key_embedding(pairs[..., 0]) + model.value_embedding(pairs[..., 1])
    torch.testing.assert_close(mom.usage(model, block.mixer, pairs), block.mixer.usage(block.mixer_norm(x)))


def test_text_that_every_python_has():
    learnt, held_out = topics()
    assert len(learnt) > 8 * len(held_out) > 100_000
    assert bytes(learnt[:4000].tolist()).decode()
    batches = all_windows(held_out[:1000], 30, batch=16)
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert max(len(part) for part, _ in batches) == 16
    assert torch.equal(inputs.flatten(), held_out[: inputs.numel()])
    assert torch.equal(targets.flatten(), held_out[1 : inputs.numel() + 1])
    assert inputs.numel() == 990
    drawn = random_windows(torch.arange(40), 500, 38, torch.Generator().manual_seed(0))
    assert drawn[0][:, 0].unique().tolist() == [0, 1]
    assert torch.equal(drawn[0] + 1, drawn[1])
    assert torch.equal(windows(learnt, torch.tensor([5]), 3)[1][0], learnt[6:9])
