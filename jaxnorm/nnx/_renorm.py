"""Batch Renormalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.nnx._call import Function
from jaxnorm.renorm import batch_renorm, init_batch_renorm


class BatchRenorm(Function):
    """Batch normalization corrected towards the running statistics: `renorm.batch_renorm`.

        y = ((x - mean) / std * r + d) * scale + bias

    Running statistics are `mean` and `std`. The bounds of r and d are arguments of the call,
    numbers or traced scalars: see `schedules.batch_renorm_bounds`.

    Args:
        num_features: channels.
        momentum: weight of the old running statistics per update.
        Others: as `Norm`.

    Raises:
        ValueError: running statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = BatchRenorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3)), rmax=1.5, dmax=0.5).shape, layer.std.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        2017, arXiv:1702.03275; see `renorm.batch_renorm`.
    """

    def __init__(self, num_features: int, *, momentum: float = 0.99, **options: Any):
        self.momentum = momentum
        super().__init__(num_features, state=init_batch_renorm, **options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        rmax: ArrayLike = 3.0,
        dmax: ArrayLike = 5.0,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(batch_renorm, rmax=rmax, dmax=dmax, momentum=self.momentum)
        return self._run(x, function, options, use_running_average=use_running_average)
