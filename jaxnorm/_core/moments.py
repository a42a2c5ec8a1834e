"""Statistics of x: count, mean and variance of each set of elements."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.export import register_pytree_node_serialization
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of
from jaxnorm._core.blocks import block_sum, channel_resolution, elements, spread
from jaxnorm._core.checks import known
from jaxnorm._core.devices import (
    AxisName,
    DeviceGroups,
    all_sum,
    device_count,
    device_groups_of,
    names_of,
)
from jaxnorm._core.groups import Specification, check_mean, resolve
from jaxnorm._core.mean_var import SYNCED, Sets, mean_var
from jaxnorm._core.platforms import total
from jaxnorm._core.shared import Shared, own_and_wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and variance of the elements of each set.

    Args:
        count: elements in each set, or their total weight.
        mean: mean of each set, in the unit of x; complex for complex x.
        var: biased variance of each set (divided by count), real, in the unit of x squared. With a
            mean fixed at 0, the mean square.

    All three have the statistic's shape, which says what is shared: see `Groups`.
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array


# So that an exported function which takes or returns moments can be stored; nothing but the three
# arrays is.
register_pytree_node_serialization(
    Moments,
    serialized_name="jaxnorm.Moments",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: None,
    from_children=lambda aux_data, children: Moments(*children),
)


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

    Squares are taken in that dtype: in float32 the variance is infinite where the sum of squared
    deviations is above 3.4e38, and loses digits where they are below 1e-38. An empty set has count,
    mean and variance 0. Elements of weight 0 touch nothing, whatever they are. Statistics are
    float32, or float64 for float64 x, and exact to rounding however large the mean is beside the
    standard deviation.

    Args:
        x: floating or complex array; `Groups` and rows need a rank of 2 or more.
        groups: which elements form a set: `Groups`, a row of the table of methods or the
            statistic's shape.
        weights: how much each element counts, 0 or more; anything that broadcasts against x.
            Booleans are a mask. Negative weights are refused where they are known: under `jit` and
            derivatives they cannot be seen, and give numbers that mean nothing.
        mean: 0 fixes the mean at zero, so that var is the mean square. None takes the set's mean.
        center: a value near the mean, of the statistic's shape, about which sums are taken (a
            running mean). It never changes the result, only its rounding, and spares a second read
            of x where the mean is large.
        axis_name: named axis or axes of pmap, shard_map or vmap over which statistics are
            synchronized. Sums are weighted by count.
        axis_index_groups: groups of indices of that axis that share statistics.
        batch_axis: axis of the examples, for `Groups`.
        channel_axis: axis of the channels, for `Groups`: -1 for NHWC, 1 for NCHW.

    Returns:
        `Moments` whose three arrays have the statistic's shape.

    Raises:
        TypeError: x is not floating or complex.
        ValueError: axes that do not split, weights that do not broadcast or are negative, unequal
            device groups.
        NameError: no axis of that name encloses the call.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.arange(8.0).reshape(2, 4)
        >>> m = moments(x, (2, 2))  # each example, two groups of two channels
        >>> m.mean.tolist(), m.var.tolist()
        ([[0.5, 2.5], [4.5, 6.5]], [[0.25, 0.25], [0.25, 0.25]])
    """
    x, wide = own_and_wide(inexact(x))
    shape, fixed = resolve(groups, x.shape, batch_axis, channel_axis)
    check_mean(mean)
    centered = fixed is None and mean is None
    device_groups = device_groups_of(axis_name, axis_index_groups)
    channels = channel_resolution(x.shape, shape, axes_of(channel_axis, x.shape))
    axis_name = names_of(axis_name) or None
    sizes = tuple(lax.axis_size(name) for name in names_of(axis_name))
    sets = Sets(shape, channels, centered, False, axis_name, sizes, device_groups)
    real = statistic_dtype(x.dtype, real=True)
    per_set = elements(x.shape, shape)
    if weights is None:
        count = per_set * device_count(axis_name, device_groups)
        w, n = None, jnp.full(shape, count, real)
        # one number for all sets: the backward pass keeps no array of counts
        divisor = jnp.asarray(count or 1, real)
    else:
        w = as_weights(weights, x)
        own = tuple(1 if k == 1 else g for g, k in zip(shape, w.shape, strict=True))
        others = elements(
            x.shape,
            tuple(g if k == 1 else n for n, g, k in zip(x.shape, shape, w.shape, strict=True)),
        )
        # small before an axis is split
        sums = total(w, channel_resolution(w.shape, own, ()), real)
        n = checkpoint_name(
            all_sum(block_sum(sums, own) * others, axis_name, device_groups), SYNCED
        )
        n = jnp.broadcast_to(spread_to(n, shape), shape)
        divisor = jnp.where(n > 0, n, 1)
    if center is not None:
        center = _as_center(center, sets, x.dtype)
        if per_set == 1:  # the mean of one value is that value to the bit, which x - c + c is not
            center = None
    statistics = mean_var(sets, x, wide, w, center, divisor)
    m = statistics[0] if centered else jnp.zeros(shape, statistic_dtype(x.dtype))
    return Moments(n, m, statistics[-1])


