"""The way back from standardized numbers to those of which they were made."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.affine import given
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import known
from jaxnorm._core.moments import Moments, as_weights, inexact
from jaxnorm._core.platforms import spread_to_channels
from jaxnorm._core.standardize import Result, standardized
from jaxnorm._core.xla import kept_small


def denormalize(
    y: ArrayLike,
    m: Moments,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-5,
    weights: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
    centered: bool = True,
) -> jax.Array:
    """Undo `normalize` with the same arguments: scale, shift, moments and epsilon.

        x = (y - bias) / scale * sqrt(var + epsilon) + mean

    It is the exact inverse, in values and in all gradients, so that a network may predict
    standardized numbers and be trained on its errors in the unit of x. y need not have the shape of
    the x of which the moments are: those of a series, (N, 1, C), serve a forecast of any length.

    Rounding is that of the two passes: of the order of the last digit of x, and of the last digit
    of y in units of the standard deviation, which counts where y was rounded to half precision.
    Sets whose variance is 0, empty ones among them, come back as well, since epsilon stands in for
    it. With an epsilon of 0 all of such a set becomes the mean, and the derivative by the variance
    is infinite.

    Args:
        y: floating or complex array, such as `normalize` returns.
        m: moments whose shape divides y's: each statistic serves a block of y.
        scale: gamma, in the shapes that `normalize` takes. It must not be 0 anywhere; a traced 0
            gives infinities and NaN.
        bias: beta, likewise.
        epsilon: added to the variance inside the root, in the unit of x squared.
        weights: where y is not finite under a zero weight, x is the mean and the gradient 0.
            Elsewhere they change nothing.
        dtype: of x. None keeps y's.
        batch_axis: axis of the examples, for scale and bias of shape (N, C).
        channel_axis: axis of the channels, -1 for NHWC, 1 for NCHW; a tuple gives scale and bias
            those axes' sizes.
        centered: False leaves out the mean, as in `normalize`.

    Returns:
        x, of y's shape.

    Raises:
        TypeError: y is not floating or complex, m is not `Moments`.
        ValueError: moments that do not divide y, a running state, scale or bias of another shape, a
            scale of 0, an epsilon below 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import moments, normalize
        >>> series = jnp.array([[[100.0], [102.0], [104.0]]])  # (N, T, C)
        >>> m = moments(series, (1, 1, 1))
        >>> z = normalize(series, m, scale=jnp.array([2.0]))
        >>> forecast = jnp.concatenate([z, 2 * z[:, -1:]], axis=1)  # stands for a network
        >>> [round(float(t)) for t in denormalize(forecast, m, scale=jnp.array([2.0])).ravel()]
        [100, 102, 104, 106]

    Reference:
        Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution
        Shift, ICLR 2022, for the use; Learning values across many orders of magnitude, 2016,
        arXiv:1602.07714, for another.
    """
    y = inexact(y, "y")
    values = None if scale is None else known(scale)
    if values is not None and not values.all():
        raise ValueError(
            f"scale is 0 in {int((values == 0).sum())} of {values.size} places. "
            "Expected none: what was multiplied by 0 does not come back."
        )
    arrays = given(y, m, scale, bias, epsilon, dtype, batch_axis, channel_axis, centered)
    w = None if weights is None else as_weights(weights, y)
    result = Result(jnp.dtype(y.dtype if dtype is None else dtype), None, False, jnp.sqrt)
    return kept_small(_back, result, y, w, *arrays)


def _back(result, y, w, mean, v, g, b):
    """The pass of `normalize`: (y - b) sqrt(v) (1 / g) + mean.

    Checkpointed, it keeps nothing that is made of a scale as large as y.
    """
    g = None if g is None else 1 / g.astype(statistic_dtype(y.dtype))
    mean = None if mean is None else spread_to_channels(mean, y.shape)
    return standardized(result, y, None, w, b, v, g, mean)
