"""Bidirectional: its equation document by document, PyTorch's own LSTM, and what refuses it."""

from __future__ import annotations

import pytest
import torch

from tidegate import LanguageModel, Segments, State, mixers, registry
from tidegate.infer import Unsupported, compile_step
from tidegate.models.sequence import SequenceModel

DIM = 8


def build(mixer="gla", options=None, **more):
    torch.manual_seed(0)
    options = {"num_heads": 2} if mixer == "gla" and options is None else options
    built = mixers.build("bidirectional", DIM, **{"dtype": torch.float64, "mixer": mixer, "options": options, **more})
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return built


def literal(layer, document):
    """The docstring's equation for one document (T, dim), from single-direction calls on lists of tokens."""
    second = layer.from_left if layer.shared else layer.from_right
    left = layer.from_left(document[None])[0][0]
    backwards = torch.stack(list(document)[::-1])
    right = torch.stack(list(second(backwards[None])[0][0])[::-1])
    if layer.merge == "sum":
        return left + right
    if layer.merge == "concat":
        return torch.stack([layer.merge_proj.weight @ torch.cat(pair) for pair in zip(left, right, strict=True)])
    gate = torch.sigmoid(document @ layer.merge_gate.weight.T + layer.merge_gate.bias)
    return gate * left + (1 - gate) * right


@pytest.mark.parametrize("merge", ["sum", "concat", "gated"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mixer", ["gla", "mamba", "rwkv7", "attention", "lru"])
def test_the_equation_document_by_document(mixer, shared, merge):
    tiny = dict(registry.info(mixer).tiny)
    layer = build(mixer, tiny, shared=shared, merge=merge)
    x = torch.randn(1, 19, DIM, dtype=torch.float64)
    real = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    segments = Segments.packed([[6, 6, 7]]) & Segments.padded(real)
    y, state = layer(x, segments=segments)
    for times in ([1, 2, 4, 5], [6, 7, 10, 11], [12, 13, 14, 15, 16]):
        torch.testing.assert_close(y[0, times], literal(layer, x[0, times]), rtol=1e-9, atol=1e-9)
    assert not y[~segments.valid].any()
    assert state.tensors() == {}
    assert (layer.from_right is None) == shared


def test_pytorchs_own_bidirectional_lstm():
    layer = build("lstm", merge="concat", dtype=torch.float32)
    theirs = torch.nn.LSTM(DIM, DIM, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for suffix, own in (("", layer.from_left), ("_reverse", layer.from_right)):
            for name, parameter in own.named_parameters():
                kind, side = name.rsplit("_", 1)
                getattr(theirs, f"{kind}_{side}_l0{suffix}").copy_(parameter)
    x, lengths = torch.randn(3, 11, DIM), torch.tensor([11, 4, 7])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    wanted, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    y, _ = layer(x, segments=Segments.padded(torch.arange(11) < lengths[:, None]))
    torch.testing.assert_close(y, wanted @ layer.merge_proj.weight.T, rtol=1e-5, atol=1e-5)


def test_a_document_that_continues_is_read_as_one_of_its_own():
    layer, x = build(), torch.randn(2, 9, DIM, dtype=torch.float64)
    for lengths in ([[9], [9]], [[4, 5], [2, 7]]):
        y, _ = layer(x, segments=Segments.packed(lengths))
        assert torch.equal(layer(x, State(), segments=Segments.packed(lengths, continues=True))[0], y)


def test_every_output_sees_every_token_of_its_document_and_no_other():
    layer = build()
    x = torch.randn(1, 7, DIM, dtype=torch.float64, requires_grad=True)
    for t in range(7):
        y, _ = layer(x, segments=Segments.packed([[3, 4]]))
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x)
        assert gradient[0].any(-1).tolist() == [(s < 3) == (t < 3) for s in range(7)]


def test_directions_start_alike_and_the_gate_between_them():
    layer = mixers.build("bidirectional", DIM, options={"num_heads": 2}, merge="gated")
    x = torch.randn(1, 5, DIM)
    left, right = layer.from_left(x)[0], layer.from_right(x.flip(1))[0].flip(1)
    torch.testing.assert_close(layer(x)[0], (left + right) / 2)
    shared, separate = (mixers.build("bidirectional", DIM, mixer="lru", shared=s) for s in (True, False))
    assert 2 * sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in separate.parameters())


def test_each_direction_hands_on_its_own_side_values():
    """RWKV-7's later layers move towards the first layer's values: those that were read in the same direction."""
    tiny = {"mixer": "rwkv7", "options": dict(registry.info("rwkv7").tiny)}
    torch.manual_seed(0)
    model = SequenceModel(DIM, [("bidirectional", tiny)] * 2, features=3, outputs=2, dtype=torch.float64)
    first, second = (block.mixer for block in model.blocks)
    assert (first.from_right.layer_index, second.from_right.layer_index, second.from_left.num_layers) == (0, 1, 2)
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    side: dict = {}
    first(x, side=side)
    assert list(side) == ["v_first", "reversed v_first"]
    kept = dict(side)
    for name, own, turned in (("v_first", first.from_left, x), ("reversed v_first", first.from_right, x.flip(1))):
        alone: dict = {}
        own(turned, side=alone)
        torch.testing.assert_close(side[name], alone["v_first"])
    second(x, side=side)
    assert all(side[name] is kept[name] for name in kept)


# -- in models ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pool", [None, "mean"])
def test_a_sequence_model_takes_it_and_comes_back(pool):
    layers = [("bidirectional", {"mixer": "gla", "options": {"num_heads": 2}, "merge": "concat"}), ("lru", {})]
    model = SequenceModel(DIM, layers, features=3, outputs=2, pool=pool)
    x = torch.randn(2, 5, 3)
    y, state = model(x)
    assert y.shape == ((2, 5, 2) if pool is None else (2, 2))
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.equal(model(changed)[0].flatten(1)[:, :2], y.flatten(1)[:, :2])  # the first output, or the mean
    with pytest.raises(ValueError, match=r"state: layer 0 \(bidirectional\) needs the whole sequence at once"):
        model(x, state)
    again = SequenceModel(DIM, model.layers, features=3, outputs=2, pool=pool)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x)[0], y)


def test_a_language_model_refuses_it():
    with pytest.raises(ValueError, match=r"layers: 'bidirectional' .layer 1. cannot predict.* after it.*SequenceModel"):
        LanguageModel(11, 32, "gla,bidirectional")


def test_it_has_no_compiled_step():
    with pytest.raises(Unsupported, match=r"module: Bidirectional has no step of its own: .*last token"):
        compile_step(mixers.build("bidirectional", 32, mixer="lru"))
    with pytest.raises(Unsupported, match="Bidirectional"):
        compile_step(torch.nn.ModuleList([mixers.build("bidirectional", 32, mixer="lru")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "gal"}, "did you mean 'gla'"),
        ({"mixer": "bidirectional"}, "mixer: 'bidirectional' reads in both directions itself"),
        ({"options": {"num_head": 2}}, "gla: no option 'num_head', did you mean 'num_heads'"),
        ({"options": {"dim": 2}}, "options: 'dim' is an argument of its own"),
        ({"merge": "add"}, "merge: seen 'add', wanted one of sum, concat, gated"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build("bidirectional", 32, **options)


def test_a_state_with_something_in_it_is_refused():
    layer = build()
    with pytest.raises(ValueError, match=r"state: has the entries \['memory'\], but Bidirectional keeps \[\]"):
        layer(torch.zeros(1, 3, DIM, dtype=torch.float64), layer.from_left.init_state(1))
