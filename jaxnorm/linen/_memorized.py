"""Memorized Batch Normalization as a layer."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.linen._call import Layer, call_function
from jaxnorm.memorized import init_memorized_batch_norm, memorized_batch_norm


class MemorizedBatchNorm(Layer, kw_only=True):
    """Batch normalization with the statistics of the last batches as well:
    `memorized.memorized_batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with a weighted combination of the remembered statistics and the batch's own. The collection
    `batch_stats` holds `mean` and `var`, (K, C), and `count`, (C,). `memorized.double_forward` is
    the training step that goes with it.

    Args:
        memory_weights: K + 1 numbers, 0 or more: of the K remembered batches, oldest first, and of
            the batch itself.
        variance: "pool" for the variance of the batches' mixture, "blend" for the average of
            variances.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, fewer than two weights, running
            statistics of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = MemorizedBatchNorm(memory_weights=(1, 1, 1))
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((4, 8, 8, 3)), use_running_average=True
        ... )
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'count': (3,), 'mean': (2, 3), 'var': (2, 3)}

    Reference:
        Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947. A
        reconstruction; see `memorized.memorized_batch_norm`.
    """

    memory_weights: Sequence[float]
    variance: Literal["pool", "blend"] = "pool"

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(
            memorized_batch_norm, memory_weights=self.memory_weights, variance=self.variance
        )
        state = partial(init_memorized_batch_norm, memory_size=len(self.memory_weights) - 1)
        return call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
