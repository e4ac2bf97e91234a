"""Several threads at one sequence: the same bits as one thread alone, whoever comes to help."""

import sys
import threading

import pytest
import torch

from tidegate import mixers
from tidegate.ops import threads
from tidegate.ops.cell import numba_cpu, team


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results(name, **options):
    """One sequence, wide enough for company: 256 channels are 2^17 products and more per token."""
    torch.manual_seed(0)
    mixer = mixers.build(name, 256, **options)
    x = torch.randn(1, 40, 256, requires_grad=True)
    y, state = mixer(x)
    return y, *state.values(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])


@pytest.mark.parametrize(
    ("name", "options"), [("lstm", {}), ("gru", {"reset": "before"}), ("lstm", {"layer_norm": True})]
)
def test_bitwise_what_one_thread_computes(name, options, two_threads, monkeypatch):
    boards = []
    board = team.board
    monkeypatch.setattr(team, "board", lambda: boards.append(board()) or boards[-1])
    shared = results(name, **options)
    assert len(boards) == 2  # forward and backward
    assert all(found[team.CLAIM] == team.STOP for found in boards)
    torch.set_num_threads(1)
    alone = results(name, **options)
    assert len(boards) == 2
    assert all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True))


def test_when_nobody_comes(two_threads, monkeypatch):
    shared = results("gru")
    monkeypatch.setattr(threads, "_team", lambda work, count: work())
    assert all(torch.equal(a, b) for a, b in zip(shared, results("gru"), strict=True))


def test_when_the_leader_has_lost_patience(two_threads, monkeypatch):
    def board():
        found = new()
        found[team.ALONE] = 7  # of 40 products
        boards.append(found)
        return found

    new, boards = team.board, []
    shared = results("gru")
    monkeypatch.setattr(team, "board", board)
    assert all(torch.equal(a, b) for a, b in zip(shared, results("gru"), strict=True))
    assert boards
    assert all(found[team.ALONE] == 0 or found[team.NEXT] > team.PAUSES[0] for found in boards)


def test_helpers_leave_when_the_kernel_fails(two_threads, monkeypatch):
    class Broken:
        def forward(*arguments):
            raise RuntimeError("broken")

    module = numba_cpu.compiled(mixers.build("gru", 256).cell.key)
    Broken.help_forward = staticmethod(module.help_forward)
    monkeypatch.setattr(numba_cpu, "compiled", lambda key: Broken())
    with pytest.raises(RuntimeError, match="broken"):
        results("gru")


def test_errors_are_raised(two_threads):
    def fail():
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        threads.together(fail, lambda: None, lambda: None)
    calls = []
    threads.together(lambda: calls.append("lead"), lambda: calls.append("help"), lambda: calls.append("dismiss"))
    assert calls.count("lead") == calls.count("dismiss") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # ctypes has nobody to raise it to
@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("place", ["lead", "share"])
def test_a_ctrl_c_before_the_first_line(two_threads, monkeypatch, place, openmp):
    """Python lets a signal's exception in as a function begins, before it can be caught there."""
    if not openmp:
        monkeypatch.setattr(threads, "_openmp", False)
    dismissed = threading.Event()

    def lead():
        pass

    def interrupt(frame, event, argument):
        if event == "call" and frame.f_code.co_name == place:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def until_this_thread_leads():
        while True:
            threads.together(lead, lambda: dismissed.wait(20), dismissed.set)

    sys.setprofile(interrupt)  # of this thread alone
    try:
        with pytest.raises(KeyboardInterrupt):
            until_this_thread_leads()
    finally:
        sys.setprofile(None)
    assert dismissed.is_set()
