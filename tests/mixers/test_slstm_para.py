"""sLSTM, ParaGRU and ParaLSTM: loops written from the papers, and forms in which their recurrence is something else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tidegate
from tidegate import Segments, State, mixers, ops

DIM = 12


def build(name, **options):
    """With every weight moved, in float64."""
    torch.manual_seed(0)
    mixer = mixers.build(name, DIM, **{"num_heads": 3, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return mixer


def convolved(mixer, x: Tensor) -> Tensor:
    """silu of the convolution of one document (T, E), tap by tap."""
    weight, bias = mixer.convolution.weight, mixer.convolution.bias
    rows = []
    for t in range(len(x)):
        total = bias
        for j in range(weight.shape[1]):
            if t - j >= 0:
                total = total + weight[:, -1 - j] * x[t - j]
        rows.append(torch.nn.functional.silu(total))
    return torch.stack(rows)


def by_head(blocks: Tensor, x: Tensor) -> Tensor:
    """(H, d, d) times (..., H d), as one large matrix with zeros."""
    return x @ torch.block_diag(*blocks).T


def check(mixer, literal) -> None:
    """Two documents in a row and beside another, in float64 and in kernels, are what the loop gives for each."""
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    segments = Segments.packed([[4, 5], [9]])
    wanted = torch.stack([torch.cat([literal(x[0, :4])[0], literal(x[0, 4:])[0]]), literal(x[1])[0]])
    with torch.no_grad():
        y, state = mixer(x, segments=segments)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-10)
        for name, last in literal(x[0, 4:])[1].items():
            torch.testing.assert_close(state[name][0], last, rtol=1e-10, atol=1e-10)
        single, _ = mixer.float()(x.float(), segments=segments)
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=1e-5)


# -- sLSTM -------------------------------------------------------------------------------------------------------------
VARIANTS = [
    {},
    {"forget_gate": "exp", "norm": "rms"},
    {"preset": "cell"},
    {"conv_width": None, "norm": None},
    {"headwise": False, "num_heads": 1},
]


def slstm_gates(mixer, x: Tensor) -> list[Tensor]:
    """What the gates see of one document's input, (T, dim) for i, f, z, o."""
    u = x if mixer.convolution is None else convolved(mixer, x)
    gates = []
    for k, source in enumerate((u, u, x, x)):
        weight = mixer.weight_ih[k * DIM : (k + 1) * DIM]
        seen = by_head(weight.unflatten(0, (mixer.num_heads, -1)), source) if mixer.headwise else source @ weight.T
        gates.append(seen + mixer.bias_ih[k * DIM : (k + 1) * DIM])
    return gates


