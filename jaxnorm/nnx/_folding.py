"""Norms of a whole nnx model folded into the layers before them."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm import _flax_rules, _layers, _pairs, folding, methods
from jaxnorm._core.axes import Shape
from jaxnorm._layers import Activation
from jaxnorm.nnx._flax_batch_norm import BatchNorm
from jaxnorm.nnx._norm import Norm

Model = TypeVar("Model", bound=nnx.Module)


class FoldedNorm(nnx.Module):
    """What is left of a norm that was folded into the layer before it.

    It keeps the dtype of the norm's output, and applies the activation it is called with.
    """

    dtype: Any = None

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        activation: Activation | None = None,
        **options: Any,
    ) -> jax.Array:
        """x, in the norm's output dtype, and activated."""
        x = x.astype(self.dtype)
        return x if activation is None else activation(x)


def fold_norms(model: Model, *example: Any, forward: Callable[..., Any] | None = None) -> Model:
    """Fold norms that use running statistics into the layers before them, in a whole model.

    A norm is folded where its input is exactly the output of a `Conv`, `ConvTranspose` or `Linear`
    and nothing else uses that output, as read from the traced program, and nothing else uses or
    holds the layer's parameters (tied weights); all others stay, such as norms whose statistics
    depend on the position. Flax's own `BatchNorm` is folded too. The result is equal up to
    rounding. Variables keep their metadata, and a new bias has the kernel's sharding of its
    outputs.

    Args:
        model: in inference, such as `nnx.view(model, use_running_average=True)`.
        *example: inputs, arrays or `jax.ShapeDtypeStruct`; nothing is computed with them.
        forward: (model, *inputs) -> outputs, an inference call. None calls the model.

    Returns:
        A copy in which folded norms are `FoldedNorm`, without variables, and the layers before them
        have other kernels and a bias.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Sequential(
        ...     nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), BatchNorm(4, rngs=nnx.Rngs(0))
        ... )
        >>> model = nnx.view(model, use_running_average=True)
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> folded = fold_norms(model, x)
        >>> type(folded.layers[1]).__name__, folded(x).shape
        ('FoldedNorm', (1, 8, 8, 4))

    Reference:
        See `folding.fold`.
    """
    run = forward or (lambda model, *inputs: model(*inputs))
    probe, outputs = nnx.clone(model), {}
    for path, module in _modules(probe).items():
        _probe(module, path, outputs)
    graph, state = nnx.split(probe)

    def trace(state: Any, *inputs: Any) -> Any:
        traced = nnx.merge(graph, state)
        for _, module in nnx.iter_modules(traced):
            if isinstance(module, _Probe):
                object.__setattr__(module, "_first", _values(module))
        return run(traced, *inputs)

    program = jax.make_jaxpr(trace)(state, *example)
    leaves, structure = jax.tree.flatten(state)
    uses = _modules(
        nnx.merge(graph, structure.unflatten(map(np.asarray, _pairs.uses(program)[: len(leaves)])))
    )
    copy = nnx.clone(model)
    modules = _modules(copy)
    holders = Counter(
        id(t)
        for module in modules.values()
        for t in vars(module).values()
        if isinstance(t, nnx.Variable)
    )
    for norm, layer in _pairs.pairs(program).items():
        own = [t for t in vars(modules[layer]).values() if isinstance(t, nnx.Variable)]
        if all(holders[id(t)] == 1 for t in own) and all(
            n <= 1 for n in _values(uses[layer]).values()
        ):
            _fold(modules[layer], modules[norm], *outputs[norm])
    return copy


