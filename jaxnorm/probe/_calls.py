"""What hooks of layers have in common: one call is seen, and may be replaced."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state


class NormCall(NamedTuple):
    """What went into a layer and came out of it.

    Args:
        x: the first argument of the call.
        y: what it returned, with scale, bias and activation where the layer applies them.

    Reference:
        A tool of this library; no paper is followed.
    """

    x: Any
    y: Any


seeing = jax.make_user_context(False)
"""Where calls are looked for, JAX traces anew: a function that it has traced before would run
without calling a layer."""

Visit = Callable[[str, Any, Any], Any]
"""(path, x, y) -> what becomes of y."""


class Tap:
    """Shows each call of a layer to a function, once and in the trace it was made for."""

    def __init__(self, visit: Visit):
        self.visit, self.trace = visit, get_opaque_trace_state()
        self.calls, self.inside = Counter(), set()

    def __call__(self, layer: Any, path: str | None, call: Any, args: Any, kwargs: Any) -> Any:
        if path in self.inside:  # of a class that calls that of its parent, or of what replaces it
            return call(*args, **kwargs)
        if path is None or get_opaque_trace_state() != self.trace:
            raise ValueError(
                f"a layer of type {type(layer).__name__}, path {path!r}, is called inside of a "
                "transformation within forward, such as remat, scan, jit or grad, or is a copy. "
                "What it computes cannot leave there; expected forward to call the model itself. "
                "Transform the recorded function instead, and build the model without remat and "
                "scan for the probe."
            )
        self.inside.add(path)
        try:
            y = call(*args, **kwargs)
        finally:
            self.inside.discard(path)
        name = f"{path}#{self.calls[path]}" if self.calls[path] else path
        self.calls[path] += 1
        first = list(inspect.signature(type(layer).__call__).parameters)[1]
        return self.visit(name, args[0] if args else kwargs[first], y)


def check_layers(layers: Any) -> tuple[type, ...]:
    """`layers` as a tuple of types."""
    types = layers if isinstance(layers, tuple) else (layers,)
    if not types or not all(isinstance(t, type) for t in types):
        raise TypeError(
            f"layers is {layers!r}; expected a class of layers or a tuple of them, such as nn.Conv."
        )
    return types


def visited(tap: Tap, layers: tuple[type, ...], run: Callable[[], Any]) -> Any:
    """The outputs of a forward pass in which at least one layer was seen."""
    with seeing(True):
        outputs = run()
    if not tap.calls:
        names = ", ".join(t.__name__ for t in layers)
        raise ValueError(
            f"forward called none of the layers that are looked for. Expected one of {names}; for "
            "layers of your own give their classes as `layers`."
        )
    return outputs


def recorder() -> tuple[Visit, dict[str, NormCall]]:
    """A visit that keeps what it sees, and where."""
    calls: dict[str, NormCall] = {}

    def keep(path: str, x: Any, y: Any) -> Any:
        calls[path] = NormCall(x, y)
        return y

    return keep, calls


def alterer(alter: Callable[[str, jax.Array], jax.Array]) -> Visit:
    """A visit that replaces outputs by arrays of their shape and dtype."""

    def change(path: str, x: Any, y: Any) -> Any:
        new = alter(path, y)
        if jnp.shape(new) != jnp.shape(y) or jnp.result_type(new) != jnp.result_type(y):
            raise ValueError(
                f"alter returned {jnp.result_type(new)} of shape {jnp.shape(new)} for the output "
                f"of {path!r}. Expected {jnp.result_type(y)} of shape {jnp.shape(y)}."
            )
        return new

    return change
