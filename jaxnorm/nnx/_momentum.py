"""Momentum Batch Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.momentum import init_momentum_batch_norm, momentum_batch_norm
from jaxnorm.nnx._call import Function


class MomentumBatchNorm(Function):
    """Batch normalization with the batch blended into running statistics first:
    `momentum.momentum_batch_norm`.

        y = (x - train_mean) / sqrt(train_var + epsilon) * scale + bias

    Running statistics are `train_mean` and `train_var`, with which training normalizes, and `mean`
    and `var` of inference. The weight of the old training statistics, lambda, is an argument of the
    call, which training needs: a number or traced scalar, see `schedules.train_momentum_schedule`.

    Args:
        num_features: channels.
        momentum: tau, weight of the old inference statistics per update: see
            `schedules.inference_momentum`.
        Others: as `Norm`.

    Raises:
        ValueError: training without `train_momentum`, running statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = MomentumBatchNorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3)), train_momentum=0.5).shape, layer.train_mean.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020; see
        `momentum.momentum_batch_norm`.
    """

    def __init__(self, num_features: int, *, momentum: float = 0.99, **options: Any):
        self.momentum = momentum
        super().__init__(num_features, state=init_momentum_batch_norm, **options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        train_momentum: ArrayLike | None = None,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(
            momentum_batch_norm, train_momentum=train_momentum, momentum=self.momentum
        )
        return self._run(x, function, options, use_running_average=use_running_average)
