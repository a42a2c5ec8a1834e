"""One layer for every method."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.axes import Shape
from jaxnorm._core.groups import Groups
from jaxnorm._core.moments import as_array
from jaxnorm._layers import Activation
from jaxnorm.methods import Method
from jaxnorm.methods._method import State
from jaxnorm.methods._row import as_method
from jaxnorm.nnx._in_front import check_in_front, in_front
from jaxnorm.nnx._variables import (
    NONE,
    Metadata,
    StatefulLayer,
    ones,
    promote_dtype,
    state_dtype,
    zeros,
)


class Tap(nnx.Variable):
    """A variable to differentiate by, and to replace by its gradient.

    See `methods.moving_average_norm`.
    """


class Observation(nnx.Intermediate):
    """What a layer stores of its method's observations under `nnx.capture(model, Observation)`.

    For `methods.domain_batch_norm` it is the `distance` of each example from the domain, (N,).
    """


class Norm(StatefulLayer):
    """Any method as a layer.

        y, state = method.apply(x, state, ...)

    The layer holds what the method remembers in variables `nnx.BatchStat` of the names of its
    state, such as `mean` and `var`, (C,), for batch norm; and what it learns in `nnx.Param`:
    `scale` and `bias`, (C,), and the parameters of the method by their names. Methods that remember
    nothing ignore `use_running_average`. The epsilon and the momentum are the method's.

    At the call the layer also takes the options of its method: `rmax=` of `batch_renorm`, `domain=`
    of `domain_batch_norm`, `example_weight=` of rows of the table at inference. Under
    `nnx.capture(model, Observation)` it stores what the method observes. A parameter that is
    replaced by its gradient is a `Tap`, as in the second example.

    Args:
        num_features: channels, the size of scale and bias.
        method: a value of `jaxnorm.methods`, such as `methods.group_norm(32)`, or `Groups`.
        layer: the layer in front, for methods that work on it (`cross_iteration_norm` and, with a
            centralized kernel, `moving_average_norm`): `nnx.Conv` or `nnx.Linear` with
            use_bias=False and num_features outputs.
        use_running_average: normalize with the running statistics; the call takes precedence.
        dtype: of the output; None promotes input, statistics and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        inits: initializers of what the method learns, by name.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        promote_dtype: Flax's hook to cast input, statistics and parameters; its default changes no
            statistics here.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.
        x_shape: shape of an input, where the state belongs to one image size; any number of
            examples.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: axes that do not split, running statistics of another shape, `x_shape` missing,
            a layer in front with a bias or for a method that does not work on it, `inits` of
            another name.

    Example:
        >>> from jaxnorm import methods
        >>> layer = Norm(16, methods.batch_group_norm(4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 16))).shape, layer.mean.shape
        ((2, 8, 8, 16), (4,))

    Example: a step of training with a tap.
        >>> import optax
        >>> rngs = nnx.Rngs(0)
        >>> conv = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        >>> layer = Norm(16, methods.moving_average_norm(), layer=conv, rngs=rngs)
        >>> optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)
        >>> @nnx.jit
        ... def step(layer, optimizer, x):
        ...     loss = lambda layer: jnp.sin(layer(x)).sum()
        ...     gradients = nnx.grad(loss, argnums=nnx.DiffState(0, (nnx.Param, Tap)))(layer)
        ...     params, taps = nnx.split_state(gradients, nnx.Param, Tap)
        ...     optimizer.update(layer, params)
        ...     nnx.update(layer, taps)
        >>> step(layer, optimizer, jax.random.normal(jax.random.key(1), (4, 8, 8, 3)))
        >>> layer.tap.shape, int(layer.step[...])
        ((16,), 1)
    """

    def __init__(
        self,
        num_features: int,
        method: Method | Groups,
        *,
        layer: nnx.Module | None = None,
        use_running_average: bool | None = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        inits: Mapping[str, Initializer] = NONE,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        unit_offset: bool = False,
        batch_axis: int = 0,
        channel_axis: int = -1,
        x_shape: Shape | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ):
        self._construct(locals(), leave_out=("inits", "x_shape"))
        self.method = as_method(method)
        first = self._first_state(x_shape)
        self._names = tuple(first)
        for name, value in first.items():
            setattr(self, name, nnx.BatchStat(value))
        for name, value, init in _layers.initializers(self.method, inits, num_features):
            if init is None:
                setattr(self, name, Tap(jnp.asarray(value)))
            else:
                setattr(self, name, nnx.Param(init(rngs.params(), value.shape, param_dtype)))

    def _first_state(self, x_shape: Shape | None) -> State:
        method, options = self.method, {}
        if self.layer is not None:
            options = check_in_front(method, self.layer, self.num_features)
        if x_shape is not None:
            options |= {"batch_axis": self.batch_axis, "channel_axis": self.channel_axis}
        elif method.keeps_positions(self.num_features):
            raise ValueError(
                f"running statistics of {method} keep positions apart. Got x_shape=None; expected "
                "the shape of an input, any number of examples."
            )
        shape = (1, self.num_features) if x_shape is None else x_shape
        return method.any_batch().init(shape, dtype=state_dtype(self.dtype), **options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_running_average: bool | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
        **options: Any,
    ) -> jax.Array:
        """Normalize x.

        Args:
            x: with examples and channels; input of the layer in front where there is one.
            use_running_average: normalize with the running statistics.
            mask: broadcasts against x and says what counts, or how much.
            update_running_average: update the state; None does where it is not used.
            scale: in place of the layer's own, with `use_scale=False`: (C,), (N, C), or of x's rank
                and broadcasting against x.
            bias: likewise.
            activation: applied to the output, and recomputed in the backward pass.
            **options: of the method.
        """
        method, x = self.method, as_array(x)
        learned = method.parameters(self.num_features)
        _layers.check_call(method, options, learned)
        options |= {name: getattr(self, name)[...] for name in learned}
        if self.layer is not None:
            x, more = in_front(
                method, self.layer, _flax_rules.wide_enough(x, x.dtype), self.channel_axis
            )
            options |= more
        y = self._call_with_state(
            method,
            x,
            self.channel_axis,
            use_running_average=use_running_average,
            update_running_average=update_running_average,
            mask=mask,
            scale=scale,
            bias=bias,
            activation=activation,
            **options,
        )
        # Elsewhere nnx would keep what it is given, and warn.
        if hasattr(self, "__captures__"):
            state = self._state(method)
            seen = _layers.observations(self, method, x, state, options, mask)
            for name, value in seen.items():
                self.sow(Observation, name, value)
        return y
