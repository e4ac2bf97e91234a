"""Generation: a row gets what it would get alone, a session goes on where it stood."""

from __future__ import annotations

import pytest
import torch

from tidegate import LanguageModel, Segments, registry
from tidegate.infer import row_seeds

VOCABULARY = 19
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]


def model_of(layers="sliding-window-attention,attention"):
    if layers in registry.names():
        layers = [(layers, dict(registry.info(layers).tiny))] * 2
    model = LanguageModel(VOCABULARY, 32, layers, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", [*registry.names(streaming=True), "sliding-window-attention,attention"])
def test_a_batch_equals_its_rows_alone(name):
    model = model_of(name)
    options = dict(max_new_tokens=12, temperature=0.9, top_k=10, top_p=0.95)
    batch = model.generate(PROMPTS, seed=5, **options)
    tokens = batch.all()
    assert tokens.shape == (3, 12)
    for row, seed in enumerate(row_seeds(5, 3)):
        alone = model.generate(PROMPTS[row], seed=[seed], **options)
        assert torch.equal(alone.all()[0], tokens[row])
        torch.testing.assert_close(
            model(torch.tensor([[1]]), batch.state.select(row))[0], model(torch.tensor([[1]]), alone.state)[0]
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_with_segments(side):
    model = model_of()
    longest = max(map(len, PROMPTS))
    ids = torch.full((3, longest), -1)
    for row, prompt in enumerate(PROMPTS):
        place = slice(longest - len(prompt), None) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
    padded = model.generate(ids, 8, seed=1, segments=Segments.padded(ids >= 0)).all()
    assert torch.equal(padded, model.generate(PROMPTS, 8, seed=1).all())


def test_greedy_is_the_argmax_of_the_whole():
    model = model_of()
    tokens = model.generate(PROMPTS[0], 10, temperature=0).all()
    whole = torch.cat([torch.tensor([PROMPTS[0]]), tokens], 1)
    logits, _ = model(whole)
    assert torch.equal(logits[:, len(PROMPTS[0]) - 1 : -1].argmax(-1), tokens)


def test_the_state_covers_all_that_was_yielded():
    model = model_of()
    generation = model.generate(PROMPTS[0], 7, seed=2)
    for count, _ in enumerate(generation, start=1):
        if count in (1, 4, 7):  # asking for it in between changes nothing
            fed = torch.cat([torch.tensor([PROMPTS[0]]), torch.stack(generation._tokens, 1)], 1)
            wanted = model(fed)[1]
            for x, y in zip(generation.state.tensors().values(), wanted.tensors().values(), strict=True):
                torch.testing.assert_close(x, y)
    assert torch.equal(generation.all(), model.generate(PROMPTS[0], 7, seed=2).all())


def test_a_session_goes_on_where_it_stood():
    model = model_of()
    first = model.generate(PROMPTS[0], 5, seed=2)
    tokens = first.all()
    second = model.generate(PROMPTS[2], 5, temperature=0, state=first.state).all()
    whole = [*PROMPTS[0], *tokens[0].tolist(), *PROMPTS[2]]
    assert torch.equal(second, model.generate(whole, 5, temperature=0).all())


def test_stop_ends_a_row_and_not_the_others():
    model = model_of()
    free = model.generate(PROMPTS, 12, seed=4).all()
    stop = int(free[1, 2])
    generation = model.generate(PROMPTS, 12, seed=4, stop=stop)
    tokens = generation.all()
    for row in range(3):
        places = (free[row] == stop).nonzero()
        end = int(places[0]) + 1 if len(places) else 12
        assert torch.equal(tokens[row, :end], free[row, :end])
        assert (tokens[row, end:] == -1).all()
        fed = PROMPTS[row] + tokens[row, : end - len(places[:1])].tolist()
        probe = torch.tensor([[0]])
        torch.testing.assert_close(
            model(probe, generation.state.select(row))[0], model(probe, model(torch.tensor([fed]))[1])[0]
        )
    assert len(list(model.generate(PROMPTS[1], 12, seed=row_seeds(4, 2)[1:], stop=[stop, 0]))) <= 3


def test_seeds():
    model = model_of()
    assert torch.equal(model.generate(PROMPTS, 9, seed=1).all(), model.generate(PROMPTS, 9, seed=1).all())
    assert not torch.equal(model.generate(PROMPTS, 9, seed=1).all(), model.generate(PROMPTS, 9, seed=2).all())
    torch.manual_seed(8)
    drawn = model.generate(PROMPTS, 9).all()
    assert not torch.equal(model.generate(PROMPTS, 9).all(), drawn)
    torch.manual_seed(8)
    assert torch.equal(model.generate(PROMPTS, 9).all(), drawn)


def test_generating_leaves_the_model_as_it_was():
    model = LanguageModel(VOCABULARY, 32, "attention", dropout=0.5).train()
    first = model.generate([1, 2], 6, seed=0).all()
    assert model.training
    assert torch.equal(model.generate([1, 2], 6, seed=0).all(), first)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, "empty"),
        ([1], dict(max_new_tokens=0), "max_new_tokens: seen 0"),
        ([1], dict(seed=[1, 2]), "seed: seen 2 for 1 prompts"),
        ([99], {}, "seen token 99"),
        ([1], dict(top_k=0), "top_k"),
        (torch.ones(1, 2, dtype=torch.int64), dict(segments=Segments.padded(torch.zeros(1, 2))), "nothing but padding"),
        (torch.ones(1, 2, dtype=torch.int64), dict(segments=Segments.padded(torch.ones(1, 3))), "segments: made for"),
    ],
)
def test_bad_input_is_named(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        model_of().generate(prompt, **options)
