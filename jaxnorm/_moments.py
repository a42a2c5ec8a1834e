"""Statistics: counts, means and variances of sets of elements, computed, pooled, merged and blended.

Moments are a commutative monoid: pooling is exact, the variance between the means included, in any order, and a set
without elements (count 0) is the identity. So from data come moments, from moments coarser ones, and several devices or
micro-batches are one more pooling.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxnorm._devices import AxisName, DeviceGroups, all_sum, device_count, device_groups_of, same_on_all_devices
from jaxnorm._groups import (
    Shape,
    Specification,
    axes_of,
    block_sum,
    channel_resolution,
    check_mean,
    elements,
    resolve,
    spread,
)
from jaxnorm._xla import barrier, by_platform, first_sums, to_channels, to_groups

CANCELLATION = 16.0
"""Sums about c cost the variance at most one digit while (mean - c)^2 <= 16 var; beyond, they are taken again
about the mean."""

SYNCED = "jaxnorm_synced_moments"
"""`checkpoint_name` of statistics that crossed devices: a remat policy that saves it repeats no collective."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and variance of the elements of each set.

    Args:
        count: elements in each set, or their total weight.
        mean: mean of each set, in the unit of x; complex for complex x.
        var: biased variance of each set (divided by count), real, in the unit of x squared. With a mean fixed at 0, the
            mean square.

    All three have the statistic's shape, which says what is shared: see `Groups`.
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array


class _Sets(NamedTuple):
    """What is known about the sets when the program is traced."""

    shape: Shape  # the statistic's
    channels: Shape  # of the first sums
    centered: bool
    kept: bool  # for the backward pass
    axis_name: AxisName
    device_groups: tuple[tuple[int, ...], ...] | None


