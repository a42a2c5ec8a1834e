"""Normalization layers of Flax: linen and nnx have the same names, arguments and arrays."""

from collections.abc import Mapping
from typing import Any

import jaxnorm.methods as methods
from jaxnorm.convert._arrays import Arrays, Layer, as_numpy, split
from jaxnorm.convert._registry import Settings, made, over, rms_over, settings_of


def from_flax(arrays: Mapping[str, Any]) -> Layer:
    """The arrays of a layer, which have their names already."""
    return split({name: as_numpy(t) for name, t in arrays.items()})


def to_flax(params: Arrays, state: Arrays) -> Arrays:
    """The inverse."""
    return params | state


@settings_of("flax.BatchNorm")
def _batch_norm(
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    use_bias: bool = True,
    use_scale: bool = True,
) -> Settings:
    return made(methods.batch_norm(epsilon=epsilon, momentum=momentum), use_scale, use_bias)


@settings_of("flax.GroupNorm")
def _group_norm(
    num_groups: int | None = 32,
    group_size: int | None = None,
    epsilon: float = 1e-6,
    use_bias: bool = True,
    use_scale: bool = True,
) -> Settings:
    row = methods.group_norm(num_groups, group_size=group_size, epsilon=epsilon)
    return made(row, use_scale, use_bias)


@settings_of("flax.InstanceNorm")
def _instance_norm(
    epsilon: float = 1e-6, use_bias: bool = True, use_scale: bool = True
) -> Settings:
    return made(methods.instance_norm(epsilon=epsilon), use_scale, use_bias)


@settings_of("flax.LayerNorm")
def _layer_norm(
    epsilon: float = 1e-6,
    use_bias: bool = True,
    use_scale: bool = True,
    reduction_axes: Any = -1,
) -> Settings:
    return made(over(reduction_axes, epsilon, "reduction_axes"), use_scale, use_bias)


@settings_of("flax.RMSNorm")
def _rms_norm(epsilon: float = 1e-6, use_scale: bool = True, reduction_axes: Any = -1) -> Settings:
    return made(rms_over(reduction_axes, epsilon, "reduction_axes"), use_scale, False)
