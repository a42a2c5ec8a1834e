"""The variables of a linen layer, and one call of its method with them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_flag
from jaxnorm._core.devices import check_named
from jaxnorm._flax_rules import Axes
from jaxnorm.methods import Method
from jaxnorm.methods._method import State

zeros, ones = initializers.zeros, initializers.ones


def call(
    module: Any,
    method: Method,
    x: jax.Array,
    feature_axes: Axes,
    *,
    first: State | None = None,
    mask: ArrayLike | None = None,
    use_running_average: bool | None = None,
    update_running_average: bool | None = None,
    **options: Any,
) -> jax.Array:
    """What every layer does: its variables, the dtype of the output, and the method.

    `first` is the state before the first step; its arrays are variables of the collection
    batch_stats.
    """
    state = _state(module, method, first or {}, x.shape)
    features = _flax_rules.feature_shape(x, feature_axes)
    for name in ("scale", "bias"):
        own = _scale_or_bias(module, name, features)
        options[name] = _layers.own_or_given(name, own, options.get(name))
    check_named(*_layers.named_axes(module).values())
    if not module.is_initializing():  # which happens outside of the map that has the named axis
        options |= _layers.named_axes(module)
    use = update = False
    if state:
        use = nn.merge_param("use_running_average", module.use_running_average, use_running_average)
        check_flag(use, "use_running_average")
        update = _layers.whether_to_update(use, update_running_average)
        update = update and not module.is_initializing()
    y, new = _layers.run(
        module,
        method,
        x,
        {name: variable.value for name, variable in state.items()},
        use,
        update,
        mask=mask,
        dtype=_flax_rules.output_dtype(x, options["scale"], options["bias"], dtype=module.dtype),
        channel_axis=feature_axes,
        **options,
    )
    if update:
        for name, variable in state.items():
            variable.value = new[name]
    return y


def _state(
    module: Any, method: Method, first: State, x_shape: Shape
) -> dict[str, nn.Variable[jax.Array]]:
    """The variables of the state by name, and those that it may have beside.

    They are looked at before the parameters: theirs is the better message where x has another
    number of channels.
    """
    names = [n for n in method.also_in_state if module.has_variable("batch_stats", n)]
    state = {name: module.variable("batch_stats", name) for name in names}
    for name, value in first.items():
        state[name] = module.variable("batch_stats", name, jnp.asarray, value)
        if jnp.shape(state[name].value) != value.shape:
            raise ValueError(
                f"running statistics of shape {jnp.shape(state[name].value)} do not fit x of shape "
                f"{x_shape}, for which {name} has shape {value.shape}. State belongs to the number "
                "of channels, and where it keeps positions apart to the image size, with which it "
                "was made."
            )
    return state


def _scale_or_bias(module: Any, name: str, shape: Shape) -> jax.Array | None:
    if not getattr(module, f"use_{name}", False):
        return None
    init = getattr(module, f"{name}_init")
    if name == "scale" and module.unit_offset:
        return 1 + module.param(name, lambda *args: init(*args) - 1, shape, module.param_dtype)
    return module.param(name, init, shape, module.param_dtype)


def learned(module: Any, method: Method, num_channels: int) -> dict[str, jax.Array]:
    """What a method learns beside scale and bias: parameters of the layer."""
    values = {}
    for name, value, init in _layers.initializers(method, module.inits or {}, num_channels):
        if init is not None:
            values[name] = module.param(name, init, value.shape, module.param_dtype)
        # At inference the collection may be left out.
        elif module.is_initializing() or module.has_variable(OVERWRITE_WITH_GRADIENT, name):
            values[name] = module.variable(OVERWRITE_WITH_GRADIENT, name, jnp.asarray, value).value
    return values


def state_dtype(module: Any, x: jax.Array) -> Any:
    """The dtype of running means.

    It is complex where x or the output is, else float32, or what Flax's field says.
    """
    promoted = [module.param_dtype] if module.use_scale or module.use_bias else []
    dtypes = [x.dtype, *(promoted if module.dtype is None else [module.dtype])]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return jnp.complex64
    return jnp.float32 if getattr(module, "force_float32_reductions", True) else module.param_dtype
