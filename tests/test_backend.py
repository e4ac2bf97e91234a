"""One decision, by device and dtype alone."""

import subprocess
import sys

import pytest
import torch

import tidegate
from tidegate.backend import BACKENDS, backend, choose, explain


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "numba"),
        (torch.bfloat16, "numba"),
        (torch.float16, "numba"),
        (torch.complex64, "numba"),
        (torch.float64, "parallel"),
        (torch.complex128, "parallel"),
    ],
)
def test_the_dtype_decides_on_a_cpu(dtype, expected):
    assert choose(torch.zeros(1, dtype=dtype)) == expected
    assert choose(torch.zeros(1, dtype=dtype, device="meta")) == "parallel"


def test_every_choice_has_a_reason():
    for device in ("cpu", "cuda", "mps"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            chosen, reason = explain(device, dtype)
            assert chosen in BACKENDS
            assert reason


def test_a_block_forces_a_backend_and_gives_it_back():
    x = torch.zeros(1)
    with backend("reference"):
        assert choose(x) == "reference"
        with backend("parallel"):
            assert choose(x) == "parallel"
        assert choose(x) == "reference"
    assert choose(x) == "numba"
    with pytest.raises(KeyError), backend("parallel"):
        raise KeyError
    assert choose(x) == "numba"


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend: seen 'cuda', wanted one of reference, parallel, numba"),
        backend("cuda"),
    ):
        pass


def test_transforms_get_the_form_they_can_see_into():
    seen = []

    def function(x):
        seen.append(choose(x))
        return x * x

    torch.vmap(function)(torch.ones(2))
    torch.func.grad(function)(torch.tensor(1.0))
    torch.func.jvp(function, (torch.ones(2),), (torch.ones(2),))
    assert seen == ["parallel"] * 3
    assert choose(torch.ones(2)) == "numba"


def test_compiled_code_keeps_the_kernel_and_follows_the_block():
    def function(x):
        return x + {"reference": 1, "parallel": 2, "numba": 3}[choose(x)]

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 3
    with backend("reference"):
        assert compiled(torch.zeros(1)) == 1
    assert compiled(torch.zeros(1)) == 3


def test_export_takes_the_reference():
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + {"reference": 1, "parallel": 2, "numba": 3}[choose(x)]

    for strict in (False, True):
        assert torch.export.export(Module(), (torch.zeros(1),), strict=strict).module()(torch.zeros(1)) == 1


def test_importing_the_library_does_not_import_numba():
    code = "import sys, tidegate; tidegate.mixers.names(); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_block_is_public():
    assert tidegate.backend is backend
