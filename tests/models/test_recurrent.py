"""tidegate.RNN beside torch.nn's modules, and what only it has."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tidegate
from tidegate import RNN, Segments, registry

KINDS = {
    "lstm": lambda **o: nn.LSTM(5, 8, **o),
    "projected": lambda **o: nn.LSTM(5, 8, proj_size=3, **o),
    "gru": lambda **o: nn.GRU(5, 8, **o),
    "tanh": lambda **o: nn.RNN(5, 8, **o),
    "relu": lambda **o: nn.RNN(5, 8, nonlinearity="relu", **o),
}
SHAPES = [
    dict(),
    dict(num_layers=2, bidirectional=True),
    dict(num_layers=3, batch_first=True),
    dict(bias=False, bidirectional=True),
]


def close(a, b, **options):
    torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-10, **options})


def first_state(module, batch):
    """A first state for a module of PyTorch's."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(rows, batch, module.proj_size or 8, dtype=torch.float64)
    return (h, torch.randn(rows, batch, 8, dtype=torch.float64)) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_pytorch_s(kind, options):
    torch.manual_seed(0)
    theirs = KINDS[kind](**options, dtype=torch.float64)
    ours = RNN.from_torch(theirs)
    x = torch.randn(3, 3, 5, dtype=torch.float64)  # the same with and without batch_first
    close(ours(x), theirs(x))
    close(ours(x, hx := first_state(theirs, 3)), theirs(x, hx))
    y, hx = ours(x[:, 0])
    expected, expected_hx = theirs(x[:, 0])
    close((y, hx), (expected, expected_hx))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind):
    torch.manual_seed(0)
    theirs = KINDS[kind](num_layers=2, bidirectional=True, dtype=torch.float64)
    ours = RNN.from_torch(theirs)
    x, first = torch.randn(7, 4, 5, dtype=torch.float64), first_state(theirs, 4)
    for lengths, ordered in (([3, 7, 1, 5], False), ([7, 5, 5, 2], True)):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=ordered)
        for hx in (None, first):
            (y, last), (expected, expected_last) = ours(packed, hx), theirs(packed, hx)
            close(pad_packed_sequence(y), pad_packed_sequence(expected))
            close(last, expected_last)


