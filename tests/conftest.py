"""Every test starts from the same seed and from poisoned memory: what is read before it is written is NaN."""

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    filled = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = filled
    torch.set_num_threads(threads)
