"""Applying statistics: y = (x - mean) / sqrt(var + epsilon) * scale + bias.

The statistic's shape says which elements share it, so no axes are named.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.affine import given
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.devices import AxisName, DeviceGroups
from jaxnorm._core.groups import Specification
from jaxnorm._core.moments import Moments, as_weights, inexact, moments
from jaxnorm._core.shared import own_and_wide, shared
from jaxnorm._core.standardize import Result, standardized


def normalize(
    x: ArrayLike,
    m: Moments,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-5,
    weights: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
    centered: bool = True,
    after: Callable[..., jax.Array] | None = None,
    arrays: Sequence[jax.Array] = (),
) -> jax.Array:
    """Standardize x with given moments, then scale and shift it.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    The moments may be those of x, running ones, or anything made from them: gradients flow into all
    of them. That by the variance is sum(g z) / (2 (var + epsilon)) with z = (x - mean) / sqrt(var +
    epsilon) and g = scale dy, and it is right while the quotient is between 1.2e-38 and 3.4e38: for
    standard deviations from 1e-17 to 1e17 where sum(g z) is of the order of 1.

    Inference by hand is `normalize(x, running_moments(state, groups, x.shape))`, with the state
    that `update_running` keeps. The way back is `denormalize`.

    Args:
        x: floating or complex array.
        m: moments whose shape divides x's: each statistic serves a block of x. A running state is
            none, because it lacks the axes of x: `running_moments` gives it their shape.
        scale: gamma: (C,); (N, C), to scale each example differently; or an array of x's rank that
            broadcasts against x, such as (N, T, 1, C), or (1, H, W, 1) where examples share it. Two
            dimensions are always (N, C). None is 1. One as large as x is kept for the backward
            pass, once and in its own dtype.
        bias: beta, likewise. None is 0.
        epsilon: added to the variance inside the root, in the unit of x squared: one number, 0 or
            more.
        weights: the weights that the moments were computed with, if some are 0: where x is not
            finite under a zero weight, y is the bias and the gradient 0. Elsewhere they change
            nothing.
        activation: applied to y in the precision of the statistics, before y is rounded to its
            dtype. It is recomputed in the backward pass, so that normalization and activation
            together keep x and small arrays.
        dtype: of y. None keeps x's.
        batch_axis: axis of the examples, for scale and bias of shape (N, C).
        channel_axis: axis of the channels, -1 for NHWC, 1 for NCHW; a tuple gives scale and bias
            those axes' sizes.
        centered: False leaves out the mean, where it is known to be 0.
        after: (y, *arrays) -> what becomes of y in the same pass, before the activation. A function
            of a module, real, and element by element: of arrays of x's rank and the dtype of the
            statistics it uses for an element what broadcasts there.
        arrays: of `after`.

    Returns:
        y, of x's shape.

    Raises:
        TypeError: x is not floating or complex, m is not `Moments`.
        ValueError: moments that do not divide x, a running state, scale or bias of another shape,
            an epsilon below 0 or for each channel.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0, 2.0], [4.0, 6.0]])
        >>> m = Moments(jnp.ones((1, 2)), jnp.array([[1.0, 2.0]]), jnp.full((1, 2), 4.0))
        >>> normalize(x, m, scale=jnp.array([2.0, 2.0]), epsilon=0.0).tolist()
        [[-1.0, 0.0], [3.0, 4.0]]
    """
    x, wide = own_and_wide(inexact(x))
    mean, v, g, b = given(x, m, scale, bias, epsilon, dtype, batch_axis, channel_axis, centered)
    w = None if weights is None else as_weights(weights, x)
    arguments = (x, wide, w, mean, v, g, b)
    out = jnp.dtype(x.dtype if dtype is None else dtype)
    if activation is None:
        return standardized(Result(out, after, False), *arguments, *arrays)
    wide_result = Result(jnp.dtype(statistic_dtype(x.dtype)), after, False)

    def activated(*args):
        return activation(standardized(wide_result, *args)).astype(out)

    return jax.checkpoint(activated, prevent_cse=False)(*arguments, *arrays)


def norm(
    x: ArrayLike,
    groups: Specification,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float | None = None,
    weights: ArrayLike | None = None,
    mean: Literal[0] | None = None,
    center: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: DeviceGroups = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, Moments]:
    """Normalize x with its own statistics: `moments`, then `normalize`.

    Args:
        x: floating or complex array.
        groups: which elements share statistics: `Groups`, a row of the table of methods or the
            statistic's shape.
        scale: gamma, (C,), (N, C) or of x's rank, see `normalize`.
        bias: beta, likewise.
        epsilon: added to the variance inside the root, in the unit of x squared. None is the
            row's, and 1e-5 where there is no row.
        weights: how much each element counts in the statistics; broadcasts against x.
        mean: 0 fixes the mean at zero.
        center: see `moments`.
        axis_name: named axis or axes over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis.
        activation: see `normalize`.
        dtype: of y. None keeps x's.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        y, of x's shape, and the moments of x, to be folded into running ones where a method has
        them.

    Raises:
        TypeError, ValueError: as `moments` and `normalize`.

    Example:
        >>> import jax.numpy as jnp
        >>> y, m = norm(jnp.ones((8, 4, 4, 6)), (8, 1, 1, 3))  # group norm, 3 groups
        >>> y.shape, m.var.shape
        ((8, 4, 4, 6), (8, 1, 1, 3))
    """
    x = shared(inexact(x))
    m = moments(
        x,
        groups,
        weights=weights,
        mean=mean,
        center=center,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
    )
    y = normalize(
        x,
        m,
        scale=scale,
        bias=bias,
        epsilon=getattr(groups, "epsilon", 1e-5) if epsilon is None else epsilon,
        weights=weights,
        activation=activation,
        dtype=dtype,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
        centered=mean is None and getattr(groups, "mean", None) is None,
    )
    return y, m
