"""Batch Renormalization: batch statistics, corrected towards the running ones."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_epsilon, check_flag, check_number
from jaxnorm._core.moments import Moments
from jaxnorm._core.running import usable
from jaxnorm._frame import (
    Options,
    State,
    along_channels,
    applied,
    averaged,
    check_state,
    measured,
    real,
)
from jaxnorm.methods import batch_norm


def init_batch_renorm(num_channels: int) -> State:
    """State before the first step: mean 0 and standard deviation 1 for each channel.

    Args:
        num_channels: C.

    Returns:
        `mean` and `std`, (C,), float32. Unlike batch normalization's, this state averages standard
        deviations.

    Example:
        >>> {name: t.shape for name, t in init_batch_renorm(3).items()}
        {'mean': (3,), 'std': (3,)}
    """
    return {
        "mean": jnp.zeros(num_channels, jnp.float32),
        "std": jnp.ones(num_channels, jnp.float32),
    }


def batch_renorm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    rmax: ArrayLike = 3.0,
    dmax: ArrayLike = 5.0,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Batch normalization, corrected by how far the batch is from the running statistics.

        std = sqrt(var + epsilon),    r = clip(std / running_std, 1 / rmax, rmax)
        d = clip((mean - running_mean) / running_std, -dmax, dmax)
        y = ((x - mean) / std * r + d) * scale + bias

    with the running statistics before this step; no gradient flows into r and d. In inference

        y = (x - running_mean) / running_std * scale + bias

    With rmax = 1 and dmax = 0 it is batch normalization; without clipping the output is that of
    inference, and the gradient r times batch normalization's.

    Args:
        x: real floating array with examples and channels.
        state: see `init_batch_renorm`.
        train: use the batch's statistics and update the state, or use the state.
        rmax: bound of the correction of the scale, 1 or more; a number or traced scalar, see
            `batch_renorm_bounds`. A traced one below 1 is taken as 1.
        dmax: bound of the correction of the mean, in standard deviations, 0 or more. A traced one
            below 0 is taken as 0.
        momentum: weight of the old state per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        channels' state.

    Raises:
        TypeError: x is complex or integer.
        ValueError: state of another number of channels or of another method, rmax below 1, dmax
            below 0, a momentum outside 0 to 1.

    Example:
        >>> x = jnp.array([[0.0], [2.0]])
        >>> y, state = batch_renorm(x, init_batch_renorm(1), train=True, momentum=0.5, epsilon=0.0)
        >>> # the running statistics are still 0 and 1, and x is within the bounds
        >>> y.tolist(), state["mean"].tolist()
        ([[0.0], [2.0]], [0.5])

    Reference:
        Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        2017, arXiv:1702.03275. That the state averages the standard deviation, and is one pair,
        follows Keras's implementation; defaults of rmax and dmax are the end of the paper's
        schedule, as cited by others.
    """
    check_flag(train, "train")
    check_epsilon(epsilon)
    x = real(x, "batch_renorm")
    check_state(state, "batch_renorm", mean=1, std=1)
    check_number(rmax, "rmax", at_least=1)
    check_number(dmax, "dmax", at_least=0)
    channel_axis = options.get("channel_axis", -1)
    mean, std = (along_channels(state[name], x, channel_axis) for name in ("mean", "std"))
    std = jnp.maximum(std, jnp.sqrt(jnp.asarray(epsilon, std.dtype)))
    if not train:
        return (
            applied(x, Moments(jnp.ones_like(mean), mean, jnp.square(std)), 0.0, **options),
            state,
        )
    m = measured(x, batch_norm(), center=mean, **options)
    batch_std = jnp.sqrt(m.var + epsilon)
    rmax, dmax = (
        jnp.maximum(jnp.asarray(t, std.dtype), least) for t, least in ((rmax, 1), (dmax, 0))
    )
    r, d = lax.stop_gradient(
        (jnp.clip(batch_std / std, 1 / rmax, rmax), jnp.clip((m.mean - mean) / std, -dmax, dmax))
    )
    corrected = batch_std / r
    y = applied(x, Moments(m.count, m.mean - d * corrected, jnp.square(corrected)), 0.0, **options)
    keep = usable(m)
    new = {
        "mean": averaged(state["mean"], m.mean, momentum, keep),
        "std": averaged(state["std"], batch_std, momentum, keep),
    }
    return y, new
