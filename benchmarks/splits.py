"""Images in training, validation and test sets, drawn and shifted anew for every seed."""

from typing import NamedTuple

import numpy as np

from benchmarks.datasets import Data, Images


class Split(NamedTuple):
    """Three sets of images that have none in common, of pixels from -1 for background to 1."""

    train: Images
    validation: Images
    test: Images


def split(data: Data, seed: int, num_train: int, num_held_out: int | None = None) -> Split:
    """The images in an order drawn from `seed`: `num_train` to train on, then those to validate on.

    Tests are on the published test images, also in an order drawn from `seed`; where there are
    none, the images that are left after those of training are halved.

    Args:
        data: a data set.
        seed: a whole number.
        num_train: number of training images.
        num_held_out: at most so many validate and so many test; None is all there are.

    Raises:
        ValueError: no images are left to validate and to test on.
    """
    total = len(data.train.labels)
    spare = 1 if data.test else 2
    if not 1 <= num_train <= total - spare:
        raise ValueError(
            f"{data.title} has {total} images to train and validate on. Got {num_train} to train "
            f"on; expected 1 to {total - spare}."
        )
    order = np.random.default_rng((seed, 0)).permutation(total)
    middle = total if data.test else (num_train + total) // 2
    train, validation, rest = np.split(order, (num_train, middle))
    test = data.train, rest
    if data.test:
        drawn = np.random.default_rng((seed, 2)).permutation(len(data.test.labels))
        test = data.test, drawn

    def part(images: Images, chosen: np.ndarray) -> Images:
        pixels = images.pixels[chosen] / np.float32(data.white / 2) - 1
        return Images(pixels.astype(np.float32), images.labels[chosen])

    return Split(
        part(data.train, train),
        part(data.train, validation[:num_held_out]),
        part(test[0], test[1][:num_held_out]),
    )


def epoch(train: Images, seed: int, index: int) -> Images:
    """`train` in a new order, each image moved by -1, 0 or 1 pixel along each axis.

    Order and moves depend on `seed` and `index` alone, so every method sees the same images in the
    same order.
    """
    rng = np.random.default_rng((seed, 1, index))
    order = rng.permutation(len(train.labels))
    _, height, width, _ = train.pixels.shape
    first_row, first_column = rng.integers(0, 3, size=(2, len(order), 1))
    rows, columns = first_row + np.arange(height), first_column + np.arange(width)
    padded = np.pad(train.pixels[order], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    image = np.arange(len(order))[:, None, None]
    return Images(padded[image, rows[:, :, None], columns[:, None, :]], train.labels[order])
