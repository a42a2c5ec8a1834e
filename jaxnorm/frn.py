"""Filter Response Normalization with its thresholded linear unit."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import check_epsilon, check_number
from jaxnorm._core.shared import widened
from jaxnorm._frame import Options, applied, measured, output_dtype, parameter, real, select_options


def filter_response_norm(
    x: ArrayLike,
    *,
    threshold: ArrayLike | None = None,
    slope: ArrayLike | None = None,
    learned_epsilon: ArrayLike | None = None,
    epsilon: float = 1e-6,
    **options: Unpack[Options],
) -> jax.Array:
    """Divide each channel of each example by its root mean square, then threshold it.

        y = x / sqrt(mean_hw(x^2) + epsilon + |learned_epsilon|) * scale + bias
        output = max(y, threshold)

    Threshold and the layer's normalization together keep x and small arrays for the backward pass.
    Nothing depends on other examples, in training or inference. Without a threshold it is `norm`
    with `methods.filter_response_norm()`.

    Args:
        x: real floating array with examples and channels.
        threshold: tau, (C,), see `thresholded_linear_unit`. None thresholds nothing.
        slope: (C,), of the affine thresholded linear unit. Needs a threshold.
        learned_epsilon: scalar or traced scalar whose absolute value is added to epsilon; 1e-4 at
            first in the paper. It is needed where there is one position, since x / |x| knows only
            the sign of x.
        epsilon: added to the mean square, in the unit of x squared.
        **options: as `norm`; the activation is applied after the threshold.

    Returns:
        y, of x's shape.

    Raises:
        TypeError: x is complex or integer.
        ValueError: a threshold or slope of another shape, a slope without threshold, an epsilon
            below 0 or for each channel.

    Example:
        >>> x = jnp.array([[[3.0], [-4.0]]])
        >>> y = filter_response_norm(x, threshold=jnp.zeros(1), epsilon=0.0)
        >>> (y * 12.5**0.5).tolist()  # the mean square of 3 and -4 is 12.5
        [[[3.0], [0.0]]]

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737. The definition was read in implementations by
        others; epsilon is that of TensorFlow Addons.
    """
    x = real(x, "filter_response_norm")
    if threshold is None and slope is not None:
        raise ValueError(
            "slope is that of the affine thresholded linear unit. Got threshold=None; expected "
            "one, (C,)."
        )
    wide = statistic_dtype(x.dtype)
    check_epsilon(epsilon)
    if learned_epsilon is not None:
        check_number(learned_epsilon, "learned_epsilon")
        learned = jnp.abs(jnp.asarray(learned_epsilon, wide))
        epsilon = learned + jnp.asarray(epsilon, wide)  # type: ignore[assignment]
    if threshold is not None:
        after, dtype = options.get("activation"), output_dtype(x, options)

        def thresholded(y: jax.Array) -> jax.Array:
            y = thresholded_linear_unit(
                y, threshold, slope=slope, **select_options(options, "batch_axis", "channel_axis")
            )
            y = y.astype(dtype)
            return y if after is None else after(y)

        options |= {"activation": thresholded, "dtype": wide}
    return applied(x, measured(x, methods.filter_response_norm(), **options), epsilon, **options)


def thresholded_linear_unit(
    x: ArrayLike,
    threshold: ArrayLike,
    *,
    slope: ArrayLike | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """The larger of x and a learned threshold; in the affine form of x and a line.

        max(x, threshold)    or    max(x, slope * x + threshold)

    A threshold of 0 is relu, of minus infinity the identity.

    Args:
        x: real floating array.
        threshold: tau, (C,), or (N, C).
        slope: alpha of the affine form, likewise. 0 is the plain form.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        Array of x's shape and dtype.

    Raises:
        TypeError: x is complex or integer.
        ValueError: a threshold or slope of another shape.

    Example:
        >>> thresholded_linear_unit(jnp.array([[-2.0, 3.0]]), jnp.array([-1.0, 4.0])).tolist()
        [[-1.0, 4.0]]

    Reference:
        arXiv:1911.09737, by implementations by others.
    """
    x = real(x, "thresholded_linear_unit")
    options: Options = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    wide = widened(x)
    floor = parameter(threshold, "threshold", x, options)
    if slope is not None:
        floor = floor + parameter(slope, "slope", x, options) * wide
    return jnp.maximum(wide, floor).astype(x.dtype)
