"""Variables of a linen layer, and what every layer does once it knows its sets."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax.typing import ArrayLike

from jaxnorm import _layers
from jaxnorm._groups import Shape, Specification
from jaxnorm._layers import Activation, Axes, Running
from jaxnorm._moments import Moments
from jaxnorm._running import init_running, serving

zeros, ones = initializers.zeros, initializers.ones


class State:
    """The variables of collection batch_stats: in their own shape, and in the statistic's shape that serves x."""

    def __init__(self, module: Any, x: jax.Array, shape: Shape, statistic: Shape):
        complex_input = jnp.iscomplexobj(x) or jnp.issubdtype(jnp.dtype(module.dtype or x.dtype), jnp.complexfloating)
        real = jnp.float32 if getattr(module, "force_float32_reductions", True) else module.param_dtype
        dtype = jnp.complex64 if complex_input else real
        first = init_running(shape, dtype=dtype, counted=getattr(module, "debias", False))
        self.variables = {
            name: module.variable("batch_stats", name, lambda value=value: value)
            for name, value in (("count", first.count), ("mean", first.mean), ("var", first.var))
            if value is not None
        }
        self.module, self.shape = module, shape
        values: dict[str, Any] = {"count": None} | {name: variable.value for name, variable in self.variables.items()}
        self.moments = serving(Moments(**values), shape, statistic, x.shape)

    def running(self, use: bool, update: bool | None) -> Running:
        update = (not use if update is None else update) and not self.module.is_initializing()
        return Running(self.moments, use, update, self.module.momentum, getattr(self.module, "correction", 0))

    def store(self, new: Moments) -> None:
        for name, variable in self.variables.items():
            variable.value = getattr(new, name).reshape(self.shape)


def _parameter(module: Any, name: str, given: ArrayLike | None, shape: Shape) -> jax.Array | None:
    """Scale or bias: the layer's own, or what was given in its place at the call."""
    own = getattr(module, f"use_{name}", False)
    if given is not None:
        if own:
            raise ValueError(
                f"{name} was given at the call, but the layer has its own. Expected one of the two: construct it with "
                f"use_{name}=False."
            )
        return jnp.asarray(given)
    if not own:
        return None
    init = getattr(module, f"{name}_init")
    if name == "scale" and module.unit_offset:
        return 1 + module.param(name, lambda *args: init(*args) - 1, shape, module.param_dtype)
    return module.param(name, init, shape, module.param_dtype)


def call(
    module: Any,
    x: jax.Array,
    groups: Specification,
    given: tuple[ArrayLike | None, ArrayLike | None],
    feature_axes: Axes,
    mask: ArrayLike | None,
    activation: Activation | None,
    *,
    mean: Literal[0] | None = None,
    state: State | None = None,
    running: Running | None = None,
) -> jax.Array:
    """What every layer does once it knows its sets: parameters, dtype, the core, and the new running statistics."""
    features = _layers.feature_shape(x, feature_axes)
    scale, bias = (_parameter(module, name, t, features) for name, t in zip(("scale", "bias"), given, strict=True))
    dtype = _layers.output_dtype(x, scale, bias, dtype=module.dtype)
    initializing = module.is_initializing()  # outside the map in which a named axis exists
    y, new = _layers.apply(
        _layers.wide_enough(x, dtype),
        groups,
        mean=mean,
        scale=scale,
        bias=bias,
        epsilon=module.epsilon,
        dtype=dtype,
        running=running,
        mask=mask,
        axis_name=None if initializing else module.axis_name,
        axis_index_groups=None if initializing else module.axis_index_groups,
        use_fast_variance=getattr(module, "use_fast_variance", True),
        activation=activation,
        batch_axis=getattr(module, "batch_axis", 0),
        channel_axis=feature_axes,
    )
    if state is not None and new is not None:
        state.store(new)
    return y
