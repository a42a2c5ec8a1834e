"""What stands between `moments` and `normalize`: the frame of every method that is more than a row of the table.

Such a method is a rule: from the moments of x, and what it remembers, to the moments to normalize with, and what it remembers
next. The rule is ordinary JAX on small arrays, so its gradient is too, and schedules enter as numbers or traced scalars.

State is a dict of arrays of fixed shapes, float32, with the channels last.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._devices import AxisName, DeviceGroups
from jaxnorm._groups import Specification, single_axis
from jaxnorm._mean_var import statistic_dtype
from jaxnorm._moments import Moments, inexact, moments
from jaxnorm._normalize import normalize

State = dict[str, jax.Array]


class Options(TypedDict, total=False):
    """What every method takes as `norm` does; see there."""

    scale: ArrayLike | None
    bias: ArrayLike | None
    weights: ArrayLike | None
    activation: Callable[[jax.Array], jax.Array] | None
    dtype: DTypeLike | None
    axis_name: AxisName
    axis_index_groups: DeviceGroups
    batch_axis: int
    channel_axis: int


def real(x: ArrayLike, method: str) -> jax.Array:
    """x as a real floating array."""
    x = inexact(x)
    if jnp.iscomplexobj(x):
        raise TypeError(f"{method} is defined for real x. Got {x.dtype}, shape {x.shape}; norm takes complex x.")
    return x


def measured(x: jax.Array, groups: Specification, **options: Unpack[Options]) -> Moments:
    """`moments` of x, with the options that concern them."""
    return moments(x, groups, **_named(options, "weights", "axis_name", "axis_index_groups", "batch_axis", "channel_axis"))


def applied(x: jax.Array, m: Moments, epsilon: float, **options: Unpack[Options]) -> jax.Array:
    """`normalize` x with m, with the options that concern it."""
    names = ("scale", "bias", "weights", "activation", "dtype", "batch_axis", "channel_axis")
    return normalize(x, m, epsilon=epsilon, **_named(options, *names))


def _named(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def along_channels(t: jax.Array, x: jax.Array, channel_axis: int = -1) -> jax.Array:
    """State t, (..., C), in the shape and dtype of statistics that serve x: (..., 1, 1, 1, C)."""
    channel = single_axis(channel_axis, x.shape)
    if t.shape[-1] != x.shape[channel]:
        raise ValueError(
            f"state of shape {t.shape} has {t.shape[-1]} channels, x of shape {x.shape} has {x.shape[channel]}. Expected as "
            "many; state belongs to the number of channels with which it was made."
        )
    sizes = [n if i == channel else 1 for i, n in enumerate(x.shape)]
    return t.reshape(*t.shape[:-1], *sizes).astype(statistic_dtype(x.dtype))


def usable(m: Moments) -> jax.Array:
    """Where a batch may enter the state: its sets have elements, and finite moments."""
    return (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)


def remembered(old: jax.Array, new: jax.Array, keep: ArrayLike = True) -> jax.Array:
    """`new` in the shape and dtype of the state `old`, without a derivative; `old` where `keep` is false."""
    new = jax.lax.stop_gradient(new).astype(old.dtype)
    return jnp.where(jnp.asarray(keep), new, old.reshape(new.shape)).reshape(old.shape)


def averaged(old: jax.Array, new: jax.Array, momentum: ArrayLike, keep: ArrayLike = True) -> jax.Array:
    """momentum old + (1 - momentum) new, in the shape and dtype of the state `old`."""
    wide = old.reshape(new.shape).astype(new.dtype)
    return remembered(old, wide + (1 - jnp.asarray(momentum, new.dtype)) * (new - wide), keep)
