"""Several training processes on one machine.

The calling process is rank 0 and starts the others as `python -m tidegate.train.worker`, each of which reads the
recipe from the run's folder. Nothing is pickled or forked: that would break with threads already running, and would
ask a user's script for a main guard.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from lightning.fabric.plugins import ClusterEnvironment


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, and where they meet."""

    rank: int = 0
    world: int = 1
    port: int = 0


class LocalProcesses(ClusterEnvironment):
    """Tells Lightning about processes that we started ourselves."""

    def __init__(self, place: Place) -> None:
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        return self.place.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.place.world

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.place.rank

    def node_rank(self) -> int:
        return 0


@contextmanager
def workers(world: int, arguments: dict[str, str | None]) -> Iterator[Place]:
    """Start the other processes and give this one's place; whatever happens, none is left behind."""
    if world == 1:
        yield Place()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // world)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    before = torch.get_num_threads()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, world):
            place = json.dumps({**asdict(Place(rank, world, port)), **arguments})
            command = [sys.executable, "-m", "tidegate.train.worker", place]
            running.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE))
        for process in running:
            assert process.stdout is not None
            if not process.stdout.readline():  # it ended before it was ready; waiting for it would take forever
                raise _ended(process)
        torch.set_num_threads(threads)
        try:
            yield Place(0, world, port)
        except RuntimeError:  # gloo's, when the other end is gone
            for process in running:
                if _exit_code(process, 5) not in (None, 0):
                    raise _ended(process) from None
            raise
        for process in running:
            process.wait(timeout=60)
    finally:
        torch.set_num_threads(before)
        for process in running:
            if process.poll() is None:
                process.terminate()
        for process in running:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def _ended(process: subprocess.Popen[bytes]) -> ChildProcessError:
    code = _exit_code(process, 5)
    return ChildProcessError(
        f"a training process ended (exit code {code}) before the others were done; continue from the last "
        "checkpoint with --resume, or with --devices 1"
    )
