"""Norms of a whole linen model folded into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import core
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm import _flax_rules, _layers, _pairs
from jaxnorm.linen._norm import Norm

OF_NORMS = ("params", "batch_stats")


class Folded(NamedTuple):
    """What `fold_norms` returns.

    Args:
        forward: as the one given, for the new variables.
        variables: without the folded norms; the layers before them have other kernels, and all have
            a bias.
        pairs: path of each folded norm -> path of its layer.
    """

    forward: Callable[..., Any]
    variables: dict[str, Any]
    pairs: dict[str, str]


def fold_norms(forward: Callable[..., Any], variables: Mapping[str, Any], *example: Any) -> Folded:
    """Fold norms that use running statistics into the layers before them, in a whole model.

    A norm is folded where its input is exactly the output of a `Conv`, `ConvTranspose` or `Dense`
    and nothing else uses that output or the layer's parameters (tied weights), as read from the
    traced program; all others stay, such as norms whose statistics depend on the position. Flax's
    own `BatchNorm` is folded too. The result is equal up to rounding. Its variables also fit a
    model that is written without these norms and with `use_bias=True`. Boxed parameters, such as
    `nn.with_partitioning` makes, stay boxed, and a new bias has the kernel's names for its outputs.

    Args:
        forward: (variables, *inputs) -> outputs, an inference call of the model.
        variables: of the model.
        *example: inputs, arrays or `jax.ShapeDtypeStruct`; nothing is computed with them.

    Returns:
        `forward`, `variables` and `pairs`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchNorm
        >>> class Model(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.relu(
        ...             BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), use_bias=False)(x))
        ...         )
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> variables = Model().init(jax.random.key(0), x)
        >>> forward, variables, pairs = fold_norms(Model().apply, variables, x)
        >>> pairs, sorted(variables["params"])
        ({'BatchNorm_0': 'Conv_0'}, ['Conv_0'])
        >>> jax.jit(forward)(variables, x).shape
        (1, 8, 8, 4)

    Reference:
        See `folding.fold`.
    """
    tree = core.unfreeze(dict(variables))
    modules: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def trace(tree: Any, *inputs: Any) -> Any:
        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if context.method_name != "__call__" or not args:
                return call(*args, **kwargs)
            name = "/".join(module.scope.path)
            is_layer = _is_layer(module) and _owns(module, tree, "params")
            is_norm = _is_norm(module, *args, **kwargs) and _owns(module, tree, *OF_NORMS)
            if is_norm:
                args = _pairs.mark(args[0], _pairs.NORM, name), *args[1:]
            y = call(*args, **kwargs)
            if is_layer or is_norm:
                modules[name], outputs[name] = module, jax.typeof(y)
            return _pairs.mark(y, _pairs.LAYER, name) if is_layer else y

        with nn.intercept_methods(interceptor):
            return forward(tree, *inputs)

    pairs = _pairs.pairs(trace, tree, *example, prefix="params/")
    biased = set()
    for norm, layer in pairs.items():
        boxed = _at(tree, "params", layer)
        of_norm = _at(tree, "params", norm) | _at(tree, "batch_stats", norm)
        kernel, bias = _layers.fold(
            modules[layer],
            modules[norm],
            nn.meta.unbox(boxed),
            nn.meta.unbox(of_norm),
            outputs[norm].shape,
        )
        if "bias" in boxed:
            boxed["bias"] = nn.meta.replace_boxed(boxed["bias"], bias)
        else:
            biased.add(layer)
            old, boxed["bias"] = boxed["kernel"], bias
            if isinstance(old, nn.Partitioned):  # with the name of the outputs
                names = _layers.of_outputs(old.names, modules[layer], kernel)
                boxed["bias"] = old.replace(value=bias, names=names)
        boxed["kernel"] = nn.meta.replace_boxed(boxed["kernel"], kernel)
    left = {
        path: t
        for path, t in flatten_dict(tree, keep_empty_nodes=True).items()
        if path[0] not in OF_NORMS or "/".join(path[1:-1]) not in pairs
    }
    return Folded(
        _forward(forward, {norm: outputs[norm].dtype for norm in pairs}, biased),
        {name: t for name, t in unflatten_dict(left).items() if t},
        pairs,
    )


def _forward(
    forward: Callable[..., Any], norms: Mapping[str, Any], biased: set[str]
) -> Callable[..., Any]:
    """`forward` in which these norms do nothing.

    These layers have a bias that they do not know of.
    """

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        called = context.method_name == "__call__"
        name = "/".join(context.module.scope.path) if called else ""
        if name in norms:
            x, activation = jnp.asarray(args[0]).astype(norms[name]), kwargs.get("activation")
            return x if activation is None else activation(x)
        y = call(*args, **kwargs)
        if name in biased:
            bias = nn.meta.unbox(context.module.scope.get_variable("params", "bias"))
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + bias.shape)
        return y

    def folded(variables: Any, *inputs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return forward(variables, *inputs)

    return folded


def _is_layer(module: Any) -> bool:
    return type(module) in (nn.Conv, nn.ConvTranspose, nn.Dense) and _flax_rules.is_plain(module)


def _is_norm(module: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether this call multiplies and shifts each channel by constants of the variables."""
    if not isinstance(module, nn.BatchNorm | Norm) or "batch_stats" not in module.variables:
        return False
    values = {**module.variables.get("params", {}), **module.variables["batch_stats"]}
    return _layers.is_constant(module, nn.meta.unbox(values), *args, **kwargs)


def _owns(module: Any, tree: Any, *collections: str) -> bool:
    """Whether a module's variables are those of the tree.

    They are not where something made them on the way, as in a scan.
    """
    seen = {name: module.variables.get(name, {}) for name in collections}
    own = {name: _at(tree, name, "/".join(module.scope.path)) for name in collections}
    return [id(t) for t in jax.tree.leaves(own)] == [id(t) for t in jax.tree.leaves(seen)]


def _at(tree: Any, collection: str, name: str) -> dict[str, Any]:
    """The variables of a module, by its path."""
    node = tree.get(collection, {})
    for part in name.split("/") if name else ():
        node = node.get(part, {}) if isinstance(node, Mapping) else {}
    return node
