"""Memorized Batch Normalization as a layer."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Unpack

import jax
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.memorized import init_memorized_batch_norm, memorized_batch_norm
from jaxnorm.nnx._call import Function


class MemorizedBatchNorm(Function):
    """Batch normalization with the statistics of the last batches as well:
    `memorized.memorized_batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with a weighted combination of the remembered statistics and the batch's own. Running statistics
    are `mean` and `var`, (K, C), and `count`, (C,). `memorized.double_forward` is the training step
    that goes with it.

    Args:
        num_features: channels.
        memory_weights: K + 1 numbers, 0 or more: of the K remembered batches, oldest first, and of
            the batch itself.
        variance: "pool" for the variance of the batches' mixture, "blend" for the average of
            variances.
        Others: as `Norm`.

    Raises:
        ValueError: fewer than two weights, running statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = MemorizedBatchNorm(3, memory_weights=(1, 1, 1), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.mean.shape
        ((4, 8, 8, 3), (2, 3))

    Reference:
        Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947. A
        reconstruction; see `memorized.memorized_batch_norm`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        memory_weights: Sequence[float],
        variance: Literal["pool", "blend"] = "pool",
        **options: Any,
    ):
        self.memory_weights = tuple(map(float, memory_weights))
        self.variance: Literal["pool", "blend"] = variance
        state = partial(init_memorized_batch_norm, memory_size=len(self.memory_weights) - 1)
        super().__init__(num_features, state=state, **options)

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(
            memorized_batch_norm, memory_weights=self.memory_weights, variance=self.variance
        )
        return self._run(x, function, options, use_running_average=use_running_average)
