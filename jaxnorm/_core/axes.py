"""Axes, counted from the front."""

from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from jaxnorm._core.checks import as_index

Shape = tuple[int, ...]


def single_axis(axis: SupportsIndex, shape: Sequence[int]) -> int:
    """`axis` counted from the front."""
    index = as_index(axis)
    if index is None or not -len(shape) <= index < len(shape):
        some = f"an integer from {-len(shape)} to {len(shape) - 1}" if shape else "x to have axes"
        raise ValueError(
            f"axis {axis!r} is not an axis of x. Got x of shape {tuple(shape)}; expected {some}."
        )
    return index % len(shape)


def axes_of(axis: SupportsIndex | Sequence[int], shape: Sequence[int]) -> Shape:
    """One axis or several, counted from the front, sorted, each once."""
    axes = tuple(axis) if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({single_axis(a, shape) for a in axes}))


def resized(shape: Shape, axis: int, size: int) -> Shape:
    """`shape` with another size of one axis, counted from the front."""
    return (*shape[:axis], size, *shape[axis + 1 :])
