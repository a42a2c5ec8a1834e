"""Images from other distributions than those of a data set, and which images of a step share a
device."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np

from benchmarks.datasets import Data, Images, load

Shift = Callable[[np.ndarray], np.ndarray]
"""Of pixels from -1 to 1, (..., H, W, C)."""


def _noisy(pixels: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(0, 0.5, pixels.shape)
    return (pixels + drawn).astype(np.float32)


SHIFTS: Mapping[str, Shift] = MappingProxyType(
    {
        "original": lambda pixels: pixels,
        "rotated": lambda pixels: np.rot90(pixels, axes=(-3, -2)),
        "inverted": lambda pixels: -pixels,
        "noisy": _noisy,
        "faint": lambda pixels: (pixels / 2 + 0.25).astype(np.float32),
    }
)
"""By name: a quarter of a turn, black for white, normal noise of 0.5 on a scale from -1 to 1, and
half the contrast on a brighter ground."""

DOMAINS = ("original", "rotated", "inverted", "noisy")
"""Shifts that are trained on; another one is unknown."""

UNKNOWN = "faint"


def _by_class(images: Images) -> Images:
    """The images of each step in the order of their labels."""
    seeds, steps, *_ = images.labels.shape
    order = images.labels.reshape(seeds, steps, -1).argsort(axis=-1, kind="stable")

    def sort(t: np.ndarray) -> np.ndarray:
        flat = t.reshape(seeds, steps, -1, *t.shape[4:])
        chosen = order.reshape(*order.shape, *[1] * (flat.ndim - 3))
        return np.take_along_axis(flat, chosen, axis=2).reshape(t.shape)

    return jax.tree.map(sort, images)


def _domains(images: Images) -> Images:
    """Image i of every device in domain i modulo their number."""
    pixels = images.pixels.copy()
    for i, name in enumerate(DOMAINS):
        pixels[:, :, :, i :: len(DOMAINS)] = SHIFTS[name](pixels[:, :, :, i :: len(DOMAINS)])
    return Images(pixels, images.labels)


def _domains_apart(images: Images) -> Images:
    """All images of device i in domain i."""
    pixels = images.pixels.copy()
    for i, name in enumerate(DOMAINS):
        pixels[:, :, i] = SHIFTS[name](pixels[:, :, i])
    return Images(pixels, images.labels)


ORDERS: Mapping[str, Callable[[Images], Images] | None] = MappingProxyType(
    {
        "mixed": None,
        "by_class": _by_class,
        "domains": _domains,
        "domains_apart": _domains_apart,
    }
)
"""By name, of images (seeds, steps, devices, images, ...): see `benchmarks.cells.How`."""


def mnist_like_digits() -> Images:
    """MNIST's digits as 8x8 images like those of scikit-learn.

    Scikit-learn's are made of 32x32 images by counting black pixels in fields of 4x4; these are
    means of fields of 3x3, without the two outermost pixels, which are white.
    """
    data: Data = load("mnist_5000")
    inner = data.train.pixels[:, 2:-2, 2:-2].astype(np.float32)
    fields = inner.reshape(-1, 8, 3, 8, 3, 1).mean(axis=(2, 4))
    return Images(fields / np.float32(data.white / 2) - 1, data.train.labels)
