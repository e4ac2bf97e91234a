"""A model as a folder: model.safetensors and config.json, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tidegate.state import write_atomically

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: nn.Module, config: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write `model`'s tensors and `config`. Raises ValueError for a config that JSON cannot hold."""
    from safetensors.torch import save as to_bytes

    try:
        text = json.dumps({"model": type(model).__name__, **config}, indent=2)
    except TypeError as error:
        raise ValueError(f"layers: an option is no plain value ({error}); such a model cannot be saved") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, to_bytes(tensors, metadata={"format": "pt", "config": _digest(text)}))
    write_atomically(folder / CONFIG, text.encode())


def read_config(folder: str | os.PathLike[str], model: str) -> dict[str, Any]:
    """The configuration of the `model` saved in `folder`. Raises ValueError with one clear line if there is none."""
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; wanted one that holds {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; is {folder} the folder of a trained model?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, not readable as JSON ({error})") from None
    if not isinstance(config, dict) or config.pop("model", None) != model:
        raise ValueError(f"{path}: does not describe a tidegate {model}")
    return config


def load_tensors(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Put the saved tensors into `model`, bit for bit and in their own dtype. Raises ValueError if they do not fit."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{path}: missing; the folder has a {CONFIG} but no weights")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            saved = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, not readable as safetensors ({error}); it may be truncated") from None
    config = Path(folder) / CONFIG
    problems = _differences(saved, model.state_dict())
    if problems:
        raise ValueError(f"{path}: does not fit {CONFIG} beside it: {problems}")
    if meta.get("config", _digest(config.read_text())) != _digest(config.read_text()):
        raise ValueError(f"{path}: was saved with another {CONFIG} than the one beside it; restore the pair")
    if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{path}: {bad[0]} holds NaN or infinity; the file was altered, restore it from a copy")
    model.load_state_dict(saved, assign=True)


def _differences(saved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str:
    if missing := sorted(set(wanted) - set(saved)):
        return f"{len(missing)} tensors are missing, the first is {missing[0]}"
    if extra := sorted(set(saved) - set(wanted)):
        return f"{len(extra)} tensors are unknown to it, the first is {extra[0]}"
    for name, tensor in wanted.items():
        if saved[name].shape != tensor.shape:
            return f"{name} has shape {tuple(saved[name].shape)}, wanted {tuple(tensor.shape)}"
    return ""


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
