"""Variables of a linen layer, and what every layer does once it knows its sets."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _frame, _layers
from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_flag
from jaxnorm._core.devices import check_named
from jaxnorm._core.groups import Specification
from jaxnorm._core.moments import Moments, as_array
from jaxnorm._core.state import init_running, serving
from jaxnorm._flax_rules import Axes
from jaxnorm._layers import Activation, CallOptions, Running, StateOptions
from jaxnorm._population import POPULATION

zeros, ones = initializers.zeros, initializers.ones


class Layer(nn.Module, kw_only=True):
    """Fields of every layer that Flax does not have; what they mean stands at `Norm`."""

    use_running_average: bool | None = None
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    unit_offset: bool = False
    batch_axis: int = 0
    channel_axis: int = -1


class State:
    """The variables of collection batch_stats: in their own shape, and in the statistic's shape
    that serves x."""

    def __init__(self, module: Any, x: jax.Array, shape: Shape, statistic: Shape):
        complex_input = jnp.iscomplexobj(x) or jnp.issubdtype(
            jnp.dtype(module.dtype or x.dtype), jnp.complexfloating
        )
        real = (
            jnp.float32 if getattr(module, "force_float32_reductions", True) else module.param_dtype
        )
        dtype = jnp.complex64 if complex_input else real
        first = init_running(shape, dtype=dtype, counted=getattr(module, "debias", False))
        self.population = next(
            (name for name in POPULATION if module.has_variable("batch_stats", name)), None
        )
        self.variables = {
            name: module.variable("batch_stats", name, lambda value=value: value)
            for name, value in (("count", first.count), ("mean", first.mean), ("var", first.var))
            if value is not None
        }
        self.module, self.shape = module, shape
        values: dict[str, Any] = {"count": None} | {
            name: variable.value for name, variable in self.variables.items()
        }
        if self.population is not None:
            self.variables["count"] = module.variable("batch_stats", self.population)
            values["count"] = self.variables["count"].value
        self.moments = serving(Moments(**values), shape, statistic, x.shape)

    def running(self, use: bool, update: bool | None, **options: Any) -> Running:
        update = _layers.whether_to_update(use, update) and not self.module.is_initializing()
        more = {
            name: getattr(self.module, name)
            for name in ("correction", "ghost_update")
            if hasattr(self.module, name)
        }
        return Running(
            self.moments,
            use,
            update,
            self.module.momentum,
            population=self.population,
            **more,
            **options,
        )

    def store(self, new: Moments) -> None:
        for name, variable in self.variables.items():
            variable.value = getattr(new, name).reshape(self.shape)
        if self.population is not None:
            calls = self.module.variable("batch_stats", "calls")
            calls.value = calls.value + 1


def uses_running(module: Any, given: bool | None) -> bool:
    """Whether to normalize with the running statistics: said by the layer or by the call."""
    name = "use_running_average"
    return check_flag(nn.merge_param(name, module.use_running_average, given), name)


def device_axes(module: Any) -> dict[str, Any]:
    """Over which devices statistics are synchronized: none while the layer is initialized, which
    happens outside of the map that has the named axis."""
    check_named(module.axis_name, module.axis_index_groups)
    if module.is_initializing():
        return {"axis_name": None, "axis_index_groups": None}
    return {"axis_name": module.axis_name, "axis_index_groups": module.axis_index_groups}


def _parameter(module: Any, name: str, given: ArrayLike | None, shape: Shape) -> jax.Array | None:
    """Scale or bias: the layer's own, or what was given in its place at the call."""
    own = getattr(module, f"use_{name}", False)
    if given is not None:
        if own:
            raise ValueError(
                f"{name} was given at the call, but the layer has its own. Expected one of the "
                f"two: construct it with use_{name}=False."
            )
        return jnp.asarray(given)
    if not own:
        return None
    init = getattr(module, f"{name}_init")
    if name == "scale" and module.unit_offset:
        return 1 + module.param(name, lambda *args: init(*args) - 1, shape, module.param_dtype)
    return module.param(name, init, shape, module.param_dtype)


def channel_parameter(module: Layer, name: str, init: Initializer, x: ArrayLike) -> jax.Array:
    """A parameter with one number for each channel."""
    return module.param(
        name, init, _flax_rules.feature_shape(as_array(x), module.channel_axis), module.param_dtype
    )


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
    """What every layer does once it knows its sets: parameters, dtype, the core, and the new
    running statistics."""
    features = _flax_rules.feature_shape(x, feature_axes)
    scale, bias = (
        _parameter(module, name, t, features)
        for name, t in zip(("scale", "bias"), given, strict=True)
    )
    dtype = _flax_rules.output_dtype(x, scale, bias, dtype=module.dtype)
    y, new = _layers.apply(
        _flax_rules.wide_enough(x, dtype),
        groups,
        mean=mean,
        scale=scale,
        bias=bias,
        epsilon=module.epsilon,
        dtype=dtype,
        running=running,
        mask=mask,
        **device_axes(module),
        use_fast_variance=getattr(module, "use_fast_variance", True),
        activation=activation,
        batch_axis=getattr(module, "batch_axis", 0),
        channel_axis=feature_axes,
    )
    if state is not None and new is not None:
        state.store(new)
    return y


def call_function(
    module: Layer,
    x: ArrayLike,
    function: Callable[..., Any],
    options: CallOptions | StateOptions,
    *,
    state: Callable[[int], _frame.State] | None = None,
    use_running_average: bool | None = None,
) -> jax.Array:
    """What a layer does whose method is a function: `function(x, state, train=, ...)` or, without
    state, `function(x, ...)`.

    `state(C)` is the state before the first step; its arrays are variables of the collection
    `batch_stats`.
    """
    _layers.check_call(options)
    x = as_array(x)
    features = _flax_rules.feature_shape(x, module.channel_axis)
    scale, bias = (
        _parameter(module, name, options.get(name), features) for name in ("scale", "bias")
    )
    dtype = _flax_rules.output_dtype(x, scale, bias, dtype=module.dtype)
    arguments = {
        "scale": scale,
        "bias": bias,
        "epsilon": module.epsilon,
        "weights": options.get("mask"),
        "activation": options.get("activation"),
        "dtype": dtype,
        **device_axes(module),
        "batch_axis": module.batch_axis,
        "channel_axis": module.channel_axis,
    }
    x = _flax_rules.wide_enough(x, dtype)
    if state is None:
        return function(x, **arguments)
    use = uses_running(module, use_running_average)
    update = _layers.whether_to_update(use, options.get("update_running_average"))
    update = update and not module.is_initializing()
    variables = {
        name: module.variable("batch_stats", name, lambda t=t: t)
        for name, t in state(*features).items()
    }
    old = {name: variable.value for name, variable in variables.items()}
    y, new = _layers.run(function, x, old, use, update, arguments)
    if update:
        for name, variable in variables.items():
            variable.value = new[name]
    return y
