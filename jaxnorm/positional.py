"""The moment shortcut: a late layer is given the moments taken out of an early one.

Both layers have the same resolution:

    y, m = norm(x, methods.positional_norm())       # in the encoder
    z = moment_shortcut(z, m)                       # in the decoder
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.meshes import in_explicit_meshes
from jaxnorm._core.moments import Moments, check_moments, inexact
from jaxnorm._core.normalize import normalize
from jaxnorm._core.shared import shared


@in_explicit_meshes
def moment_shortcut(
    x: ArrayLike, m: Moments, *, epsilon: float = 1e-5, channel_axis: int = -1
) -> jax.Array:
    """Give x the mean and standard deviation that a normalization took out of an earlier layer.

        y = x * sqrt(var + epsilon) + mean

    Applied to the output of that normalization, without scale and bias, it returns its input. The
    authors' torch code divides the variance by C - 1: there
    `m = dataclasses.replace(m, var=m.var * C / (C - 1))` before m is used for either.

    Args:
        x: real floating array, as a rule of another layer; any number of channels.
        m: moments with one channel, as `norm` returns them for `methods.positional_norm()`, or of
            x's shape.
        epsilon: of that normalization, in the unit of its input squared.
        channel_axis: axis of the channels.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError: x is complex or integer, m is not `Moments`.
        ValueError: moments of another shape, an epsilon below 0.

    Example:
        >>> from jaxnorm import methods, norm
        >>> x = jnp.array([[[1.0, 3.0]]])
        >>> y, m = norm(x, methods.positional_norm(), epsilon=0.0)
        >>> y.tolist(), moment_shortcut(y, m, epsilon=0.0).tolist()
        ([[[-1.0, 1.0]]], [[[1.0, 3.0]]])

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """
    check_moments(m, "m")
    check_epsilon(epsilon)
    return scale_and_shift(x, jnp.sqrt(m.var + epsilon), m.mean, channel_axis=channel_axis)


@in_explicit_meshes
def scale_and_shift(
    x: ArrayLike, scale: ArrayLike, shift: ArrayLike, *, channel_axis: int = -1
) -> jax.Array:
    """Scale and shift each position by itself, as a network that reads moments may ask for.

        y = x * scale + shift

    Args:
        x: real floating array.
        scale: of x's shape, or with one channel.
        shift: likewise.
        channel_axis: axis of the channels.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError: x is complex or integer.
        ValueError: scale or shift of another shape.

    Example:
        >>> x, scale, shift = (jnp.full((1, 2, n), 2.0) for n in (3, 1, 1))
        >>> scale_and_shift(x, scale, shift)[0, 0].tolist()
        [6.0, 6.0, 6.0]

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312, whose dynamic moment shortcut makes both
        by convolutions.
    """
    x = inexact(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"the moment shortcut is defined for real x. Got {x.dtype}.")
    x = shared(x)
    channel = single_axis(channel_axis, x.shape)
    one_channel = tuple(1 if i == channel else n for i, n in enumerate(x.shape))
    shapes = {jnp.shape(scale), jnp.shape(shift)}
    if len(shapes) > 1 or not shapes <= {one_channel, x.shape}:
        raise ValueError(
            f"scale of shape {jnp.shape(scale)} and shift of shape {jnp.shape(shift)} do not fit x "
            f"of shape {x.shape}. Expected {one_channel} for both, or x's shape; they serve a "
            "layer of the same resolution."
        )
    axes = [i for i in range(x.ndim) if i != channel or x.shape in shapes]
    sizes = [x.shape[i] for i in axes]
    one = jnp.ones((1,) * x.ndim, statistic_dtype(x.dtype))
    return normalize(
        x,
        Moments(one, jnp.zeros_like(one), one),
        scale=jnp.asarray(scale).reshape(sizes),
        bias=jnp.asarray(shift).reshape(sizes),
        epsilon=0.0,
        channel_axis=axes,
    )
