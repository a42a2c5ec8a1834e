"""The pieces of flattened features over which `batch_group_norm` takes statistics.

Each example is flattened in the order channel, row, column and cut into G equal pieces. The
flattening is done on moments, which have no examples: x is read and written as it lies.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.groups import EACH, Groups


def positions_of(
    num_groups: int, x_shape: Sequence[int], batch_axis: int, channel_axis: int
) -> Shape:
    """The image size, once G is known to divide the features."""
    batch, channel = single_axis(batch_axis, x_shape), single_axis(channel_axis, x_shape)
    positions = tuple(n for i, n in enumerate(x_shape) if i not in (batch, channel))
    features = x_shape[channel] * math.prod(positions)
    if features % num_groups != 0:
        raise ValueError(
            f"{num_groups} groups do not divide the features of x. Got x of shape "
            f"{tuple(x_shape)}; expected a divisor of {features}, the product of its "
            f"{x_shape[channel]} channels and positions {positions}."
        )
    return positions


def grid_of(num_groups: int, x_shape: Shape, batch_axis: int, channel_axis: int) -> Shape:
    """The coarsest statistic at hand of which every piece is a union.

    It is that of the pieces themselves, or of each feature apart.
    """
    positions = positions_of(num_groups, x_shape, batch_axis, channel_axis)
    channels = x_shape[single_axis(channel_axis, x_shape)]
    parts = _parts_of_channels(num_groups, channels, positions) or EACH
    groups = Groups(batch=1, spatial=parts, channel=EACH)
    return groups.shape(x_shape, batch_axis=batch_axis, channel_axis=channel_axis)


def _parts_of_channels(num_groups: int, channels: int, positions: Shape) -> Shape | None:
    """Into how many parts each spatial axis is split where pieces are parts of single channels.

    Rows are split first. None where pieces are no parts of single channels, or no product over
    axes.
    """
    parts, rest = divmod(num_groups, channels)
    if rest:
        return None
    spatial = []
    for size in positions:
        # The rows are split until each stands apart, and only then the columns.
        spatial.append(parts if size % parts == 0 else size)
        if parts % spatial[-1]:
            return None
        parts = max(parts // spatial[-1], 1)
    return tuple(spatial) if math.prod(spatial) * channels == num_groups else None


def in_pieces(t: jax.Array, num_groups: int, channel: int) -> jax.Array:
    """A statistic without examples in pieces: (G, rest), in the order channel, row, column."""
    return jnp.moveaxis(t, channel, 0).reshape(num_groups, -1)


def at_features(t: jax.Array, grid: Shape, channel: int) -> jax.Array:
    """A statistic of the pieces, (G, 1), repeated for the features of each: of shape `grid`."""
    order = (grid[channel], *(n for i, n in enumerate(grid) if i != channel))
    t = jnp.broadcast_to(t, (t.shape[0], math.prod(grid) // t.shape[0]))
    return jnp.moveaxis(t.reshape(order), 0, channel)
