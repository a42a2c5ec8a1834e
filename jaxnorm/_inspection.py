"""What a call of a normalization is, in the terms of the table of methods: ours and Flax's own."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend.core import get_opaque_trace_state

from jaxnorm import _flax_rules
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of
from jaxnorm._core.groups import EACH, Groups
from jaxnorm.methods import Method, Row
from jaxnorm.methods._row import as_method
from jaxnorm.probe import NormRow, NormTable


def kind_of(layer: Any) -> str:
    """The name under which Flax knows a layer, also where it is one's own subclass of it."""
    names = [c.__name__ for c in type(layer).__mro__]
    kinds = ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
    return next((name for name in names if name in kinds), names[0])


def channel_axes(layer: Any, rank: int) -> tuple[int, ...]:
    """The axes of the channels, from the front."""
    names = ("channel_axis", "axis", "feature_axes")
    axes = next((getattr(layer, name) for name in names if hasattr(layer, name)), -1)
    return axes_of(axes, (1,) * rank)


def method_of(layer: Any, x_shape: Shape) -> Method:
    """The method of a layer, for x of this shape."""
    if hasattr(layer, "method"):
        return as_method(layer.method)
    kind = kind_of(layer)
    sets = _sets(layer, kind, x_shape)
    groups = _groups(sets, x_shape, channel_axes(layer, len(x_shape)))
    row = Row(
        sets(x_shape) if groups is None else groups,
        mean=0 if kind == "RMSNorm" else None,
        epsilon=layer.epsilon,
    )
    if kind == "BatchNorm":
        return dataclasses.replace(row, momentum=layer.momentum)
    return dataclasses.replace(row, momentum=None) if row.pools_batch else row


def _sets(layer: Any, kind: str, x_shape: Shape) -> Callable[[Shape], Shape]:
    """The shape of the statistic of one of Flax's layers, by that of x."""

    def shape(x_shape: Shape) -> Shape:
        x: Any = jax.ShapeDtypeStruct(x_shape, np.float32)
        if kind == "BatchNorm":
            return _flax_rules.keep_axes(x, layer.axis)
        if kind == "InstanceNorm":
            return _flax_rules.instance_sets(layer, x)[0]
        if kind == "GroupNorm":
            return _flax_rules.group_sets(x, num_groups, layer.reduction_axes)[0]
        return _flax_rules.layer_sets(layer, x)[0]

    num_groups = getattr(layer, "num_groups", None) or 0
    if kind == "GroupNorm" and not num_groups:
        num_groups = x_shape[-1] // layer.group_size
    return shape


def _groups(
    sets: Callable[[Shape], Shape], x_shape: Shape, channel: tuple[int, ...]
) -> Groups | None:
    """One number per axis, where there is one axis of channels.

    They are read off an x of twice the size, in which no axis has size 1.
    """
    if len(channel) != 1 or channel == (0,):
        return None
    twice = tuple(2 * n for n in x_shape)
    batch, *rest = (EACH if k == n else k for k, n in zip(sets(twice), twice, strict=True))
    split = rest.pop(channel[0] - 1)
    if not rest:  # as positions would be, if there were any
        rest = [EACH if split == 1 and batch == EACH else 1]
    return Groups(batch, rest[0] if len(set(rest)) == 1 else tuple(rest), split)


def norm_row(
    path: str, layer: Any, name: str, x: Any, state: Mapping[str, Any], parameters: Any
) -> NormRow:
    """The row of one call of a layer.

    Args:
        path: of the layer.
        layer: of ours or Flax's own.
        name: of its class.
        x: shape and dtype of what is normalized.
        state: its running statistics, or their shapes and dtypes.
        parameters: scale and bias, likewise, or whatever has a number for each channel.
    """
    shape = tuple(x.shape)
    method, features = method_of(layer, shape), channel_axes(layer, len(shape))
    axes: Any = {"batch_axis": getattr(layer, "batch_axis", 0), "channel_axis": features[-1]}
    try:
        sets = method.sets(shape, **axes)
    except ValueError as error:
        raise ValueError(f"{name} at {path!r} cannot normalize its input: {error}") from error
    channels = math.prod(shape[i] for i in features)
    copies = next((math.prod(t.shape) // channels for t in parameters), 1)
    sent = [s.sent for s in sets]
    width = np.dtype(statistic_dtype(x.dtype)).itemsize
    return NormRow(
        path=path,
        layer=name,
        method=method,
        x_shape=shape,
        statistics=tuple(s.shape for s in sets),
        elements=min((math.prod(shape) // math.prod(s.shape) for s in sets), default=None),
        state_bytes=sum(math.prod(t.shape) * t.dtype.itemsize for t in state.values()),
        sent_bytes=None if None in sent or not sets else sum(sent) * width * copies,  # type: ignore[arg-type]
        copies=max(1, copies),
    )


looking = jax.make_user_context(0)
"""Where calls are looked for, JAX traces anew: a function that it has traced before would run
without calling a layer."""
TIMES = itertools.count(1)


class Calls:
    """Calls of layers by their paths, with the shape and dtype of what they normalize.

    Transformations such as scan and remat call a layer as often as they trace it; there a layer is
    one call for each shape. Elsewhere its second call is "path#1", and so on.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, Any, Any]] = {}
        self.trace = get_opaque_trace_state()

    def see(self, path: str, layer: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call of a layer, which has what it normalizes in its output's shape."""
        before = len(self._calls_of(path))
        y = call(*args, **kwargs)
        mine = self._calls_of(path)
        if len(mine) > before:  # of a class that calls that of its parent, or of what replaces it
            return y
        seen = jax.ShapeDtypeStruct(y.shape, y.dtype)
        repeated = get_opaque_trace_state() != self.trace and seen in mine
        if not repeated:
            self.found[f"{path}#{len(mine)}" if mine else path] = (path, layer, seen)
        return y

    def _calls_of(self, path: str) -> list[Any]:
        return [x for of, _, x in self.found.values() if of == path]


def run_abstractly(run: Callable[[Any], Any], arguments: Any) -> Any:
    """What `run` returns, as shapes and dtypes, for arguments of which arrays are not computed."""
    leaves, tree = jax.tree.flatten(arguments)
    traced = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    def filled(arrays: list[Any]) -> Any:
        values = dict(zip(traced, arrays, strict=True))
        return run(jax.tree.unflatten(tree, [values.get(i, t) for i, t in enumerate(leaves)]))

    with looking(next(TIMES)):
        return jax.eval_shape(filled, [leaves[i] for i in traced])


def table(rows: list[NormRow], looked_for: tuple[type, ...]) -> NormTable:
    """The table, which is not empty."""
    if not rows:
        names = ", ".join(t.__name__ for t in looked_for)
        raise ValueError(
            f"the model calls no normalization. Expected one of {names}; layers of your own are "
            "seen if they are subclasses of these."
        )
    return NormTable(tuple(rows))
