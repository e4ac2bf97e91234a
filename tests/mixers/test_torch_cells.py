"""LSTM and GRU: the textbook loop, torch.nn, and every way they are run."""

from __future__ import annotations

import pytest
import torch

import tidegate
from tidegate import Segments, mixers

CELLS = [("lstm", {}), ("gru", {}), ("gru", {"reset": "before"})]
DIM = 6


def build(name, options=None, **more):
    torch.manual_seed(0)
    return mixers.build(name, DIM, **{"dtype": torch.float64, **(options or {}), **more})


def literal(cell, x):
    """The equations for one document, gate by gate."""
    gates = len(cell.cell.inputs)
    W, U, b, d = (p.chunk(gates) for p in (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
    h = c = torch.zeros(DIM, dtype=x.dtype)
    outputs = []
    for t in range(len(x)):

        def gate(k, h, t=t):
            return W[k] @ x[t] + b[k] + U[k] @ h + d[k]

        if gates == 4:
            i, f, g, o = (gate(k, h) for k in range(4))
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            r, z = torch.sigmoid(gate(0, h)), torch.sigmoid(gate(1, h))
            if cell.reset == "after":
                n = torch.tanh(W[2] @ x[t] + b[2] + r * (U[2] @ h + d[2]))
            else:
                n = torch.tanh(gate(2, r * h))
            h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize(("name", "options"), CELLS)
@pytest.mark.parametrize("backend", ["reference", "parallel"])
def test_equals_the_equations(name, options, backend):
    cell = build(name, options)
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    with tidegate.backend(backend), torch.no_grad():
        y, state = cell(x)
        for row in range(2):
            expected, h, c = literal(cell, x[row])
            torch.testing.assert_close(y[row], expected, atol=1e-12, rtol=1e-12)
            torch.testing.assert_close(state["h"][row], h, atol=1e-12, rtol=1e-12)
            if name == "lstm":
                torch.testing.assert_close(state["c"][row], c, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("name", "module"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_with_torch_weights(name, module, dtype):
    cell, peer = build(name, dtype=dtype), module(DIM, DIM, batch_first=True, dtype=dtype)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in peer.state_dict().items()})
    x = torch.randn(3, 11, DIM, dtype=dtype)
    expected, last = peer(x)
    y, state = cell(x)
    torch.testing.assert_close(y, expected)
    for entry, other in zip(state.values(), last if name == "lstm" else (last,), strict=True):
        torch.testing.assert_close(entry, other[0])


@pytest.mark.parametrize(("name", "options"), CELLS)
def test_all_ways_to_run_it_agree(name, options):
    """Kernel, packed kernel and loop: outputs, final state, and the gradients of everything."""
    cell = build(name, options)
    T = 13
    holes = torch.rand(4, T) > 0.3
    holes[2] = False  # a row without a token
    holes[:2, 0] = False
    packed = Segments.packed([[5, 1, 7], [13], [4, 9], [13]], continues=True)
    blank = Segments.padded(torch.zeros(4, T))
    for segments in (None, packed, Segments.padded(holes), packed & Segments.padded(holes), blank):
        x = torch.randn(4, T, DIM, dtype=torch.float64)
        state = cell.init_state(4).map(torch.randn_like)
        found = []
        for backend in ("reference", "parallel"):
            leaves = [x.clone().requires_grad_(), *(entry.clone().requires_grad_() for entry in state.values())]
            with tidegate.backend(backend):
                y, last = cell(leaves[0], tidegate.State(dict(zip(state, leaves[1:], strict=True))), segments=segments)
            generator = torch.Generator().manual_seed(1)
            loss = sum(
                (z * torch.randn(z.shape, generator=generator, dtype=z.dtype)).sum() for z in (y, *last.values())
            )
            gradients = torch.autograd.grad(loss, [*leaves, *cell.parameters()], materialize_grads=True)
            found.append([y, *last.values(), *gradients])
        for seen, wanted in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(seen, wanted, atol=1e-10, rtol=1e-10)
        if segments is not None:
            assert (y[~segments.valid] == 0).all()


@pytest.mark.parametrize(("name", "options"), CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_wide_state(name, options, dtype):
    cell, x = build(name, options, dtype=torch.float32), torch.randn(2, 9, DIM)
    expected, _ = cell(x)
    for segments in (None, Segments.packed([[9], [9]])):
        y, state = cell.to(dtype)(x.to(dtype), segments=segments)
        assert y.dtype == dtype
        assert all(entry.dtype == torch.float32 for entry in state.values())
        torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_biases_at_initialisation(name):
    dim = 400
    cell = mixers.build(name, dim, forget_bias=2.5)
    with torch.no_grad():
        total = (cell.bias_ih + cell.bias_hh).chunk(len(cell.cell.inputs))
        assert (total[1] == 2.5).all()  # exactly, although PyTorch adds two biases
        others = torch.cat(
            [cell.weight_ih.flatten(), cell.weight_hh.flatten(), cell.bias_ih.chunk(len(cell.cell.inputs))[2]]
        )
        assert others.abs().max() <= dim**-0.5
        assert abs(float(others.std()) * (3 * dim) ** 0.5 - 1) < 0.02

        cell = mixers.build(name, dim, chrono_length=100)
        total = (cell.bias_ih + cell.bias_hh).chunk(len(cell.cell.inputs))
        lags = torch.exp(total[1])
        assert lags.min() >= 1 - 1e-4
        assert lags.max() <= 99 + 1e-2
        assert abs(float(lags.mean()) - 50) < 5
        if name == "lstm":
            assert torch.equal(total[0], -total[1])


def test_errors_name_the_option():
    with pytest.raises(ValueError, match="reset: seen 'never'"):
        mixers.build("gru", 4, reset="never")
    for name in ("lstm", "gru"):
        with pytest.raises(ValueError, match="chrono_length: seen 2"):
            mixers.build(name, 4, chrono_length=2)
