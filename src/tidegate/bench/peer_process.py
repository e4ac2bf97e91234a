"""A process that runs adapters (bench/peers/worker.py), and what two of them agree on."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


class PeerError(RuntimeError):
    """What an adapter raised, or that its process is gone."""


class PeerProcess:
    """One side of a comparison, in a process of its own: `answer = process.ask("sample", phase="forward")`.

    `python` is an interpreter, `modules` are adapter modules in `folder`, beside worker.py. Raises PeerError with the
    adapter's own error.
    """

    def __init__(self, python: str | Path, folder: Path, modules: Sequence[str], **limits: Any) -> None:
        self.start = ([str(python), str(folder / "worker.py"), *modules], folder, limits)
        self._begin()

    def _begin(self) -> None:
        command, folder, limits = self.start
        # Peers must not look for kernels or weights in the net, nor find this library by accident.
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **quiet},
        )
        self._answer()
        if limits:
            self.ask("limit", **limits)

    def again(self, **limits: Any) -> None:
        """A new process in place of this one, with other limits where given."""
        self.close()
        command, folder, before = self.start
        self.start = (command, folder, {**before, **limits})
        self._begin()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._gone()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise PeerError(self._gone())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _gone(self) -> str:
        return f"the process has ended with code {self.process.wait()}"

    @property
    def resident_bytes(self) -> int:
        """Memory that the process holds (0 where the system does not say)."""
        try:
            return 4096 * int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return 0

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest relative error |ours - theirs| / |theirs| over all tensors (2-norms), and the tensor that has it.

    A tensor that only one side has, another shape and anything not finite count as infinitely wrong; where both are
    zero there is no error.
    """
    worst, where = 0.0, ""
    for name in dict.fromkeys([*theirs, *ours]):
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            return float("inf"), name
        a, b = ours[name].double(), theirs[name].double()
        size, error = b.norm().item(), (a - b).norm().item()
        relative = 0.0 if error == 0 else error / size if size > 0 else float("inf")
        if not relative <= worst:  # also where it is no number
            worst, where = relative if relative == relative else float("inf"), name
    return worst, where
