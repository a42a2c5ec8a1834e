"""Blocks of an array: their sums, and one value for each spread over it."""

import math

import jax
import jax.numpy as jnp

from jaxnorm._core.axes import Shape


def elements(shape: Shape, groups: Shape) -> int:
    """How many elements of an array of `shape` each of `groups` sets has."""
    return math.prod(1 if n == g else n // g for n, g in zip(shape, groups, strict=True))


def _cut(shape: Shape, groups: Shape) -> tuple[list[int], Shape]:
    """`shape` with split axes written as (groups, rest), and the axes of the rests."""
    dims: list[int] = []
    rests = []
    for n, g in zip(shape, groups, strict=True):
        dims += [n] if g in (1, n) else [g, n // g]
        if g != n:
            rests.append(len(dims) - 1)
    return dims, tuple(rests)


def block_sum(t: jax.Array, groups: Shape) -> jax.Array:
    """Sum of each block: an array of shape `groups`."""
    if t.shape == groups:
        return t
    dims, rests = _cut(t.shape, groups)
    return t.reshape(dims).sum(rests).reshape(groups)


def spread(v: jax.Array, shape: Shape) -> jax.Array:
    """Each group's value repeated for its indices.

    Axes of size 1 stay and broadcast against `shape`.
    """
    shape = tuple(g if g == 1 else n for n, g in zip(shape, v.shape, strict=True))
    if v.shape == shape:
        return v
    dims, rests = _cut(shape, v.shape)
    v = jnp.expand_dims(v.reshape([d for i, d in enumerate(dims) if i not in rests]), rests)
    return jnp.broadcast_to(v, dims).reshape(shape)


def channel_resolution(shape: Shape, groups: Shape, channel_axes: Shape) -> Shape:
    """Shape of the first, full-size sums.

    It is `groups` with the channels, and with every axis that is split, whole.

    Splitting an axis at full size makes two of it, which XLA reduces several times slower; summing
    the indices of a group afterwards costs nothing. Where these axes are all that is summed there
    is one stage.
    """
    sizes = enumerate(zip(shape, groups, strict=True))
    whole = tuple(n if i in channel_axes or g != 1 else 1 for i, (n, g) in sizes)
    return groups if whole == shape else whole
