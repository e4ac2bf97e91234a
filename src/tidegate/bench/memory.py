"""Peak memory of a forward and backward, each case in a process of its own.

The process first does the same at a tiny size, so that libraries, kernels and threads are there, and hands freed memory
back to the system. It notes its resident memory, resets the system's record of the highest (Linux; elsewhere the record
since its start is taken), makes parameters and inputs, runs forward and backward once, and reports the highest resident
memory less that before: parameters, inputs, what is kept for backward, work space, outputs and gradients.

The C library (glibc) is told to return every large block as soon as it is freed, so that the figure is what is in use;
what the allocator holds on to, left alone, can be a third more.

    python -m tidegate.bench.memory '{"subject": "mixers", "name": "gla", "batch": 1, "length": 16384, "dim": 256}'
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SUBJECTS = ("ops", "mixers", "cells", "model")
_TINY = 32
_M_MMAP_THRESHOLD = -3  # malloc.h


def peak(subject: str, name: str, *, batch: int, length: int, threads: int, **options: Any) -> int:
    """Bytes that the training call of one case adds at its highest, measured in a fresh process.

    `subject` is a module of this package with `prepare(name, batch=..., length=..., **options)`, which makes the inputs
    and returns the call. Raises ValueError with the process's last line if it fails.
    """
    case = {"subject": subject, "name": name, "batch": batch, "length": length, "threads": threads, **options}
    # What this process has compiled is in the cache; a case is computed on the same number of threads as here.
    command = [sys.executable, "-m", "tidegate.bench.memory", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"memory of {name} at T = {length}: the measuring process failed ({cause})")
    return int(done.stdout.split()[-1])


def added(prepare: Callable[[], Callable[[], object]]) -> int:
    """Bytes of resident memory that `prepare()()` adds at its highest, in this process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest begins anew
    before = resident()
    prepare()()
    return max(0, highest() - before)


def exact() -> None:
    """Let the C library return large blocks when they are freed (glibc; others are left as they are)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def resident() -> int:
    """Bytes of this process in memory now; where the system does not say, the highest so far."""
    return _status("VmRSS:") or highest()


def highest() -> int:
    """The most bytes this process has had in memory."""
    found = _status("VmHWM:")
    if found is None:
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = used if sys.platform == "darwin" else 1024 * used
    return found


def _status(entry: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(entry)]
    return 1024 * int(found[0]) if found else None


def main(text: str) -> None:
    """What the fresh process does: warm up, measure the case, print the bytes."""
    import torch

    exact()
    case = json.loads(text)
    subject, length = case.pop("subject"), case.pop("length")
    if subject not in _SUBJECTS:
        raise ValueError(f"subject: seen {subject!r}, wanted one of {', '.join(_SUBJECTS)}")
    torch.set_num_threads(case.pop("threads", torch.get_num_threads()))
    prepare = importlib.import_module(f"tidegate.bench.{subject}").prepare
    prepare(**{**case, "batch": 1}, length=min(_TINY, length))()
    print(added(lambda: prepare(**case, length=length)))


if __name__ == "__main__":
    main(sys.argv[1])
