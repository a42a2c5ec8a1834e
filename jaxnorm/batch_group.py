"""Batch Group Normalization with any number of groups, also where groups are no product over axes.

Each example is flattened in the order channel, row, column and cut into G equal pieces. The
flattening is done on moments, which have no examples: x is read and written as it lies.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.checks import check_count, check_flag
from jaxnorm._core.groups import EACH, Groups
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import pool
from jaxnorm._core.state import init_running
from jaxnorm._frame import (
    Options,
    State,
    applied,
    check_state,
    measured,
    per_device,
    real,
    select_options,
    updated,
)


def init_batch_group_norm(
    num_groups: int,
    x_shape: Sequence[int],
    *,
    counted: bool = False,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> State:
    """State of `batch_group_norm` before the first step: mean 0 and variance 1 for each group.

    Args:
        num_groups: G.
        x_shape: shape of x; any number of examples.
        counted: add `count`, (G,), which divides the initial 0 and 1 out of the average; see
            `init_running`.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        `mean` and `var`, (G,), float32; and where G does not divide C `positions`, zeros of the
        image size, (H, W): its shape says to which resolution the state belongs.

    Raises:
        ValueError: G does not divide C H W.

    Example:
        >>> {name: t.shape for name, t in init_batch_group_norm(4, (1, 8, 8, 6)).items()}
        {'mean': (4,), 'var': (4,), 'positions': (8, 8)}
    """
    channels, positions = _sizes(num_groups, x_shape, batch_axis, channel_axis)
    first = init_running((num_groups,), counted=counted)
    state = {"mean": first.mean, "var": first.var} | ({"count": first.count} if counted else {})
    return (
        state
        if channels % num_groups == 0
        else state | {"positions": jnp.zeros(positions, jnp.float32)}
    )


def batch_group_norm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    num_groups: int,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    correction: int = 0,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Standardize each of G equal pieces of the flattened features over the whole batch.

    With d = ((c H + h) W + w) the place of a feature in the order channel, row, column, S_g = {(n,
    h, w, c): all n, floor(d G / (C H W)) = g}, and

        y = (x - mean_S) / sqrt(var_S + epsilon) * scale_c + bias_c.

    Where G divides C, or is C times whole parts of the image, it is `norm` with
    `methods.batch_group_norm(G, x.shape)`; G = C H W pools the examples alone. Where G does not
    divide C the result depends on the position, and state belongs to one image size.

    Args:
        x: real floating array with examples and channels.
        state: see `init_batch_group_norm`.
        train: use the batch's statistics and update the state, or use the state.
        num_groups: G, a divisor of C H W; `methods.batch_group_count` chooses one.
        momentum: weight of the old state per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.
        correction: 1 stores the unbiased variance, as PyTorch does.
        **options: as `norm`.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        groups' state.

    Raises:
        TypeError: x is complex or integer.
        ValueError: G does not divide C H W; state of another number of groups or of another image
            size.

    Example:
        >>> # two positions, three channels; flattened 0, 3, 1, 4, 2, 5
        >>> x = jnp.arange(6.0).reshape(1, 2, 3)
        >>> state = init_batch_group_norm(2, x.shape)
        >>> _, state = batch_group_norm(x, state, train=True, num_groups=2, momentum=0.0)
        >>> (3 * state["mean"]).tolist()
        [4.0, 11.0]

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782. The definition was read in the abstract
        and in two independent implementations; running statistics are as in one of them.
    """
    check_flag(train, "train")
    x = real(x, "batch_group_norm")
    batch, channel = (
        options.get("batch_axis", 0),
        single_axis(options.get("channel_axis", -1), x.shape),
    )
    channels, positions = _sizes(num_groups, x.shape, batch, channel)
    check_state(state, "batch_group_norm", ("count", "positions"), mean=1, var=1)
    tied = channels % num_groups != 0
    if (
        not state["mean"].shape == state["var"].shape == (num_groups,)
        or ("positions" in state) != tied
    ):
        raise ValueError(
            f"state of {state['mean'].shape[0]} groups, with var of shape {state['var'].shape} and "
            f"{'with' if 'positions' in state else 'without'} positions, does not fit "
            f"{num_groups} groups of x of shape {x.shape}. Expected "
            f"init_batch_group_norm({num_groups}, {x.shape})."
        )
    if tied and state["positions"].shape != positions:
        raise ValueError(
            f"state that belongs to images of {state['positions'].shape} does not fit x of shape "
            f"{x.shape}. With {num_groups} groups, which do not divide {channels} channels, "
            "statistics depend on the position; feed x of that size."
        )
    grid = _grid(num_groups, x.shape, batch, channel)
    if train:
        devices = select_options(options, "axis_name", "axis_index_groups")
        features = jax.tree.map(
            lambda t: _pieces(t, num_groups, channel), measured(x, grid, **per_device(options))
        )
        m = pool(features, (num_groups, 1), **devices)
        state = updated(state, m, momentum, correction)
    else:
        mean, var = (
            state[name].reshape(-1, 1).astype(statistic_dtype(x.dtype)) for name in ("mean", "var")
        )
        m = Moments(jnp.ones_like(mean), mean, var)
    return (
        applied(x, jax.tree.map(lambda t: _at_features(t, grid, channel), m), epsilon, **options),
        state,
    )


def _sizes(
    num_groups: int, x_shape: Sequence[int], batch_axis: int, channel_axis: int
) -> tuple[int, Shape]:
    """C and the image size, once G is checked."""
    batch, channel = single_axis(batch_axis, x_shape), single_axis(channel_axis, x_shape)
    positions = tuple(n for i, n in enumerate(x_shape) if i not in (batch, channel))
    features = x_shape[channel] * math.prod(positions)
    if features % check_count(num_groups, "num_groups") != 0:
        raise ValueError(
            f"{num_groups} groups do not divide the features of x. Got x of shape "
            f"{tuple(x_shape)}; expected a divisor of {features}, the product of its "
            f"{x_shape[channel]} channels and positions {positions}."
        )
    return x_shape[channel], positions


def _grid(num_groups: int, x_shape: Shape, batch_axis: int, channel_axis: int) -> Shape:
    """The coarsest statistic at hand of which every piece is a union: the pieces themselves, or
    each feature apart."""
    channels, positions = _sizes(num_groups, x_shape, batch_axis, channel_axis)
    row = methods.Method(Groups(batch=1, spatial=EACH, channel=EACH))
    if channels % num_groups == 0 or num_groups % channels == 0:
        try:
            row = methods.batch_group_norm(num_groups, (1, *positions, channels))
        except ValueError:
            pass
    return row.shape(x_shape, batch_axis=batch_axis, channel_axis=channel_axis)


def _pieces(t: jax.Array, num_groups: int, channel: int) -> jax.Array:
    """A statistic without examples in pieces: (G, rest), in the order channel, row, column."""
    return jnp.moveaxis(t, channel, 0).reshape(num_groups, -1)


def _at_features(t: jax.Array, grid: Shape, channel: int) -> jax.Array:
    """A statistic of the pieces, (G, 1), repeated for the features of each: of shape `grid`."""
    order = (grid[channel], *(n for i, n in enumerate(grid) if i != channel))
    t = jnp.broadcast_to(t, (t.shape[0], math.prod(grid) // t.shape[0]))
    return jnp.moveaxis(t.reshape(order), 0, channel)
