"""Pathfinder: the picture decides, not the generator: labels are found again by following the line."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d

from tidegate.tasks.pathfinder import pathfinder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def connected(image):
    """Whether the two circles are linked by bright pixels: a flood from the brightest spot."""
    lit = (image > 0.12).float()[None, None]
    circles = (image > 0.9).float()[None, None]
    seed = torch.zeros_like(circles)
    seed.view(-1)[circles.view(-1).argmax()] = 1
    for _ in range(image.numel()):
        grown = torch.minimum(max_pool2d(seed, 3, 1, 1), lit)
        if torch.equal(grown, seed):
            break
        seed = grown
    return bool((seed >= circles).all())


def test_a_flood_finds_the_label():
    """At gap 1 dashes flow into each other, and a margin lies between curves, except where circles touch."""
    images, labels = pathfinder(60, generator(), distractors=3)
    assert images.shape == (60, 32, 32)
    assert images.min() == 0
    assert (images.flatten(1).max(1).values == 1).all()
    found = torch.tensor([connected(image) for image in images]).long()
    assert (found == labels).double().mean() >= 0.9
    assert 15 <= labels.sum() <= 45


def test_more_of_everything_is_brighter():
    def light(**sizes):
        return pathfinder(8, generator(), **sizes)[0].sum()

    assert light(distractors=0) < light(distractors=6)
    assert light(contour=3, distractors=0) < light(contour=6, distractors=0)


def test_a_wider_gap_is_dark():
    def linked(gap):
        images, labels = pathfinder(12, generator(), distractors=0, gap=gap)
        return [connected(image) for image, label in zip(images, labels, strict=True) if label]

    assert all(linked(1.0))
    assert not any(linked(2.5))


def test_an_image_does_not_depend_on_the_batch():
    few, many = (pathfinder(n, generator(), size=20, contour=2, distractors=2) for n in (2, 4))
    assert torch.equal(few[0], many[0][:2])
    assert torch.equal(few[1], many[1][:2])
    assert not torch.equal(pathfinder(2, generator(1), size=20, contour=2, distractors=2)[0], few[0])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"size": 8}, "size: seen 8"),
        ({"distractors": -1}, "distractors: seen -1"),
        ({"continuity": 0}, "continuity: seen 0"),
        ({"contour": 0}, "contour: seen 0"),
    ],
)
def test_sizes_that_cannot_be_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        pathfinder(1, generator(), **sizes)
