"""Variables of an nnx layer, and what every layer does once it knows its sets."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes, initializers
from flax.typing import Dtype, Initializer
from jax import lax
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_flag
from jaxnorm._core.devices import check_named
from jaxnorm._core.ghosts import GhostUpdate
from jaxnorm._core.groups import Specification
from jaxnorm._core.moments import Moments, as_array
from jaxnorm._core.state import init_running, serving
from jaxnorm._flax_rules import Axes
from jaxnorm._frame import State
from jaxnorm._layers import Activation, CallOptions, Running, StateOptions
from jaxnorm._population import POPULATION

zeros, ones = initializers.zeros_init(), initializers.ones_init()
promote_dtype = dtypes.promote_dtype
Metadata = Mapping[str, Any]
NONE: Metadata = MappingProxyType({})


class Layer(nnx.Module):
    """Parameters of a layer, and what every layer does once it knows its sets."""

    if TYPE_CHECKING:  # attributes are the arguments of a constructor, see _construct

        def __getattr__(self, name: str) -> Any: ...

    # what a class has no option for
    has_bias: bool = True
    use_bias: bool = False
    use_fast_variance: bool = True
    batch_axis: int = 0
    correction: int = 0
    ghost_update: GhostUpdate = "pooled"

    def _construct(self, options: dict[str, Any]) -> None:
        """Keep a constructor's arguments as attributes and make scale and bias, in this order, as
        Flax does."""
        options = {
            name: value for name, value in options.items() if name not in ("self", "__class__")
        }
        rngs = options.pop("rngs")
        made = {
            name: (options.pop(f"{name}_init", zeros), options.pop(f"{name}_metadata", NONE))
            for name in ("scale", "bias")
        }
        for name, value in options.items():
            setattr(self, name, value)
        check_named(self.axis_name, self.axis_index_groups)
        for name, (init, metadata) in made.items():
            if not getattr(self, f"use_{name}"):
                setattr(self, name, nnx.data(None))
                continue
            value = init(rngs.params(), (self.num_features,), self.param_dtype)
            value = value - 1 if name == "scale" and self.unit_offset else value
            setattr(self, name, nnx.Param(value, **metadata))

    def _parameter(
        self, name: str, given: ArrayLike | None, x: jax.Array, axes: Axes
    ) -> jax.Array | None:
        """Scale or bias: the layer's own, or what was given in its place at the call."""
        own = getattr(self, name, None)
        if given is not None and own is not None:
            raise ValueError(
                f"{name} was given at the call, but the layer has its own. Expected one of the "
                f"two: construct it with use_{name}=False."
            )
        if own is None:
            return None if given is None else jnp.asarray(given)
        features = _flax_rules.feature_shape(x, axes)
        value = own[...]
        value = value + 1 if name == "scale" and self.unit_offset else value
        return value.reshape(features) if value.size == math.prod(features) else value

    def _apply(
        self,
        x: jax.Array,
        groups: Specification,
        given: tuple[ArrayLike | None, ArrayLike | None],
        feature_axes: Axes,
        mask: ArrayLike | None,
        activation: Activation | None,
        *,
        mean: Literal[0] | None = None,
        running: Running | None = None,
    ) -> jax.Array:
        scale, bias = (
            self._parameter(name, t, x, feature_axes)
            for name, t in zip(("scale", "bias"), given, strict=True)
        )
        old = () if running is None else (self.mean[...], self.var[...])
        if self.promote_dtype is promote_dtype:
            dtype = _flax_rules.output_dtype(x, *old, scale, bias, dtype=self.dtype)
        else:
            affine = (scale, bias) if self.has_bias else (scale,)
            x, *promoted = self.promote_dtype((x, *old, *affine), dtype=self.dtype)
            statistics, (scale, bias) = promoted[: len(old)], (*promoted[len(old) :], bias)[:2]
            if running is not None and running.use and not running.update:
                running = running.with_values(
                    *(t.reshape(running.moments.mean.shape) for t in statistics)
                )
            dtype = _flax_rules.output_dtype(x, scale, bias, dtype=self.dtype)
        y, new = _layers.apply(
            _flax_rules.wide_enough(x, dtype),
            groups,
            mean=mean,
            scale=scale,
            bias=bias,
            epsilon=self.epsilon,
            dtype=dtype,
            running=running,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            use_fast_variance=self.use_fast_variance,
            activation=activation,
            batch_axis=self.batch_axis,
            channel_axis=feature_axes,
        )
        if new is not None:
            population = running.population if running is not None else None
            if population is not None:
                self.calls[...] = self.calls[...] + 1
            for name in ("count", "mean", "var"):
                if (value := getattr(new, name)) is not None:
                    variable = getattr(
                        self, population if name == "count" and population is not None else name
                    )
                    # A variable may be a reference shared with the outside, which must not keep a
                    # tracer of a derivative.
                    variable[...] = lax.stop_gradient(
                        value.reshape(variable.shape).astype(variable.dtype)
                    )
        return y


