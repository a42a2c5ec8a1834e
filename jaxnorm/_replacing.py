"""Whether a method can take the place of a layer of a model that was written for another."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from jaxnorm._core.groups import Groups
from jaxnorm._inspection import kind_of
from jaxnorm.methods import Method, Row, batch_norm
from jaxnorm.methods._method import options_of
from jaxnorm.methods._row import as_method

Choice = Method | Groups | Callable[[str, Any], Method | Groups | None]
"""A method for all layers, or (path, layer) -> its method, or None, which leaves the layer."""


def chosen(choice: Choice, path: str, layer: Any) -> Method | None:
    """The method that takes a layer's place."""
    if isinstance(choice, Method | Groups) or not callable(choice):
        return as_method(choice)
    own = choice(path, layer)
    return None if own is None else as_method(own)


def method_before(layer: Any) -> Method | None:
    """The method of a layer, where it matters for what takes its place."""
    if hasattr(layer, "method"):
        return as_method(layer.method)
    return batch_norm() if kind_of(layer) == "BatchNorm" else None


def channel_axis_of(layer: Any) -> Any:
    """The one axis of a layer's channels; None where it has several."""
    names = ("channel_axis", "axis", "feature_axes")
    axes = next((getattr(layer, name) for name in names if hasattr(layer, name)), -1)
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    return axes[0] if len(axes) == 1 else None


def reasons_against(layer: Any, method: Method, channels: int, positions: bool) -> Iterator[str]:
    """Why a method cannot take a layer's place, in words that go on from "X at path"."""
    before = method_before(layer)
    if not type(layer).__call__.__module__.startswith(("flax.", "jaxnorm.")):
        yield "has a call of its own: leave it out, by a function that returns None for it"
    if channel_axis_of(layer) is None:
        yield "has several axes of channels, and Norm has one"
    if getattr(layer, "layer", None) is not None:
        yield "owns the layer in front of it, which would be lost"
    if type(before) is not type(method):
        if method.activates:
            yield (
                f"cannot be {method}, which is or takes the activation that follows: the model "
                "would activate twice. Build the model with that layer and without the activation"
            )
        elif before is not None and before.activates:
            yield f"is {before}, which is or takes its activation: the model would have none"
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    given = {*fields, *method.parameters(channels)}
    own = options_of(type(method).rule).items()
    if missing := [n for n, o in own if o.default is o.empty and n not in given]:
        yield f"cannot be {method}, which needs {', '.join(missing)} at each call"
    elif method.overwritten_by_gradient:
        yield f"cannot be {method}, which needs a training step of its own for its tap"
    if positions and method.keeps_positions(channels):
        yield f"cannot be {method}, whose state belongs to one image size. Build it with x_shape"
    yield from _channels_that_do_not_split(method, channels)


def _channels_that_do_not_split(method: Method, channels: int) -> Iterator[str]:
    for row in (method.for_channels(channels), *method.statistics):
        if not isinstance(row, Row):
            continue
        if not isinstance(row.groups, Groups):
            yield f"cannot be {method}, which is for x of one shape. Give it as Groups"
            continue
        try:
            Groups(batch=1, spatial=1, channel=row.groups.channel).shape((1, channels))
        except ValueError:
            yield f"has {channels} channels, which do not split as {method} says"


def refuse(reasons: dict[str, list[str]]) -> None:
    """One error that names all layers that cannot be replaced; none where there are none."""
    found = [f"{name} {'; it '.join(why)}." for name, why in reasons.items() if why]
    if found:
        raise ValueError(
            f"layers cannot be replaced, and nothing was: {' '.join(found)} Expected a method that "
            "does what the model expects of the layer; a function (path, layer) chooses for each."
        )


def state_means_the_same(before: Method | None, method: Method, channels: int) -> bool:
    """Whether state of the same names and shapes has the same meaning in both methods."""
    if before is None:
        return False
    one, other = (t.for_channels(channels) for t in (before, method))
    if isinstance(one, Row) and isinstance(other, Row):
        return _remembered(one, channels) == _remembered(other, channels)
    return type(one) is type(other)


def _remembered(row: Row, channels: int) -> tuple[Any, ...]:
    """What a row's running statistics are of."""
    kept: Any = row.running or row.groups
    sets = (kept.spatial, Groups(1, 1, kept.channel).shape((1, channels)))
    return sets, row.mean, row.debias, row.remembers
