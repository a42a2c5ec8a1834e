"""Norms of a whole linen model folded into the layers before them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import core
from flax import linen as nn

from jaxnorm import _flax_rules, _layers, _pairs, folding, methods
from jaxnorm.linen._flax_batch_norm import BatchNorm
from jaxnorm.linen._norm import Norm
from jaxnorm.methods import Method
from jaxnorm.methods._row import as_method

Path = tuple[str, ...]


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
    layers: dict[str, dict[str, Any]] = {}
    norms: dict[str, dict[str, Any]] = {}

    def trace(tree: Any, *inputs: Any) -> Any:
        def interceptor(
            call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
        ) -> Any:
            module: Any = context.module
            if context.method_name != "__call__" or not args:
                return call(*args, **kwargs)
            name = "/".join(module.scope.path)
            if _is_layer(module) and _owns(module, tree, "params"):
                layers[name] = {
                    "output_axis": -2 if getattr(module, "transpose_kernel", False) else -1
                }
                return _pairs.mark(call(*args, **kwargs), _pairs.LAYER, name)
            if _is_norm(module, *args, **kwargs) and all(
                _owns(module, tree, name) for name in ("params", "batch_stats")
            ):
                y = call(_pairs.mark(args[0], _pairs.NORM, name), *args[1:], **kwargs)
                norms[name] = {
                    "method": _method(module),
                    "x_shape": y.shape,
                    "unit_offset": getattr(module, "unit_offset", False),
                    "dtype": y.dtype,
                }
                return y
            return call(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            return forward(tree, *inputs)

    program = jax.make_jaxpr(trace)(tree, *example)
    leaves, structure = jax.tree.flatten(tree)
    uses = structure.unflatten(_pairs.uses(program)[: len(leaves)])
    tied = {name for name in layers if max(jax.tree.leaves(_get(uses["params"], _path(name)))) > 1}
    pairs = {norm: layer for norm, layer in _pairs.pairs(program).items() if layer not in tied}
    dtypes = {norm: norms[norm]["dtype"] for norm in pairs}
    biased = set()
    for norm, layer in pairs.items():
        at, of = _path(layer), _path(norm)
        boxed, options = _get(tree["params"], at), norms[norm]
        parameters, affine, statistics = nn.meta.unbox(
            (boxed, _get(tree["params"], of), _get(tree["batch_stats"], of))
        )
        scale, method = affine.get("scale"), options["method"]
        kernel, bias = folding.fold(
            parameters["kernel"],
            parameters.get("bias"),
            _layers.moments_to_fold(method, statistics, options["x_shape"]),
            scale=scale + 1 if scale is not None and options["unit_offset"] else scale,
            shift=affine.get("bias"),
            epsilon=getattr(method, "epsilon", 0.0),
            **layers[layer],
        )
        tree["params"] = _without(tree["params"], of)
        tree["batch_stats"] = _without(tree["batch_stats"], of)
        if "bias" in boxed:
            boxed["bias"] = nn.meta.replace_boxed(boxed["bias"], bias)
        else:
            biased.add(layer)
            boxed["bias"] = _boxed_as_outputs(bias, boxed["kernel"], **layers[layer])
        boxed["kernel"] = nn.meta.replace_boxed(boxed["kernel"], kernel)
    return Folded(
        _forward(forward, dtypes, frozenset(biased)),
        {name: t for name, t in tree.items() if t},
        pairs,
    )


def _forward(
    forward: Callable[..., Any], norms: Mapping[str, Any], biased: frozenset[str]
) -> Callable[..., Any]:
    """`forward` in which these norms do nothing.

    These layers have a bias that they do not know of.
    """

    def interceptor(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module: Any = context.module
        name = "/".join(module.scope.path) if context.method_name == "__call__" else ""
        if name in norms:
            x = jax.numpy.asarray(args[0]).astype(norms[name])
            return kwargs["activation"](x) if kwargs.get("activation") is not None else x
        y = call(*args, **kwargs)
        if name not in biased:
            return y
        bias = nn.meta.unbox(module.scope.get_variable("params", "bias")).astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    def folded(variables: Any, *inputs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return forward(variables, *inputs)

    return folded


def _is_layer(module: Any) -> bool:
    return type(module) in (nn.Conv, nn.ConvTranspose, nn.Dense) and _flax_rules.is_plain(module)


def _method(module: Any) -> Method:
    """The method of a norm, Flax's own among them."""
    if isinstance(module, Norm):
        return as_method(module.method)
    return methods.batch_norm(epsilon=module.epsilon)


def _is_norm(module: Any, x: Any, use_running_average: bool | None = None, **options: Any) -> bool:
    """Whether this call multiplies and shifts each channel by constants of the variables."""
    if not isinstance(module, nn.BatchNorm | BatchNorm | Norm):
        return False
    use = module.use_running_average if use_running_average is None else use_running_average
    axis = module.channel_axis if isinstance(module, Norm) else module.axis
    if not _layers.is_constant(x, axis, use, options) or "batch_stats" not in module.variables:
        return False
    if getattr(module, "batch_axis", 0) != 0:  # which no layer in front has
        return False
    statistics = nn.meta.unbox(module.variables["batch_stats"])
    return _layers.moments_to_fold(_method(module), statistics, x.shape) is not None


def _owns(module: Any, tree: Any, collection: str) -> bool:
    """Whether a module's variables are those of the tree.

    They are not where something made them on the way, as in a scan.
    """
    own, seen = (
        _get(tree.get(collection, {}), module.scope.path),
        module.scope.variables().get(collection, {}),
    )
    if jax.tree.structure(own) != jax.tree.structure(seen):
        return False
    return all(a is b for a, b in zip(*map(jax.tree.leaves, (own, seen)), strict=True))


def _boxed_as_outputs(bias: jax.Array, kernel: Any, output_axis: int) -> Any:
    """A bias that the layer did not have, boxed as the kernel is, with the name of its outputs."""
    if not isinstance(kernel, nn.Partitioned):
        return bias
    names = dict(enumerate(kernel.names))
    return kernel.replace(value=bias, names=(names.get(output_axis % kernel.value.ndim),))


def _path(name: str) -> Path:
    return tuple(part for part in name.split("/") if part)


def _get(tree: Any, path: Path) -> dict[str, Any]:
    for name in path:
        tree = tree.get(name, {}) if isinstance(tree, Mapping) else {}
    return tree


def _without(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """The tree without what is at that path, nor what is then empty."""
    name, *rest = path
    inner = _without(tree[name], tuple(rest)) if rest and name in tree else None
    return {key: inner if key == name else t for key, t in tree.items() if key != name or inner}
