"""One layer for every method."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.axes import single_axis
from jaxnorm._core.groups import Groups
from jaxnorm._core.moments import as_array
from jaxnorm._layers import Activation
from jaxnorm.linen._in_front import in_front
from jaxnorm.linen._variables import call, learned, ones, state_dtype, zeros
from jaxnorm.methods import Method
from jaxnorm.methods._row import as_method


class Norm(nn.Module):
    """Any method as a layer.

        y, state = method.apply(x, state, ...)

    The layer holds what the method remembers in the collection `batch_stats`, such as `mean` and
    `var`, (C,), for batch norm; and what it learns in `params`: `scale` and `bias`, (C,), and the
    parameters of the method by their names. Methods that remember nothing ignore
    `use_running_average`. The epsilon and the momentum are the method's.

    At the call the layer also takes the options of its method: `rmax=` of `batch_renorm`, `domain=`
    of `domain_batch_norm`, `example_weight=` of rows of the table at inference. With the collection
    `observations` mutable it stores what the method observes, such as how far each example is from
    the domain. A parameter that is replaced by its gradient, the `tap` of `moving_average_norm`,
    is in the collection `_overwrite_with_gradient`, which
    `flax.training.train_state.TrainState` treats so where its params are a dict of that collection
    and `params`.

    Args:
        method: a value of `jaxnorm.methods`, such as `methods.group_norm(32)`, or `Groups`.
        layer: the layer in front, for methods that work on it (`cross_iteration_norm` and, with a
            centralized kernel, `moving_average_norm`): `nn.Conv` or `nn.Dense` with use_bias=False.
            Its kernel is that of a child of the module in which it was made, such as `Conv_0`, or
            else of this layer's child `layer`.
        use_running_average: normalize with the running statistics; here or at the call, not both.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        inits: initializers of what the method learns, by name: `{"v": nn.initializers.zeros}`.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.

    Raises:
        TypeError: an option that the method does not take.
        ValueError: axes that do not split, `use_running_average` given nowhere or twice, running
            statistics of another shape, a layer in front with a bias or for a method that does not
            work on it, `inits` of another name.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import methods
        >>> layer = Norm(methods.batch_group_norm(4))
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 16)), use_running_average=True
        ... )
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'mean': (4,), 'var': (4,)}
        >>> layer = Norm(methods.batch_renorm(momentum=0.9))
        >>> x = jnp.ones((4, 8, 8, 3))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, rmax=1.5, dmax=0.5, mutable="batch_stats"
        ... )
        >>> jax.tree.map(jnp.shape, updates["batch_stats"])
        {'mean': (3,), 'std': (3,)}
    """

    method: Method | Groups
    layer: nn.Module | None = None
    use_running_average: bool | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    inits: Any = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    unit_offset: bool = False
    batch_axis: int = 0
    channel_axis: int = -1

    def __post_init__(self):
        if isinstance(self.inits, Mapping):  # so that the module has a hash
            object.__setattr__(self, "inits", FrozenDict(self.inits))
        super().__post_init__()

    @nn.compact
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
        method, x = as_method(self.method), as_array(x)
        of_init: Any = {"batch_axis": self.batch_axis, "channel_axis": self.channel_axis}
        channels = x.shape[single_axis(self.channel_axis, x.shape)]
        _layers.check_call(method, options, method.parameters(channels))
        if self.layer is not None:
            x, more, front = in_front(
                method, self.layer, _flax_rules.wide_enough(x, x.dtype), self.channel_axis
            )
            options |= more
            of_init |= front
        if self.is_initializing():  # any batch initializes, also one that ghosts do not divide
            method = method.any_batch()
        first = method.init(x.shape, dtype=state_dtype(self, x), **of_init)
        channels = x.shape[single_axis(self.channel_axis, x.shape)]
        options |= learned(self, method, channels)
        y = call(
            self,
            method,
            x,
            self.channel_axis,
            first=first,
            mask=mask,
            use_running_average=use_running_average,
            update_running_average=update_running_average,
            scale=scale,
            bias=bias,
            activation=activation,
            **options,
        )
        if self.is_mutable_collection("observations") and not self.is_initializing():
            state = {name: self.get_variable("batch_stats", name) for name in first}
            seen = _layers.observations(self, method, x, state, options, mask)
            for name, value in seen.items():
                self.sow("observations", name, value)
        return y
