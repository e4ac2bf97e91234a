"""HGRN, QRNN, SRU, minGRU, minLSTM: each against its paper's equation, step by step, and against a second form.

The second forms are sums over the past, other parametrisations, and log space. What the contract suite asks of the
tiny configuration is asked here of the other options.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.nn import functional

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import mixers, registry

D, T = 6, 17
VARIANTS = [
    ("hgrn", dict()),
    ("hgrn", dict(complex_state=True, layer_index=2, num_layers=4)),
    ("hgrn", dict(preset="paper", lower_bound=0.9, conv_width=3)),
    ("hgrn", dict(norm="layer", gate_activation="sigmoid", expand=0.5)),
    ("hgrn", dict(norm_before_gate=False, conv_width=1, bias=True)),
    ("qrnn", dict()),
    ("qrnn", dict(pooling="f", window=1)),
    ("qrnn", dict(pooling="ifo", window=6, forget_bias=2.0)),
    ("sru", dict()),
    ("sru", dict(gates_see_state=False)),
    ("sru", dict(highway=False, rank=3, forget_bias=1.0)),
    ("sru", dict(rescale=False, highway_bias=-2.0)),
    ("min-gru", dict()),
    ("min-gru", dict(candidate="linear", expand=2, bias=False)),
    ("min-lstm", dict()),
    ("min-lstm", dict(candidate="linear", expand=2, forget_bias=1.0)),
    ("min-lstm", dict(normalise=False, expand=0.5)),
]


def subject(name, options):
    options = {**options, **registry.info(name).presets.get(options.get("preset"), {})}
    options.pop("preset", None)
    return Subject(name, registry.info(name).cls, D, options)


def variant(*names):
    chosen = [(name, options) for name, options in VARIANTS if not names or name in names]
    ids = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in chosen]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=ids)


def weighted_sum(keep, taken):
    """h_t = sum_s (prod of keep over s < r <= t) taken_s, as T x T weights; no recurrence."""
    total = keep.abs().log().cumsum(1)
    lag = total[:, :, None] - total[:, None]
    causal = torch.ones(keep.shape[1], keep.shape[1]).tril().bool()[..., None]
    weights = torch.exp(torch.where(causal, lag, -torch.inf))
    return torch.einsum("btsd,bsd->btd", weights.to(taken.dtype), taken)


def log_space(log_keep, log_taken, log_h0):
    """The papers' scan of log h: A + logcumsumexp(log b - A), A = cumsum(log a); the state goes in front as log h."""
    total = functional.pad(log_keep.cumsum(1), (0, 0, 1, 0))
    return torch.exp(total + torch.logcumsumexp(torch.cat([log_h0[:, None], log_taken], 1) - total, 1))[:, 1:]


# -- the contract, for the options that the tiny configuration leaves out ----------------------------------------------
@variant()
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(name, options, kind):
    case = subject(name, options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(name))
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), alone(mixer, segments), x, state)
    if segments is not None:
        assert (got.outputs["y"][~segments.valid] == 0).all()
    single = case.build(torch.float32)
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), x, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")
    assert_near(seen.gradients, wanted.gradients, EQUAL[torch.float32], "gradients")


@variant()
def test_every_weight_matters(name, options):
    mixer = subject(name, options).build()
    y, _ = mixer(torch.randn(2, 9, D, dtype=torch.float64))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in mixer.parameters())


@variant()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_wide_state(name, options, dtype):
    mixer = subject(name, options).build(dtype)
    y, state = mixer(torch.randn(2, 9, D).to(dtype))
    assert y.dtype == dtype
    assert state["memory"].dtype in (torch.float32, torch.complex64)


# -- HGRN --------------------------------------------------------------------------------------------------------------
def hgrn_inputs(mixer, x):
    """gamma, forget gate, input and gate as the paper writes them; no convolution."""
    E, values = mixer.width, mixer.parts * mixer.width
    weight, bias = mixer.fig_proj.weight, 0 if mixer.fig_proj.bias is None else mixer.fig_proj.bias
    f, i, g = (x @ weight.T + bias).split([E, values, values], -1)
    gamma = torch.zeros(E) if mixer.lower_bound_logit is None else torch.sigmoid(mixer.lower_bound_logit)
    i = functional.silu(i)
    return (
        gamma + (1 - gamma) * torch.sigmoid(f),
        torch.complex(i[..., ::2], i[..., 1::2]) if mixer.theta is not None else i,
        g,
    )


