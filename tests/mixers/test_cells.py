"""Nonlinear cells: each against its equation as a loop, against PyTorch's where it has one, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tidegate
from tests.mixers import cell_equations
from tests.mixers.cells import D, build, draw, gradients, near
from tidegate import Segments, State, mixers

CASES = [
    ("antisymmetric-rnn", {}),
    ("antisymmetric-rnn", {"gated": True, "epsilon": 0.5, "num_heads": 2}),
    ("antisymmetric-rnn", {"gamma": 0.0}),
    ("brc", {}),
    ("brc", {"neuromodulated": True, "num_heads": 2}),
    ("co-rnn", {}),
    ("co-rnn", {"implicit": True, "dt": 0.5, "gamma": 1.5, "epsilon": 0.2}),
    ("co-rnn", {"preset": "adding", "num_heads": 2}),
    ("cfn", {}),
    ("cfn", {"num_heads": 2}),
    ("elman", {}),
    ("elman", {"nonlinearity": "relu", "num_heads": 2}),
    ("fast-rnn", {}),
    ("fast-rnn", {"nonlinearity": "relu", "num_heads": 2}),
    ("fast-rnn", {"gated": True}),
    ("fast-rnn", {"gated": True, "nonlinearity": "sigmoid", "gate_nonlinearity": "tanh", "num_heads": 4}),
    ("gru", {}),
    ("gru", {"reset": "before", "num_heads": 2}),
    ("ind-rnn", {}),
    ("ind-rnn", {"nonlinearity": "tanh"}),
    ("janet", {}),
    ("janet", {"beta": -0.5, "num_heads": 4}),
    ("jordan", {}),
    ("jordan", {"alpha": 0.5, "nonlinearity": "sigmoid", "output_activation": "sigmoid"}),
    ("jordan", {"alpha": 0.25, "nonlinearity": "relu", "output_activation": "tanh", "num_heads": 2}),
    ("lem", {}),
    ("lem", {"dt": 0.3, "num_heads": 2}),
    ("li-gru", {}),
    ("li-gru", {"nonlinearity": "tanh", "num_heads": 2}),
    ("lstm", {}),
    ("lstm", {"peephole": True, "num_heads": 2}),
    ("lstm", {"peephole": True, "coupled": True}),
    ("lstm", {"layer_norm": True, "num_heads": 2}),
    ("lstm", {"hidden_size": 13}),
    ("lstm", {"hidden_size": 13, "peephole": True, "layer_norm": True, "forget_gate": False}),
    ("lstm", {"forget_gate": False}),
    ("lstm", {"input_gate": False, "output_activation": False}),
    ("lstm", {"output_gate": False, "input_activation": False, "peephole": True}),
    ("lstm", {"gate_recurrence": True, "num_heads": 2}),
    ("lstm", {"gate_recurrence": True, "peephole": True, "coupled": True, "layer_norm": True}),
    ("lstm", {"gate_recurrence": True, "forget_gate": False}),
    *(("mgu", {"gate": gate}) for gate in ("full", "state-bias", "state", "bias")),
    *(("mgu", {"gate": gate, "convention": "flax"}) for gate in ("full", "state", "bias")),
    ("mgu", {"num_heads": 4}),
    ("minimal-rnn", {}),
    ("minimal-rnn", {"num_heads": 4}),
    ("multiplicative-lstm", {}),
    ("multiplicative-lstm", {"num_heads": 2}),
    ("ran", {}),
    ("ran", {"nonlinearity": "identity", "num_heads": 2}),
    ("rhn", {"depth": 1}),
    ("rhn", {"depth": 3, "num_heads": 2}),
    ("rhn", {"depth": 2, "coupled": False}),
    ("star", {}),
    ("star", {"beta": 1.0, "num_heads": 2}),
    ("ugrnn", {}),
    ("ugrnn", {"intersection": True, "num_heads": 2}),
]


# -- each against its equation -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value) if value else "")
def test_equals_the_equation(name, options):
    """Outputs, final states, and gradients of everything."""
    cell, x = build(name, **options), draw(2, 6, D).requires_grad_()
    state = cell.init_state(2).map(lambda entry: torch.randn_like(entry).requires_grad_())
    leaves = [x, *state.values(), *cell.parameters()]
    y, last = cell(x, state)
    expected, *final = cell_equations.run(name, cell, x, *state.values())
    for seen, wanted in zip([y, *last.values()], [expected, *final], strict=True):
        near(seen, wanted)
    for seen, wanted in zip(gradients([y, *last.values()], leaves), gradients([expected, *final], leaves), strict=True):
        near(seen, wanted, 1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lstm", {}),
        ("gru", {"reset": "before"}),
        ("ugrnn", {"intersection": True}),
        ("lstm", {"hidden_size": 13}),
        ("li-gru", {}),
        ("fast-rnn", {"gated": True}),
    ],
)
def test_kernels_equal_the_equation(name, options):
    """In float32, where kernels run: packed, padded and whole, outputs, states and gradients."""
    cell, single = build(name, **options), build(name, **options).float()
    T = 13
    holes = torch.rand(4, T) > 0.3
    holes[2] = False  # a row without a token
    holes[:2, 0] = False
    packed = Segments.packed([[5, 1, 7], [13], [4, 9], [13]], continues=True)
    for segments in (None, packed, packed & Segments.padded(holes)):
        x, state = draw(4, T, D).float().double(), cell.init_state(4).map(torch.randn_like).map(lambda e: e.float())
        found = []
        for own, form in ((single, "numba"), (cell, "reference")):
            dtype = own.weight_ih.dtype
            leaves = [entry.to(dtype).detach().requires_grad_() for entry in (x, *state.values())]
            with tidegate.backend(form):
                y, last = own(leaves[0], State(dict(zip(state, leaves[1:], strict=True))), segments=segments)
            outputs = [y, *last.values()]
            found.append([*outputs, *gradients(outputs, [*leaves, *own.parameters()])])
        for seen, wanted in zip(*found, strict=True):
            near(seen.double() / wanted.abs().max().clamp(min=1), wanted / wanted.abs().max().clamp(min=1), 2e-5)
        if segments is not None:
            assert (y[~segments.valid] == 0).all()


@pytest.mark.parametrize(("name", "options"), [("lstm", {}), ("gru", {}), ("gru", {"reset": "before"})])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_wide_state(name, options, dtype):
    torch.manual_seed(0)
    cell, x = mixers.build(name, D, **options), torch.randn(2, 9, D)
    expected, _ = cell(x)
    for segments in (None, Segments.packed([[9], [9]])):
        y, state = cell.to(dtype)(x.to(dtype), segments=segments)
        assert y.dtype == dtype
        assert all(entry.dtype == torch.float32 for entry in state.values())
        torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


# -- PyTorch's ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "module", "more"),
    [
        ("elman", {}, nn.RNN, {}),
        ("elman", {"nonlinearity": "relu"}, nn.RNN, {"nonlinearity": "relu"}),
        ("lstm", {}, nn.LSTM, {}),
        ("lstm", {"hidden_size": 13}, nn.LSTM, {"proj_size": D}),
        ("gru", {}, nn.GRU, {}),
    ],
)
def test_equals_torch_with_torch_weights(name, options, module, more):
    x = draw(3, 11, D)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        if dtype == torch.float32 and "nonlinearity" in options:
            continue  # kernels that nothing else needs, two seconds to compile
        cell = build(name, **options).to(dtype)
        peer = module(D, options.get("hidden_size", D), batch_first=True, dtype=dtype, **more)
        own, others = dict(cell.named_parameters()), dict(peer.named_parameters())
        cell.load_state_dict({key.removesuffix("_l0"): value for key, value in peer.state_dict().items()})
        expected, last = peer(x.to(dtype))
        y, state = cell(x.to(dtype))
        near(y, expected, tolerance)
        for entry, other in zip(state.values(), last if name == "lstm" else (last,), strict=True):
            near(entry, other[0], tolerance)
        found = gradients([y], list(own.values()))
        wanted = gradients([expected], [others[f"{key}_l0"] for key in own])
        for gradient, other in zip(found, wanted, strict=True):
            near(gradient, other, tolerance)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("antisymmetric-rnn", {"epsilon": 0.0}, "epsilon: seen 0.0, wanted a step size above 0"),
        ("antisymmetric-rnn", {"gamma": -0.1}, "gamma: seen -0.1, wanted a strength of diffusion of at least 0"),
        ("brc", {"num_heads": 3}, "num_heads: seen 3, wanted a divisor of dim = 8"),
        ("star", {"beta": float("nan")}, "beta: seen nan, wanted a finite number"),
        ("antisymmetric-rnn", {"gamma": float("inf")}, "gamma: seen inf"),
        ("co-rnn", {"epsilon": float("inf"), "implicit": True}, "epsilon: seen inf"),
        ("co-rnn", {"dt": 0.0}, "dt: seen 0.0, wanted more than 0"),
        ("co-rnn", {"gamma": -1.0}, "gamma: seen -1.0, wanted more than 0"),
        ("co-rnn", {"epsilon": 0.0}, "epsilon: seen 0.0, wanted more than 0"),
        ("co-rnn", {"dt": 0.5}, r"dt: seen 0.5, too long a step: wanted 2 dt epsilon \+ dt\^2 gamma < 4"),
        ("co-rnn", {"dt": 5.0, "implicit": True}, r"dt: seen 5.0, too long a step: wanted dt\^2 gamma < 4 \+ 2"),
        ("elman", {"nonlinearity": "gelu"}, "nonlinearity: seen 'gelu', wanted 'tanh' or 'relu'"),
        ("elman", {"recurrent_init": "zero"}, "recurrent_init: seen 'zero', wanted one of 'uniform', 'orthogonal'"),
        ("elman", {"num_heads": 3}, "num_heads: seen 3, wanted a divisor of dim = 8"),
        (
            "fast-rnn",
            {"nonlinearity": "gelu"},
            "nonlinearity: seen 'gelu', wanted one of 'tanh', 'relu', 'sigmoid'",
        ),
        ("fast-rnn", {"gate_nonlinearity": "relu"}, "gate_nonlinearity: seen 'relu', wanted 'sigmoid' or 'tanh'"),
        ("fast-rnn", {"gate_nonlinearity": "tanh"}, "gate_nonlinearity: seen 'tanh', but there is no gate"),
        ("gru", {"reset": "never"}, "reset: seen 'never'"),
        ("gru", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("ind-rnn", {"nonlinearity": "sigmoid"}, "nonlinearity: seen 'sigmoid', wanted 'relu' or 'tanh'"),
        ("ind-rnn", {"length": 0}, "length: seen 0, wanted at least 1"),
        ("ind-rnn", {"gamma": 0.5}, "gamma: seen 0.5, wanted at least 1"),
        ("ind-rnn", {"max_recurrent": 1.5}, "max_recurrent: seen 1.5, wanted more than 0 and at most the bound, 1"),
        ("ind-rnn", {"max_recurrent": 0.0}, "max_recurrent: seen 0.0"),
        ("janet", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("jordan", {"alpha": 1.0}, r"alpha: seen 1.0, wanted a number in \[0, 1\)"),
        ("jordan", {"nonlinearity": "gelu"}, "nonlinearity: seen 'gelu', wanted one of 'tanh', 'relu', 'sigmoid'"),
        ("jordan", {"output_activation": "relu"}, "output_activation: seen 'relu', wanted one of 'identity'"),
        ("li-gru", {"nonlinearity": "sin"}, "nonlinearity: seen 'sin', wanted 'relu' or 'tanh'"),
        ("lem", {"dt": 0.0}, "dt: seen 0.0, wanted more than 0 and at most 1"),
        ("lem", {"dt": 1.5}, "dt: seen 1.5, wanted more than 0 and at most 1"),
        ("lstm", {"chrono_length": 2}, "chrono_length: seen 2"),
        ("lstm", {"coupled": True, "forget_gate": False}, "coupled: seen True with forget_gate=False"),
        ("lstm", {"coupled": True, "input_gate": False}, "coupled: seen True with input_gate=False"),
        ("lstm", {"hidden_size": 8}, "hidden_size: seen 8, wanted more than dim = 8"),
        ("lstm", {"hidden_size": 16, "num_heads": 2}, "num_heads: seen 2 with hidden_size"),
        ("lstm", {"hidden_size": 16, "gate_recurrence": True}, "gate_recurrence: seen True with hidden_size"),
        (
            "lstm",
            {"gate_recurrence": True, "input_gate": False, "forget_gate": False, "output_gate": False},
            "gate_recurrence: seen True without a gate",
        ),
        ("mgu", {"convention": "keras"}, "convention: seen 'keras', wanted 'paper' or 'flax'"),
        ("mgu", {"gate": "input"}, "gate: seen 'input', wanted one of 'full', 'state-bias'"),
        ("ran", {"nonlinearity": "relu"}, "nonlinearity: seen 'relu', wanted 'tanh' or 'identity'"),
        ("rhn", {"depth": 0}, "depth: seen 0, wanted at least 1"),
        ("star", {"chrono_length": 2}, "chrono_length: seen 2"),
    ],
)
def test_errors_name_the_option(name, options, match):
    with pytest.raises(ValueError, match=match):
        mixers.build(name, D, **options)


@pytest.mark.parametrize("name", ["antisymmetric-rnn", "co-rnn", "lem"])
def test_step_sizes_are_no_part_of_what_is_compiled(name):
    option = "epsilon" if name == "antisymmetric-rnn" else "dt"
    one, other = (mixers.build(name, D, dtype=torch.float64, **{option: value}) for value in (0.1, 0.2))
    assert one.cell is other.cell
    assert one.config()[option] == 0.1
    x = draw(1, 5, D)
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(one(x)[0], other(x)[0])


# -- how it is run -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["lstm", "slstm", "para-lstm"])
def test_gradients_are_cut_and_clipped_and_the_method_chosen(name):
    torch.manual_seed(0)
    preset = {"lstm": None, "slstm": "cell", "para-lstm": "state-tracking"}[name]
    mixer = mixers.build(name, 16, **({"preset": preset} if preset else {}))
    mixer = mixer.double()
    x = torch.randn(1, 12, 16, dtype=torch.float64, requires_grad=True)

    def flow():
        return torch.autograd.grad(1e6 * mixer(x)[0][:, -1].sum(), x)[0].abs().amax(-1)[0]

    whole = flow()
    assert (whole > 0).all()
    mixer.truncate = 5
    cut = flow()
    assert not cut[:10].any()
    assert (cut[10:] > 0).all()
    mixer.truncate, mixer.gradient_clip = None, 1.0
    assert (flow()[:-1] < whole[:-1]).all()
    mixer.gradient_clip, mixer.method = None, "newton"
    torch.testing.assert_close(flow(), whole, rtol=1e-8, atol=1e-8)
