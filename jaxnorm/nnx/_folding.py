"""Norms of a whole nnx model folded into the layers before them."""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxnorm import _flax_rules, _layers, _pairs
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
    graph, state = nnx.split(model)
    outputs: dict[str, Any] = {}

    def trace(state: Any, *inputs: Any) -> Any:
        traced = nnx.merge(graph, state)
        values = [_probe(module, name, outputs) for name, module in _modules(traced).items()]
        y = traced(*inputs) if forward is None else forward(traced, *inputs)
        for own in values:  # JAX keeps the probes' classes, which shall not keep what was traced
            own.clear()
        return y

    pairs = _pairs.pairs(trace, state, *example)
    copy = nnx.clone(model)
    modules = _modules(copy)
    holders = Counter(id(t) for module in modules.values() for t in _variables(module).values())
    for norm, layer in pairs.items():
        if all(holders[id(t)] == 1 for t in _variables(modules[layer]).values()):
            _fold(modules[layer], modules[norm], outputs[norm])
    return copy


def _modules(model: Any) -> dict[str, Any]:
    """All modules of a model, each once."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


def _variables(module: Any) -> dict[str, Any]:
    """The variables of a module, without those of modules in it."""
    return {name: t for name, t in vars(module).items() if isinstance(t, nnx.Variable)}


def _values(module: Any) -> dict[str, jax.Array]:
    """The arrays of `_variables`."""
    return {name: t[...] for name, t in _variables(module).items()}


def _fold(layer: Any, norm: Any, y: Any) -> None:
    """Change a layer and its norm in place."""
    kernel, bias = _layers.fold(layer, norm, _values(layer), _values(norm), y.shape)
    layer.kernel[...] = kernel
    if layer.bias is not None:
        layer.bias[...] = bias
    else:
        layer.bias, layer.use_bias = nnx.Param(bias), True
        layer.bias.set_metadata(layer.bias.get_metadata() | _sharding_of_outputs(layer))
    for name in [name for name in vars(norm) if not name.startswith("_")]:
        delattr(norm, name)
    object.__setattr__(norm, "__class__", FoldedNorm)
    norm.dtype = y.dtype


def _sharding_of_outputs(layer: Any) -> dict[str, Any]:
    """The metadata of a bias that says how it is sharded: as the outputs of the layer's kernel."""
    metadata = layer.kernel.get_metadata()
    sharding = metadata.get("out_sharding")
    spec = getattr(sharding, "spec", sharding)
    if not isinstance(spec, PartitionSpec | tuple | list):
        return {}
    of_outputs: Any = _layers.of_outputs(spec, layer, layer.kernel[...])
    if isinstance(spec, PartitionSpec):
        of_outputs = PartitionSpec(*of_outputs)
    if isinstance(sharding, NamedSharding):
        of_outputs = NamedSharding(sharding.mesh, of_outputs)
    found = {name: metadata[name] for name in ("mesh", "sharding_rules") if name in metadata}
    return found | {"out_sharding": of_outputs}


def _probe(module: Any, name: str, outputs: dict[str, Any]) -> dict[str, jax.Array]:
    """Let a module that can be of a pair mark what it takes or gives, by a class of its own.

    Only while its variables are those that it has here, which are returned. They are not where
    something made them on the way, as in a scan.
    """
    of, own = type(module), _values(module)

    def is_own(module: Any) -> bool:
        return all(getattr(module, name)[...] is value for name, value in own.items())

    def layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = of.__call__(self, *args, **kwargs)
        return _pairs.mark(y, _pairs.LAYER, name) if is_own(self) else y

    def norm(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        if is_own(self) and _layers.is_constant(self, own, x, *args, **kwargs):
            x = _pairs.mark(x, _pairs.NORM, name)
        y = of.__call__(self, x, *args, **kwargs)
        outputs[name] = jax.typeof(y)
        return y

    is_layer = of in (nnx.Conv, nnx.ConvTranspose, nnx.Linear) and _flax_rules.is_plain(module)
    if is_layer or (isinstance(module, nnx.BatchNorm | BatchNorm | Norm) and "mean" in own):
        call = {"__call__": layer if is_layer else norm}
        object.__setattr__(module, "__class__", type(of.__name__, (of,), call))
    return own
