"""Running statistics as an exponential average of those of batches."""

import functools
import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.arithmetic import quotient, statistic_dtype
from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_number, known
from jaxnorm._core.divisor import corrected
from jaxnorm._core.ghosts import GhostUpdate, check_ghost_update, one_update
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import approached, toward
from jaxnorm._core.state import check_running


def update_running(
    state: Moments,
    m: Moments,
    *,
    momentum: ArrayLike = 0.99,
    correction: int = 0,
    ghost_update: GhostUpdate = "pooled",
    batch_axis: int = 0,
) -> Moments:
    """Exponential moving average of mean and variance, in Flax's convention.

        state <- momentum * state + (1 - momentum) * m

    computed as state + (1 - momentum) * (m - state), so that the average of values far from 0 is
    not off by the rounding of the two weights. In float32 a step below half of the last digit is
    lost: the mean comes as near as 3e-8 / (1 - momentum) of its size.

    With a counted state (`init_running(counted=True)`) the average is debiased: with W <- momentum
    * W + 1 - momentum the weight of all batches so far, the new batch enters with (1 - momentum) /
    W, so the initial 0 and 1 never count.

    Statistics of several ghost batches are pooled first, so the state is that of plain batch
    normalization whatever the ghost size. Other conventions take k ghosts, of moments s_1 to s_k,
    as they are:

        "averaged"              state <- momentum * state + (1 - momentum) * mean_i s_i
        "sequential"            one update for each ghost in turn: later ghosts weigh more,
                                and k ghosts forget k times as much
        "sequential divided"    the same with the rate 1 - momentum divided by k

    Their variances lack the variance between the ghosts' means. Pooled is the convention of the
    code of arXiv:1906.03548; sequential of arXiv:1705.08741 and TabNet's Keras code, divided of
    MosaicML's Composer, averaged of Keras 2 (from memory).

    Where a set is empty, or its moments or what would be stored are not finite, the state stays;
    where only some ghosts are so, they are left out, but for non-finite ones in a pool.

    At inference `normalize(x, running_moments(state, groups, x.shape))` uses the state.

    Args:
        state: old running statistics.
        m: moments of the batch, of the statistic's shape or of the state's.
        momentum: weight of the OLD value per update, 0 to 1; a number or traced scalar. PyTorch's
            momentum is 1 minus this. A traced one beyond 0 or 1 is taken as 0 or 1, and with NaN
            the state stays.
        correction: 1 stores the unbiased variance, n / (n - 1) times the biased one, as PyTorch
            does; n of the pooled batch, or in the other conventions of each ghost. With real
            weights n is their sum, so they must count elements: multiplied by 10 they give another
            variance. The factor is never below 1, and is 1 up to n = 1.
        ghost_update: how several ghost batches enter.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state; a state that is no `Moments`, such as a dict.
        ValueError: moments of another shape, an unknown convention, a momentum outside 0 to 1.

    Warns:
        UserWarning: the state is of half precision, in which the average stops too early.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import init_running
        >>> m = Moments(jnp.full((1, 2), 8.0), jnp.ones((1, 2)), jnp.full((1, 2), 3.0))
        >>> new = update_running(init_running((2,)), m, momentum=0.5)
        >>> new.mean.tolist(), new.var.tolist()
        ([0.5, 0.5], [2.0, 2.0])

    Example: a step of training, then inference by hand.
        >>> from jaxnorm import methods, norm, normalize, running_moments
        >>> x, batch_norm = jnp.array([[0.0, 2.0], [4.0, 6.0]]), methods.batch_norm()
        >>> y, m = norm(x, batch_norm)
        >>> state = update_running(init_running((2,)), m, momentum=0.0)
        >>> z = normalize(x, running_moments(state, batch_norm, x.shape))
        >>> bool((y == z).all())
        True
    """
    check_running(state, "state")
    rate = rate_of(momentum, statistic_dtype(state.var.dtype))
    warn_of_half_precision(state.var.dtype, momentum)
    check_ghost_update(ghost_update)
    m, rate = one_batch(m, state, batch_axis, correction, rate, ghost_update)
    count = state.count
    if count is not None:
        count = toward(count, jnp.ones_like(count), rate)
        rate = quotient(rate, count)
    return moved(state, m, rate, count)


