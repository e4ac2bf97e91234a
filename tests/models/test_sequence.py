"""The sequence model: other ends than a language model's, the same state; pooled answers in pieces."""

from __future__ import annotations

import pytest
import torch

from tidegate import Segments, State, registry
from tidegate.infer import compile_step
from tidegate.models.sequence import SequenceModel
from tidegate.tasks.recall import PairModel

VOCABULARY, FEATURES, OUTPUTS = 11, 3, 4
MIXERS = ("gla", "attention", "mamba", "lstm")


def model_of(names=MIXERS, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layers = [(name, dict(registry.info(name).tiny)) for name in names]
    ends = options if "vocab_size" in options else {"features": FEATURES, **options}
    return SequenceModel(16, layers, outputs=OUTPUTS, dtype=dtype, **ends)


def inputs_of(model, batch, time):
    if model.vocab_size is None:
        return torch.randn(batch, time, FEATURES, dtype=torch.float64)
    return torch.randint(VOCABULARY, (batch, time))


ENDS = [{"vocab_size": VOCABULARY}, {}]
POOLS = [None, "mean", "last"]


def equal(seen, wanted):
    torch.testing.assert_close(seen, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("pool", POOLS)
def test_pieces_equal_the_whole(ends, pool):
    model = model_of(pool=pool, **ends)
    x = inputs_of(model, 2, 13)
    whole, last = model(x)
    assert whole.shape == ((2, 13, OUTPUTS) if pool is None else (2, OUTPUTS))
    pieces, state = [], model.init_state(2)
    for part in x.split([1, 5, 1, 6], 1):
        outputs, state = model(part, state)
        pieces.append(outputs)
    equal(torch.cat(pieces, 1) if pool is None else pieces[-1], whole)
    for (name, a), (other, b) in zip(state.tensors().items(), last.tensors().items(), strict=True):
        assert name == other
        equal(a, b)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooling_is_over_what_the_head_sees(pool):
    pooled, plain = model_of(pool=pool), model_of()
    plain.load_state_dict(pooled.state_dict())
    x = inputs_of(pooled, 2, 7)
    every = plain(x)[0]  # the head is linear, so it and the mean can change places
    equal(pooled(x)[0], every.mean(1) if pool == "mean" else every[:, -1])


@pytest.mark.parametrize("pool", POOLS)
def test_padding_counts_for_nothing(pool):
    model = model_of(pool=pool)
    x = inputs_of(model, 3, 9)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 0], [1] * 9, [0, 0, 0, 1, 0, 0, 0, 0, 0]]).bool()
    dirty = torch.where(mask[..., None], x, torch.nan)
    outputs, state = model(dirty, segments=Segments.padded(mask))
    for row in range(3):
        alone, its_state = model(x[row : row + 1, mask[row]])
        equal(outputs[row : row + 1, mask[row]] if pool is None else outputs[row : row + 1], alone)
        following = inputs_of(model, 1, 2)
        equal(model(following, state.select(row))[0], model(following, its_state)[0])


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_piece_of_padding_changes_nothing(pool):
    model = model_of(("gla",), pool=pool)
    x = inputs_of(model, 2, 5)
    whole, state = model(x)
    nothing = Segments.padded(torch.zeros(2, 3))
    outputs, _ = model(torch.full((2, 3, FEATURES), torch.nan, dtype=torch.float64), state, nothing)
    equal(outputs, whole)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_the_last_document_of_a_row_answers(pool):
    model = model_of(pool=pool)
    x = inputs_of(model, 2, 9)
    packed, state = model(x, segments=Segments.packed([[4, 5], [9]]))
    equal(packed[:1], model(x[:1, 4:])[0])
    equal(packed[1:], model(x[1:])[0])
    following = inputs_of(model, 2, 6)
    outputs, _ = model(following, state, Segments.packed([[2, 4], [6]], continues=True))
    equal(outputs[:1], model(following[:1, 2:])[0])
    equal(outputs[1:], model(torch.cat([x, following], 1)[1:])[0])


