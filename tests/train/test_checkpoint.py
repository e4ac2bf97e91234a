"""Checkpoint files: what goes in comes out, damage is noticed, a full disk destroys nothing."""

import errno
import math
import os
import pickle

import pytest
import torch

from tidegate.train.checkpoint import load_checkpoint, newest_good, save_checkpoint

TREE = {
    "weights": {"a": torch.randn(3, 2), "b": torch.arange(4), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)},
    "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
    "half": torch.ones(2, dtype=torch.bfloat16),
    "plain": [None, True, 1, 0.1, "text", (1, (2,)), [], {}, math.inf],
    "transposed": torch.randn(4, 5).T,
}


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    return type(one) is type(two) and one == two


def test_comes_back(tmp_path):
    save_checkpoint(TREE, tmp_path / "c.safetensors")
    assert same(load_checkpoint(tmp_path / "c.safetensors"), TREE)
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_shared_tensors_are_stored_twice(tmp_path):
    tied = torch.randn(3)
    save_checkpoint({"a": tied, "b": tied}, tmp_path / "c.safetensors")
    assert torch.equal(load_checkpoint(tmp_path / "c.safetensors")["b"], tied)


def test_other_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot store a object"):
        save_checkpoint({"a": object()}, tmp_path / "c.safetensors")


def test_every_truncation_and_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(TREE, path)
    content = path.read_bytes()
    for size in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"damaged checkpoint|not a training checkpoint"):
            load_checkpoint(path)
    for place in (len(content) - 1, len(content) - 40):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="checksum is wrong"):
            load_checkpoint(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / "c.safetensors"
    for content in (pickle.dumps(Bomb()), None):
        if content is None:
            torch.save({"state_dict": {}}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged checkpoint"):
            load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    save_checkpoint({"a": torch.zeros(2)}, path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*c.safetensors"):
        save_checkpoint({"a": torch.ones(2)}, path)
    assert os.listdir(tmp_path) == ["c.safetensors"]
    assert torch.equal(load_checkpoint(path)["a"], torch.zeros(2))


def test_newest_good(tmp_path):
    warnings = []
    assert newest_good(tmp_path, warnings.append) is None
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (4, 8):
        save_checkpoint({"step": step}, folder / f"step-{step:08d}.safetensors")
    (folder / ".step-00000012.safetensors.99.partial").write_bytes(b"half")
    assert newest_good(tmp_path, warnings.append).name == "step-00000008.safetensors"
    assert not list(folder.glob(".*"))
    assert not warnings
    (folder / "step-00000008.safetensors").write_bytes(b"")
    assert newest_good(tmp_path, warnings.append).name == "step-00000004.safetensors"
    assert len(warnings) == 1
    assert "going back to the one before" in warnings[0]
    (folder / "step-00000004.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint is damaged .*; delete them to start"):
        newest_good(tmp_path, warnings.append)
