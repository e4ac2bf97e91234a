"""Kernels on PyTorch's own threads.

PyTorch's OpenMP workers keep spinning on their cores for a while after each operation. A second pool beside them would
find every core taken (measured on 2 cores: no gain at all from the second thread), so kernels are run by the same
workers: `GOMP_parallel`, the entry point that compilers call for a parallel region, is in the OpenMP library that
PyTorch has loaded. Where there is no such library, a pool of our own does it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

_WORTHWHILE = 1 << 15  # array elements; below, waking a second thread costs more than it saves
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_openmp: Any = None  # the library, or False if there is none to be had


def run(kernel: Callable[..., None], problems: int, *arguments: Any) -> None:
    """Call `kernel(begin, end, *arguments)` over `range(problems)`, split among `torch.get_num_threads()` threads.

    How the range is split makes no difference to a kernel's results. An error in any share is raised here.
    """
    size = sum(x.size for x in arguments if isinstance(x, np.ndarray))
    threads = min(torch.get_num_threads(), problems) if size >= _WORTHWHILE else 1
    if threads <= 1:
        kernel(0, problems, *arguments)
        return
    bounds = [problems * part // threads for part in range(threads + 1)]
    shares = itertools.pairwise(bounds)
    errors: list[BaseException] = []

    def work(_: Any = None) -> None:
        # Whoever is free takes the next share: a team may be smaller than was asked for.
        try:
            for begin, end in iter(lambda: _next(shares), None):
                kernel(begin, end, *arguments)
        except BaseException as error:
            errors.append(error)

    _team(work, threads)
    if errors:
        raise errors[0]


def together(lead: Callable[[], None], help_out: Callable[[], None]) -> None:
    """Call `lead` on one of PyTorch's threads and `help_out` on each of the others that comes.

    `lead` must be able to finish alone: a team may be smaller than was asked for, or late.
    """
    turns = iter([lead])
    errors: list[BaseException] = []

    def work(_: Any = None) -> None:
        try:
            next(turns, help_out)()
        except BaseException as error:
            errors.append(error)

    _team(work, torch.get_num_threads())
    if errors:
        raise errors[0]


def _team(work: Callable[..., None], threads: int) -> None:
    """Call `work` on this and `threads - 1` more threads, and wait for all."""
    openmp = _find_openmp()
    if openmp:
        openmp.GOMP_parallel(_Region(work), None, threads, 0)
    else:
        helpers = [_threads(threads - 1).submit(work) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            helper.result()


def _next(shares: Iterator[tuple[int, int]]) -> tuple[int, int] | None:
    return next(shares, None)  # one bytecode under the GIL: no two threads get the same share


def _find_openmp() -> Any:
    """PyTorch's GNU OpenMP library, if that is what it uses (Linux wheels do)."""
    global _openmp
    if _openmp is None:
        _openmp = False
        try:
            with open("/proc/self/maps") as maps:
                paths = {line.split()[-1] for line in maps if "libgomp" in line}
            if len(paths) == 1:  # with two of them loaded there is no telling whose workers spin
                _openmp = ctypes.CDLL(paths.pop())
        except OSError:
            pass
    return _openmp


def _threads(wanted: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < wanted:
            _pool = ThreadPoolExecutor(wanted, thread_name_prefix="tidegate")
        return _pool


def _after_fork() -> None:
    # Threads do not survive a fork, and GNU OpenMP does not notice: a child uses a pool of its own.
    global _pool, _lock, _openmp
    _pool, _lock, _openmp = None, threading.Lock(), False


os.register_at_fork(after_in_child=_after_fork)
