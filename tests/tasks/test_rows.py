"""Training rows: every window once per epoch, a function of (seed, row) alone, documents kept apart."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tidegate.tasks.language.data import Rows, permuted, segments_of

STREAM = np.array([255, *range(100), 255, *range(100, 150), 255], np.uint8)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000])
def test_permutation(size):
    for key in (b"a" * 24, b"bcdefghi" * 3):
        assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))
    if size > 60:
        one, two = ([permuted(i, size, key) for i in range(size)] for key in (b"a" * 24, b"bcdefghi" * 3))
        assert one != two
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.4


def test_an_epoch_visits_every_window():
    rows = Rows(STREAM, 8, 255, seed=3)
    inputs, targets = rows.batch(0, rows.windows)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert sorted(inputs.flatten().tolist()) == sorted(STREAM[: rows.windows * 8].tolist())
    later, _ = rows.batch(rows.windows, rows.windows)
    assert not torch.equal(later.sort(0).values, inputs.sort(0).values), "the next epoch is cut elsewhere"


def test_rows_depend_on_seed_and_number_alone():
    rows = Rows(STREAM, 8, 255, seed=3)
    whole, _ = rows.batch(5, 10)
    parts = torch.cat([rows.batch(5, 3)[0], rows.batch(8, 7)[0]])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, Rows(STREAM, 8, 255, seed=4).batch(5, 10)[0])


def test_segments_start_at_boundaries():
    inputs = torch.tensor([[255, 1, 2, 255, 3], [1, 2, 3, 4, 255]])
    assert segments_of(inputs, 255).starts.int().tolist() == [[1, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_too_short():
    with pytest.raises(ValueError, match=r"has 153 tokens, but one row takes training.length \+ 1 = 1,025"):
        Rows(STREAM, 1024, 255, seed=1)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Tokenise and read rows of a 64 MB file in a process of its own: its peak grows by far less than the file."""
    script = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from tidegate.tasks.language import data
from tidegate.tasks.language.data import Rows
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
path = Path(sys.argv[1])
line = b"The tide comes in and the tide goes out, and nobody counts the gates. "
with open(path, "wb") as file:
    for i in range(int(sys.argv[2])):
        file.write(line * 14_000 + b"\\n\\n")
before = peak()
corpus = data.prepare(path)
rows = Rows(corpus.train, 256, 255, 1)
for i in range(20):
    rows.batch(16 * i, 16)
print(peak() - before, path.stat().st_size >> 20)
"""
    cache = {"TIDEGATE_CACHE": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "big.txt"), "64"]
    grown, size = map(int, subprocess.check_output(command, env=cache, text=True).split())
    assert size >= 58
    assert grown < 25, f"peak memory grew by {grown} MB for a file of {size} MB"
