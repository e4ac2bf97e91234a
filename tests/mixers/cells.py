"""What the tests of cells share: a cell in float64 with every weight moved, and exact comparisons."""

from __future__ import annotations

import torch

from tidegate import mixers

D = 8
ONE = 1e3  # as the bias of a gate: its sigmoid is 1 to the last digit, and 0 with the sign changed


def build(name, dim=D, seed=0, **options):
    """The cell, with every weight moved: what starts at zero would hide what flows through it."""
    torch.manual_seed(seed)
    cell = mixers.build(name, dim, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return cell


def near(seen, wanted, tolerance=1e-12):
    torch.testing.assert_close(seen, wanted, atol=tolerance, rtol=tolerance)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assign(parameter, *blocks):
    """Overwrite a parameter by blocks of its rows."""
    with torch.no_grad():
        parameter.copy_(torch.cat([torch.as_tensor(block) for block in blocks]))


def gradients(outputs, leaves):
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in outputs)
    return torch.autograd.grad(loss, leaves)
