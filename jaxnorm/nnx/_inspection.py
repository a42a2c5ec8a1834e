"""The normalizations of an nnx model as a table."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxnorm import _inspection
from jaxnorm.nnx._probe import NORMS
from jaxnorm.probe import NormTable


def tabulate_norms(
    model: nnx.Module, *args: Any, forward: Callable[..., Any] | None = None, **kwargs: Any
) -> NormTable:
    """Every normalization of a model: what shares statistics, and how many elements do.

    Each row of the table is a call of a layer, with its path, method, groups, the shape of its
    statistics, the elements that share one, the bytes of what it remembers, and the bytes that a
    device adds up with others in a step of training where the layer is synchronized. Statistics of
    fewer than 16 elements are marked. Flax's own layers are in it too. Nothing is computed, no
    memory is taken, and the model stays as it is.

    Args:
        model: of nnx.
        *args: what the model is called with: arrays or `jax.ShapeDtypeStruct`, with the batch that
            one device, or all devices under jit, normalize together.
        forward: (model, *args, **kwargs) -> anything. None calls the model.
        **kwargs: likewise.

    Returns:
        The table, a sequence of `probe.NormRow` that prints as text, and in notebooks as HTML.

    Raises:
        TypeError: model is not an `nnx.Module`.
        ValueError: the model calls no normalization, or x does not split into groups.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(10, 32, rngs=rngs), nnx.BatchNorm(32, rngs=rngs))
        >>> table = tabulate_norms(model, jax.ShapeDtypeStruct((64, 10), jnp.float32))
        >>> print(table)
        path      layer      method      groups      statistic  elements  state   sent
        --------  ---------  ----------  ----------  ---------  --------  -----  -----
        layers/1  BatchNorm  batch_norm  1, 1, EACH  (1,32)           64  256 B  512 B
        1 normalization; 256 B of state; 512 B sent by a device in a step, where ...

    Reference:
        A tool of this library; no paper is followed.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is {type(model).__name__}; expected an nnx.Module.")
    graph, state = nnx.split(model)
    calls: Any = None

    def run(arguments: Any) -> None:
        nonlocal calls
        calls = _inspection.Calls()
        state, args, kwargs = arguments
        copy: Any = nnx.merge(graph, state)
        for path, layer in _norms(copy).items():
            object.__setattr__(layer, "__class__", _seen_class(type(layer), path, calls))
        (copy if forward is None else functools.partial(forward, copy))(*args, **kwargs)

    _inspection.run_abstractly(run, (state, args, kwargs))
    layers, rows = _norms(model), []
    for path, (own, _, x) in calls.found.items():
        layer = layers[own]
        values = {n: t.get_value() for n, t in vars(layer).items() if isinstance(t, nnx.Variable)}
        stats = {n: values[n] for n in values if isinstance(vars(layer)[n], nnx.BatchStat)}
        parameters = [values[n] for n in ("scale", "bias") if n in values]
        rows.append(
            _inspection.norm_row(
                path, layer, type(layer).__name__, x, stats if path == own else {}, parameters
            )
        )
    return _inspection.table(rows, NORMS)


def _norms(model: Any) -> dict[str, Any]:
    """The layers of a model that normalize, by their paths."""
    return {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, NORMS)
    }


def _seen_class(of: type, path: str, calls: _inspection.Calls) -> type:
    """A class of one layer and its copies, as scan makes them, whose calls are seen."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return calls.see(path, self, functools.partial(of.__call__, self), args, kwargs)

    return type(of.__name__, (of,), {"__call__": call})
