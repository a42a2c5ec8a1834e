"""Whether state is that of a method: it has the names and shapes of what `init` makes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._core.axes import Shape


def check_state(method: Any, state: Any, x_shape: Shape, **options: Any) -> None:
    """`state` has the names and shapes of what `init` makes for x of this shape."""
    expected = _shapes_of_state(method, x_shape, **options)
    error, got = TypeError, f"a {type(state).__name__}"
    if isinstance(state, Mapping):
        shapes = {name: jax.tree.map(jnp.shape, state[name]) for name in sorted(state)}
        own = {name: shapes[name] for name in shapes if name not in method.also_in_state}
        if own == expected or (method.any_arrangement and own.keys() == expected.keys()):
            return
        error, got = ValueError, f"a state with {_listed(shapes) or 'nothing in it'}"
    raise error(
        f"{type(method).__name__} got {got}. Expected its own state, "
        f"{expected and 'a dict with ' + _listed(expected)}, as its init makes it for x of shape "
        f"{x_shape}: state belongs to one method and number of channels, and where it keeps "
        "positions apart to one image size."
    )


# Cached, and without values: otherwise every step outside of jit would make a state anew.
@functools.lru_cache
def _shapes_of_state(method: Any, x_shape: Shape, **options: Any) -> dict[str, Any]:
    first = jax.eval_shape(lambda: method.init(x_shape, **options))
    return {name: jax.tree.map(jnp.shape, t) for name, t in first.items()}


def _listed(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} of shape {shape}" for name, shape in shapes.items())
