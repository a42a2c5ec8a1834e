"""Statistics from statistics: pooled, merged and blended.

Moments are a commutative monoid: pooling is exact, the variance between the means included, in any
order, and a set without elements (count 0) is the identity. So from moments come coarser ones, and
several devices or micro-batches are one more pooling.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import abs2, quotient, scale_by, statistic_dtype
from jaxnorm._core.blocks import block_sum, spread
from jaxnorm._core.devices import AxisName, DeviceGroups, all_sum, device_groups_of
from jaxnorm._core.groups import Specification, resolve
from jaxnorm._core.mean_var import SYNCED
from jaxnorm._core.moments import Moments


def toward(old: jax.Array, new: jax.Array, rate: jax.Array) -> jax.Array:
    """old + rate (new - old), which is old at rate 0 and new at rate 1, to the bit.

    (1 - rate) old + rate new has weights whose sum, rounded, is not 1: an average over many steps
    is then off by a part of the mean, however small the standard deviation is. `rate` is real.
    """
    step = new - old
    return jnp.where(rate < 0.5, old + scale_by(step, rate), new - scale_by(step, 1 - rate))


def alike(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two values, such as a state's and a batch's, in a precision that holds both."""
    wide = np.promote_types(statistic_dtype(old.dtype), new.dtype)
    return old.astype(wide), new.astype(wide)


def approached(old: Moments, new: Moments, rate: jax.Array, count: jax.Array | None) -> Moments:
    """Mean and variance a part of the way from old to new, with that count."""
    mean, var = (toward(*alike(*ts), rate) for ts in ((old.mean, new.mean), (old.var, new.var)))
    return Moments(count, mean, var)  # type: ignore[arg-type]  # running statistics may have none


def pool(
    m: Moments,
    groups: Specification,
    *,
    axis_name: AxisName = None,
    axis_index_groups: DeviceGroups = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> Moments:
    """Moments of the unions of sets, exact: the variance between the means is included.

    With n_i, m_i, v_i the moments that are pooled, and T their sum over a block of sets and over
    named axes,

        count = T(n_i),
        mean = T(n_i m_i) / count,
        var = T(n_i (v_i + |m_i - mean|^2)) / count.

    Pooling instance norm's moments to (N, 1, 1, 32) gives `moments(x, group_norm(32))`. Moments
    with a mean fixed at 0 stay so.

    Args:
        m: moments of the finer sets.
        groups: the coarser sets: `Groups` or a row applied to the shape of m, or the resulting
            shape itself.
        axis_name: named axis or axes over which to pool as well.
        axis_index_groups: groups of indices of that axis.
        batch_axis: axis of the examples, for `Groups`.
        channel_axis: axis of the channels, for `Groups`.

    Returns:
        `Moments` of the coarser shape.

    Raises:
        ValueError: shapes that do not divide, unequal device groups.

    Example:
        >>> import jax.numpy as jnp
        >>> halves = Moments(jnp.ones((2, 1)), jnp.array([[0.0], [2.0]]), jnp.zeros((2, 1)))
        >>> pool(halves, (1, 1)).var.tolist()  # the blend of the variances would be 0
        [[1.0]]
    """
    check_counted(m, "pool")
    fine = m.mean.shape
    shape, _ = resolve(groups, fine, batch_axis, channel_axis)
    device_groups = device_groups_of(axis_name, axis_index_groups)

    def totals(*sums: jax.Array) -> list[jax.Array]:
        parts = [block_sum(t, shape) for t in sums]
        return checkpoint_name(all_sum(parts, axis_name, device_groups), SYNCED)

    some = m.count > 0  # an empty set may hold anything
    means, variances = (jnp.where(some, t, 0) for t in (m.mean, m.var))
    count, total = totals(m.count, scale_by(means, m.count))
    # Sums about a value near the mean, whatever it is. The rounding of that value is a part of the
    # mean and may be many times the variance, so what it lacks is measured and taken out of both.
    center = jax.lax.stop_gradient(quotient(total, count))
    d = jnp.where(some, means - spread(center, fine), 0)
    total, square = totals(scale_by(d, m.count), m.count * (variances + abs2(d)))
    rest = quotient(total, count)
    mean, var = center + rest, quotient(square, count) - abs2(rest)
    var = var + jax.lax.stop_gradient(jnp.maximum(-var, 0))  # 0 where rounding is below it
    return Moments(count, mean, var)


def merge(*parts: Moments) -> Moments:
    """Moments of the union of parts of a set, such as micro-batches: `pool` over parts.

    Args:
        *parts: moments of equal shape.

    Returns:
        `Moments` of that shape. A part with count 0 changes nothing.

    Raises:
        ValueError: no parts, or parts of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import moments
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> merge(moments(x[:1], (1, 2)), moments(x[1:], (1, 2))).mean.tolist()
        [[3.0, 4.0]]
    """
    for part in parts:
        check_counted(part, "merge")
    _check_shapes(parts, "merge")
    stacked = jax.tree.map(lambda *ts: jnp.stack(ts), *parts)
    pooled = pool(stacked, (1, *parts[0].mean.shape))
    return jax.tree.map(lambda t: t[0], pooled)


def blend(parts: Sequence[Moments], weights: Sequence[ArrayLike]) -> Moments:
    """Weighted averages of means and of variances, without the variance between the means.

        mean = sum_i w_i m_i,    var = sum_i w_i v_i,    count = sum_i n_i

    What running averages, Momentum BN and Switchable Normalization do. It is not the variance of a
    union of sets: that is `merge`, larger by the variance of the means.

    Args:
        parts: moments of equal shape.
        weights: one weight a part, a number or an array that broadcasts against the statistic. They
            are used as given, so they should add up to 1.

    Returns:
        `Moments` of that shape; counts add, where all parts have one.

    Raises:
        ValueError: no parts, parts of different shapes, or another number of weights.

    Example:
        >>> import jax.numpy as jnp
        >>> a, b = (Moments(jnp.ones(1), jnp.full(1, mean), jnp.ones(1)) for mean in (0.0, 2.0))
        >>> blend([a, b], [0.5, 0.5]).var.tolist(), merge(a, b).var.tolist()
        ([1.0], [2.0])
    """
    parts = list(parts)
    if len(parts) != len(weights):
        raise ValueError(
            f"blend needs one weight for each part. Got {len(parts)} parts and {len(weights)} "
            "weights."
        )
    _check_shapes(parts, "blend")
    counted = all(part.count is not None for part in parts)
    weighed = [
        Moments(
            part.count if counted else None,  # type: ignore[arg-type]  # as running statistics
            *(jnp.asarray(w).astype(t.dtype) * t for t in (part.mean, part.var)),
        )
        for w, part in zip(weights, parts, strict=True)
    ]
    return functools.reduce(functools.partial(jax.tree.map, operator.add), weighed)


def _check_shapes(parts: Sequence[Moments], verb: str) -> None:
    shapes = [part.mean.shape for part in parts]
    if len(set(shapes)) != 1:
        raise ValueError(f"{verb} needs one or more moments of equal shape. Got shapes {shapes}.")


def check_counted(m: Moments, what: str) -> None:
    """Moments whose count is needed have one."""
    if m.count is None:
        raise ValueError(
            f"{what} needs a count. Got running statistics without one; make them by "
            "init_running(shape, counted=True)."
        )