def hgrn_output(mixer, h, g):
    if h.is_complex():
        h = torch.stack([h.real, h.imag], -1).flatten(-2)
    gate = {"silu": functional.silu, "sigmoid": torch.sigmoid}[mixer.gate_activation](g)
    if not mixer.norm_before_gate:
        h = h * gate
    if mixer.norm == "layer":
        centred = h - h.mean(-1, keepdim=True)
        h = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + mixer.norm_eps) * mixer.norm_weight
        h = h + mixer.norm_bias
    else:
        h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + mixer.norm_eps) * mixer.norm_weight
    return mixer.o_proj(h * gate if mixer.norm_before_gate else h)


@pytest.mark.parametrize("options", [o for n, o in VARIANTS if n == "hgrn" and "conv_width" not in o])
def test_hgrn_equals_the_equation_and_the_weighted_sum(options):
    mixer = subject("hgrn", options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        forget, value, gate = hgrn_inputs(mixer, x)
        # 1. Step by step.
        turn = 1 if mixer.theta is None else torch.exp(1j * mixer.theta)
        h, steps = torch.zeros_like(value[:, 0]), []
        for t in range(T):
            h = forget[:, t] * turn * h + (1 - forget[:, t]) * value[:, t]
            steps.append(h)
        torch.testing.assert_close(y, hgrn_output(mixer, torch.stack(steps, 1), gate), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(state["memory"], h, atol=1e-11, rtol=1e-11)
        # 2. In a frame that turns with theta nothing turns: a real sum over the past.
        frame = 1 if mixer.theta is None else torch.exp(1j * mixer.theta * torch.arange(T)[:, None])
        summed = weighted_sum(forget, (1 - forget) * value / frame) * frame
        torch.testing.assert_close(y, hgrn_output(mixer, summed, gate), atol=1e-11, rtol=1e-11)


def test_hgrn_lower_bounds_begin_as_the_papers_table_and_can_hold_any():
    """The paper: gamma of layer l is cumsum(softmax(Gamma over layers))_l minus that of layer 0."""
    layers = 5
    built = [mixers.build("hgrn", D, layer_index=n, num_layers=layers, dtype=torch.float64) for n in range(layers)]
    for table in (torch.zeros(layers, D), torch.randn(layers, D)):
        share = table.double().softmax(0)
        bounds = share.cumsum(0) - share[0]
        for n, mixer in enumerate(built):
            if n == 0:
                assert mixer.lower_bound_logit is None
                continue
            if table.any():
                with torch.no_grad():
                    mixer.lower_bound_logit.copy_(torch.logit(bounds[n]))
            torch.testing.assert_close(torch.sigmoid(mixer.lower_bound_logit), bounds[n])
            # No forget gate is below its bound, however strongly its logit asks for it.
            x = torch.randn(1, 3, D, dtype=torch.float64) * 1e3
            assert (hgrn_inputs(mixer, x)[0] >= bounds[n] - 1e-9).all()


def test_hgrn_initialisation():
    mixer = mixers.build("hgrn", 256, complex_state=True, bias=True, lower_bound=0.25)
    torch.testing.assert_close(torch.sigmoid(mixer.lower_bound_logit), torch.full((256,), 0.25))
    torch.testing.assert_close(mixer.theta[[0, 128]], torch.tensor([1.0, 1e-4]))
    for part in (mixer.fig_proj, mixer.o_proj):
        assert abs(float(part.weight.detach().std()) / 0.02 - 1) < 0.02
        assert (part.bias == 0).all()


# -- QRNN --------------------------------------------------------------------------------------------------------------
def qrnn_gates(mixer, x):
    """z, f, o, i by torch's convolution over time, left-padded with zeros."""
    kernel = mixer.zfoi_proj.weight.unflatten(1, (mixer.window, D)).transpose(1, 2)  # (out, in, window)
    padded = functional.pad(x.transpose(1, 2), (mixer.window - 1, 0))
    z, f, *rest = functional.conv1d(padded, kernel, mixer.zfoi_proj.bias).transpose(1, 2).split(D, -1)
    o = torch.sigmoid(rest[0]) if rest else torch.ones_like(z)
    return torch.tanh(z), torch.sigmoid(f), o, torch.sigmoid(rest[1]) if len(rest) > 1 else 1 - torch.sigmoid(f)


@variant("qrnn")
def test_qrnn_equals_the_equation_and_the_weighted_sum(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        weight = mixer.zfoi_proj.weight.split(D)
        biases = mixer.zfoi_proj.bias.split(D)
        past = torch.cat([torch.zeros(2, mixer.window - 1, D), x], 1)
        c = torch.zeros(2, D, dtype=torch.float64)
        for t in range(T):
            u = past[:, t : t + mixer.window].reshape(2, -1)
            z, f, *rest = (u @ w.T + b for w, b in zip(weight, biases, strict=True))
            f = torch.sigmoid(f)
            taken = torch.sigmoid(rest[1]) if mixer.pooling == "ifo" else 1 - f
            c = f * c + taken * torch.tanh(z)
            expected = c if mixer.pooling == "f" else torch.sigmoid(rest[0]) * c
            torch.testing.assert_close(y[:, t], expected, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(state["memory"], c, atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(state["window"], x[:, T - mixer.window + 1 :])
        z, f, o, i = qrnn_gates(mixer, x)
        torch.testing.assert_close(y, o * weighted_sum(f, i * z), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pooling", ["f", "ifo"])
def test_zoneout_keeps_channels_in_training_and_what_is_expected_in_evaluation(pooling):
    mixer = mixers.build("qrnn", D, pooling=pooling, zoneout=0.4, dtype=torch.float64)
    x = torch.randn(64, 40, D, dtype=torch.float64)
    with torch.no_grad():
        z, f, o, i = qrnn_gates(mixer, x)
        c = mixer(x)[0] / o
        # A channel either keeps its value exactly or moves by the equation.
        before = functional.pad(c, (0, 0, 1, 0))[:, :-1]
        moved = (f * before + i * z - c).abs() < 1e-12
        assert (moved | ((c - before).abs() < 1e-12)).all()
        assert abs(float(moved.double().mean()) - 0.6) < 0.02
        assert not torch.equal(mixer(x)[0], mixer(x)[0])
        expected = weighted_sum(1 - 0.6 * (1 - f), 0.6 * i * z) * o
        torch.testing.assert_close(mixer.eval()(x)[0], expected, atol=1e-10, rtol=1e-10)


# -- SRU ---------------------------------------------------------------------------------------------------------------
def sru_inputs(mixer, x):
    weight = mixer.ufr_proj.weight if mixer.rank is None else mixer.ufr_proj.weight @ mixer.down_proj.weight
    v = torch.zeros(2, D).double() if mixer.gate_state_weight is None else mixer.gate_state_weight
    scale = math.sqrt(1 + 2 * math.exp(mixer.highway_bias)) if mixer.rescale else 1.0
    return *(x @ weight.T).split(D, -1), *v, *mixer.gate_bias, scale * x if mixer.highway else torch.zeros_like(x)


@variant("sru")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sru_equals_the_equation_and_its_fixed_point(name, options, dtype):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D).double()
    with torch.no_grad():
        y, state = subject(name, options).build(dtype)(x.to(dtype))
        close = dict(atol=1e-11, rtol=1e-11) if dtype == torch.float64 else dict(atol=1e-5, rtol=1e-5)
        u, f, r, v_f, v_r, b_f, b_r, high = sru_inputs(mixer, x)
        # 1. Step by step.
        c = torch.zeros(2, D, dtype=torch.float64)
        for t in range(T):
            forget, reset = torch.sigmoid(f[:, t] + v_f * c + b_f), torch.sigmoid(r[:, t] + v_r * c + b_r)
            c = forget * c + (1 - forget) * u[:, t]
            torch.testing.assert_close(y[:, t].double(), reset * c + (1 - reset) * high[:, t], **close)
        torch.testing.assert_close(state["memory"].double(), c, **close)
        # 2. All tokens at once, with gates from the c of the round before; after round n the first n tokens are right.
        before = torch.zeros_like(x)
        for _ in range(T):
            forget = torch.sigmoid(f + v_f * before + b_f)
            c = weighted_sum(forget, (1 - forget) * u)
            before = functional.pad(c, (0, 0, 1, 0))[:, :-1]
        reset = torch.sigmoid(r + v_r * before + b_r)
        torch.testing.assert_close(y.double(), reset * c + (1 - reset) * high, **close)


def test_sru_initialisation():
    for see, gate_variance in ((True, 0.5), (False, 1.0)):
        mixer = mixers.build("sru", 256, gates_see_state=see, forget_bias=1.0, highway_bias=-3.0)
        u, f, r = mixer.ufr_proj.weight.split(256)
        for rows, variance in ((u, 1.0), (f, gate_variance), (r, gate_variance)):
            assert abs(float(rows.detach().var()) * 256 / variance - 1) < 0.03
            assert float(rows.detach().abs().max()) <= math.sqrt(3 * variance / 256)
        assert (mixer.gate_bias == torch.tensor([[1.0], [-3.0]])).all()
        if see:
            assert float(mixer.gate_state_weight.detach().abs().max()) <= math.sqrt(1.5)
            assert abs(float(mixer.gate_state_weight.detach().var()) / 0.5 - 1) < 0.2
    # What alpha is for: at initialisation the variance of white noise goes through many layers unchanged.
    x = torch.randn(64, 8, 256)
    with torch.no_grad():
        for rescale in (True, False):
            h = x
            for _ in range(8):
                h, _ = mixers.build("sru", 256, gates_see_state=False, rescale=rescale)(h)
            assert (float(h.var()) > 0.3) == rescale


# -- minGRU and minLSTM ------------------------------------------------------------------------------------------------
def log_g(x):
    return torch.where(x >= 0, torch.log(functional.relu(x) + 0.5), -functional.softplus(-x))


def min_outputs(mixer, h):
    return h if mixer.o_proj is None else h @ mixer.o_proj.weight.T


@variant("min-gru", "min-lstm")
def test_minimal_cells_equal_the_equation_and_log_space(name, options):
    mixer = subject(name, options).build()
    x = torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        state = subject(name, options).state(mixer, 2)
        y, last = mixer(x, state)
        v, *logits = mixer.input_proj(x).split(mixer.width, -1)
        # 1. Step by step.
        h, steps = state["memory"], []
        for t in range(T):
            candidate = v[:, t]
            if mixer.candidate == "positive":
                candidate = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
            if name == "min-gru":
                z = torch.sigmoid(logits[0][:, t])
                h = (1 - z) * h + z * candidate
            else:
                f, i = (torch.sigmoid(gate[:, t]) for gate in logits)
                h = (f * h + i * candidate) / (f + i if mixer.normalise else 1)
            steps.append(h)
        torch.testing.assert_close(y, min_outputs(mixer, torch.stack(steps, 1)), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(last["memory"], h, atol=1e-11, rtol=1e-11)
        # 2. The paper's log space; numbers of either sign are a difference of two positive runs.
        if name == "min-gru":
            log_keep, log_taken = -functional.softplus(logits[0]), -functional.softplus(-logits[0])
        elif mixer.normalise:
            difference = functional.softplus(-logits[0]) - functional.softplus(-logits[1])
            log_keep, log_taken = -functional.softplus(difference), -functional.softplus(-difference)
        else:
            log_keep, log_taken = (-functional.softplus(-gate) for gate in logits)
        if mixer.candidate == "positive":
            h = log_space(log_keep, log_taken + log_g(v), state["memory"].log())
        else:
            parts = [(sign * v).clamp(min=1e-300).log() for sign in (1, -1)]
            begin = [(sign * state["memory"]).clamp(min=1e-300).log() for sign in (1, -1)]
            h = log_space(log_keep, log_taken + parts[0], begin[0]) - log_space(
                log_keep, log_taken + parts[1], begin[1]
            )
        torch.testing.assert_close(y, min_outputs(mixer, h), atol=1e-9, rtol=1e-9)


def test_minimal_cells_are_means_of_positive_candidates():
    for name in ("min-gru", "min-lstm"):
        mixer = mixers.build(name, D)
        y, _ = mixer(torch.randn(2, 50, D) * 10)
        assert (y > 0).all()
        for forget_bias in (4.0, -4.0):
            mixer = mixers.build(name, D, forget_bias=forget_bias)
            keep, _ = mixer._coefficients(tuple(mixer.input_proj.bias.split(D)[1:]))
            wanted = torch.sigmoid(torch.tensor(forget_bias))  # for the LSTM against an input gate of one half
            wanted = wanted if name == "min-gru" else wanted / (wanted + 0.5)
            torch.testing.assert_close(keep, wanted.expand(D))


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("hgrn", dict(expand=0.3), "expand: 0.3"),
        ("hgrn", dict(lower_bound=1.0), "lower_bound: seen 1.0"),
        ("hgrn", dict(norm="batch"), "norm: seen 'batch'"),
        ("hgrn", dict(gate_activation="relu"), "gate_activation: seen 'relu'"),
        ("hgrn", dict(conv_width=0), "conv_width: seen 0"),
        ("qrnn", dict(window=0), "window: seen 0"),
        ("qrnn", dict(pooling="max"), "pooling: seen 'max'"),
        ("qrnn", dict(zoneout=1.0), "zoneout: seen 1.0"),
        ("sru", dict(rank=0), "rank: seen 0"),
        ("min-gru", dict(candidate="tanh"), "candidate: seen 'tanh'"),
        ("min-gru", dict(expand=0.3), "expand: 0.3"),
        ("min-lstm", dict(bias=False, forget_bias=1.0), "forget_bias: seen 1"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, 8, **options)
