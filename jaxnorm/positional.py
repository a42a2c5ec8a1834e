"""Positional Normalization whose mean and standard deviation are handed to a later layer: the
moment shortcut."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import axes_of, single_axis
from jaxnorm._core.divisor import with_divisor
from jaxnorm._core.moments import Moments
from jaxnorm._core.normalize import normalize
from jaxnorm._frame import Options, applied, measured, real


def positional_norm(
    x: ArrayLike, *, epsilon: float = 1e-5, correction: int = 0, **options: Unpack[Options]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standardize each position over its channels, and return what was taken out.

        std = sqrt(var + epsilon),    y = (x - mean) / std * scale + bias

    Without scale and bias, as in the paper, `moment_shortcut(y, mean, std)` is x. In a network with
    an encoder and a decoder mean and std of an early layer shift and scale a late one of the same
    resolution.

    Args:
        x: real floating array with examples and channels.
        epsilon: added to the variance, in the unit of x squared.
        correction: 1 divides the variance by C - 1, as the authors' torch code does; their
            TensorFlow code divides by C.
        **options: as `norm`.

    Returns:
        y, of x's shape; mean and std, of x's shape with one channel, float32 or wider.

    Raises:
        TypeError: x is complex or integer.

    Example:
        >>> y, mean, std = positional_norm(jnp.array([[[1.0, 3.0]]]), epsilon=0.0)
        >>> y.tolist(), mean.tolist(), std.tolist()
        ([[[-1.0, 1.0]]], [[[2.0]]], [[[1.0]]])

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312. The definition was read in the authors'
        code.
    """
    x = real(x, "positional_norm")
    m = with_divisor(
        measured(x, methods.positional_norm(), **options), epsilon, correction=correction
    )
    return applied(x, m, 0.0, **options), m.mean, jnp.sqrt(m.var)


def moment_shortcut(
    x: ArrayLike, mean: ArrayLike, std: ArrayLike, *, channel_axis: int = -1
) -> jax.Array:
    """Give x the mean and standard deviation that `positional_norm` took out of an earlier layer.

        y = x * std + mean

    Args:
        x: real floating array, as a rule of another layer; any number of channels.
        mean: of x's shape, or with one channel.
        std: likewise.
        channel_axis: axis of the channels.

    Returns:
        y, of x's shape and dtype.

    Raises:
        TypeError: x is complex or integer.
        ValueError: mean or std of another shape.

    Example:
        >>> x = jnp.array([[[1.0, 3.0]]])
        >>> moment_shortcut(*positional_norm(x, epsilon=0.0)).tolist()
        [[[1.0, 3.0]]]

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """
    x = real(x, "moment_shortcut")
    channel = single_axis(channel_axis, x.shape)
    one_channel = tuple(1 if i == channel else n for i, n in enumerate(x.shape))
    shapes = {"mean": jnp.shape(mean), "std": jnp.shape(std)}
    if shapes["mean"] != shapes["std"] or shapes["mean"] not in (one_channel, x.shape):
        raise ValueError(
            f"mean and std of shapes {shapes['mean']} and {shapes['std']} do not fit x of shape "
            f"{x.shape}. Expected {one_channel} for both, or x's shape; they serve a layer of the "
            "same resolution."
        )
    axes = [i for i in range(x.ndim) if i != channel or shapes["mean"] == x.shape]
    sizes = [x.shape[i] for i in axes_of(axes, x.shape)]
    one = jnp.ones((1,) * x.ndim, statistic_dtype(x.dtype))
    scale, bias = (jnp.asarray(t).reshape(sizes) for t in (std, mean))
    return normalize(
        x,
        Moments(one, jnp.zeros_like(one), one),
        scale=scale,
        bias=bias,
        epsilon=0.0,
        channel_axis=axes,
    )
