"""Real images from an installed package: scikit-learn's handwritten digits, split and shifted anew
for every seed."""

from functools import cache
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

NUM_IMAGES = 1797


class Images(NamedTuple):
    """Pixels (N, 8, 8, 1), from -1 for background to 1 for ink, and labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


class Split(NamedTuple):
    """Three sets of images that have none in common."""

    train: Images
    validation: Images
    test: Images


@cache
def split(seed: int, num_train: int) -> Split:
    """The digits in an order drawn from `seed`: `num_train` to train on, the rest halved into
    validation and test."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng((seed, 0)).permutation(NUM_IMAGES)
    pixels = (pixels[order].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    labels = labels[order].astype(np.int32)
    middle = (num_train + NUM_IMAGES) // 2
    parts = (slice(num_train), slice(num_train, middle), slice(middle, None))
    return Split(*(Images(pixels[part], labels[part]) for part in parts))


def epoch(train: Images, seed: int, index: int) -> Images:
    """`train` in a new order, each image moved by -1, 0 or 1 pixel along each axis.

    Order and moves depend on `seed` and `index` alone, so every method sees the same images in the
    same order.
    """
    rng = np.random.default_rng((seed, 1, index))
    order = rng.permutation(len(train.labels))
    corners = rng.integers(0, 3, size=(2, len(order), 1))
    rows, columns = corners + np.arange(8)
    padded = np.pad(train.pixels[order], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    image = np.arange(len(order))[:, None, None]
    return Images(padded[image, rows[:, :, None], columns[:, None, :]], train.labels[order])
