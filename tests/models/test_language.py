"""The language model: one state for all layers, documents that do not leak, files that come back bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from tidegate import LanguageModel, Segments, State, registry
from tidegate.nn.weight_decay import weight_decay_groups

VOCABULARY = 23


def model_of(layers="2*sliding-window-attention,attention", dtype=torch.float64, **options):
    if isinstance(layers, str) and layers in registry.names():
        layers = [(layers, dict(registry.info(layers).tiny))] * 2
    return LanguageModel(VOCABULARY, 32, layers, dtype=dtype, **options)


def ids_of(batch, time):
    return torch.randint(VOCABULARY, (batch, time))


def hybrid():
    window = ("sliding-window-attention", {"window": 4})
    return model_of(
        [window, ("rwkv7", dict(registry.info("rwkv7").tiny)), "attention", "lru"], feed_forward="channel-mix"
    )


@pytest.mark.parametrize("name", [*registry.names(streaming=True), None])
def test_pieces_equal_the_whole(name):
    model = hybrid() if name is None else model_of(name)
    randomise(model)
    ids = ids_of(2, 13)
    whole, last = model(ids)
    pieces, state = [], None
    for part in ids.split([1, 5, 1, 6], 1):
        logits, state = model(part, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    for (name, x), (_, y) in zip(state.tensors().items(), last.tensors().items(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", [*registry.names(streaming=True), None])
def test_packed_documents_leak_nothing(name):
    model = hybrid() if name is None else model_of(name)
    randomise(model)
    ids = ids_of(1, 12)
    packed, last = model(ids, segments=Segments.packed([[5, 7]]))
    first, _ = model(ids[:, :5])
    second, alone = model(ids[:, 5:])
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=1e-9, atol=1e-9)
    following = ids_of(1, 3)
    torch.testing.assert_close(model(following, last)[0], model(following, alone)[0], rtol=1e-9, atol=1e-9)


def test_padding_may_hold_any_number():
    model = model_of()
    ids = ids_of(1, 6)
    real = torch.tensor([[0, 1, 1, 0, 1, 1]])
    logits, _ = model(torch.where(real.bool(), ids, -100), segments=Segments.padded(real))
    alone, _ = model(ids[:, real[0].bool()])
    torch.testing.assert_close(logits[:, real[0].bool()], alone)


def test_layers_of_one_call_share_side_values():
    rwkv = ("rwkv7", dict(registry.info("rwkv7").tiny))
    model = model_of([rwkv, rwkv])
    randomise(model)
    ids = ids_of(1, 4)
    together = model(ids)[0]
    model.blocks[1].takes_side = False
    assert not torch.allclose(model(ids)[0], together)


def test_depth_reaches_the_mixers():
    model = model_of("3*attention")
    assert [block.mixer.num_layers for block in model.blocks] == [3, 3, 3]
    rwkv = ("rwkv7", dict(registry.info("rwkv7").tiny))
    assert [block.mixer.layer_index for block in model_of([rwkv, rwkv]).blocks] == [0, 1]


def test_head_may_stand_alone():
    tied, free = model_of(), model_of(tie_embeddings=False)
    assert free.num_parameters - tied.num_parameters == VOCABULARY * 32
    assert free(ids_of(1, 2))[0].shape == (1, 2, VOCABULARY)


def test_feed_forward_per_layer():
    model = model_of("3*attention", feed_forward=["none", "gelu", "channel-mix"])
    assert [type(block.feed_forward).__name__ for block in model.blocks] == ["NoneType", "GELU", "ChannelMix"]
    _, state = model(ids_of(2, 3))
    assert [list(state[name]) for name in state] == [["mixer"], ["mixer"], ["mixer", "feed_forward"]]
    assert list(model.init_state(2).tensors()) == list(state.tensors())


def test_gradients_reach_every_parameter():
    model = model_of("attention,sliding-window-attention", feed_forward=["swiglu", "gelu"], tie_embeddings=False)
    model(ids_of(2, 7))[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_bit_for_bit(tmp_path, dtype):
    model = model_of(dtype=dtype, feed_forward="gelu", dropout=0.1).eval()
    model.save(tmp_path / "run")
    before = torch.get_rng_state()
    loaded = LanguageModel.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.config() == model.config()
    assert not loaded.training
    ids = ids_of(2, 9)
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    for (name, x), (other, y) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert x.dtype == y.dtype == dtype
        assert torch.equal(x, y)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_config_rebuilds_the_model():
    model = model_of([("sliding-window-attention", {"window": 3}), "2*attention"])
    assert LanguageModel(**json.loads(json.dumps(model.config()))).config() == model.config()


def damage(folder, how):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "garbage":
        weights.write_bytes(b"not a model" * 50)
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "no json":
        config.write_text("{")
    elif how == "binary config":
        config.write_bytes(b"\xff\xfe\x00")
    elif how == "other json":
        config.write_text("[1]")
    else:
        content = json.loads(config.read_text())
        content.update(
            {"other shape": {"dim": 16}, "fewer": {"layers": "attention"}, "unknown": {"layers": "atention"}}[how]
        )
        config.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "model.safetensors: damaged"),
        ("empty", "model.safetensors: damaged"),
        ("garbage", "model.safetensors: damaged"),
        ("no weights", "model.safetensors: missing"),
        ("no config", "config.json: missing"),
        ("no json", "config.json: damaged"),
        ("binary config", "config.json: damaged"),
        ("other json", "config.json: does not describe"),
        ("other shape", "does not fit config.json beside it: .* has shape"),
        ("fewer", "tensors are unknown to it"),
        ("unknown", "did you mean 'attention'"),
    ],
)
def test_damaged_files_give_one_line(tmp_path, how, message):
    model_of().save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match=message) as caught:
        LanguageModel.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_of_the_same_shape(tmp_path):
    model_of([("attention", {"num_heads": 2})]).save(tmp_path / "a")
    model_of([("attention", {"num_heads": 4})]).save(tmp_path / "b")
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(ValueError, match="another config"):
        LanguageModel.load(tmp_path / "b")
    with pytest.raises(ValueError, match="no such folder"):
        LanguageModel.load(tmp_path / "c")


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = model_of()
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        model_of().save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input_is_named():
    model = model_of()
    for ids, message in [
        (torch.zeros(4, dtype=torch.int64), "ids: seen shape \\(4,\\)"),
        (torch.zeros(1, 0, dtype=torch.int64), "T = 0"),
        (torch.zeros(1, 2), "ids: seen torch.float32"),
        (torch.tensor([[1, VOCABULARY]]), "seen token 23, but the vocabulary has the tokens 0 to 22"),
        (torch.tensor([[1, -1]]), "seen token -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(ids)
    with pytest.raises(ValueError, match="segments: made for"):
        model(ids_of(1, 3), segments=Segments.packed([[2]]))


def test_a_state_of_another_model_gives_one_line():
    model = model_of("2*attention")
    ids = ids_of(2, 3)
    others = [
        (model_of("3*attention"), "it belongs to another model"),
        (model_of("2*attention", feed_forward="channel-mix"), "layer 0 of this model keeps \\['mixer'\\]"),
        (model_of("2*lstm"), "belongs to another layer"),
        (model_of([("2*attention", {"num_heads": 2})]), "belongs to another layer"),
    ]
    for other, message in others:
        with pytest.raises(ValueError, match=message) as caught:
            model(ids, other(ids)[1])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="belongs to another layer or batch"):
        model(ids, model(ids_of(3, 3))[1])
    with pytest.raises(ValueError, match="state: seen dict"):
        model(ids, {"0": None})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dim=0), "dim: seen 0"),
        (dict(vocab_size=0), "vocab_size: seen 0"),
        (dict(dropout=1.0), "dropout: seen 1.0"),
        (dict(feed_forward="swigl"), "did you mean 'swiglu'"),
        (dict(feed_forward=["swiglu"]), "feed_forward: 1 entries for 2 layers"),
    ],
)
def test_bad_options_are_named(options, message):
    arguments = dict(vocab_size=5, dim=16, layers="2*attention") | options
    with pytest.raises(ValueError, match=message):
        LanguageModel(**arguments)


def test_state_round_trip_through_a_file(tmp_path):
    model = hybrid()
    _, state = model(ids_of(2, 5))
    state.save(tmp_path / "state.safetensors")
    following = ids_of(2, 1)
    loaded = State.load(tmp_path / "state.safetensors")
    assert torch.equal(model(following, loaded)[0], model(following, state)[0])


def test_compile_as_one_graph():
    torch._dynamo.reset()
    model = model_of("attention,sliding-window-attention", dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = ids_of(2, 9)
    logits, state = compiled(ids)
    torch.testing.assert_close(logits, model(ids)[0])
    segments = Segments.packed([[3, 6], [9]], continues=True)
    torch.testing.assert_close(compiled(ids, state, segments)[0], model(ids, state, segments)[0])


def test_export_for_any_length():
    model = model_of("sliding-window-attention,attention", dtype=torch.float32).eval()
    example, state = ids_of(1, 6), model(ids_of(1, 5))[1]
    dynamic = torch.export.Dim.DYNAMIC
    slots = [[{}, {}, {}], [{1: dynamic}, {1: dynamic}, {}]]
    program = torch.export.export(
        model, (example, state), dynamic_shapes={"ids": {1: dynamic}, "state": [[part] for part in slots]}
    ).module()
    for length in (4, 11, 3):
        ids = ids_of(1, length)
        logits, after = program(ids, state)
        wanted, state = model(ids, state)
        torch.testing.assert_close(logits, wanted)
        for x, y in zip(after.tensors().values(), state.tensors().values(), strict=True):
            torch.testing.assert_close(x, y)


def test_weight_decay_spares_what_it_should():
    model = model_of([("rwkv7", dict(registry.info("rwkv7").tiny)), ("attention", {"qkv_bias": True})])
    decayed, free = weight_decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    free_names = {names[id(parameter)] for parameter in free["params"]}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert decayed_names | free_names == set(names.values())
    assert not decayed_names & free_names
    assert {"blocks.1.mixer.qkv_proj.weight", "blocks.0.feed_forward.down.weight"} <= decayed_names
    assert {"embedding.weight", "norm.weight", "blocks.1.mixer.qkv_proj.bias", "blocks.0.mixer.mix"} <= free_names
    assert any(p is model.embedding.weight for p in weight_decay_groups(model, 0.1, embeddings=True)[0]["params"])


def randomise(model):
    """Zero-initialised outputs would hide every mistake behind them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
