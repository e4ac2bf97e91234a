"""An empty batch is no special case: every op gives an empty result, and gradients of the right shapes."""

from __future__ import annotations

import pytest
import torch

import tidegate
from tests.contract import test_ops_threads
from tests.contract.test_ops_threads import OPS


@pytest.mark.parametrize("backend", ["numba", "parallel", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch(monkeypatch, op, backend):
    monkeypatch.setattr(test_ops_threads, "B", 0)
    if op.startswith(("linear attention", "delta rule")):
        shape = {"head": (2,), "token": (0, 131, 2), "key": (0, 131, 2, 8)}.get(op.rpartition(" ")[2], ())
        call, inputs = getattr(test_ops_threads, op.split(",")[0].replace(" ", "_"))(*shape)(None)
    else:
        call, inputs = OPS[op](None)
    with tidegate.backend(backend):
        outputs = call()
    assert all(output.shape[0] == 0 for output in outputs)
    gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
    assert [gradient.shape for gradient in gradients] == [x.shape for x in inputs]
    assert all((gradient == 0).all() for gradient in gradients)
