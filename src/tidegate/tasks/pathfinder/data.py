"""A light generator of Pathfinder images (after arXiv 1805.08315 and the Long Range Arena), in numpy alone."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from tidegate.tasks.randomness import seeds
from tidegate.tasks.targets import check_sizes

DASH = 2.0  # its length, in pixels
_CORE, _EDGE = 0.3, 0.7  # a dash is full up to _CORE from its middle line, and fades over _EDGE
_MARGIN = 1.0  # kept free around what was drawn
_BORDER = 1.0
_LINE, _RADIUS = 0.75, 1.5  # brightness of dashes; size of the circles, whose brightness is 1
_TRIES, _DISTRACTOR_TRIES = 12, 5

Image = NDArray[np.float64]
Mask = NDArray[np.bool_]


def pathfinder(
    batch: int,
    generator: Generator,
    *,
    size: int = 32,
    contour: int = 6,
    distractors: int = 6,
    distractor_contour: int = 2,
    continuity: float = 1.0,
    seed_distance: float = 7.0,
    gap: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Images (batch, size, size) between 0 and 1, and labels (batch,): 1 if both circles lie on one curve, else 0.

    Two curves of `contour` dashes begin `seed_distance` pixels apart; `distractors` curves of `distractor_contour`
    dashes fill in. Dashes are 2 pixels long with `gap` between them; at 1 they flow into each other, at 2 they stand
    apart. From dash to dash a curve turns by an angle d within pi / (2 continuity), drawn in proportion to
    cos^2(continuity d). One circle stands at the start of a curve, the other at the end of the same or of the other
    curve, at an even chance. 30 ms an image; one does not depend on the batch's size. `images.flatten(1)[..., None]`
    makes a sequence.

    >>> images, labels = pathfinder(1, torch.Generator().manual_seed(0), size=24, contour=3, distractors=1)
    >>> images.shape, images.max().item(), labels.shape
    (torch.Size([1, 24, 24]), 1.0, torch.Size([1]))
    """
    check_sizes(batch=batch, size=size, contour=contour, distractor_contour=distractor_contour)
    if distractors < 0:
        raise ValueError(f"distractors: seen {distractors}, wanted at least 0")
    if continuity <= 0:
        raise ValueError(f"continuity: seen {continuity}, wanted a number above 0")
    if size < seed_distance + 2 * _BORDER + 2 * DASH:
        raise ValueError(f"size: seen {size}, wanted room for two curves {seed_distance} pixels apart and a border")
    drawn = [
        _image(
            np.random.default_rng(seed), size, contour, distractors, distractor_contour, continuity, seed_distance, gap
        )
        for seed in seeds(batch, generator)
    ]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).float()
    return images, torch.tensor([label for _, label in drawn])


def _image(
    dice: np.random.Generator,
    size: int,
    contour: int,
    distractors: int,
    distractor_contour: int,
    continuity: float,
    seed_distance: float,
    gap: float,
) -> tuple[Image, int]:
    while True:  # until both curves fit
        canvas = _Canvas(dice, size, continuity, gap)
        begin = dice.uniform(_BORDER, size - 1 - _BORDER, 2)
        angle = dice.uniform(0, 2 * math.pi)
        curves = [_Curve(begin), _Curve(begin + seed_distance * _unit(angle))]
        if all(canvas.extend(curve, other) for _ in range(contour) for curve, other in (curves, curves[::-1])):
            break
    for curve in curves:
        canvas.close(curve)
    for _ in range(distractors):
        for _ in range(_DISTRACTOR_TRIES):
            if canvas.add_distractor(distractor_contour):
                break
    label, first = (int(bit) for bit in dice.integers(2, size=2))
    circles = [curves[first].begin, curves[first if label else 1 - first].end]
    image = _LINE * canvas.image
    for centre in circles:
        image = np.maximum(image, np.clip(_RADIUS + 0.5 - np.linalg.norm(canvas.pixels - centre, axis=-1), 0, 1))
    return image, label


class _Curve:
    """A curve being drawn: where it began, where it ends, its direction, and its last dash."""

    def __init__(self, begin: Image) -> None:
        self.begin = self.end = begin
        self.angle: float | None = None
        self.last: Mask | None = None  # what the next dash may touch, since it follows at once


class _Canvas:
    """What was drawn, and what is taken."""

    def __init__(self, dice: np.random.Generator, size: int, continuity: float, gap: float) -> None:
        self.dice, self.size, self.continuity, self.gap = dice, size, continuity, gap
        self.pixels = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).astype(float)
        self.image: Image = np.zeros((size, size))
        self.taken: Mask = np.zeros((size, size), dtype=bool)

    def extend(self, curve: _Curve, other: _Curve | None = None) -> bool:
        """Add a dash to the curve, if one fits within a few tries; `other` is a curve that grows beside it."""
        taken = self.taken if other is None or other.last is None else self.taken | other.last
        for _ in range(_TRIES):
            if curve.angle is None:
                angle, tail = self.dice.uniform(0, 2 * math.pi), curve.begin
            else:
                angle, tail = curve.angle + self._turn(), curve.end + self.gap * _unit(curve.angle)
            head = tail + DASH * _unit(angle)
            if not all(_BORDER <= x <= self.size - 1 - _BORDER for x in (*tail, *head)):
                continue
            distance = self._distance(tail, head)
            if (taken & (distance < _CORE + _EDGE)).any():
                continue
            self.close(curve)
            self.image = np.maximum(self.image, np.clip(1 - (distance - _CORE) / _EDGE, 0, 1))
            curve.end, curve.angle, curve.last = head, angle, distance < _CORE + _EDGE + _MARGIN
            return True
        return False

    def close(self, curve: _Curve) -> None:
        """The curve's last dash is taken, too."""
        if curve.last is not None:
            self.taken |= curve.last

    def add_distractor(self, dashes: int) -> bool:
        """A short curve somewhere; nothing is left of one that does not fit."""
        free = np.argwhere(~self.taken)
        if len(free) < 0.01 * self.taken.size:
            return False
        image, taken = self.image, self.taken.copy()
        curve = _Curve(free[self.dice.integers(len(free))].astype(float))
        if all(self.extend(curve) for _ in range(dashes)):
            self.close(curve)
            return True
        self.image, self.taken = image, taken
        return False

    def _turn(self) -> float:
        """An angle within pi / (2 continuity), in proportion to the square of its cosine."""
        while True:
            turn = self.dice.uniform(-1, 1) * math.pi / (2 * self.continuity)
            if self.dice.random() < math.cos(self.continuity * turn) ** 2:
                return float(turn)

    def _distance(self, tail: Image, head: Image) -> Image:
        """Of every pixel to the line from tail to head."""
        along = head - tail
        place = np.clip(((self.pixels - tail) @ along) / (along @ along), 0, 1)
        nearest: Image = np.linalg.norm(self.pixels - tail - place[..., None] * along, axis=-1)
        return nearest


def _unit(angle: float) -> Image:
    return np.array([math.cos(angle), math.sin(angle)])
