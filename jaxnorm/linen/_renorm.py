"""Batch Renormalization as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.linen._call import Layer, call_function
from jaxnorm.renorm import batch_renorm, init_batch_renorm


class BatchRenorm(Layer, kw_only=True):
    """Batch normalization corrected towards the running statistics: `renorm.batch_renorm`.

        y = ((x - mean) / std * r + d) * scale + bias

    The collection `batch_stats` holds `mean` and `std`. The bounds of r and d are arguments of the
    call, numbers or traced scalars: see `schedules.batch_renorm_bounds`.

    Args:
        momentum: weight of the old running statistics per update.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchRenorm()
        >>> x = jnp.ones((4, 8, 8, 3))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, rmax=1.5, dmax=0.5, mutable="batch_stats"
        ... )
        >>> jax.tree.map(jnp.shape, updates["batch_stats"])
        {'mean': (3,), 'std': (3,)}

    Reference:
        Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        2017, arXiv:1702.03275; see `renorm.batch_renorm`.
    """

    momentum: float = 0.99

    @nn.compact
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
        return call_function(
            self,
            x,
            function,
            options,
            state=init_batch_renorm,
            use_running_average=use_running_average,
        )
