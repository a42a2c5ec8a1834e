"""Momentum Batch Normalization as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.linen._call import Layer, call_function
from jaxnorm.momentum import init_momentum_batch_norm, momentum_batch_norm


class MomentumBatchNorm(Layer, kw_only=True):
    """Batch normalization with the batch blended into running statistics first:
    `momentum.momentum_batch_norm`.

        y = (x - train_mean) / sqrt(train_var + epsilon) * scale + bias

    The collection `batch_stats` holds `train_mean` and `train_var`, with which training normalizes,
    and `mean` and `var` of inference. The weight of the old training statistics, lambda, is an
    argument of the call, which training needs: a number or traced scalar, see
    `schedules.train_momentum_schedule`.

    Args:
        momentum: tau, weight of the old inference statistics per update: see
            `schedules.inference_momentum`.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, training without `train_momentum`,
            running statistics of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = MomentumBatchNorm()
        >>> x = jnp.ones((4, 8, 8, 3))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, train_momentum=0.5, mutable="batch_stats"
        ... )
        >>> sorted(updates["batch_stats"])
        ['mean', 'train_mean', 'train_var', 'var']

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020; see
        `momentum.momentum_batch_norm`.
    """

    momentum: float = 0.99

    @nn.compact
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
        state = init_momentum_batch_norm
        return call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
