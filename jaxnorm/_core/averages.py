"""Running statistics in which every element, or every batch, counts alike."""

import jax.numpy as jnp

from jaxnorm._core.arithmetic import abs2
from jaxnorm._core.divisor import corrected
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import toward
from jaxnorm._core.running import _alike, _as_state, _stored, warn_of_half_precision
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
    if state.count is None:
        raise ValueError(
            "a cumulative average needs a count. Got a state without one; make it by "
            "init_running(counted=True)."
        )
    warn_of_half_precision(state.var.dtype, None)
    m = _as_state(m, state, batch_axis)
    total = state.count + m.count.astype(state.count.dtype)
    share = m.count.astype(state.count.dtype) / jnp.where(total > 0, total, 1)
    mean, new_mean = _alike(state.mean, m.mean)
    var, new_var = _alike(state.var, m.var)
    between = (1 - share).astype(var.dtype) * abs2(new_mean - mean)
    mean, var = toward(mean, new_mean, share), toward(var, new_var + between, share)
    return _stored(state, m, mean, var, total)


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
    if state.count is None:
        raise ValueError(
            "an average over batches counts them. Got no count; make the state by "
            "init_running(counted=True)."
        )
    warn_of_half_precision(state.var.dtype, None)
    m = corrected(_as_state(m, state, batch_axis), 1)
    k = state.count + 1
    mean, var = (toward(*_alike(*ts), 1 / k) for ts in ((state.mean, m.mean), (state.var, m.var)))
    return _stored(state, m, mean, var, k)