def moments(
    x: ArrayLike,
    groups: Specification,
    *,
    weights: ArrayLike | None = None,
    mean: Literal[0] | None = None,
    center: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: DeviceGroups = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> Moments:
    """Count, mean and biased variance of each set of elements of x.

    With w the weights (1 where there are none) and S a set,

        count = sum_S w,    mean = sum_S w x / count,    var = sum_S w |x - mean|^2 / count.

    An empty set has count, mean and variance 0. Elements of weight 0 touch nothing, whatever they are. Statistics are
    float32, or float64 for float64 x, and exact to rounding however large the mean is beside the standard deviation.

    Args:
        x: floating or complex array of rank 2 or more.
        groups: which elements form a set: `Groups`, `Method` or the statistic's shape.
        weights: how much each element counts; anything that broadcasts against x. Booleans are a mask.
        mean: 0 fixes the mean at zero, so that var is the mean square. None takes the set's mean.
        center: a value near the mean, of the statistic's shape, about which sums are taken (a running mean). It never
            changes the result, only its rounding, and spares a second read of x where the mean is large.
        axis_name: named axis or axes of pmap, shard_map or vmap over which a set goes on. Sums are weighted by count.
        axis_index_groups: groups of indices of that axis that share statistics.
        batch_axis: axis of the examples, for `Groups`.
        channel_axis: axis of the channels, for `Groups`: -1 for NHWC, 1 for NCHW.

    Returns:
        `Moments` whose three arrays have the statistic's shape.

    Raises:
        TypeError: x is not floating or complex.
        ValueError: axes that do not split, weights that do not broadcast, unequal device groups.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(8.0).reshape(2, 4)
        >>> m = moments(x, (2, 2))  # each example, two groups of two channels
        >>> m.mean.tolist(), m.var.tolist()
        ([[0.5, 2.5], [4.5, 6.5]], [[0.25, 0.25], [0.25, 0.25]])
    """
    x = inexact(x)
    shape, fixed = resolve(groups, x.shape, batch_axis, channel_axis)
    check_mean(mean)
    centered = fixed is None and mean is None
    device_groups = device_groups_of(axis_name, axis_index_groups)
    channels = channel_resolution(x.shape, shape, axes_of(channel_axis, x.shape))
    sets = _Sets(shape, channels, centered, False, axis_name, device_groups)
    real = statistic_dtype(x.dtype, real=True)
    per_set = elements(x.shape, shape)
    if weights is None:
        w, n = None, jnp.full(shape, per_set * device_count(axis_name, device_groups), real)
    else:
        w = as_weights(weights, x)
        own = tuple(g if k > 1 else 1 for g, k in zip(shape, w.shape, strict=True))
        others = elements(x.shape, tuple(g if k == 1 else n for n, g, k in zip(x.shape, shape, w.shape, strict=True)))
        n = all_sum(block_sum(w, own) * others, axis_name, device_groups)
        n = jnp.broadcast_to(spread_to(n, shape), shape)
    if center is not None:
        center = _as_center(center, sets, x.dtype)
        if per_set == 1:  # the mean of one value is that value to the bit, which x - c + c is not
            center = None
    divisor = n if w is None and per_set else jnp.where(n > 0, n, 1)
    statistics = _mean_var(sets, x, w, center, divisor)
    m = statistics[0] if centered else jnp.zeros(shape, statistic_dtype(x.dtype))
    return Moments(n, m, statistics[-1])


def as_array(x: ArrayLike) -> jax.Array:
    """x itself where it is an array: `jnp.asarray` copies it under an eager `vjp`, and the copy would be kept for backward."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def inexact(x: ArrayLike) -> jax.Array:
    """x as a floating or complex array of rank 2 or more."""
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"x must be floating or complex. Got {x.dtype}, shape {x.shape}; convert it, for example x.astype('float32')."
        )
    if x.ndim < 1:
        raise ValueError("x must have axes. Got a scalar; expected for example (batch, channel).")
    return x


def statistic_dtype(dtype: jnp.dtype, real: bool = False) -> jnp.dtype:
    """float32 or wider; complex for complex unless `real`."""
    info = jnp.finfo(dtype)
    if info.bits < 32:
        return jnp.dtype(jnp.float32)
    return info.dtype if real else jnp.dtype(dtype)


def as_weights(weights: ArrayLike, x: jax.Array) -> jax.Array:
    """Weights as a real array of x's rank that broadcasts against x."""
    w = jnp.asarray(weights)
    if jnp.iscomplexobj(w):
        raise TypeError(f"weights must be boolean or real. Got {w.dtype}; expected for example a boolean mask.")
    fits = w.ndim <= x.ndim and all(k in (1, n) for k, n in zip(w.shape[::-1], x.shape[::-1], strict=False))
    if not fits:
        raise ValueError(
            f"weights of shape {w.shape} do not broadcast against x of shape {x.shape}. Expected sizes of 1 or x's own, "
            f"aligned at the last axis: one weight an example is (N{', 1' * (x.ndim - 1)}) when the batch is axis 0."
        )
    return w.reshape((1,) * (x.ndim - w.ndim) + w.shape).astype(statistic_dtype(x.dtype, real=True))


def spread_to(v: jax.Array, shape: Shape) -> jax.Array:
    """`v`, whose sizes divide or are 1, spread over the groups that it shares."""
    return spread(v, tuple(n if g > 1 else 1 for n, g in zip(shape, v.shape, strict=True)))


def _as_center(center: ArrayLike, sets: _Sets, dtype: jnp.dtype) -> jax.Array:
    c = jnp.asarray(center)
    if c.ndim != len(sets.shape) or any(k not in (1, g) for k, g in zip(c.shape, sets.shape, strict=True)):
        raise ValueError(
            f"center of shape {c.shape} does not fit statistics of shape {sets.shape}. Expected that shape, or 1 on the "
            "axes that it shares."
        )
    c = jnp.broadcast_to(c.astype(statistic_dtype(dtype)), sets.shape)
    return lax.stop_gradient(jnp.where(jnp.isfinite(c), c, 0))


def _abs2(t: jax.Array) -> jax.Array:
    return jnp.square(t.real) + jnp.square(t.imag) if jnp.iscomplexobj(t) else jnp.square(t)


def _counted(x: jax.Array, w: jax.Array | None, s: jax.Array | None = None) -> jax.Array:
    """x - s in the statistics' dtype, and 0 where the weight is: what does not count may be NaN."""
    x = x.astype(statistic_dtype(x.dtype))
    d = x if s is None else x - s
    return d if w is None else jnp.where(w != 0, d, 0)


def _weighed(t: jax.Array, w: jax.Array | None) -> jax.Array:
    return t if w is None else _times(t, w)


def _times(t: jax.Array, real: jax.Array) -> jax.Array:
    return t * real.astype(t.dtype)


def _over(t: jax.Array, real: jax.Array) -> jax.Array:
    return t / real.astype(t.dtype)


def _totals(sets: _Sets, cpu: bool, sums: Sequence[jax.Array]) -> list[jax.Array]:
    """Full-size sums to groups and devices. The barrier keeps XLA from joining the two stages into one full-size sum."""
    return all_sum([to_groups(cpu, t, sets.shape) for t in barrier(list(sums))], sets.axis_name, sets.device_groups)


def _square_sum(sets: _Sets, cpu: bool, x: jax.Array, w: jax.Array | None, c: jax.Array | None) -> jax.Array:
    """sum w |x - c|^2 at the resolution of the first sums."""
    c = None if c is None else to_channels(cpu, c, x.shape)
    return block_sum(_weighed(_abs2(_counted(x, w, c)), w), first_sums(cpu, x.shape, sets.channels))


def _statistics(
    sets: _Sets, cpu: bool, x: jax.Array, w: jax.Array | None, c: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, ...]:
    """Mean (unless it is fixed) and variance: sums about c, and again about the mean where cancellation would show."""

    def again(m: jax.Array | None) -> jax.Array:
        return _over(_totals(sets, False, [_square_sum(sets, cpu, x, w, m)])[0], n)

    if not sets.centered:
        return (again(None),)
    if not cpu and not sets.kept and sets.shape == sets.channels and sets.shape[-1] < x.shape[-1]:
        # Rows of channels stay on a GPU's chip from here to the end of what uses the statistics, in one kernel: 2 times the
        # tensor are moved. A statistic that is kept as well would break that kernel in two, 4.1 times; one pass then takes 3.
        m = _over(all_sum(block_sum(_weighed(_counted(x, w), w), sets.shape), sets.axis_name, sets.device_groups), n)
        square = block_sum(_weighed(_abs2(_counted(x, w, spread(m, x.shape))), w), sets.shape)
        return m, _over(all_sum(square, sets.axis_name, sets.device_groups), n)
    shift = None if c is None else to_channels(cpu, c, x.shape)
    first = block_sum(_weighed(_counted(x, w, shift), w), first_sums(cpu, x.shape, sets.channels))
    alias = barrier((x, c)) if cpu else (x, c)
    total, square = _totals(sets, False, [first, _square_sum(sets, cpu, alias[0], w, alias[1])])
    e = _over(total, n)
    m = e if c is None else c + e
    if sets.axis_name is not None and not same_on_all_devices(sets.axis_name, sets.device_groups):
        return m, again(m)
    v = jnp.maximum(_over(square, n) - _abs2(e), 0)
    exact = (_abs2(e) <= CANCELLATION * v) & jnp.isfinite(v)  # also false where squares overflow
    return m, lax.cond(jnp.all(exact), lambda m: v, again, m)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mean_var(sets: _Sets, x: jax.Array, w: jax.Array | None, c: jax.Array | None, n: jax.Array) -> tuple[jax.Array, ...]:
    """Mean (unless it is fixed) and variance. The result does not depend on c, which therefore has no derivative; that along
    n is part of that along w."""
    return by_platform(partial(_statistics, sets), x, w, c, n)


def _mean_var_of_dx(sets, cpu, dx, x, w, m, n):
    """Derivative of mean and variance along dx: linear in dx, and read backwards the closed form.

    dmean = sum w dx / n and dvar = 2 sum w (x - mean) dx / n.
    """
    dx = _weighed(_counted(dx, w), w)
    x, m = barrier((x, m)) if cpu else (x, m)
    d = _counted(x, w, None if m is None else to_channels(cpu, m, x.shape))
    product = d.real * dx.real + d.imag * dx.imag if jnp.iscomplexobj(d) else d * dx
    shape = first_sums(cpu, x.shape, sets.channels)
    sums = [block_sum(t, shape) for t in ((dx, product) if sets.centered else (product,))]
    sums = _totals(sets, cpu, sums)
    return tuple(_over(s, n) for s in (*sums[:-1], 2 * sums[-1]))


def _mean_var_of_dw(sets, dw, x, w, m, v, n):
    """Derivative along the weights: dmean = sum dw (x - mean) / n and dvar = sum dw (|x - mean|^2 - var) / n."""
    finite = jnp.isfinite(x)
    d = x.astype(statistic_dtype(x.dtype))
    d = jnp.where(finite, d if m is None else d - spread(m, x.shape), 0)
    spare = jnp.where(finite, _abs2(d) - spread(v, x.shape), 0)
    terms = (d, spare) if sets.centered else (spare,)
    return tuple(_over(s, n) for s in _totals(sets, False, [block_sum(_times(t, dw), sets.channels) for t in terms]))


def _tangent(sets, primals, tangents):
    x, w, c, n = primals
    dx, dw = tangents[:2]
    out = _mean_var(sets._replace(kept=True), x, w, c, n)
    if sets.axis_name is not None:
        out = tuple(checkpoint_name(t, SYNCED) for t in out)
    m, v = out[0] if sets.centered else None, out[-1]
    # Checkpointed, so that reverse mode keeps x and small arrays instead of what the map computes from them.
    d_out = None
    if not isinstance(dx, SymbolicZero):
        d_out = jax.checkpoint(partial(by_platform, partial(_mean_var_of_dx, sets)), prevent_cse=False)(dx, x, w, m, n)
    if w is not None and not isinstance(dw, SymbolicZero):
        of_dw = jax.checkpoint(partial(_mean_var_of_dw, sets), prevent_cse=False)(dw, x, w, m, v, n)
        d_out = of_dw if d_out is None else tuple(a + b for a, b in zip(d_out, of_dw, strict=True))
    return out, tuple(jnp.zeros_like(t) for t in out) if d_out is None else d_out


_mean_var.defjvp(_tangent, symbolic_zeros=True)


def _divide(total: jax.Array, count: jax.Array) -> jax.Array:
    return _over(total, jnp.where(count > 0, count, 1))


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

    With n_i, m_i, v_i the moments that are pooled, and T their sum over a block of sets and over named axes,

        count = T(n_i),    mean = T(n_i m_i) / count,    var = T(n_i (v_i + |m_i - mean|^2)) / count.

    Pooling instance norm's moments to (N, 1, 1, 32) gives `moments(x, group_norm(32))`. Moments with a mean fixed at 0
    stay so.

    Args:
        m: moments of the finer sets.
        groups: the coarser sets: `Groups` or `Method` applied to the shape of m, or the resulting shape itself.
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
    fine = m.mean.shape
    shape, _ = resolve(groups, fine, batch_axis, channel_axis)
    device_groups = device_groups_of(axis_name, axis_index_groups)

    def total(t: jax.Array) -> jax.Array:
        return all_sum(block_sum(t, shape), axis_name, device_groups)

    count = total(m.count)
    mean = _divide(total(_times(m.mean, m.count)), count)
    var = _divide(total(m.count * (m.var + _abs2(m.mean - spread(mean, fine)))), count)
    return Moments(count, mean, var)


def merge(*parts: Moments) -> Moments:
    """Moments of the union of parts of a set, such as the micro-batches of a batch: `pool` over parts.

    Args:
        *parts: moments of equal shape.

    Returns:
        `Moments` of that shape. A part with count 0 changes nothing.

    Raises:
        ValueError: no parts, or parts of different shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(8.0).reshape(4, 2)
        >>> merge(moments(x[:1], (1, 2)), moments(x[1:], (1, 2))).mean.tolist() == x.mean(0, keepdims=True).tolist()
        True
    """
    stacked = _stacked(parts, "merge")
    pooled = pool(stacked, (1, *parts[0].mean.shape))
    return jax.tree.map(lambda t: t[0], pooled)


def blend(parts: Sequence[Moments], weights: Sequence[ArrayLike]) -> Moments:
    """Weighted averages of means and of variances, without the variance between the means.

        mean = sum_i w_i m_i,    var = sum_i w_i v_i,    count = sum_i n_i

    What running averages, Momentum BN and Switchable Normalization do. It is not the variance of a union of sets: that
    is `merge`, larger by the variance of the means.

    Args:
        parts: moments of equal shape.
        weights: one weight a part, a number or an array that broadcasts against the statistic. They are used as given,
            so they should add up to 1.

    Returns:
        `Moments` of that shape; counts add.

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
        raise ValueError(f"blend needs one weight for each part. Got {len(parts)} parts and {len(weights)} weights.")
    stacked = _stacked(parts, "blend")

    def average(name: str) -> jax.Array:
        values = [getattr(part, name) for part in parts]
        terms = [jnp.asarray(w).astype(t.dtype) * t for w, t in zip(weights, values, strict=True)]
        return functools.reduce(operator.add, terms)

    return Moments(stacked.count.sum(0), average("mean"), average("var"))


def _stacked(parts: Sequence[Moments], verb: str) -> Moments:
    shapes = [part.mean.shape for part in parts]
    if len(set(shapes)) != 1:
        raise ValueError(f"{verb} needs one or more moments of equal shape. Got shapes {shapes}.")
    return jax.tree.map(lambda *ts: jnp.stack(ts), *parts)
