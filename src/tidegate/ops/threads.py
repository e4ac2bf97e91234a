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
from pathlib import Path
from typing import Any

import numpy as np
import torch

_WORTHWHILE = 1 << 15  # array elements; below, waking a second thread costs more than it saves
_SMALL = 1 << 17  # floats of scratch that a thread keeps
_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lock = threading.Lock()
_local = threading.local()
_pool: ThreadPoolExecutor | None = None
_openmp: Any = None  # the library, or False if there is none to be had


def run(
    kernel: Callable[..., None], problems: int, *arguments: Any, parts: int = 1, scratch: int | None = None
) -> None:
    """Call `kernel(begin, end, *arguments)` over `range(problems)`, split among `torch.get_num_threads()` threads.

    A kernel whose problems have `parts` independent parts (columns, say) takes a range of `range(problems * parts)`: it
    gets whole problems, or where these don't fill the threads evenly, some broken up. With `scratch` it gets that many
    floats as third argument, aligned and for itself; what they hold is not defined.

    How the range is split makes no difference to a kernel's results. An error in any share is raised here.
    """
    threads = min(torch.get_num_threads(), problems * parts)
    if threads <= 1 or sum(x.size for x in arguments if isinstance(x, np.ndarray)) < _WORTHWHILE:
        run_here(kernel, problems, *arguments, parts=parts, scratch=scratch)
        return
    bounds = _bounds(problems, parts, threads)
    shares = itertools.pairwise(bounds)

    def work() -> None:
        # Whoever is free takes the next share: a team may be smaller than was asked for.
        for begin, end in iter(lambda: _next(shares), None):
            if begin < end:
                kernel(begin, end, *memory(scratch), *arguments)

    _team(work, threads)


def together(lead: Callable[[], None], help_out: Callable[[], None], dismiss: Callable[[], None]) -> None:
    """Call `lead` on one of PyTorch's threads and `help_out` on each of the others that comes.

    `lead` must be able to finish alone: a team may be smaller than was asked for, or late. `dismiss` sends the others
    home; it is called by the thread that leads, also where a Ctrl-C comes before the first line of `lead`.
    """
    team: dict[str, int] = {}

    def work() -> None:
        me = threading.get_ident()
        try:
            (lead if team.setdefault("leader", me) == me else help_out)()
        finally:
            if team.get("leader") == me:
                dismiss()

    _team(work, torch.get_num_threads())


def _team(work: Callable[[], None], threads: int) -> None:
    """Call `work` on this and `threads - 1` more threads, wait for all, and raise the first error of any."""
    errors: list[BaseException] = []
    ended: list[int] = []

    def share(_: Any = None) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.append(threading.get_ident())

    openmp = _find_openmp()
    if openmp:
        openmp.GOMP_parallel(_Region(share), None, threads, 0)
    else:
        helpers = [_threads(threads - 1).submit(share) for _ in range(threads - 1)]
        try:
            share()
        finally:
            for helper in helpers:
                helper.result()
    if errors:
        raise errors[0]
    if threading.get_ident() not in ended:  # a Ctrl-C before the first line of `share`: ctypes prints it, and goes on
        raise KeyboardInterrupt


def run_here(
    kernel: Callable[..., None], problems: int, *arguments: Any, parts: int = 1, scratch: int | None = None
) -> None:
    """As `run`, on this thread."""
    kernel(0, problems * parts, *memory(scratch), *arguments)


def _bounds(problems: int, parts: int, threads: int) -> list[int]:
    """Where shares end, in parts: after whole problems, unless breaking some up lets the last thread finish earlier."""
    whole = [problems * share // threads * parts for share in range(threads + 1)]
    even = [problems * parts * share // threads for share in range(threads + 1)]

    def duration(bounds: list[int]) -> float:
        # Some of a problem's work is done again for each share it is in: by estimate, two fifths.
        return max(
            0.6 * (end - begin) / parts + 0.4 * (-(-end // parts) - begin // parts)
            for begin, end in itertools.pairwise(bounds)
        )

    return min(whole, even, key=duration)


def memory(size: int | None) -> list[np.ndarray]:
    """This thread's memory for a kernel, kept for the next one if it is small.

    It begins with a cache line, as rows that are a multiple of one long then don't straddle two.
    """
    if size is None:
        return []
    kept = getattr(_local, "scratch", None)
    if kept is None or kept.size < size:
        whole = np.empty(size + 16, np.float32)
        kept = whole[-(whole.ctypes.data // 4) % 16 :]
        if size <= _SMALL:
            _local.scratch = kept
    return [kept[:size]]


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
            # Wheels bring a copy each (scikit-learn's too): PyTorch's workers are in PyTorch's own, or in the only one.
            own = {path for path in paths if Path(torch.__file__).parent in Path(path).parents}
            if len(own or paths) == 1:
                _openmp = ctypes.CDLL((own or paths).pop())
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