def _modules(model: Any) -> dict[str, Any]:
    """All modules of a model, each once."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _fold(layer: Any, norm: Any, x_shape: Shape, dtype: Any) -> None:
    """Change a layer and its norm in place."""
    method = _method(norm)
    output_axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    scale, shift, bias = (
        None if t is None else t[...] for t in (norm.scale, norm.bias, layer.bias)
    )
    kernel, bias = folding.fold(
        layer.kernel[...],
        bias,
        _layers.moments_to_fold(method, _statistics(norm), x_shape),
        scale=scale + 1 if scale is not None and getattr(norm, "unit_offset", False) else scale,
        shift=shift,
        epsilon=getattr(method, "epsilon", 0.0),
        output_axis=output_axis,
    )
    layer.kernel[...] = kernel
    if layer.bias is not None:
        layer.bias[...] = bias
    else:
        layer.bias, layer.use_bias = nnx.Param(bias), True
        layer.bias.set_metadata(
            layer.bias.get_metadata() | _sharding_of_outputs(layer.kernel, output_axis)
        )
    for name in [name for name in vars(norm) if not name.startswith("_")]:
        delattr(norm, name)
    object.__setattr__(norm, "__class__", FoldedNorm)
    norm.dtype = dtype


def _sharding_of_outputs(kernel: Any, output_axis: int) -> dict[str, Any]:
    """The metadata of a bias that says how it is sharded: as the outputs of its kernel."""
    metadata = kernel.get_metadata()
    found = {name: metadata[name] for name in ("mesh", "sharding_rules") if name in metadata}
    sharding = metadata.get("out_sharding")
    axis = output_axis % kernel[...].ndim

    def entry(spec: Any) -> Any:
        return spec[axis] if axis < len(spec) else None

    if isinstance(sharding, NamedSharding):
        of_outputs = NamedSharding(sharding.mesh, PartitionSpec(entry(sharding.spec)))
    elif isinstance(sharding, PartitionSpec):
        of_outputs = PartitionSpec(entry(sharding))
    elif isinstance(sharding, tuple | list):
        of_outputs = (entry(sharding),)
    else:
        return {}
    return found | {"out_sharding": of_outputs}


class _Probe:
    """A module of the copy that is traced: it marks what it takes or gives.

    Its class is made for it alone.
    """

    __slots__ = ()  # so that an object may change to such a class

    def _is_own(self) -> bool:
        """Whether variables are those of the model.

        They are not where something made them on the way, as in a scan.
        """
        first: dict[str, Any] = getattr(self, "_first", {})
        return bool(first) and all(
            getattr(self, name)[...] is value for name, value in first.items()
        )


def _probe(module: Any, name: str, outputs: dict[str, Any]) -> None:
    """Let a module that can be of a pair mark what it takes or gives."""
    of = type(module)

    def layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = of.__call__(self, *args, **kwargs)
        return _pairs.mark(y, _pairs.LAYER, name) if self._is_own() else y

    def norm(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_constant(self, x, *args, **kwargs) and self._is_own():
            x = _pairs.mark(x, _pairs.NORM, name)
        y = of.__call__(self, x, *args, **kwargs)
        outputs[name] = y.shape, y.dtype
        return y

    if of in (nnx.Conv, nnx.ConvTranspose, nnx.Linear) and _flax_rules.is_plain(module):
        call = layer
    elif isinstance(module, nnx.BatchNorm | BatchNorm | Norm) and isinstance(
        getattr(module, "mean", None), nnx.BatchStat
    ):
        call = norm
    else:
        return
    object.__setattr__(module, "__class__", type(of.__name__, (of, _Probe), {"__call__": call}))


def _values(module: Any) -> dict[str, Any]:
    """The arrays of a module's own variables."""
    return {
        name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Variable)
    }


def _is_constant(
    module: Any, x: Any, use_running_average: bool | None = None, **options: Any
) -> bool:
    """Whether this call multiplies and shifts each channel by constants of the variables."""
    use = module.use_running_average if use_running_average is None else use_running_average
    set_options = {
        name: getattr(module, name, None) for name in ("update_running_average", "example_weight")
    }
    options = set_options | {name: value for name, value in options.items() if value is not None}
    axis = module.channel_axis if isinstance(module, Norm) else module.axis
    if not _layers.is_constant(x, axis, use, options) or getattr(module, "batch_axis", 0):
        return False
    method = _method(module)
    return _layers.moments_to_fold(method, _statistics(module), x.shape) is not None


def _method(norm: Any) -> Any:
    """The method of a norm, Flax's own among them."""
    return norm.method if isinstance(norm, Norm) else methods.batch_norm(epsilon=norm.epsilon)


def _statistics(norm: Any) -> dict[str, jax.Array]:
    names = ("mean", "var") if not isinstance(norm, Norm) else norm._names
    return {name: getattr(norm, name)[...] for name in names}
