"""Running statistics in which every element, or every batch, counts alike."""

import dataclasses

from jaxnorm._core.arithmetic import abs2, quotient, scale_by
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import alike, check_counted
from jaxnorm._core.running import moved, one_batch, warn_of_half_precision
from jaxnorm._core.state import check_running


def update_cumulative(state: Moments, m: Moments, *, batch_axis: int = 0) -> Moments:
    """Moments of all elements seen so far, the variance between batches included.

        state <- merge(state, m)

    by differences from the state: with N and n the counts, and d = m.mean - mean,

        mean <- mean + d n / (N + n),    var <- var + (m.var - var + |d|^2 N / (N + n)) n / (N + n)

    so that what the mean loses by rounding does not enter the variance, however many the steps. In
    float32 the mean stands still once a step is below half of its last digit.

    Args:
        state: old running statistics with a count: `init_running(shape, counted=True)`.
        m: moments of the batch, of the statistic's shape or of the state's.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state.
        ValueError: a state without count, or moments of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import init_running
        >>> state = init_running((1,), counted=True)
        >>> for value in (0.0, 2.0):
        ...     m = Moments(jnp.ones((1, 1)), jnp.full((1, 1), value), jnp.zeros((1, 1)))
        ...     state = update_cumulative(state, m)
        >>> state.mean.tolist(), state.var.tolist()
        ([1.0], [1.0])
    """
    check_running(state, "state")
    check_counted(state, "a cumulative average")
    warn_of_half_precision(state.var.dtype, None)
    m, _ = one_batch(m, state, batch_axis)
    n = m.count.astype(state.count.dtype)
    total = state.count + n
    share = quotient(n, total)
    old, new = alike(state.mean, m.mean)
    between = scale_by(abs2(new - old), 1 - share)
    m = dataclasses.replace(m, var=m.var.astype(between.dtype) + between)
    return moved(state, m, share, total)


def update_averaged(state: Moments, m: Moments, *, batch_axis: int = 0) -> Moments:
    """Averages of the batches' means and unbiased variances, each batch counting alike.

        k <- k + 1,    mean <- mean + (m - mean) / k,    var <- var + (v n / (n - 1) - var) / k

    It estimates the variance inside batches; `update_cumulative` that of all elements, and is exact
    where batches differ.

    Args:
        state: old running statistics with a count, here of batches:
            `init_running(shape, counted=True)`.
        m: moments of the batch, of the statistic's shape or of the state's.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state.
        ValueError: a state without count, or moments of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import init_running
        >>> state = init_running((1,), counted=True)
        >>> for value in (0.0, 2.0):
        ...     m = Moments(jnp.full((1, 1), 3.0), jnp.full((1, 1), value), jnp.ones((1, 1)))
        ...     state = update_averaged(state, m)
        >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
        ([1.0], [1.5], [2.0])
    """
    check_running(state, "state")
    check_counted(state, "an average over batches")
    warn_of_half_precision(state.var.dtype, None)
    m, _ = one_batch(m, state, batch_axis, correction=1)
    number = state.count + 1
    return moved(state, m, 1 / number, number)
