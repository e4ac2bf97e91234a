"""Digits: the images of scikit-learn, all of them, once, in an order that is always the same."""

from __future__ import annotations

import builtins

import pytest
import torch

from tidegate.tasks.digits import data, digits, load_digits


def test_every_image_is_on_one_side():
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    (learnt, learnt_labels), (held, held_labels) = load_digits(permutation=None)
    assert (len(learnt), len(held)) == (1437, 360)
    ours = torch.cat([learnt, held])[..., 0] * 16
    row = torch.cat([ours, torch.cat([learnt_labels, held_labels])[:, None]], 1)
    theirs = torch.cat([torch.from_numpy(pixels).float(), torch.from_numpy(labels)[:, None]], 1)
    assert sorted(row.tolist()) == sorted(theirs.tolist())
    assert torch.bincount(held_labels, minlength=10).min() >= 20


def test_the_permutation_is_fixed_and_the_same_for_all():
    plain, shuffled, other = (load_digits(permutation=seed).train[0][..., 0] for seed in (None, 0, 1))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled, plain[:, order])
    assert not torch.equal(shuffled, other)


def test_batches_are_drawn_from_what_is_to_be_learnt():
    pixels, labels = digits(50, torch.Generator().manual_seed(0))
    learnt, wanted = load_digits().train
    for image, label in zip(pixels, labels, strict=True):
        same = (learnt == image).flatten(1).all(1)
        assert same.any()
        assert wanted[same.nonzero()[0, 0]] == label
    assert torch.equal(pixels, digits(50, torch.Generator().manual_seed(0))[0])


def test_without_scikit_learn_one_is_told(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    data._images.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'tidegate\[data\]'"):
        load_digits()
    data._images.cache_clear()