def normed(mixer, h: Tensor) -> Tensor:
    if mixer.norm is None:
        return h
    h = h.unflatten(-1, (mixer.num_heads, -1))
    if mixer.norm == "layer":
        h = h - h.mean(-1, keepdim=True)
    return (h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * mixer.norm_weight


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_slstm_is_its_equations(options):
    mixer = build("slstm", **options)

    def literal(x):
        """exp(i~), exp(f~) and sigmoid(f~) as they stand; only m is left to say what the state's scale is."""
        parts = mixer.weight_hh.double().chunk(4)
        heads = [part.unflatten(0, (mixer.num_heads, -1)) for part in parts]
        h = c = n = torch.zeros(DIM, dtype=x.dtype)
        outputs = []
        for i, f, z, o in zip(*slstm_gates(mixer, x), strict=True):
            i, f, z, o = (gate + by_head(U, h) for gate, U in zip((i, f, z, o), heads, strict=True))
            forget = torch.sigmoid(f) if mixer.forget_gate == "sigmoid" else torch.exp(f)
            c, n = forget * c + torch.exp(i) * torch.tanh(z), forget * n + torch.exp(i)
            h = torch.sigmoid(o) * c / n
            outputs.append(h)
        return normed(mixer, torch.stack(outputs)), {"h": h}

    check(mixer, literal)


def test_slstm_without_recurrent_weights_is_a_weighted_mean():
    """As attention: weights softmax_s(i~_s + log f_{s+1} + ... + log f_t) over all tokens so far."""
    mixer = build("slstm", norm=None)
    with torch.no_grad():
        mixer.weight_hh.zero_()
        x = torch.randn(17, DIM, dtype=torch.float64)
        i, f, z, o = slstm_gates(mixer, x)
        i = 20 * i  # far beyond what exp could take without the running maximum, in float32
        total = torch.nn.functional.logsigmoid(f).cumsum(0)
        logits = (i - total)[None] + total[:, None]  # (t, s, dim)
        logits = logits.masked_fill(torch.ones(17, 17, dtype=torch.bool).triu(1)[..., None], -torch.inf)
        wanted = torch.sigmoid(o) * (torch.softmax(logits, 1) * torch.tanh(z)).sum(1)
        mixer.weight_ih[:DIM] *= 20
        mixer.bias_ih[:DIM] *= 20
        y, state = mixer(x[None])
        torch.testing.assert_close(y[0], wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state["m"][0] + state["n"][0].log(), logits[-1].logsumexp(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(mixer.float()(x[None].float())[0][0].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_maximum_drops_out_of_slstm(dtype):
    """c and n relative to another m are the same state, also in the gradients; a first token does not see any m."""
    mixer = build("slstm").to(dtype)
    x, tolerance = torch.randn(2, 6, DIM, dtype=dtype), 1e-10 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 5, DIM, dtype=dtype))
    found = []
    for shift in (0.0, 3.0):
        scale = torch.exp(torch.tensor(-shift, dtype=dtype))
        moved = State({**state, "c": state["c"] * scale, "n": state["n"] * scale, "m": state["m"] + shift})
        y, _ = mixer(x, moved)
        found.append((y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))))
    for seen, wanted in zip(*found, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        mixer.bias_ih[:DIM] = -1000.0  # an input gate that is nearly shut opens for who comes first
    (y, _), (other, _) = (mixer(x[:, :1], State({**mixer.init_state(2), "m": state["m"] + m})) for m in (0.0, 50.0))
    assert y.isfinite().all()
    assert torch.equal(y, other)


def test_slstm_starts_as_the_paper_says():
    for layer, power in ((0, 0.3), (2, 0.95), (4, 1.6)):
        mixer = mixers.build("slstm", 40, num_heads=2, layer_index=layer, num_layers=5)
        forget = mixer.bias_ih.view(4, 2, 20)[:, 1]
        assert not forget[[0, 2, 3]].any()
        expected = torch.tensor([5 - 12 * (j / 19) ** power for j in range(20)])
        torch.testing.assert_close(forget[1], expected)
    assert not mixer.weight_hh.any()
    assert (mixer.norm_weight == 1).all()
    assert abs(float(mixers.build("slstm", 400).weight_ih.detach().std()) / (2 / 2000) ** 0.5 - 1) < 0.02
    mixer = mixers.build("slstm", 64, preset="cell", recurrent_init="uniform", forget_bias=3.0)
    assert (mixer.convolution, mixer.norm_weight) == (None, None)
    assert (mixer.bias_ih.view(4, -1)[1] == 3).all()
    assert 0.9 / 8 < mixer.weight_hh.max() <= 1 / 8
    assert mixers.build("slstm", 4).bias_ih.view(4, 4)[1].tolist() == [5.0] * 4  # one channel per head


# -- ParaGRU and ParaLSTM ----------------------------------------------------------------------------------------------
PARA = [
    ("para-gru", {}),
    ("para-gru", {"preset": "cell"}),
    ("para-gru", {"expand": 1.5, "conv_width": 2}),
    ("para-lstm", {}),
    ("para-lstm", {"preset": "cell"}),
    ("para-lstm", {"coupled": False, "peephole": False}),
    ("para-lstm", {"coupled": False, "conv_width": None}),
]


def para_gates(mixer, x: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """What the gates see of one document's input, by name, and the block's output gate."""
    u, g = (x, None) if mixer.in_proj is None else (x @ mixer.in_proj.weight.T).chunk(2, -1)
    u = u if mixer.convolution is None else convolved(mixer, u)
    seen = zip(mixer.cell.inputs, mixer.weight_ih, mixer.bias_ih, strict=True)
    return {name: by_head(blocks, u) + bias for name, blocks, bias in seen}, g


def para_output(mixer, h: Tensor, g: Tensor | None) -> Tensor:
    if g is None:
        return h
    h = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    return (h * torch.nn.functional.silu(g)) @ mixer.o_proj.weight.T


@pytest.mark.parametrize(("name", "options"), PARA, ids=str)
def test_para_cells_are_their_equations(name, options):
    mixer = build(name, **options)

    def literal(x):
        gates, g = para_gates(mixer, x)
        v = dict(zip(mixer.cell.vectors, mixer.vectors, strict=True))
        h = c = torch.zeros(mixer.width, dtype=x.dtype)
        outputs = []
        for t in range(len(x)):
            seen = {gate: value[t] for gate, value in gates.items()}
            if name == "para-gru":
                z = torch.sigmoid(v["a_z"] * h + seen["W_z"])
                r = torch.sigmoid(v["a_r"] * h + seen["W_r"])
                h = (1 - z) * h + z * torch.tanh(v["a_c"] * (h * r) + seen["W_c"])
            else:
                peep = {k: v.get(f"c_{k}", torch.zeros(())) for k in "fio"}
                f = torch.sigmoid(v["a_f"] * h + peep["f"] * c + seen["W_f"])
                i = 1 - f if mixer.coupled else torch.sigmoid(v["a_i"] * h + peep["i"] * c + seen["W_i"])
                c = f * c + i * torch.tanh(v["a_z"] * h + seen["W_z"])
                h = torch.sigmoid(v["a_o"] * h + peep["o"] * c + seen["W_o"]) * torch.tanh(c)
            outputs.append(h)
        last = {"h": h} if name == "para-gru" else {"h": h, "c": c}
        return para_output(mixer, torch.stack(outputs), g), last

    check(mixer, literal)


@pytest.mark.parametrize("name", ["para-gru", "para-lstm"])
def test_para_cells_that_do_not_look_back_are_scans(name):
    """With vectors of zero the gates see the input alone, and the memory is linear: another op of this library."""
    mixer = build(name)
    with torch.no_grad():
        mixer.vectors.zero_()
        x = torch.randn(1, 40, DIM, dtype=torch.float64)
        gates, g = para_gates(mixer, x[0])
        squash = {k[-1]: torch.tanh(v) if k == "W_c" else torch.sigmoid(v) for k, v in gates.items()}
        if name == "para-gru":
            h, last = ops.scan((1 - squash["z"])[None], (squash["z"] * squash["c"])[None])
        else:
            memory, last = ops.scan(squash["f"][None], ((1 - squash["f"]) * torch.tanh(gates["W_z"]))[None])
            h = squash["o"] * torch.tanh(memory)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            y, state = mixer.to(dtype)(x.to(dtype))
            torch.testing.assert_close(y.double(), para_output(mixer.double(), h, g), rtol=tolerance, atol=tolerance)
            entry = state["h" if name == "para-gru" else "c"]
            torch.testing.assert_close(entry.double(), last, rtol=tolerance, atol=tolerance)


def test_the_jacobian_is_diagonal_and_that_of_the_paper():
    mixer = build("para-gru", preset="cell")
    x = torch.randn(1, 1, DIM, dtype=torch.float64)
    h = torch.randn(DIM, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda h: mixer(x, State(h=h[None]))[1]["h"][0], h)
    with torch.no_grad():
        gates = para_gates(mixer, x[0])[0]
        a_z, a_r, a_c = mixer.vectors
        z, r = torch.sigmoid(a_z * h + gates["W_z"][0]), torch.sigmoid(a_r * h + gates["W_r"][0])
        c = torch.tanh(a_c * h * r + gates["W_c"][0])
        diagonal = (1 - z) + (c - h) * z * (1 - z) * a_z + z * (1 - c**2) * a_c * (r + h * r * (1 - r) * a_r)
    torch.testing.assert_close(jacobian, torch.diag(diagonal), rtol=1e-10, atol=1e-12)

    mixer = build("para-lstm", preset="cell")
    state = torch.randn(2, DIM, dtype=torch.float64)

    def step(state):
        after = mixer(x, State(h=state[1:], c=state[:1]))[1]
        return torch.cat([after["c"], after["h"]])

    jacobian = torch.autograd.functional.jacobian(step, state)  # (c, h) by (c, h)
    with torch.no_grad():
        gates, v = para_gates(mixer, x[0])[0], dict(zip(mixer.cell.vectors, mixer.vectors, strict=True))
        c, h = state
        f = torch.sigmoid(v["a_f"] * h + v["c_f"] * c + gates["W_f"][0])
        z = torch.tanh(v["a_z"] * h + gates["W_z"][0])
        new = f * c + (1 - f) * z
        o, t = torch.sigmoid(v["a_o"] * h + v["c_o"] * new + gates["W_o"][0]), torch.tanh(new)
        F, O, Z, Q = f * (1 - f), o * (1 - o), 1 - z**2, o * (1 - t**2)
        cc, ch = f + (c - z) * F * v["c_f"], (c - z) * F * v["a_f"] + (1 - f) * Z * v["a_z"]
        hc, hh = (t * O * v["c_o"] + Q) * cc, t * O * (v["a_o"] + v["c_o"] * ch) + Q * ch
    for i, row in enumerate(((cc, ch), (hc, hh))):
        for j, wanted in enumerate(row):
            torch.testing.assert_close(jacobian[i, :, j], torch.diag(wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["para-gru", "para-lstm"])
def test_para_cells_start_within_their_limit_and_stay(name):
    mixer = mixers.build(name, 512)
    assert not mixer.bias_ih.any()
    assert abs(float(mixer.vectors.detach().std()) * 128**0.5 - 1) < 0.1
    assert abs(float(mixer.weight_ih.detach().std()) * (3 * 128) ** 0.5 - 1) < 0.02
    wide = mixers.build(name, 512, preset="state-tracking")
    assert wide.vectors.abs().max() > 2
    with torch.no_grad():
        for module in (mixer, wide):
            module.vectors += 1.0
            module.constrain_()
    assert mixer.vectors.max() == 0.5
    assert wide.vectors.max() > 3
    assert mixers.build(name, 512, recurrent_std=1.0, recurrent_limit=0.9).vectors.abs().max() <= 0.9


# -- all three ---------------------------------------------------------------------------------------------------------
def test_kernels_do_not_change_the_gradients():
    for name in ("slstm", "para-gru", "para-lstm"):
        mixer, x = build(name).float(), torch.randn(3, 21, DIM)
        found = []
        for backend in ("reference", "numba"):
            with tidegate.backend(backend):
                y, state = mixer(x)
            loss = y.square().sum() + sum(entry.square().sum() for entry in state.values())
            found.append(torch.autograd.grad(loss, list(mixer.parameters())))
        for seen, wanted in zip(*found, strict=True):
            torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("slstm", {"forget_gate": "tanh"}, "forget_gate: seen 'tanh', wanted 'sigmoid' or 'exp'"),
        ("slstm", {"norm": "batch"}, "norm: seen 'batch', wanted 'layer', 'rms' or None"),
        ("slstm", {"recurrent_init": "ones"}, "recurrent_init: seen 'ones', wanted 'zeros' or 'uniform'"),
        ("slstm", {"conv_width": 0}, "conv_width: seen 0, wanted at least 1"),
        ("slstm", {"num_heads": 5}, "num_heads: .* wanted a whole number"),
        ("para-gru", {"num_heads": 5}, "expand: .* wanted a whole number"),
        ("para-gru", {"block": False, "expand": 2.0}, "expand: seen 2, wanted 1 without the block"),
        ("para-lstm", {"conv_width": 0}, "conv_width: seen 0, wanted at least 1"),
        ("para-lstm", {"recurrent_std": 0.0}, "recurrent_std: seen 0.0, wanted more than 0"),
        ("para-lstm", {"recurrent_limit": -1.0}, "recurrent_limit: seen -1.0, wanted more than 0"),
    ],
)
def test_errors_name_the_option(name, options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build(name, DIM, **options)
