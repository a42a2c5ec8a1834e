"""Cross-Iteration Batch Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import wide_enough
from jaxnorm._layers import StateOptions
from jaxnorm.cross_iteration import cross_iteration_norm, init_cross_iteration
from jaxnorm.nnx._call import Function
from jaxnorm.nnx._in_front import check_in_front, in_front


class CrossIterationNorm(Function):
    """A convolution or dense layer, normalized over this batch and the last ones:
    `cross_iteration.cross_iteration_norm`.

    Running statistics are `mean` and `var` of inference and the window, about `window` times the
    kernel.

    Args:
        layer: `nnx.Conv` or `nnx.Linear` with use_bias=False.
        window: most batches before the present one that are pooled with it.
        momentum: weight of the old running statistics per update.
        Others: as `Norm`.

    Raises:
        ValueError: a layer with a bias, statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm.schedules import cross_iteration_window
        >>> rngs = nnx.Rngs(0)
        >>> layer = CrossIterationNorm(
        ...     nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs), rngs=rngs
        ... )
        >>> y = layer(jnp.ones((4, 8, 8, 3)), window=cross_iteration_window(1000, burn_in=500))
        >>> y.shape, layer.past_slope.shape
        ((4, 8, 8, 16), (3, 3, 3, 3, 16))

    Reference:
        Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712; see
        `cross_iteration.cross_iteration_norm`.
    """

    def __init__(
        self, layer: nnx.Module, *, window: int = 3, momentum: float = 0.9, **options: Any
    ):
        check_in_front(layer)
        self.layer: Any = layer
        self.momentum = momentum
        kernel = self.layer.kernel
        groups = getattr(self.layer, "feature_group_count", 1)

        def state(_):
            return init_cross_iteration(kernel.shape, window=window, feature_group_count=groups)

        super().__init__(kernel.shape[-1], state=state, **options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        window: ArrayLike | None = None,
        rho: ArrayLike = 1.0,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Apply the layer and normalize; `window` says how many batches to pool with now, and the
        options are `Norm`'s."""
        x = as_array(x)
        x = wide_enough(x, x.dtype)
        kernel, layer = in_front(self.layer)
        function = partial(
            cross_iteration_norm,
            inputs=x,
            kernel=kernel,
            layer=layer,
            window=window,
            rho=rho,
            momentum=self.momentum,
        )
        return self._run(
            layer(x, kernel), function, options, use_running_average=use_running_average
        )
