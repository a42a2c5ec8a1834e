"""Moving Average Batch Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._layers import StateOptions
from jaxnorm.kernels import centralize_kernel
from jaxnorm.moving_average import init_moving_average, moving_average_norm
from jaxnorm.nnx._call import Function
from jaxnorm.nnx._in_front import check_in_front, in_front


class Tap(nnx.Variable):
    """A variable to differentiate by, and to replace by its gradient:
    `moving_average.moving_average_norm`."""


class MovingAverageNorm(Function):
    """Division by a root mean square averaged over steps: `moving_average.moving_average_norm`.

    Its state are variables `nnx.BatchStat`; `tap`, (C,), is a `Tap`: differentiate by it and
    replace it by its gradient, as in the example. How gradients by it are summed over devices
    stands at the function.

    Args:
        layer: `nnx.Conv` or `nnx.Linear` with use_bias=False, to be applied first, with its kernel
            less its mean for each output channel: nothing else subtracts a mean. Or the number of
            channels of x, to normalize x.
        window: K, batches over which to average.
        momentum: weight of the old running mean square per update.
        Others: as `Norm`.

    Raises:
        ValueError: a layer with a bias, statistics of another shape.

    Example: a step of training.
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> layer = MovingAverageNorm(nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs), rngs=rngs)
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

    Reference:
        Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020,
        arXiv:2001.06838; see `moving_average.moving_average_norm`.
    """

    def __init__(
        self, layer: nnx.Module | int, *, window: int = 16, momentum: float = 0.98, **options: Any
    ):
        if not isinstance(layer, int):
            check_in_front(layer)
        self.layer: Any = None if isinstance(layer, int) else layer
        self.momentum = momentum
        channels = layer if isinstance(layer, int) else self.layer.kernel.shape[-1]
        self.tap = Tap(jnp.zeros(channels, jnp.float32))
        super().__init__(channels, state=partial(init_moving_average, window=window), **options)

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
            kernel, layer = in_front(self.layer)
            x = layer(x, centralize_kernel(kernel))
        schedule = {"average_from": average_from, "correct_from": correct_from, "rmax": rmax}
        function = partial(
            moving_average_norm, tap=self.tap[...], momentum=self.momentum, **schedule
        )
        return self._run(x, function, options, use_running_average=use_running_average)
