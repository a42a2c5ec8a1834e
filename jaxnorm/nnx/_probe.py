"""What goes into the normalizations of an nnx model and comes out of them."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

from jaxnorm.nnx._variables import Layer
from jaxnorm.probe import NormCall, _calls

NORMS = (Layer, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)
"""Those of jaxnorm, which are all of one class, and Flax's own."""


def record_norms(
    forward: Callable[..., Any], *, layers: type | tuple[type, ...] = NORMS
) -> Callable[..., tuple[Any, dict[str, NormCall]]]:
    """A function that also returns what went into each normalization and came out of it.

    The outputs of `forward`, and what it changes in the model, stay what they are. `nnx.jit` and
    `nnx.grad(has_aux=True)` may be around the function, and `jax.jit` where it is around `forward`.

    Args:
        forward: `forward(model, *args)`, such as `lambda model, x: model(x)`. Inside of it the
            model may not be copied, and no layer may be under a transformation of its own, such as
            `nnx.remat`, `nnx.scan`, `nnx.jit` or `nnx.grad`, from which values cannot leave.
        layers: the classes that are recorded, with their subclasses: by default all normalizations
            of jaxnorm and Flax.

    Returns:
        `recorded(model, *args, **kwargs)`, which returns the outputs and a dict from the path of a
        layer, such as "blocks/0/norm", to its `probe.NormCall`, in the order of calls. "" is a
        model that is a layer itself. The second call of one layer is "path#1", and so on.

    Raises:
        TypeError: `layers` that are not classes, a model that is not an `nnx.Module`.
        ValueError: when called: no such layer is called, or one inside of a transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs))
        >>> recorded = nnx.jit(record_norms(lambda model, x: model(x)))
        >>> y, calls = recorded(model, jnp.ones((2, 4)))
        >>> {path: call.x.shape for path, call in calls.items()}
        {'layers/1': (2, 3)}

    Reference:
        A tool of this library; no paper is followed.
    """
    types = _calls.check_layers(layers)

    def recorded(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, NormCall]]:
        keep, calls = _calls.recorder()
        return _tapped(forward, keep, types, model, args, kwargs), calls

    return recorded


def alter_norms(
    forward: Callable[..., Any],
    alter: Callable[[str, jax.Array], jax.Array],
    *,
    layers: type | tuple[type, ...] = NORMS,
) -> Callable[..., Any]:
    """A function in which the outputs of normalizations are replaced, as by noise.

    Args:
        forward: see `record_norms`.
        alter: (path, y) -> what takes the place of a layer's output y, of its shape and dtype.
        layers: see `record_norms`.

    Returns:
        `altered(model, *args, **kwargs)`, which returns what `forward` does.

    Raises:
        TypeError: as for `record_norms`.
        ValueError: when called: as for `record_norms`, or an output of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.LayerNorm(2, rngs=nnx.Rngs(0))
        >>> altered = alter_norms(lambda model, x: model(x), lambda path, y: -y)
        >>> altered(model, jnp.array([[1.0, 3.0]])).round(2).tolist()
        [[1.0, -1.0]]

    Reference:
        How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604, for noise behind
        normalizations; see `probe.noise`.
    """
    types = _calls.check_layers(layers)

    def altered(model: Any, *args: Any, **kwargs: Any) -> Any:
        return _tapped(forward, _calls.alterer(alter), types, model, args, kwargs)

    return altered


_watched: contextvars.ContextVar[tuple[_calls.Tap, dict[int, str]] | None] = contextvars.ContextVar(
    "_watched", default=None
)


@functools.cache
def _watched_class(of: type) -> type:
    """A subclass whose calls are shown to the tap of the moment, one for each class of layers."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own, now = functools.partial(of.__call__, self), _watched.get()
        if now is None:
            return own(*args, **kwargs)
        tap, paths = now
        return tap(self, paths.get(id(self)), own, args, kwargs)

    return type(of.__name__, (of,), {"__call__": functools.wraps(of.__call__)(call)})


@contextlib.contextmanager
def _watching(tap: _calls.Tap, layers: dict[str, Any]) -> Iterator[None]:
    """Inside of this context the layers of a model have other classes, and afterwards their own."""
    classes = {path: type(layer) for path, layer in layers.items()}
    token = _watched.set((tap, {id(layer): path for path, layer in layers.items()}))
    try:
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", _watched_class(classes[path]))
        yield
    finally:
        _watched.reset(token)
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", classes[path])


def _tapped(
    forward: Callable[..., Any],
    visit: _calls.Visit,
    types: tuple[type, ...],
    model: Any,
    args: Any,
    kwargs: Any,
) -> Any:
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"the first argument is {type(model).__name__}; expected the nnx.Module that forward "
            "calls, as in forward(model, x)."
        )
    layers = {
        "/".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, types)
    }
    tap = _calls.Tap(visit)
    with _watching(tap, layers):
        return _calls.visited(tap, types, lambda: forward(model, *args, **kwargs))
