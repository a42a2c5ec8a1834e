"""What goes into the normalizations of a linen model and comes out of them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from jaxnorm.linen._norm import Norm
from jaxnorm.probe import NormCall, _calls

NORMS = (Norm, nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm, nn.LayerNorm, nn.RMSNorm)
"""`Norm`, and Flax's own, whose subclasses the other layers of jaxnorm are."""


def record_norms(
    forward: Callable[..., Any], *, layers: type | tuple[type, ...] = NORMS
) -> Callable[..., tuple[Any, dict[str, NormCall]]]:
    """A function that also returns what went into each normalization and came out of it.

    The outputs of `forward` stay what they are. The function is pure where `forward` is:
    `jax.jit`, `jax.grad(has_aux=True)` and `jax.vmap` may be around it.

    Args:
        forward: calls one or more models of linen, such as `model.apply`. Inside of it no layer may
            be under a transformation of its own, such as `nn.remat`, `nn.scan`, `jax.jit` or
            `jax.grad`, from which values cannot leave.
        layers: the classes that are recorded, with their subclasses: by default all normalizations
            of jaxnorm and Flax.

    Returns:
        `recorded(*args, **kwargs)`, which returns the outputs and a dict from the path of a layer,
        such as "Block_0/BatchNorm_0", to its `probe.NormCall`, in the order of calls. "" is a model
        that is a layer itself. The second call of one layer is "path#1", and so on.

    Raises:
        TypeError: `layers` that are not classes.
        ValueError: when called: no such layer is called, or one inside of a transformation.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(3), nn.LayerNorm(), nn.relu])
        >>> x = jnp.ones((2, 4))
        >>> variables = model.init(jax.random.key(0), x)
        >>> y, calls = jax.jit(record_norms(model.apply))(variables, x)
        >>> {path: call.x.shape for path, call in calls.items()}
        {'layers_1': (2, 3)}

    Reference:
        A tool of this library; no paper is followed.
    """
    types = _calls.check_layers(layers)

    def recorded(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, NormCall]]:
        keep, calls = _calls.recorder()
        return _tapped(forward, keep, types, args, kwargs), calls

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
        `altered(*args, **kwargs)`, which returns what `forward` does.

    Raises:
        TypeError: `layers` that are not classes.
        ValueError: when called: as for `record_norms`, or an output of another shape or dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nn.LayerNorm()
        >>> x = jnp.array([[1.0, 3.0]])
        >>> variables = model.init(jax.random.key(0), x)
        >>> altered = alter_norms(model.apply, lambda path, y: -y)
        >>> altered(variables, x).round(2).tolist()
        [[1.0, -1.0]]

    Reference:
        How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604, for noise behind
        normalizations; see `probe.noise`.
    """
    types = _calls.check_layers(layers)
    return lambda *args, **kwargs: _tapped(forward, _calls.alterer(alter), types, args, kwargs)


def _tapped(
    forward: Callable[..., Any],
    visit: _calls.Visit,
    types: tuple[type, ...],
    args: Any,
    kwargs: Any,
) -> Any:
    tap = _calls.Tap(visit)

    def interceptor(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, types):
            return call(*arguments, **options)
        return tap(module, "/".join(module.path), call, arguments, options)

    with nn.intercept_methods(interceptor):
        return _calls.visited(tap, types, lambda: forward(*args, **kwargs))