def test_packed_sequences_of_one_length_keep_their_places():
    """Sorting anew is not stable: from 17 rows on those of one length changed places in `.data`."""
    torch.manual_seed(0)
    theirs = KINDS["gru"]()
    ours = RNN.from_torch(theirs)
    lengths = torch.randint(1, 4, (60,)).sort(descending=True, stable=True).values
    for ordered in (True, False):
        packed = pack_padded_sequence(torch.randn(3, 60, 5), lengths, enforce_sorted=ordered)
        found, expected = ours(packed)[0], theirs(packed)[0]
        close(found.data, expected.data, rtol=1e-4, atol=1e-5)
        for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            mine, other = getattr(found, name), getattr(expected, name)
            assert (mine is None and other is None) or torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_there_and_back_are_the_same_bits(kind):
    torch.manual_seed(0)
    theirs = KINDS[kind](num_layers=2, bidirectional=True, dropout=0.25)
    back = RNN.from_torch(theirs).to_torch()
    assert type(back) is type(theirs)
    for (name, a), (other, b) in zip(theirs.state_dict().items(), back.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(6, 2, 5)
    theirs.eval(), back.eval()
    assert torch.equal(theirs(x)[0], back(x)[0])
    assert back.dropout == 0.25


@pytest.mark.parametrize("projection", [{}, {"proj_size": 3}])
def test_gradients_reach_everything(projection):
    torch.manual_seed(0)
    theirs = nn.LSTM(5, 8, num_layers=2, bidirectional=True, dtype=torch.float64, **projection)
    ours = RNN.from_torch(theirs)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    for module in (theirs, ours):
        module(x)[0].square().sum().backward()
    for layer, names in ours._torch_names():
        for mine, other in names.items():
            close(getattr(layer, mine).grad, getattr(theirs, other).grad)


@pytest.mark.parametrize("name", [n for n in registry.names(streaming=True) if registry.info(n).family == "cell"])
def test_every_cell_in_pieces_and_bidirectional(name):
    torch.manual_seed(0)
    options = registry.info(name).tiny
    rnn = RNN(name, 6, 16, num_layers=2, dtype=torch.float64, **options)
    x = torch.randn(9, 2, 6, dtype=torch.float64)
    whole, last = rnn(x)
    first, hx = rnn(x[:4])
    second, hx = rnn(x[4:], hx)
    close(torch.cat([first, second]), whole)
    close(hx, last)
    both = RNN(name, 6, 16, bidirectional=True, dtype=torch.float64, **options)
    y, _ = both(x)
    assert y.shape == (9, 2, 32)
    both.layers = nn.ModuleList([both.layers[1], both.layers[0]])
    turned, _ = both(x.flip(0))
    close(torch.cat([turned[..., 16:], turned[..., :16]], -1).flip(0), y)


def test_documents_in_a_row():
    rnn = RNN("gru", 5, 8, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    y, _ = rnn(x, segments=Segments.packed([[4, 5]]))
    close(y, torch.cat([rnn(x[:, :4])[0], rnn(x[:, 4:])[0]], 1))


@pytest.mark.parametrize("variational", [False, True])
def test_dropout_is_between_layers_and_may_be_one_mask_for_all_time(variational, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(30, 2, 5)
    one = RNN("gru", 5, 8, dropout=0.5, variational=variational)
    close(one(x), one(x))
    rnn = RNN("elman", 5, 8, num_layers=2, dropout=0.5, variational=variational)
    second, seen = rnn.layers[1], []
    run = second.run
    monkeypatch.setattr(second, "run", lambda x, *rest: (seen.append(x), run(x, *rest))[1])
    rnn(x)
    zero = seen[-1] == 0
    assert 0.3 < zero.float().mean() < 0.7
    assert bool((zero == zero[:, :1]).all()) == variational
    rnn.eval()(x)
    assert not (seen[-1] == 0).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "zoneout"), [("gru", 0.25), ("lstm", {"c": 0.5}), ("lstm", {"h": 0.125, "c": 0.5})])
def test_zoneout_keeps_channels_or_moves_all_by_their_share(name, zoneout, training, monkeypatch):
    torch.manual_seed(0)
    rnn = RNN(name, 5, 8, zoneout=zoneout, dtype=torch.float64).train(training)
    plain = RNN(name, 5, 8, dtype=torch.float64)
    plain.load_state_dict(rnn.state_dict())
    drawn, bernoulli = [], torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p: drawn.append(bernoulli(p)) or drawn[-1])
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    y, last = rnn(x)
    cell = rnn.layers[0].cell
    shares = dict.fromkeys(cell.states, 0.0) | (zoneout if isinstance(zoneout, dict) else {"h": zoneout})
    assert len(drawn) == (sum(share > 0 for share in shares.values()) if training else 0)
    state = [torch.zeros(3, 8, dtype=torch.float64) for _ in cell.states]
    for t in range(6):
        _, after = plain(x[t : t + 1], tuple(s[None] for s in state) if len(state) > 1 else state[0][None])
        masks = iter(drawn)
        for k, (share, new) in enumerate(zip(shares.values(), after if len(state) > 1 else [after], strict=True)):
            moves = (next(masks)[:, t, 0] if training else 1 - share) if share else 1.0
            state[k] = state[k] + moves * (new[0] - state[k])
        close(y[t], state[0])
    for seen, wanted in zip(last if len(state) > 1 else [last], state, strict=True):
        close(seen[0], wanted)


