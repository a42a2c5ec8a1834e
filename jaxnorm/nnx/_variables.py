"""The variables of an nnx layer, and one call of its method with them."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.checks import check_flag
from jaxnorm._core.devices import check_named
from jaxnorm._flax_rules import Axes
from jaxnorm.methods import Method
from jaxnorm.methods._method import State

zeros, ones = initializers.zeros_init(), initializers.ones_init()
promote_dtype = dtypes.promote_dtype
Metadata = Mapping[str, Any]
NONE: Metadata = MappingProxyType({})


class Layer(nnx.Module):
    """Scale and bias of a layer, and one call of its method."""

    if TYPE_CHECKING:  # attributes are the arguments of a constructor, see _construct

        def __getattr__(self, name: str) -> Any: ...

    # what a class has no option for
    has_bias: bool = True
    use_bias: bool = False

    def _construct(self, options: dict[str, Any], leave_out: tuple[str, ...] = ()) -> None:
        """Keep a constructor's arguments as attributes, and make scale and bias.

        They are made in this order, as Flax does.
        """
        leave_out = ("self", "__class__", "rngs", *leave_out)
        for name, value in options.items():
            if name not in leave_out and not name.endswith(("_init", "_metadata")):
                setattr(self, name, value)
        check_named(self.axis_name, self.axis_index_groups)
        for name in ("scale", "bias"):
            if not getattr(self, f"use_{name}"):
                setattr(self, name, nnx.data(None))
                continue
            init, key = options[f"{name}_init"], options["rngs"].params()
            value = init(key, (self.num_features,), self.param_dtype)
            value = value - 1 if name == "scale" and self.unit_offset else value
            setattr(self, name, nnx.Param(value, **options[f"{name}_metadata"]))

    def _scale_or_bias(
        self, name: str, given: ArrayLike | None, x: jax.Array, axes: Axes
    ) -> jax.Array | None:
        """The layer's own, or what was given in its place at the call."""
        own = getattr(self, name, None)
        if own is not None:
            features = _flax_rules.feature_shape(x, axes)
            own = own[...] + 1 if name == "scale" and self.unit_offset else own[...]
            own = own.reshape(features) if own.size == math.prod(features) else own
        return _layers.own_or_given(name, own, given)

    def _call(
        self,
        method: Method,
        x: jax.Array,
        feature_axes: Axes,
        /,
        *,
        state: State | None = None,
        use: bool = False,
        update: bool = False,
        **options: Any,
    ) -> jax.Array:
        """What every layer does: the dtype of the output, the method, and what it remembers."""
        state = state or {}
        affine = [
            self._scale_or_bias(name, options.get(name), x, feature_axes)
            for name in ("scale", "bias")
        ]
        if self.promote_dtype is promote_dtype:
            dtype = _flax_rules.output_dtype(x, *state.values(), *affine, dtype=self.dtype)
        else:
            affine = affine if self.has_bias else affine[:1]
            x, *promoted = self.promote_dtype((x, *state.values(), *affine), dtype=self.dtype)
            statistics, affine = promoted[: len(state)], [*promoted[len(state) :], None][:2]
            if use and not update:
                state = dict(zip(state, statistics, strict=True))
            dtype = _flax_rules.output_dtype(x, *affine, dtype=self.dtype)
        options |= {"scale": affine[0], "bias": affine[1], "channel_axis": feature_axes}
        options |= _layers.named_axes(self)
        y, new = _layers.run(self, method, x, state, use, update, dtype=dtype, **options)
        for name in state if update else ():
            variable = getattr(self, name)
            # A variable may be a reference shared with the outside, which must not keep a tracer
            # of a derivative.
            variable[...] = lax.stop_gradient(new[name].astype(variable.dtype))
        return y


def state_dtype(dtype: Any) -> Any:
    """The dtype of running means, from that of the output."""
    is_complex = dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.complex64 if is_complex else jnp.float32


class StatefulLayer(Layer):
    """A layer that may remember."""

    _names: tuple[str, ...] = ()

    # what nnx.view sets
    update_running_average: bool | None = None
    example_weight: ArrayLike | None = None

    def _state(self, method: Method) -> State:
        """What the layer remembers, by `_names` and those that its state may have beside."""
        more = (n for n in method.also_in_state if n not in self._names and hasattr(self, n))
        return {name: getattr(self, name)[...] for name in (*self._names, *more)}

    def _call_with_state(
        self,
        method: Method,
        x: jax.Array,
        feature_axes: Axes,
        /,
        *,
        use_running_average: bool | None,
        update_running_average: bool | None,
        example_weight: ArrayLike | None = None,
        **options: Any,
    ) -> jax.Array:
        """`_call` with what the layer remembers, used and updated as it was asked.

        What was not asked at the call is the layer's.
        """
        if self._names:
            use = self.use_running_average if use_running_average is None else use_running_average
            if use is None:
                raise ValueError(
                    f"No `use_running_average` argument was provided to {type(self).__name__}. Got "
                    "None from the constructor and at the call; expected True or False from one of "
                    "them, or from nnx.view(model, use_running_average=...)."
                )
            check_flag(use, "use_running_average")
            if update_running_average is None:
                update_running_average = self.update_running_average
            update = _layers.whether_to_update(use, update_running_average)
            options |= {"state": self._state(method), "use": use, "update": update}
            if example_weight is None and use:
                example_weight = self.example_weight
            _layers.check_weighs_examples(method, example_weight)
        if example_weight is not None:
            options["example_weight"] = example_weight
        return self._call(method, x, feature_axes, **options)

    def set_view(
        self,
        use_running_average: bool | None = None,
        update_running_average: bool | None = None,
        example_weight: ArrayLike | None = None,
    ) -> None:
        """What `nnx.view` calls.

        Args:
            use_running_average: as at the call.
            update_running_average: as at the call.
            example_weight: as at the call, wherever running statistics are used.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_running_average is not None:
            self.update_running_average = update_running_average
        if example_weight is not None:
            self.example_weight = example_weight
