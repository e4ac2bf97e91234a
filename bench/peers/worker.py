"""One side of the comparison: runs the adapters of the modules named on the command line, as told through a pipe.

A request is one line of JSON, and so is the answer; tensors travel in safetensors files. The same file serves
tidegate and its peers, each with the Python of its own environment, so that no side is measured by other means.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

LIBRARIES = (
    *("tidegate", "torch", "transformers", "mambapy", "mlstm_kernels", "xlstm", "accelerated-scan", "opengdn"),
    *("fla-core", "flashrnn"),
)


class Worker:
    """Adapters, and the one case that is set up at a time."""

    def __init__(self, modules: list[str]) -> None:
        import torch
        from adapter import registered

        self.torch, self.registered, self.missing = torch, registered, {}
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                self.missing[module] = f"{type(error).__name__}: {error}"

    # -- requests ------------------------------------------------------------------------------------------------------
    def adapters(self) -> dict[str, Any]:
        """The adapters, the modules that cannot be imported and why, and what is installed."""
        versions = {}
        for library in LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[library] = importlib.metadata.version(library)
        adapters = {key: [entry.function, entry.name, entry.note] for key, entry in self.registered.items()}
        return {"adapters": adapters, "missing": self.missing, "versions": versions}

    def limit(self, threads: int, gigabytes: float | None = None, keep_freed_memory: bool = True) -> dict[str, Any]:
        """Threads, memory this process may take, and whether the C library keeps what was freed."""
        self.torch.set_num_threads(threads)
        if gigabytes:
            resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), resource.RLIM_INFINITY))
        if keep_freed_memory:  # the setting of tidegate's command line (src/tidegate/memory.py), for all sides
            with contextlib.suppress(OSError, AttributeError, TypeError):
                mallopt = ctypes.CDLL(None).mallopt
                mallopt(-4, 0), mallopt(-1, 2**31 - 1)
        return {"threads": self.torch.get_num_threads()}

    def weights(self, key: str, options: dict[str, Any], file: str) -> dict[str, Any]:
        """Write the weights that tidegate's adapter draws: both sides are given these."""
        from safetensors.torch import save_file

        save_file(self.registered[key].make(options, None), file)
        return {}

    def case(self, key: str, options: dict[str, Any], inputs: str, weights: str | None = None) -> dict[str, Any]:
        """Set up one adapter with inputs and weights from files."""
        from safetensors.torch import load_file

        self.end()
        self.entry, self.inputs = self.registered[key], load_file(inputs)
        self.given = load_file(weights) if weights else {}
        self.kind = self.entry.function.split("/")[0]
        self.cotangent = self.inputs.pop("cotangent", None)
        self.module, self.translate = None, None
        if self.kind == "op":
            self.call = self.entry.make
        elif self.kind == "layer":
            self.module, self.call, self.translate = self.entry.make(options, self.given)
        else:
            with self.torch.no_grad():
                self.call = self.entry.make(options, self.given)
        return {}

    def end(self) -> dict[str, Any]:
        """Forget the case."""
        for name in ("inputs", "given", "module", "call", "translate", "leaves", "cotangent"):
            setattr(self, name, None)
        gc.collect()
        return {}

    def outputs(self, file: str, gradients: bool = True) -> dict[str, Any]:
        """Write the output and, unless it is a decode step, all gradients by tidegate's names. Says what it took."""
        from safetensors.torch import save_file

        found, begin = {}, time.perf_counter()
        if self.kind == "decode":
            with self.torch.no_grad():
                steps = [self.call(token).clone() for token in self.inputs["tokens"].unbind(1)]
            found["output"] = self.torch.stack(steps, 1)
        elif not gradients:
            found["output"] = self._forward()
        else:
            found["output"], names, values = self._training(named=True)
            own = {name: value for name, value in zip(names, values, strict=True) if value is not None}
            found |= {f"d {name}": value for name, value in self._pulled_back(own).items()}
        seconds = time.perf_counter() - begin
        save_file({name: value.detach().contiguous().clone() for name, value in found.items()}, file)
        return {"seconds": seconds}

    def sample(self, phase: str, loops: int = 1) -> dict[str, Any]:
        """Seconds per call of `forward`, `training` (with all gradients) or `decode` (one token)."""
        run = {"forward": self._forward, "training": self._training, "decode": self._step}[phase]
        gc.collect()
        gc.disable()
        try:
            begin = time.perf_counter()
            for _ in range(loops):
                run()
            return {"seconds": (time.perf_counter() - begin) / loops}
        finally:
            gc.enable()

    def memory(self) -> dict[str, Any]:
        """Bytes that one training step adds at its peak, inputs and weights not counted. For a process of its own."""
        from_here = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        self._training()
        return {"bytes": _status("VmHWM") - from_here}

    # -- running -------------------------------------------------------------------------------------------------------
    def _forward(self) -> Any:
        with self.torch.no_grad():
            return self.call(**self.inputs)

    def _step(self) -> Any:
        with self.torch.no_grad():
            return self.call(self.inputs["tokens"][:, 0])

    def _training(self, named: bool = False) -> Any:
        if self.leaves is None:
            self.leaves = {name: x.detach().requires_grad_() for name, x in self.inputs.items()}
        wanted = dict(self.leaves)
        if self.module is not None:
            wanted |= {f"weight {name}": parameter for name, parameter in self.module.named_parameters()}
        y = self.call(**self.leaves)
        gradients = self.torch.autograd.grad(y, list(wanted.values()), self.cotangent, allow_unused=True)
        return (y, list(wanted), gradients) if named else gradients

    def _pulled_back(self, own: dict[str, Any]) -> dict[str, Any]:
        """Gradients of the module's parameters as gradients of the weights they were made from."""
        if self.translate is None:
            return own
        kept = {name: value for name, value in own.items() if not name.startswith("weight ")}
        leaves = {name: value.clone().requires_grad_() for name, value in self.given.items()}
        made = self.translate(leaves)
        names = [name for name in made if f"weight {name}" in own]
        back = self.torch.autograd.grad(
            [made[name] for name in names],
            list(leaves.values()),
            [own[f"weight {name}"] for name in names],
            allow_unused=True,
        )
        return kept | {name: value for name, value in zip(leaves, back, strict=True) if value is not None}


def _status(entry: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{entry}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    # What libraries print must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parent))
    worker = Worker(sys.argv[1:])
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