class StatefulLayer(Layer):
    """A layer that may keep running statistics."""

    # what nnx.view sets
    update_running_average: bool | None = None
    example_weight: ArrayLike | None = None

    def _make_running(self, shape: Shape, counted: bool = False) -> None:
        complex_mean = self.dtype is not None and jnp.issubdtype(self.dtype, jnp.complexfloating)
        first = init_running(
            shape, dtype=jnp.complex64 if complex_mean else jnp.float32, counted=counted
        )
        self.mean, self.var = nnx.BatchStat(first.mean), nnx.BatchStat(first.var)
        if counted:
            self.count = nnx.BatchStat(first.count)

    def _running(
        self,
        x: jax.Array,
        shape: Shape,
        statistic: Shape,
        use: bool | None,
        update: bool | None,
        **options: Any,
    ) -> Running:
        """The running statistics in the shape that serves x, and what the flags ask for."""
        use = self._uses_running(use)
        population = self._population()
        count = getattr(self, population or "count", None)
        count = None if count is None else count[...]
        # a count of None is no count
        state = Moments(count, self.mean[...], self.var[...])  # type: ignore[reportArgumentType]
        state = serving(state, shape, statistic, x.shape)
        update = self.update_running_average if update is None else update
        update = _layers.whether_to_update(use, update)
        more = {"ghost_update": self.ghost_update, "population": population}
        return Running(state, use, update, self.momentum, self.correction, **more, **options)

    def _population(self) -> str | None:
        return next((name for name in POPULATION if hasattr(self, name)), None)

    def _uses_running(self, use: bool | None) -> bool:
        use = self.use_running_average if use is None else use
        if use is None:
            raise ValueError(
                f"No `use_running_average` argument was provided to {type(self).__name__}. Got "
                "None from the constructor and at the call; expected True or False from one of "
                "them, or from nnx.view(model, use_running_average=...)."
            )
        return check_flag(use, "use_running_average")

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
        options = {
            "use_running_average": use_running_average,
            "update_running_average": update_running_average,
            "example_weight": example_weight,
        }
        for name, value in options.items():
            if value is not None:
                setattr(self, name, value)

    def _weight(self, given: ArrayLike | None, use: bool) -> ArrayLike | None:
        """Of an example at inference: from the call, or the layer's."""
        return self.example_weight if given is None and use else given


class Function(StatefulLayer):
    """A layer whose method is a function: `function(x, state, train=, ...)` or, without state,
    `function(x, ...)`.

    `state(C)` is the state before the first step; its arrays are variables of the layer,
    `nnx.BatchStat`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        state: Callable[[int], State] | None = None,
        use_running_average: bool | None = False,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        unit_offset: bool = False,
        batch_axis: int = 0,
        channel_axis: int = -1,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ):
        first = {} if state is None else state(num_features)
        self._state = tuple(first)
        for name, value in first.items():
            setattr(self, name, nnx.BatchStat(value))
        options = {
            name: value
            for name, value in locals().items()
            if name not in ("state", "first", "name", "value")
        }
        self._construct(options)

    def _run(
        self,
        x: ArrayLike,
        function: Callable[..., Any],
        options: CallOptions | StateOptions,
        *,
        use_running_average: bool | None = None,
    ) -> jax.Array:
        _layers.check_call(options)
        x = as_array(x)
        scale, bias = (
            self._parameter(name, options.get(name), x, self.channel_axis)
            for name in ("scale", "bias")
        )
        old = {name: getattr(self, name)[...] for name in self._state}
        dtype = _flax_rules.output_dtype(x, *old.values(), scale, bias, dtype=self.dtype)
        arguments = {
            "scale": scale,
            "bias": bias,
            "epsilon": self.epsilon,
            "weights": options.get("mask"),
            "activation": options.get("activation"),
            "dtype": dtype,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            "batch_axis": self.batch_axis,
            "channel_axis": self.channel_axis,
        }
        x = _flax_rules.wide_enough(x, dtype)
        if not self._state:
            return function(x, **arguments)
        use = self._uses_running(use_running_average)
        _layers.only_rows(self._weight(None, use), type(self).__name__)
        update = options.get("update_running_average")
        update = self.update_running_average if update is None else update
        update = _layers.whether_to_update(use, update)
        y, new = _layers.run(function, x, old, use, update, arguments)
        for name in self._state if update else ():
            getattr(self, name)[...] = lax.stop_gradient(new[name])
        return y
