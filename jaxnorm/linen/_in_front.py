"""The layer in front of a normalization that works on it."""

from typing import Any

import jax
from flax import linen as nn

from jaxnorm import _layers
from jaxnorm.methods import Method


def in_front(
    method: Method, layer: Any, inputs: jax.Array, channel_axis: int
) -> tuple[jax.Array, dict[str, Any], dict[str, Any]]:
    """What a method makes of a submodule like `nn.Conv` and `nn.Dense`.

    It is the method's x, the options of `apply` and those of `init`.
    """
    _layers.check_works_on_layers(method, layer)
    if (
        not isinstance(layer, nn.Module)
        or getattr(layer, "use_bias", True)
        or not hasattr(layer, "features")
    ):
        raise ValueError(
            f"layer is a Flax layer with `features` and a kernel, without a bias. Got {layer!r}; "
            "expected for example nn.Conv(64, (3, 3), use_bias=False) or nn.Dense(64, "
            "use_bias=False)."
        )
    if not layer.has_variable("params", "kernel"):
        layer(inputs)  # makes it
    alone: Any = layer.clone(parent=None, name=None)

    def function(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return alone.clone(features=kernel.shape[-1]).apply({"params": {"kernel": kernel}}, inputs)

    kernel = nn.meta.unbox(layer.variables["params"]["kernel"])
    groups = inputs.shape[-1] // kernel.shape[-2]
    x, options = _layers.in_front(method, inputs, kernel, function, channel_axis)
    return x, options, {"kernel_shape": kernel.shape, "feature_group_count": groups}
