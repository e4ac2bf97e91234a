"""The chunkwise forms and the sLSTM that the paper's file writes out, against other ways to the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tidegate.backend import backend
from tidegate.nn.parts import split_heads
from tidegate.papers.tfla_mlstm import EXP, FORMS, SLSTM, by_chunk, by_op, dip, gates_of, share_of_states


@pytest.mark.parametrize("chunk", [1, 4, 16, 48])
@pytest.mark.parametrize("name", list(FORMS))
def test_chunks_of_any_length_are_the_recurrence(name, chunk):
    q, k = torch.randn(2, 2, 48, 3, 5, dtype=torch.float64)
    v = torch.randn(2, 48, 3, 7, dtype=torch.float64)
    logits, forget = 3 * torch.randn(2, 2, 48, 3, dtype=torch.float64)
    inputs = [q, k, v, gates_of(name, logits), functional.logsigmoid(forget + 2)]
    with backend("reference"):
        wanted = by_op(name, inputs)
    h, states = FORMS[name](inputs, chunk)
    # eps = 1e-6 stands beside exp(-m), and the two start from another m.
    tolerance = 5e-6 if name == EXP else 1e-9
    torch.testing.assert_close(h, wanted, rtol=tolerance, atol=tolerance)
    assert all(state.shape[2] == 48 // chunk for state in states)


def test_the_slstm_is_its_equations_without_stabiliser():
    torch.manual_seed(0)
    cell = SLSTM(dim=8, heads=2).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ids = torch.randint(2, (3, 9))
    x = cell.embedding(ids)
    h = c = n = torch.zeros(3, 8, dtype=torch.float64)
    outputs = []
    for t in range(9):
        back = torch.cat([part @ R for part, R in zip(split_heads(h, 2).unbind(1), cell.recurrent, strict=True)], -1)
        back = back.reshape(3, 2, 4, 4).movedim(2, 1).reshape(3, 32)
        i, f, z, o = (x[:, t] @ cell.inputs.weight.T + cell.inputs.bias + back).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    torch.testing.assert_close(cell(ids)[0], cell.head(cell.norm(torch.stack(outputs, 1) + x)))


def test_what_is_read_from_the_table():
    seconds = {"L 16": 9.0, "L 32": 4.0, "L 64": 3.0, "L 4096": 7.5}
    table = {
        f"{name}, {length}": {"forward (ms)": ms, "state bytes": 4096 * 8 / int(length[2:])}
        for name in FORMS
        for length, ms in seconds.items()
    }
    assert by_chunk(table, "mLSTMexp") == [9.0, 4.0, 3.0, 7.5]
    assert dip(table, "mLSTMsig") == 2.5
    assert share_of_states(table) == 0
    table["mLSTMsig, L 64"]["state bytes"] *= 1.25
    assert share_of_states(table) == pytest.approx(0.25)
