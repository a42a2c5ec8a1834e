"""What meets x in the full-size pass: given moments, scale and bias, checked and in x's rank."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of, single_axis
from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.devices import varying_like
from jaxnorm._core.groups import check_divides
from jaxnorm._core.moments import Moments, check_moments


class Given(NamedTuple):
    """Arrays of x's rank, each of which broadcasts against x once its groups are spread."""

    mean: jax.Array | None
    """None where it is known to be 0."""
    v: jax.Array
    """Variance and epsilon."""
    scale: jax.Array | None
    bias: jax.Array | None


def given(
    x: jax.Array,
    m: Moments,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    epsilon: float,
    dtype: DTypeLike | None,
    batch_axis: int,
    channel_axis: int | Sequence[int],
    centered: bool,
) -> Given:
    """The arguments of `normalize` as its pass over x takes them, or the reason why it cannot."""
    check_moments(m, "m")
    check_epsilon(epsilon)
    mean, var = (jnp.asarray(t) for t in (m.mean, m.var))
    _check_serves(var.shape, x.shape)
    _check_holds(mean, x, dtype)
    axes = axes_of(channel_axis, x.shape)
    g, b = (
        broadcast_parameter(t, name, x, batch_axis, axes, channel_axis)
        for t, name in ((scale, "scale"), (bias, "bias"))
    )
    mean, var, g, b = jax.tree.map(lambda t: varying_like(t, x), (mean, var, g, b))
    var = var.astype(statistic_dtype(x.dtype, real=True))
    v = var + jnp.asarray(epsilon, var.dtype)
    return Given(mean.astype(statistic_dtype(x.dtype)) if centered else None, v, g, b)


def _check_serves(shape: Shape, x_shape: Shape) -> None:
    if len(shape) < len(x_shape):
        raise ValueError(
            f"m.var of shape {shape} does not fit x of shape {x_shape}. Expected moments of x's "
            "rank. A running state lacks the axes that its sets pool: if m is one, pass "
            "running_moments(m, groups, x.shape)."
        )
    check_divides(shape, x_shape, "m.var")


def _check_holds(mean: jax.Array, x: jax.Array, dtype: DTypeLike | None) -> None:
    if jnp.iscomplexobj(mean) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"m.mean is complex ({mean.dtype}) and x is {x.dtype}. Expected both real, or x "
            "complex."
        )
    if dtype is not None and not jnp.issubdtype(
        dtype, jnp.complexfloating if jnp.iscomplexobj(x) else jnp.inexact
    ):
        raise TypeError(
            f"dtype {jnp.dtype(dtype).name} cannot hold the result for x of dtype {x.dtype}. Pass "
            "a wider one."
        )


def broadcast_parameter(
    t: ArrayLike | None,
    name: str,
    x: jax.Array,
    batch_axis: int,
    axes: Shape,
    channel_axis: int | Sequence[int],
) -> jax.Array | None:
    """Scale or bias in x's rank: an axis that it does not have is of size 1.

    It is (C,), or (N, C), of the axes `axes` of x that are the channels, or has x's rank already.
    """
    if t is None:
        return None
    t = jnp.asarray(t)
    batch = single_axis(batch_axis, x.shape)
    features = tuple(x.shape[i] for i in axes)
    per_example = features if batch in axes else (x.shape[batch], *features)
    # Where (N, C) has x's rank, an array that begins with another axis of x could be either.
    unambiguous = len(per_example) < x.ndim or batch in axes or batch < axes[0]
    if t.shape == features:
        t = t.reshape([n if i in axes else 1 for i, n in enumerate(x.shape)])
    elif t.shape == per_example:
        t = jnp.moveaxis(t, 0, sum(i < batch for i in axes))
        t = t.reshape([n if i in (*axes, batch) else 1 for i, n in enumerate(x.shape)])
    elif not (
        unambiguous
        and t.ndim == x.ndim
        and all(k in (1, n) for k, n in zip(t.shape, x.shape, strict=True))
    ):
        expected = f"{features}, {per_example} per example"
        expected += f", or {x.ndim} axes that broadcast against x." if unambiguous else "."
        raise ValueError(_misfit(t.shape, name, x.shape, batch, features, channel_axis, expected))
    if jnp.iscomplexobj(t) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"{name} is complex ({t.dtype}) and x is {x.dtype}. Expected both real, or x complex."
        )
    # One as large as x is widened in the pass that uses it: the backward pass would keep the copy.
    return t if t.shape == x.shape else t.astype(statistic_dtype(x.dtype))


def _misfit(
    shape: Shape,
    name: str,
    x_shape: Shape,
    batch: int,
    features: Shape,
    channel_axis: int | Sequence[int],
    expected: str,
) -> str:
    """Why a scale or bias is none for x, and what is meant perhaps."""
    message = (
        f"{name} has shape {shape}, but axis {channel_axis} of x, shape {x_shape}, has size "
        f"{features[0] if len(features) == 1 else features}. Expected {expected}"
    )
    fitting = [i for i, n in enumerate(x_shape) if i != batch and shape == (n,)]
    if fitting == [1]:
        message += (
            " This looks like NCHW data: pass channel_axis=1 (axis=1 or feature_axes=1 to Flax's "
            "layers)."
        )
    elif fitting:
        message += (
            f" Axis {fitting[0]} has that size: pass channel_axis={fitting[0]} if it holds the "
            "channels."
        )
    elif 1 < len(shape) < len(x_shape) and x_shape[len(x_shape) - len(shape) :] == shape:
        whole = (1,) * (len(x_shape) - len(shape)) + shape
        message += f" For one that all examples share, write its axes of size 1: {whole}."
    return message
