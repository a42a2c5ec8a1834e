"""Layers of other libraries by name, and what their arguments have in common.

Each library's file has a function for each of its layers, with the arguments that make another
method, by their names and with their defaults.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jaxnorm.methods as methods
from jaxnorm.methods import Method, Row

Settings = dict[str, Any]
"""Arguments of `Norm`: method, use_scale, use_bias."""
Shape = int | Sequence[int]


LAYERS: dict[str, Callable[..., Settings]] = {}
"""Functions by library and layer."""


def settings_of(*layers: str) -> Callable[[Callable[..., Settings]], Callable[..., Settings]]:
    """List the decorated function for these layers."""

    def listed(function: Callable[..., Settings]) -> Callable[..., Settings]:
        LAYERS.update(dict.fromkeys(layers, function))
        return function

    return listed


def made(method: Method, scale: Any = True, bias: Any = True) -> Settings:
    """The settings of a method."""
    return {"method": method, "use_scale": bool(scale), "use_bias": bool(bias)}


def refused(argument: str, value: Any, expected: str) -> ValueError:
    """The error for an argument with which there is no method here."""
    return ValueError(
        f"there is no such method here. Got {argument}={value!r}; expected {expected}."
    )


def over(axes: Any, epsilon: float, argument: str = "axis") -> Row:
    """Layer normalization over the last axis, or over several, which are all but the first.

    Axes counted from the front are refused, as (1, 2) is all but the first for x of rank 3 alone.
    """
    axes = (axes,) if isinstance(axes, int) else axes
    if axes == slice(1, None) or (
        not isinstance(axes, slice) and len(axes) > 1 and sorted(axes) == [*range(-len(axes), 0)]
    ):
        return methods.layer_norm(epsilon=epsilon)
    if not isinstance(axes, slice) and tuple(axes) == (-1,):
        return methods.token_layer_norm(epsilon=epsilon)
    raise refused(
        argument, axes, "-1, or all axes but the first, as slice(1, None) or (-3, -2, -1)"
    )


def rms_over(axes: Any, epsilon: float, argument: str = "axis") -> Row:
    """The same without a mean."""
    return Row(over(axes, epsilon, argument).groups, mean=0, epsilon=epsilon)


def last_axes(shape: Shape) -> range:
    """As many of the last axes as the shape has."""
    return range(-1 if isinstance(shape, int) else -len(shape), 0)
