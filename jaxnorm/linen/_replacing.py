"""The normalizations of a linen model replaced by others."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen as nn

from jaxnorm import _replacing
from jaxnorm.linen._norm import Norm
from jaxnorm.linen._probe import NORMS
from jaxnorm.methods import Method
from jaxnorm.probe import _calls

OURS: set[int] = set()
"""Layers that took the place of others, by id, which no other context replaces."""

replacing = jax.make_user_context(None)
"""Where layers are replaced JAX traces anew what it has traced with others."""


@contextlib.contextmanager
def replace_norms(
    method: _replacing.Choice, *, layers: type | tuple[type, ...] = NORMS
) -> Iterator[dict[str, Method]]:
    """Inside of a context, every normalization that a model calls is `Norm` of another method.

    The model is initialized and applied there. Flax's own layers are replaced as those of this
    library. Each keeps its path, initializers, axis, dtypes, named axes and `use_running_average`;
    epsilon and momentum are the method's. Its scale and bias have the names and shapes of before,
    so the `params` of a model serve where the method learns nothing else; `batch_stats` serve where
    the method remembers the same, as batch norms of any kind do. A model that was written for
    layers without running statistics does not say whether to use them: `call_norms_with` does.

    Args:
        method: a value of `jaxnorm.methods`, or a function (path, layer) -> the method of a layer,
            or None to leave it.
        layers: the classes that are replaced, with their subclasses: by default all normalizations
            of jaxnorm and Flax.

    Returns:
        A context manager, `as` a dict from the path of a layer, such as "Block_0/BatchNorm_0", to
        its method, which fills as layers are called.

    Raises:
        TypeError: method is no method, `layers` that are not classes.
        ValueError: when a layer is called, where the model would not be what it seems: a method
            that carries its activation or loses one, needs an option at the call or a layer in
            front, or does not split the channels; a layer with several axes of channels or with a
            call of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import methods
        >>> model = nn.Sequential([nn.Dense(8), nn.LayerNorm()])
        >>> x = jnp.ones((4, 3))
        >>> variables = model.init(jax.random.key(0), x)
        >>> with replace_norms(methods.group_norm(2)) as replaced:
        ...     y = model.apply(variables, x)
        >>> replaced
        {'layers_1': Row(Groups(batch=EACH, spatial=1, channel=2))}

    Reference:
        A tool of this library; no paper is followed.
    """
    types = _calls.check_layers(layers)
    replaced: dict[str, Method] = {}

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        is_norm = isinstance(module, types) and id(module) not in OURS
        if context.method_name != "__call__" or not is_norm:
            return call(*args, **kwargs)
        path = "/".join(module.path)
        own = _replacing.chosen(method, path, module)
        if own is None:
            return call(*args, **kwargs)
        new = _norm(module, path, own, args[0] if args else kwargs["x"])
        replaced[path] = own
        OURS.add(id(new))
        try:
            return new(*args, **kwargs)
        finally:
            OURS.discard(id(new))

    if isinstance(method, Method) or not callable(method):
        _replacing.chosen(method, "", None)  # refuses what is no method before anything runs
    with replacing((method, types)), nn.intercept_methods(interceptor):
        yield replaced


def _norm(module: Any, path: str, method: Method, x: Any) -> Norm:
    """A layer that has the variables of a module, and another method."""
    axis = _replacing.channel_axis_of(module)
    channels = x.shape[-1 if axis is None else axis]
    reasons = list(_replacing.reasons_against(module, method, channels, positions=False))
    _replacing.refuse({f"{type(module).__name__} at {path!r}": reasons})
    names = (
        "use_running_average", "dtype", "param_dtype", "use_scale", "scale_init", "bias_init",
        "axis_name", "axis_index_groups", "unit_offset", "batch_axis", "inits",
    )  # fmt: skip
    fields: Any = {name: getattr(module, name) for name in names if hasattr(module, name)}
    use_bias = getattr(module, "use_bias", False)  # RMSNorm has none
    return Norm(method, use_bias=use_bias, channel_axis=axis, parent=module.scope, **fields)  # type: ignore[arg-type]
