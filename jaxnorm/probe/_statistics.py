"""Statistics of batches against those of the population, in training and in use at inference."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import abs2, divide, statistic_dtype
from jaxnorm._core.boundary import normalize, pool
from jaxnorm._core.checks import check_number
from jaxnorm._core.moments import Moments, check_moments, inexact


class StatisticsSpread(NamedTuple):
    """What `statistics_spread` returns, arrays of the statistic's shape.

    Args:
        var_ratio: mean over the batches of batch variance / population variance. Of n independent
            elements it is (n - 1) / n.
        var_spread: sample standard deviation of this ratio over the batches. Of n independent
            normal elements it is sqrt(2 (n - 1)) / n.
        mean_shift: mean over the batches of (batch mean - population mean) / population standard
            deviation.
        mean_spread: sample standard deviation of this over the batches, 1 / sqrt(n) for n
            independent elements.
        effective_count: 1 / mean_spread^2: how many independent elements would have means that
            spread as much. Less than the count where elements are correlated, as those of one image
            are.

    Reference:
        See `statistics_spread`.
    """

    var_ratio: jax.Array
    var_spread: jax.Array
    mean_shift: jax.Array
    mean_spread: jax.Array
    effective_count: jax.Array


def statistics_spread(batches: Moments, *, population: Moments | None = None) -> StatisticsSpread:
    """How well the statistics of a batch estimate those of the population.

    With batches k = 1 ... K of moments (m_k, v_k) and the population's (M, V),

        r_k = v_k / V,    d_k = (m_k - M) / sqrt(V)

    and for each the mean over the batches and the sample standard deviation, whose sum of squares
    is divided by K - 1. Nothing is added to V.

    Args:
        batches: moments with the batches as one more axis in front, (K, *shape), K at least 2, as
            `jax.vmap(lambda x: moments(x, row))(batches)` makes.
        population: moments of `shape`, such as `running_moments`; their count does not matter.
            None pools all batches, exactly, by their counts.

    Returns:
        `StatisticsSpread` of arrays of `shape`. NaN or infinite where the population's variance or
        the spread of the means is 0.

    Raises:
        TypeError: not `Moments`.
        ValueError: fewer than two batches, a population of another shape.

    Example:
        >>> m = Moments(jnp.ones((2, 1)), jnp.array([[-1.0], [1.0]]), jnp.array([[1.0], [3.0]]))
        >>> seen = statistics_spread(m, population=Moments(None, jnp.zeros(1), jnp.full(1, 4.0)))
        >>> seen.var_ratio.tolist(), seen.mean_shift.tolist()
        ([0.5], [0.0])
        >>> seen.effective_count.round(4).tolist()  # d is -1/2 and 1/2
        [2.0]

    Reference:
        No paper is followed. That small batches estimate badly is the motive of Batch
        Renormalization, 2017, arXiv:1702.03275, and others.
    """
    check_moments(batches, "batches")
    mean, var = batches.mean, batches.var
    if var.ndim < 1 or len(var) < 2:
        raise ValueError(
            f"batches has moments of shape {var.shape}. Expected those of two or more batches, "
            "which are its first axis."
        )
    if population is None:
        pooled = pool(batches, (1, *var.shape[1:]))
        known_mean, known_var = pooled.mean[0], pooled.var[0]
    else:
        check_moments(population, "population")
        known_mean, known_var = jnp.asarray(population.mean), jnp.asarray(population.var)
        if known_var.shape != var.shape[1:]:
            raise ValueError(
                f"population has moments of shape {known_var.shape}. Expected that of one of the "
                f"batches, {var.shape[1:]}."
            )
    ratio = var / known_var[None].astype(var.dtype)
    scale = jnp.sqrt(known_var[None].astype(var.dtype))
    shift = divide(mean - known_mean[None].astype(mean.dtype), scale)
    spread = jnp.std(shift, axis=0, ddof=1)
    return StatisticsSpread(
        ratio.mean(0), jnp.std(ratio, axis=0, ddof=1), shift.mean(0), spread, 1 / jnp.square(spread)
    )


class RangeExcess(NamedTuple):
    """What `range_excess` returns, scalars.

    Args:
        bound: sqrt(n - 1).
        largest: the largest standardized magnitude.
        excess: largest / bound, at most 1 where the statistics are those of x itself.
        beyond: the share of elements beyond the bound, from 0 to 1.

    Reference:
        See `range_excess`.
    """

    bound: jax.Array
    largest: jax.Array
    excess: jax.Array
    beyond: jax.Array


def range_excess(
    x: ArrayLike,
    m: Moments,
    *,
    count: ArrayLike,
    epsilon: float = 1e-5,
    channel_axis: int | Sequence[int] = -1,
) -> RangeExcess:
    """How far standardized values leave the range that training held them in.

        |x - mean| / sqrt(var + epsilon) <= sqrt(n - 1)

    holds for an element that is one of the n whose mean and variance these are, whatever the data.
    With running statistics nothing holds it, so the layers behind meet values at inference that
    they could not meet in training; `inference.weigh_example` with a weight of 1 / B, with
    B examples in a set, has the same bound.

    Args:
        x: input of the normalization, floating or complex.
        m: the moments that are used: `running_moments` at inference, or those of the batch.
        count: n, elements in a set in training, such as examples x positions for batch norm; above
            1, a number or traced scalar.
        epsilon: of the normalization.
        channel_axis: axis or axes of the channels.

    Returns:
        `RangeExcess`, before scale and bias.

    Raises:
        TypeError: x is not floating or complex, m is not `Moments`.
        ValueError: moments that do not divide x, a count of 1 or less.

    Example:
        >>> x = jnp.array([[6.0], [1.0], [0.0], [-1.0]])
        >>> running = Moments(None, jnp.zeros((1, 1)), jnp.ones((1, 1)))
        >>> seen = range_excess(x, running, count=5, epsilon=0.0)
        >>> float(seen.bound), float(seen.excess), float(seen.beyond)
        (2.0, 3.0, 0.25)

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548. The
        bound was derived; that its mismatch is the motive of inference example weighing is known
        from the authors' code and from others.
    """
    x = inexact(x)
    check_number(count, "count", above=1)
    wide = statistic_dtype(x.dtype)
    y = normalize(x, m, epsilon=epsilon, channel_axis=channel_axis, dtype=wide)
    magnitudes = jnp.sqrt(abs2(y)) if jnp.iscomplexobj(y) else jnp.abs(y)
    bound = jnp.sqrt(jnp.asarray(count, magnitudes.dtype) - 1)
    largest = magnitudes.max()
    # an element alone against n - 1 equal ones reaches the bound, up to rounding
    slack = 1 + 8 * jnp.finfo(magnitudes.dtype).eps
    return RangeExcess(bound, largest, largest / bound, (magnitudes > bound * slack).mean())
