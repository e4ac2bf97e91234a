"""Training checkpoints: one safetensors file each, written whole or not at all, never a pickle.

Everything that is no tensor (loop counters, schedules, evaluation history) travels as JSON in the file's header,
beside a checksum over all of it, so that a damaged file is recognised and never half used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from tidegate.state import write_atomically

_FORMAT = "tidegate.Checkpoint"
_PLAIN = (bool, int, float, str, type(None))


def save_checkpoint(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values. Raises OSError naming the file (a full disk)."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(content, tensors))
    meta = {"format": _FORMAT, "tree": tree, "checksum": _checksum(tree, tensors)}
    try:
        write_atomically(path, save(tensors, metadata=meta))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read what `save_checkpoint` wrote. Raises ValueError for a file that is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); it is truncated or was altered") from None
    if meta.get("format") != _FORMAT:
        raise ValueError(f"{path}: not a training checkpoint of tidegate; give one from a run's checkpoints folder")
    if _checksum(meta["tree"], tensors) != meta.get("checksum"):
        raise ValueError(f"{path}: damaged checkpoint (its checksum is wrong); its content was altered")
    return _unpack(json.loads(meta["tree"]), tensors)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True)


def newest_good(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint, None if there are none; a damaged one is reported and passed over.

    Raises ValueError if all are damaged. What a killed process left half-written is removed.
    """
    for partial in (folder / "checkpoints").glob(".*.partial"):
        partial.unlink(missing_ok=True)
    damaged = []
    for path in checkpoints(folder):
        try:
            load_checkpoint(path)
        except ValueError as error:
            damaged.append(path)
            warn(f"{error}; going back to the one before")
        else:
            return path
    if damaged:
        raise ValueError(
            f"{folder}: every checkpoint is damaged ({', '.join(path.name for path in damaged)}); "
            "delete them to start this run again from step 0"
        )
    return None


class SafeCheckpointIO(CheckpointIO):
    """What Lightning reads and writes checkpoints with."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, whole or not at all."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; there is no pickle in it whatever `weights_only` says."""
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves every `every` steps and at the last one; keeps the newest `keep`."""

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self._saved = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step  # nothing new to save yet, whether at 0 or just resumed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps or trainer.should_stop
        if due and step != self._saved:
            trainer.save_checkpoint(self.folder / "checkpoints" / f"step-{step:08d}.safetensors")
            self._saved = step
            if trainer.is_global_zero:
                for old in checkpoints(self.folder)[self.keep :]:
                    old.unlink(missing_ok=True)


# -- the tree in the header --------------------------------------------------------------------------------------------
def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON: plain values as they are, everything else as [kind, content]; tensors go into `tensors`."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return ["tensor", name]
    if isinstance(value, dict):
        if not all(isinstance(key, _PLAIN) for key in value):
            raise ValueError(f"checkpoint: keys of a dict must be plain values, seen {list(value)[:3]}")
        return ["dict", [[key, _pack(inner, tensors)] for key, inner in value.items()]]
    if isinstance(value, list | tuple):
        return ["list" if isinstance(value, list) else "tuple", [_pack(inner, tensors) for inner in value]]
    raise ValueError(f"checkpoint: cannot store a {type(value).__name__}; wanted tensors and plain values")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(inner, tensors) for key, inner in content}
    inner = [_unpack(item, tensors) for item in content]
    return inner if kind == "list" else tuple(inner)


def _checksum(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
