"""The layer in front of a normalization that needs its kernel."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def in_front(layer: Any) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """The kernel of a layer like `nnx.Conv` and `nnx.Linear`, and the layer as a function of input
    and kernel."""
    check_in_front(layer)

    def function(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
        parts: tuple[Any, Any] = nnx.split(layer)
        definition, state = parts
        state["kernel"] = state["kernel"].replace(kernel)
        copy: Any = nnx.merge(definition, state)
        return copy(inputs)

    return layer.kernel[...], function


def check_in_front(layer: Any) -> None:
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
