"""What is remembered between steps.

State is `Moments` without the axes that hold no information: the batch axis and spatial axes of
size 1 are dropped, the channel axis stays. Its `count` is None, no leaf at all, except where a rule
needs it: see `init_running`. The shape and dtypes of state are the same after an update, so it can
be the carry of a `lax.scan`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, resized, single_axis
from jaxnorm._core.groups import Groups, HasRow, check_divides, row_of
from jaxnorm._core.moments import Moments, check_moments
from jaxnorm._core.pooling import pool


def running_shape(
    groups: Groups | HasRow, x_shape: Shape, *, batch_axis: int = 0, channel_axis: int = -1
) -> tuple[Shape, Shape]:
    """Shape of the running state, and the shape in which it serves x.

    Args:
        groups: `Groups`, or a row of the table. Its batch number does not matter: running
            statistics are those of all examples.
        x_shape: shape of x; the number of examples does not matter.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        The state's shape and the statistic's shape with the batch pooled.

    Raises:
        ValueError: axes that do not split.

    Example:
        >>> from jaxnorm import EACH, Groups
        >>> running_shape(Groups(batch=4, spatial=1, channel=EACH), (64, 8, 8, 256))
        ((256,), (1, 1, 1, 256))
    """
    axes = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    found, _ = row_of(groups, x_shape, **axes)
    if not isinstance(found, Groups):
        raise TypeError(
            "expected a Groups, or a row of the table such as methods.group_norm(32). Got "
            f"{groups!r}."
        )
    statistic = dataclasses.replace(found, batch=1).shape(x_shape, **axes)
    batch, channel = (single_axis(axis, x_shape) for axis in axes.values())
    state = tuple(g for i, g in enumerate(statistic) if i == channel or (i != batch and g != 1))
    return state, statistic


def init_running(shape: Shape, *, dtype: DTypeLike = jnp.float32, counted: bool = False) -> Moments:
    """Running statistics before the first step: mean 0, variance 1.

    Training updates them, `state = update_running(state, m)`, and inference uses them,
    `normalize(x, running_moments(state, groups, x.shape))`.

    Args:
        shape: of the state, see `running_shape`.
        dtype: of the mean; complex for complex x. The variance is real. In half precision an
            average stops short of where it goes: `update_running` warns.
        counted: whether to keep a count, starting at 0. `update_running` then divides the zeros it
            started from out of the average, and `update_cumulative` needs it.

    Returns:
        `Moments` of that shape, with count None unless counted.

    Example:
        >>> init_running((3,)).var.tolist()
        [1.0, 1.0, 1.0]
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"running statistics are floating or complex. Got dtype {jnp.dtype(dtype).name}; "
            "expected float32."
        )
    real = jnp.finfo(dtype).dtype
    count = jnp.zeros(shape, statistic_dtype(real)) if counted else None
    return Moments(count, jnp.zeros(shape, dtype), jnp.ones(shape, real))  # type: ignore[arg-type]  # count is optional here


def running_moments(
    state: Moments,
    groups: Groups | HasRow,
    x_shape: Shape,
    *,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Moments:
    """Running state in the shape that `normalize` takes.

    Args:
        state: running statistics.
        groups: `Groups`, or the row of the table they belong to.
        x_shape: shape of the x to normalize; any number of examples.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        `Moments` that serve x.

    Raises:
        ValueError: the state belongs to another number of channels, groups or positions.

    Example:
        >>> from jaxnorm import EACH, Groups
        >>> running_moments(init_running((3,)), Groups(1, 1, EACH), (8, 4, 4, 3)).mean.shape
        (1, 1, 1, 3)
    """
    expected, statistic = running_shape(
        groups, x_shape, batch_axis=batch_axis, channel_axis=channel_axis
    )
    return serving(state, expected, statistic, x_shape)


def serving(state: Moments, expected: Shape, statistic: Shape, x_shape: Shape) -> Moments:
    """State of the expected shape, in the statistic's shape."""
    check_running(state, "state")
    if state.mean.shape != expected or state.mean.size != math.prod(statistic):
        raise ValueError(
            f"running statistics of shape {state.mean.shape} do not fit x of shape "
            f"{tuple(x_shape)}, whose statistics have shape {statistic}. State that keeps "
            "positions apart is tied to the image size, and all state to the number of channels, "
            "with which it was made; feed x of that size."
        )
    return jax.tree.map(lambda t: t.reshape(statistic), state)


def pooled_to(running: Moments, shape: Shape, batch_axis: int = 0) -> Moments:
    """Running moments, pooled where they are finer than statistics of that shape.

    The batch axis stays of size 1.
    """
    fine, batch = running.mean.shape, single_axis(batch_axis, shape)
    if len(fine) != len(shape) or fine[batch] != 1:
        raise ValueError(
            f"running moments of shape {fine} do not serve statistics of shape {shape}. Expected "
            "the statistic's shape with 1 for the batch, as running_moments(state, groups, "
            "x.shape) returns."
        )
    coarse = resized(shape, batch, 1)
    check_divides(coarse, fine, "statistics")
    known = dataclasses.replace(running, count=jnp.ones_like(running.var))
    return known if coarse == fine else pool(known, coarse)


def check_running(state: Any, name: str) -> None:
    """`state` is running statistics, with a mean and a variance of one shape."""
    if not isinstance(state, Moments):
        raise TypeError(
            f"{name} is a {type(state).__name__}; expected Moments, such as init_running(shape), "
            "or of a dict Moments(None, d['mean'], d['var']); a method's apply takes the dict."
        )
    check_moments(state, name)


def serves_channels(shape: Shape, channels: int) -> bool:
    """Whether running statistics of this shape are those of channels or groups of channels.

    Others depend on the position, which a kernel cannot.
    """
    return len(shape) == 1 and channels % max(shape[0], 1) == 0