def test_a_padding_token_is_padding_wherever_it_stands():
    model = model_of(vocab_size=VOCABULARY, pool="mean", padding=3)
    ids = torch.tensor([[3, 1, 2, 3, 5, 3], [1, 2, 5, 3, 3, 3]])
    outputs, _ = model(ids)
    equal(outputs[0], outputs[1])
    equal(outputs[:1], model(torch.tensor([[1, 2, 5]]))[0])


def test_gradients_reach_everything_that_counts():
    model = model_of(pool="mean")
    x = inputs_of(model, 2, 4).requires_grad_()
    model(x, segments=Segments.padded(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])))[0].sum().backward()
    assert (x.grad[0, 2:] == 0).all()
    assert (x.grad[1].abs().sum(-1) > 0).all()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("pool", POOLS)
def test_the_model_compiles_and_tells_its_state(pool):
    model = model_of(("gla",), dtype=torch.float32, pool=pool)
    x = torch.randn(2, 5, FEATURES)
    wanted, state = model(x)
    outputs, again = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(outputs, wanted)
    assert again.tensors().keys() == state.tensors().keys() == model.init_state(2).tensors().keys()
    spec = model.state_spec()
    assert list(spec) == list(state)
    if pool is not None:
        assert {name: (2, *shape) for name, shape in spec["pool"].items()} == {
            name: tuple(leaf.shape) for name, leaf in state["pool"].items()
        }


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_compiled_step_is_a_step(ends, pool):
    model = model_of(("gla",), dtype=torch.float32, pool=pool, **ends).eval()
    step, state, ours = compile_step(model), model.init_state(1), model.init_state(1)
    with torch.no_grad():
        for _ in range(3):
            x = inputs_of(model, 1, 1)
            x = x if model.features is None else x.float()
            wanted, state = model(x, state)
            seen, ours = step(x, ours)
            torch.testing.assert_close(seen, wanted)


def test_half_precision_stays():
    model = model_of(("gla",), dtype=torch.bfloat16, pool="mean")
    outputs, state = model(torch.randn(2, 5, FEATURES, dtype=torch.bfloat16))
    assert outputs.dtype == torch.bfloat16
    assert state["pool"]["sum"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "vocab_size, features: seen None and None"),
        ({"vocab_size": 3, "features": 3}, "vocab_size, features: seen 3 and 3"),
        ({"features": 0}, "features: seen 0"),
        ({"features": 1, "pool": "max"}, "pool: seen 'max'"),
        ({"features": 1, "padding": 0}, "padding: seen 0"),
        ({"vocab_size": 4, "padding": 4}, "padding: seen 4"),
        ({"vocab_size": 4, "feed_forward": ["gelu", "gelu"]}, "feed_forward: 2 entries for 1 layers"),
        ({"vocab_size": 4, "dropout": 1.0}, "dropout: seen 1.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceModel(8, "gla", outputs=2, **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 5), "inputs: seen shape"),
        (torch.zeros(1, 5, 2), "features=3"),
        (torch.zeros(1, 0, 3), "T = 0"),
        (torch.zeros(1, 5, 3, dtype=torch.long), "inputs: seen torch.int64"),
    ],
)
def test_bad_inputs_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        model_of(("gla",))(x)


def test_a_state_of_another_model_is_refused():
    pooled, plain = model_of(("gla",), pool="mean"), model_of(("gla",))
    x = inputs_of(plain, 1, 2)
    with pytest.raises(ValueError, match=r"state: has the entries \['0'\], .* are \['0', 'pool'\]"):
        pooled(x, plain(x)[1])
    with pytest.raises(ValueError, match="layer pool of this model keeps"):
        pooled(x, State({"0": plain(x)[1]["0"], "pool": State(last=torch.zeros(1, 16))}))


def test_all_models_share_the_blocks():
    pairs = PairModel(5, 3, 16, "gla", feed_forward="gelu", dropout=0.1)
    names = {
        name for name, _ in SequenceModel(16, "gla", outputs=2, features=1, feed_forward="gelu").named_parameters()
    }
    assert {name for name, _ in pairs.named_parameters() if name.startswith(("blocks", "norm"))} <= names
    assert pairs.num_parameters == sum(p.numel() for p in pairs.parameters())
