"""Moving Average Batch Normalization as a layer."""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import feature_shape
from jaxnorm._layers import StateOptions
from jaxnorm.kernels import centralize_kernel
from jaxnorm.linen._call import Layer, call_function
from jaxnorm.linen._in_front import in_front
from jaxnorm.moving_average import init_moving_average, moving_average_norm


class MovingAverageNorm(Layer):
    """Division by a root mean square averaged over steps: `moving_average.moving_average_norm`.

    The collection `batch_stats` holds its state; `_overwrite_with_gradient` holds `tap`, (C,). As
    the name of the collection says, differentiate by it and replace it by its gradient.
    `flax.training.train_state.TrainState` does so with params that are a dict of the collections
    `params` and `_overwrite_with_gradient`. How gradients by it are summed over devices stands at
    the function.

    Args:
        layer: `nn.Conv` or `nn.Dense` with use_bias=False, to be applied first, with its kernel
            less its mean for each output channel: nothing else subtracts a mean. None normalizes x.
            Its kernel is that of a child of the module in which it was made, such as `Conv_0`, or
            else of this layer's child `layer`.
        window: K, batches over which to average.
        momentum: weight of the old running mean square per update.
        Others: as `Norm`.

    Raises:
        ValueError: a layer with a bias, training without a tap, `use_running_average` given nowhere
            or twice.

    Example: a step of training, here without an optimizer.
        >>> import jax, jax.numpy as jnp
        >>> layer = MovingAverageNorm(nn.Conv(16, (3, 3), use_bias=False))
        >>> x = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
        >>> trained = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> state = {"batch_stats": trained.pop("batch_stats")}
        >>> def loss(trained, state):
        ...     y, state = layer.apply(
        ...         trained | state, x, use_running_average=False, mutable=["batch_stats"]
        ...     )
        ...     return jnp.sin(y).sum(), state
        >>> gradients, state = jax.jit(jax.grad(loss, has_aux=True))(trained, state)
        >>> params = jax.tree.map(lambda p, g: p - 0.1 * g, trained["params"], gradients["params"])
        >>> trained = {
        ...     "params": params,
        ...     "_overwrite_with_gradient": gradients["_overwrite_with_gradient"],
        ... }
        >>> jax.tree.map(jnp.shape, trained["_overwrite_with_gradient"])
        {'tap': (16,)}

    Reference:
        Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020,
        arXiv:2001.06838; see `moving_average.moving_average_norm`.
    """

    layer: nn.Module | None = None
    window: int = 16
    momentum: float = 0.98

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        average_from: ArrayLike = 100,
        correct_from: ArrayLike = 1001,
        rmax: ArrayLike = 5.0,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Apply the layer and normalize; the options are those of `Norm`."""
        x = as_array(x)
        if self.layer is not None:
            kernel, layer = in_front(self.layer, x)
            x = layer(x, centralize_kernel(kernel))
        tap = None
        if self.is_initializing() or self.has_variable(OVERWRITE_WITH_GRADIENT, "tap"):
            features = feature_shape(x, self.channel_axis)
            tap = self.variable(
                OVERWRITE_WITH_GRADIENT, "tap", jnp.zeros, features, jnp.float32
            ).value
        schedule = {"average_from": average_from, "correct_from": correct_from, "rmax": rmax}
        function = partial(moving_average_norm, tap=tap, momentum=self.momentum, **schedule)
        state = partial(init_moving_average, window=self.window)
        return call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
