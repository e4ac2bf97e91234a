"""Kernels on several threads: every problem once, the same bits, errors handed on, whoever calls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tidegate.ops import threads
from tidegate.ops.kernels import exp32, jit
from tidegate.ops.threads import run


@jit
def exponentials(begin, end, x, y):
    for i in range(begin, end):
        y[i] = exp32(x[i])


@jit
def squares(begin, end, x, y):
    for i in range(begin, end):
        y[i] = x[i] * x[i]


@jit
def mark(begin, end, visits):
    for i in range(begin, end):
        visits[i] += 1


@pytest.fixture(params=["openmp", "own pool"], autouse=True)
def _both_kinds_of_threads(request, monkeypatch):
    monkeypatch.setattr(threads, "_WORTHWHILE", 0)  # these arrays are small
    if request.param == "own pool":
        monkeypatch.setattr(threads, "_openmp", False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [1, 2, 3, 8])
@pytest.mark.parametrize("problems", [0, 1, 2, 3, 7, 100])
def test_run_solves_every_problem_once(wanted, problems):
    torch.set_num_threads(wanted)
    visits = np.zeros(problems, np.int64)
    run(mark, problems, visits)
    assert (visits == 1).all()


def test_run_gives_the_same_bits_for_any_number_of_threads():
    x = np.random.default_rng(0).uniform(-90, 90, 1001).astype(np.float32)
    results = []
    for wanted in (1, 2, 3, 5):
        torch.set_num_threads(wanted)
        results.append(np.empty_like(x))
        run(exponentials, len(x), x, results[-1])
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_run_hands_on_an_error_of_any_thread():
    torch.set_num_threads(2)

    def kernel(begin, end):
        if begin > 0:
            raise FloatingPointError("in the second share")

    with pytest.raises(FloatingPointError, match="second share"):
        run(kernel, 2)
    with pytest.raises(TypeError):
        run(squares, 2, np.zeros(2))  # a missing argument


def test_several_callers_at_once():
    torch.set_num_threads(3)
    x = np.random.default_rng(1).standard_normal((8, 999)).astype(np.float32)
    y = np.zeros_like(x)

    def call(row):
        for _ in range(50):
            run(squares, x.shape[1], x[row], y[row])

    callers = [threading.Thread(target=call, args=(row,)) for row in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    np.testing.assert_array_equal(y, x * x)


def test_our_own_pool_grows(monkeypatch):
    monkeypatch.setattr(threads, "_openmp", False)
    monkeypatch.setattr(threads, "_pool", None)
    x, y = np.ones(64, np.float32), np.zeros(64, np.float32)
    for wanted in (2, 6):
        torch.set_num_threads(wanted)
        y[:] = 0
        run(squares, 64, x, y)
        assert (y == 1).all()
        assert threads._pool._max_workers == wanted - 1


def test_pytorch_s_openmp_library_is_found_on_linux(monkeypatch):
    """A Linux wheel brings GNU OpenMP; should that change, kernels fall back to a slower pool and we want to know."""
    monkeypatch.setattr(threads, "_openmp", None)
    if sys.platform == "linux" and "OpenMP" in torch.__config__.parallel_info():
        assert threads._find_openmp()


FORK = """
import os, signal, sys
import numpy as np, torch
from tests.ops.test_threads import exponentials
from tidegate.ops import threads
from tidegate.ops.threads import run
threads._WORTHWHILE = 0
torch.set_num_threads(2)
x = np.linspace(-80, 80, 1001).astype(np.float32)
def go():
    y = np.empty_like(x)
    run(exponentials, len(x), x, y)
    return y
expected = go()  # the parent's pool exists and is warm
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for threads it does not have is ended
    os._exit(0 if all((go() == expected).all() for _ in range(20)) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or not (go() == expected).all())
"""


def test_kernels_run_after_a_fork():
    """In a process of its own: a fork of the test run would copy all of it."""
    finished = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert hasattr(os, "fork")