def test_zoneout_moves_exactly_or_not_at_all():
    rnn = RNN("elman", 1, 2, nonlinearity="relu", zoneout=0.5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.fill_(0.0)
        rnn.layers[0].weight_ih.fill_(1.0)
    torch.manual_seed(0)
    x = torch.tensor([1e30, 3e-30], dtype=torch.float64)[:, None, None].expand(2, 50, 1)
    y, _ = rnn(x, torch.ones(1, 50, 2, dtype=torch.float64))
    assert {*y[0].flatten().tolist()} == {1.0, 1e30}
    assert {*y[1].flatten().tolist()} == {1.0, 1e30, 3e-30}  # not rounded away beside what was there
    y, _ = rnn(torch.full((1, 50, 1), torch.inf, dtype=torch.float64), torch.ones(1, 50, 2, dtype=torch.float64))
    assert {*y.flatten().tolist()} == {1.0, torch.inf}


def test_what_regularises_can_be_set_later():
    rnn = RNN("lstm", 5, 8, num_layers=2)
    assert (rnn.layers[0].zoneout, rnn.layers[1].weight_dropout) == ({}, 0.0)
    rnn.layers[1].zoneout = 0.25
    assert "zoneout={'h': 0.25, 'c': 0.25}" in repr(rnn)
    with pytest.raises(ValueError, match="PyTorch has no lstm, zoneout="):
        rnn.to_torch()
    rnn.layers[1].zoneout = {"c": 0.0}
    rnn.layers[0].weight_dropout = 0.5
    with pytest.raises(ValueError, match=r"PyTorch has no lstm, weight_dropout=0\.5"):
        rnn.to_torch()
    rnn.layers[0].weight_dropout = 0.0
    rnn.to_torch()
    rnn.layers[0].zoneout["h"] = 5.0  # a copy
    assert rnn.layers[0].zoneout == {}


def test_zoneout_leaves_out_as_many_as_it_says():
    torch.manual_seed(0)
    rnn = RNN("elman", 5, 64, zoneout=0.25, dtype=torch.float64)
    y, _ = rnn(torch.randn(50, 20, 5, dtype=torch.float64))
    stayed = (y[1:] == y[:-1]).float().mean()
    assert abs(stayed - 0.25) < 0.01
    y.sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


def test_weight_dropout_is_one_mask_for_all_tokens_of_a_call():
    torch.manual_seed(0)
    rnn = RNN("lstm", 5, 8, weight_dropout=0.5, dtype=torch.float64)
    plain = RNN("lstm", 5, 8, dtype=torch.float64)
    plain.load_state_dict(rnn.state_dict())
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    torch.manual_seed(1)
    y, _ = rnn(x)
    torch.manual_seed(1)
    with torch.no_grad():
        plain.layers[0].weight_hh.copy_(torch.nn.functional.dropout(rnn.layers[0].weight_hh, 0.5))
    assert (plain.layers[0].weight_hh == 0).float().mean() > 0.3
    close(y, plain(x)[0])
    plain.load_state_dict(rnn.state_dict())
    close(rnn.eval()(x), plain(x))


def test_other_mixers_stream_in_it_too():
    rnn = RNN("gla", 5, 16, num_layers=2, batch_first=True, num_heads=2)
    x = torch.randn(2, 9, 5)
    whole, _ = rnn(x)
    first, hx = rnn(x[:, :4])
    close(torch.cat([first, rnn(x[:, 4:], hx)[0]], 1), whole, rtol=1e-4, atol=1e-5)


def test_a_state_that_grows_is_taken_back():
    rnn = RNN("attention", 5, 16, num_layers=2, batch_first=True, num_heads=2)
    x = torch.randn(2, 9, 5)
    whole, _ = rnn(x)
    first, hx = rnn(x[:, :4])
    close(torch.cat([first, rnn(x[:, 4:], hx)[0]], 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="hx: seen"):
        rnn(x, tuple(part[..., :-1] for part in hx))


def test_layers_know_their_place():
    rnn = RNN("hgrn", 5, 16, num_layers=3, bidirectional=True)
    assert [layer[-1].layer_index for layer in rnn.layers] == [0, 0, 1, 1, 2, 2]
    assert {layer[-1].num_layers for layer in rnn.layers} == {3}


def test_a_preset_that_pytorch_does_not_have():
    with pytest.raises(ValueError, match="PyTorch has no lstm, peephole=True"):
        RNN("lstm", 5, 8, preset="peephole").to_torch()
    assert RNN("elman", 5, 8, preset="irnn").to_torch().nonlinearity == "relu"


def test_errors():
    rnn = RNN("lstm", 5, 8, num_layers=2)
    x, h = torch.randn(4, 3, 5), torch.zeros(2, 3, 8)
    for given, message in (
        (lambda: rnn(torch.randn(4, 3, 6)), r"input: seen shape \(4, 3, 6\), wanted \(time, batch, input_size=5\)"),
        (lambda: rnn(x[:0]), "input: seen T = 0 tokens, wanted at least one"),
        (lambda: rnn(x, h), r"hx: seen \(2, 3, 8\), wanted a tuple of h, c of shape \(2, 3, 8\), \(2, 3, 8\)"),
        (lambda: rnn(x, (h, h[:1])), "hx: seen"),
        (lambda: RNN("lstm", 5, 8, num_layers=0), "num_layers: seen 0"),
        (lambda: RNN("lstm", 5, 8, dropout=1.0), "dropout: seen 1.0"),
        (lambda: RNN("lstmm", 5, 8), "lstmm"),
        (lambda: RNN("gru", 5, 8, weight_dropout=1.0), "weight_dropout: seen 1.0"),
        (
            lambda: RNN("brc", 8, 8, weight_dropout=0.5),
            "weight_dropout: seen 0.5, but this cell has no recurrent",
        ),
        (lambda: RNN("gru", 5, 8, zoneout="0.1"), "zoneout: seen '0.1', wanted a share"),
        (lambda: RNN("lstm", 5, 8, proj_size=2.5), "proj_size: seen 2.5, wanted less than"),
        (lambda: RNN("gru", 5, 8, zoneout=-0.1), "zoneout: seen -0.1, wanted a share from 0 to below 1"),
        (lambda: RNN("gru", 5, 8, zoneout={"c": 0.1}), "zoneout: seen 'c', wanted states of the cell: h"),
        (lambda: RNN("gla", 5, 8, num_heads=2, zoneout=0.1), "zoneout: seen 0.1, but 'gla' is more than a cell"),
        (lambda: RNN("gru", 5, 8, zoneout=0.1).to_torch(), "cell: PyTorch has no gru, zoneout={'h': 0.1}"),
        (lambda: RNN("lstm", 5, 8, peepholes=True), "no option 'peepholes', did you mean 'peephole'"),
        (lambda: RNN("bidirectional", 5, 8), "cell: 'bidirectional' cannot be read from left to right"),
        (lambda: RNN.from_torch(nn.Linear(2, 2)), "module: seen Linear, wanted torch.nn.LSTM, GRU or RNN"),
        (lambda: RNN("lstm", 5, 8, proj_size=8), "proj_size: seen 8, wanted less than hidden_size = 8, or 0 for none"),
        (lambda: RNN("gru", 5, 8, proj_size=4), "proj_size: seen 4, but 'gru' has no projection"),
        (lambda: RNN("lstm", 5, 8, peephole=True).to_torch(), "cell: PyTorch has no lstm, peephole=True"),
        (lambda: RNN("mgu", 5, 8).to_torch(), "cell: PyTorch has no mgu"),
        (
            lambda: rnn(pack_padded_sequence(x, torch.tensor([4, 2, 1])), segments=Segments.packed([[4]])),
            "segments: a PackedSequence has its own lengths",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            given()


def test_it_is_found_at_the_top():
    assert tidegate.RNN is RNN