def check_moments(m: object, name: str) -> None:
    """`m` is moments, whose mean and variance are of one shape."""
    if not isinstance(m, Moments):
        raise TypeError(
            f"{name} must be Moments, such as moments(x, groups) returns. Got {type(m).__name__}."
        )
    if jnp.shape(m.mean) != jnp.shape(m.var):
        raise ValueError(
            f"{name}.mean has shape {jnp.shape(m.mean)} and {name}.var {jnp.shape(m.var)}. "
            "Expected one shape, that of the statistic."
        )


def as_array(x: ArrayLike) -> jax.Array:
    """x itself where it is an array.

    `jnp.asarray` copies it under an eager `vjp`, and the copy would be kept for backward.
    """
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def inexact(x: ArrayLike | Shared, name: str = "x") -> jax.Array:
    """x as a floating or complex array, or as it is where functions of ours share it."""
    if isinstance(x, Shared):
        return x  # type: ignore[return-value]  # it stands for one
    x = as_array(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name} must be floating or complex. Got {x.dtype}, shape {x.shape}; convert it, for "
            f"example {name}.astype('float32')."
        )
    if x.ndim < 1:
        raise ValueError(
            f"{name} must have axes. Got a scalar; expected for example (batch, channel)."
        )
    return x


def as_weights(weights: ArrayLike, x: jax.Array) -> jax.Array:
    """Weights as a boolean or real array of x's rank that broadcasts against x."""
    w = jnp.asarray(weights)
    if jnp.iscomplexobj(w):
        raise TypeError(
            f"weights must be boolean or real. Got {w.dtype}; expected for example a boolean mask."
        )
    values = None if w.dtype == bool else known(weights)
    if values is not None and values.size and not values.min() >= 0:
        raise ValueError(
            f"weights say how much each element counts. Got {values.min()} among them; expected "
            "numbers of at least 0, or a boolean mask."
        )
    fits = w.ndim <= x.ndim and all(
        k in (1, n) for k, n in zip(w.shape[::-1], x.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"weights of shape {w.shape} do not broadcast against x of shape {x.shape}. Expected "
            "sizes of 1 or x's own, aligned at the last axis: one weight an example is "
            f"(N{', 1' * (x.ndim - 1)}) when the batch is axis 0."
        )
    w = w.reshape((1,) * (x.ndim - w.ndim) + w.shape)
    return w if w.dtype == bool else w.astype(statistic_dtype(x.dtype, real=True))


def spread_to(v: jax.Array, shape: Shape) -> jax.Array:
    """`v`, whose sizes divide or are 1, spread over the groups that it shares."""
    return spread(v, tuple(1 if g == 1 else n for n, g in zip(shape, v.shape, strict=True)))


def _as_center(center: ArrayLike, sets: Sets, dtype: jnp.dtype) -> jax.Array:
    c = jnp.asarray(center)
    if c.ndim != len(sets.shape) or any(
        k not in (1, g) for k, g in zip(c.shape, sets.shape, strict=True)
    ):
        raise ValueError(
            f"center of shape {c.shape} does not fit statistics of shape {sets.shape}. Expected "
            "that shape, or 1 on the axes that it shares."
        )
    c = jnp.broadcast_to(c.astype(statistic_dtype(dtype)), sets.shape)
    return lax.stop_gradient(jnp.where(jnp.isfinite(c), c, 0))
