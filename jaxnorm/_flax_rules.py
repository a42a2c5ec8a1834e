"""What Flax means by its fields: dtypes, axes and numbers of groups in the terms of the core."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax
from jax.typing import DTypeLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of

Axes = int | Sequence[int]
Sets = tuple[Shape, Axes]
"""The statistic's shape, and the axes of scale and bias."""


def is_plain(layer: Any) -> bool:
    """Whether a Flax layer computes with its kernel as it is."""
    hooks = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
    standard = (None, lax.dot_general, lax.conv_general_dilated)
    return all(getattr(layer, hook, None) in standard for hook in hooks)


def wide_enough(x: jax.Array, dtype: Any) -> jax.Array:
    """x as the core takes it.

    Integers and booleans become float32, as in Flax, and x is cast up where the output is wider
    than its statistics would be (float64 or complex parameters).
    """
    x = x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
    wide = statistic_dtype(x.dtype)
    with jax.numpy_dtype_promotion("standard"):
        wider = jnp.promote_types(wide, dtype)
    return x if wider == wide else x.astype(wider)


def output_dtype(*arrays: jax.Array | None, dtype: DTypeLike | None) -> Any:
    """Flax's rule for the dtype of the output: `dtype`, or what input and parameters promote to."""
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays, dtype=dtype)


def feature_shape(x: jax.Array, axes: Axes) -> Shape:
    """Sizes of the feature axes, the shape of scale and bias."""
    return tuple(x.shape[i] for i in axes_of(axes, x.shape))


def keep_axes(x: jax.Array, axes: Axes) -> Shape:
    """The statistic's shape when only `axes` are not pooled."""
    kept = axes_of(axes, x.shape)
    return tuple(n if i in kept else 1 for i, n in enumerate(x.shape))


def pool_axes(x: jax.Array, axes: Axes) -> Shape:
    """The statistic's shape when `axes` are pooled."""
    pooled = axes_of(axes, x.shape)
    return tuple(1 if i in pooled else n for i, n in enumerate(x.shape))


def layer_sets(layer: Any, x: jax.Array) -> Sets:
    """The sets of Flax's LayerNorm and RMSNorm."""
    return pool_axes(x, layer.reduction_axes), layer.feature_axes


def instance_sets(layer: Any, x: jax.Array) -> Sets:
    """The sets of Flax's InstanceNorm."""
    axes = axes_of(layer.feature_axes, x.shape)
    if 0 in axes:
        raise ValueError(
            "The channel axes cannot include the leading dimension as this is assumed to be the "
            f"batch axis. Got feature_axes={layer.feature_axes} for x of shape {x.shape}; expected "
            "axes from 1 on."
        )
    return keep_axes(x, (0, *axes)), layer.feature_axes


def number_of_groups(
    channels: int, num_groups: int | None, group_size: int | None, noun: str = "channels"
) -> int:
    """The number of channel groups of Flax's GroupNorm, from it or from the size of a group.

    `noun` is Flax's word for channels.
    """
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "Either `num_groups` or `group_size` should be specified. If `group_size` is to be "
            "specified, pass `num_groups=None` as argument to override the default `num_groups` "
            f"value of 32. Got num_groups={num_groups} and group_size={group_size}."
        )
    if group_size is not None:
        if group_size <= 0 or channels % group_size != 0:
            raise ValueError(
                f"Number of {noun} ({channels}) is not multiple of the group size ({group_size}). "
                f"Expected a divisor of {channels}."
            )
        return channels // group_size
    assert num_groups is not None
    if num_groups <= 0 or channels % num_groups != 0:
        raise ValueError(
            f"Number of groups ({num_groups}) does not divide the number of channels ({channels}). "
            "Expected one of its divisors; the default of 32 needs a multiple of 32 channels."
        )
    return num_groups


def group_sets(x: jax.Array, num_groups: int, reduction_axes: Axes | None) -> Sets:
    """The sets of Flax's GroupNorm: channels, the last axis, in groups."""
    axes = (*range(1, x.ndim - 1), -1) if reduction_axes is None else reduction_axes
    if x.ndim - 1 not in axes_of(axes, x.shape):
        raise ValueError(
            "The reduction axes must include the final dimension as this is assumed to be the "
            f"feature axis. Got reduction_axes={reduction_axes} for x of shape {x.shape}."
        )
    return (*pool_axes(x, axes)[:-1], num_groups), -1