def moved(state: Moments, m: Moments, rate: jax.Array, count: jax.Array | None) -> Moments:
    """State that has gone a part of its way to m, with that count, in its own dtypes.

    It stays where m is not usable, or where something would not be finite as it is stored.
    """
    new = approached(state, m, rate, count)
    new = jax.tree.map(lambda t, old: t.astype(old.dtype), new, state)
    keep = functools.reduce(operator.and_, map(jnp.isfinite, jax.tree.leaves(new)), usable(m))
    return jax.tree.map(lambda t, old: jnp.where(keep, t, old), new, state)


def rate_of(momentum: ArrayLike, dtype: jnp.dtype, name: str = "momentum") -> jax.Array:
    """1 - momentum, from 0 to 1, once momentum is known to be a number; a traced one is clipped."""
    check_number(momentum, name, at_least=0, at_most=1)
    return jnp.clip(jnp.asarray(1 - momentum, dtype), 0, 1)


def warn_of_half_precision(dtype: DTypeLike, momentum: ArrayLike | None) -> None:
    """Say so where an average in half precision would stop far from where it goes.

    Steps of less than half of the last digit are lost. `momentum` is None where steps become ever
    smaller.

    It stops at a distance of half of the last digit / (1 - momentum): with 0.99 a part in 10^5 in
    float32, and 4 in 10 in bfloat16.
    """
    digit = float(jnp.finfo(dtype).eps) / 2
    value = None if momentum is None else known(momentum)
    rate = 0.0 if value is None else 1 - float(value)
    if jnp.finfo(dtype).bits >= 32 or value == 1 or digit <= 0.01 * rate:
        return
    which = "a cumulative average" if momentum is None else "an average"
    which += "" if value is None else f" with momentum {float(value):g}"
    warnings.warn(
        f"running statistics in {jnp.dtype(dtype).name}: a step below {digit:.1%} of their value "
        f"is lost, so {which} stops far from where it goes. Keep the state in float32, for example "
        "jax.tree.map(lambda t: t.astype('float32'), state).",
        UserWarning,
        stacklevel=4,
    )


def usable(m: Moments) -> jax.Array:
    """Where a batch may enter the state: its sets have elements, and finite moments."""
    return (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)


def one_batch(
    m: Moments,
    state: Moments,
    batch_axis: int,
    correction: int = 0,
    rate: Any = None,
    ghost_update: GhostUpdate = "pooled",
) -> tuple[Moments, Any]:
    """A batch's moments in the state's shape, ghosts joined, and the rate at which they enter."""
    check_running(m, "m")
    if m.count is None:
        raise ValueError(
            "m has no count. Expected a batch's moments, as moments(x, groups) returns, not "
            "running statistics."
        )
    shape, fits = m.mean.shape, state.mean.shape
    if ghost_update != "pooled":  # the variance of each ghost, not that of their average
        m, correction = corrected(m, correction), 0
    if shape != fits:
        batch = single_axis(batch_axis, shape)
        if shape[batch] != 1:
            m, rate = one_update(m, usable(m), batch, rate, ghost_update)
        if [n for n in m.mean.shape if n != 1] != [n for n in fits if n != 1]:
            raise ValueError(
                f"moments of shape {shape} do not fit running statistics of shape {fits}. "
                "Expected the statistic's shape, whose batch axis and spatial axes of size 1 are "
                "dropped."
            )
        m, rate = jax.tree.map(lambda t: t.reshape(fits) if t.ndim else t, (m, rate))
    if jnp.iscomplexobj(m.mean) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"the batch's mean is complex and the running mean {state.mean.dtype}. Expected a "
            "complex running mean for complex x: make it so from the start, init_running(shape, "
            "dtype=jnp.complex64)."
        )
    return corrected(m, correction), rate
