"""The layer in front of a normalization that needs its kernel."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn


def in_front(
    layer: Any, x: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """The kernel of a submodule like `nn.Conv` and `nn.Dense`, and the layer as a function of input
    and kernel."""
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
        layer(x)  # makes it
    alone: Any = layer.clone(parent=None, name=None)

    def function(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        return alone.clone(features=kernel.shape[-1]).apply({"params": {"kernel": kernel}}, inputs)

    return nn.meta.unbox(layer.variables["params"]["kernel"]), function
