"""The layer in front of a normalization that works on it."""

from typing import Any

import jax
from flax import nnx

from jaxnorm import _layers
from jaxnorm.methods import Method


def in_front(
    method: Method, layer: Any, inputs: jax.Array, channel_axis: int
) -> tuple[jax.Array, dict[str, Any]]:
    """What a method makes of a layer like `nnx.Conv` and `nnx.Linear`.

    It is the method's x, and the options of `apply`.
    """

    def function(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        copy: Any = nnx.merge(*nnx.split(layer))
        copy.kernel = copy.kernel.replace(kernel)
        return copy(inputs)

    return _layers.in_front(method, inputs, layer.kernel[...], function, channel_axis)


def check_in_front(method: Method, layer: Any, num_features: int) -> dict[str, Any]:
    """The options of `init` that describe the layer, once it is known to be one."""
    _layers.check_works_on_layers(method, layer)
    if (
        not isinstance(layer, nnx.Module)
        or not hasattr(layer, "kernel")
        or getattr(layer, "use_bias", True)
    ):
        raise ValueError(
            f"layer is a Flax layer with a kernel, without a bias. Got {type(layer).__name__}; "
            "expected for example nnx.Conv(3, 64, (3, 3), use_bias=False, rngs=rngs) or "
            "nnx.Linear(3, 64, use_bias=False, rngs=rngs)."
        )
    shape = layer.kernel[...].shape  # type: ignore[attr-defined]  # checked above
    if shape[-1] != num_features:
        raise ValueError(
            f"num_features={num_features} and a layer in front with {shape[-1]} outputs, whose "
            f"kernel has shape {shape}. Expected as many."
        )
    groups = getattr(layer, "feature_group_count", 1)
    return {"kernel_shape": shape, "feature_group_count": groups}
