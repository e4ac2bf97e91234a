"""Registering is enough to be tested: every test with a `subject` runs for every registered mixer."""

import pytest
import torch

from tests.contract.helpers import Subject
from tidegate import mixers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        names = mixers.names()
        metafunc.parametrize("subject", [Subject.registered(name) for name in names], ids=names)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
