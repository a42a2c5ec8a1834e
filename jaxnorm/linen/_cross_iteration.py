"""Cross-Iteration Batch Normalization as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import wide_enough
from jaxnorm._layers import StateOptions
from jaxnorm.cross_iteration import cross_iteration_norm, init_cross_iteration
from jaxnorm.linen._call import Layer, call_function
from jaxnorm.linen._in_front import in_front


class CrossIterationNorm(Layer):
    """A convolution or dense layer, normalized over this batch and the last ones:
    `cross_iteration.cross_iteration_norm`.

    The collection `batch_stats` holds `mean` and `var` of inference and the window, about `window`
    times the kernel.

    Args:
        layer: `nn.Conv` or `nn.Dense` with use_bias=False. Its kernel is that of a child of the
            module in which it was made, such as `Conv_0`, or else of this layer's child `layer`.
        window: most batches before the present one that are pooled with it.
        momentum: weight of the old running statistics per update.
        Others: as `Norm`.

    Raises:
        ValueError: a layer with a bias, `use_running_average` given nowhere or twice, statistics of
            another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.schedules import cross_iteration_window
        >>> layer = CrossIterationNorm(nn.Conv(16, (3, 3), use_bias=False))
        >>> x = jnp.ones((4, 8, 8, 3))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
        >>> window = cross_iteration_window(1000, burn_in=500)
        >>> y, updates = layer.apply(
        ...     variables, x, use_running_average=False, window=window, mutable="batch_stats"
        ... )
        >>> y.shape, updates["batch_stats"]["past_slope"].shape
        ((4, 8, 8, 16), (3, 3, 3, 3, 16))

    Reference:
        Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712; see
        `cross_iteration.cross_iteration_norm`.
    """

    layer: nn.Module
    window: int = 3
    momentum: float = 0.9

    @nn.compact
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
        kernel, layer = in_front(self.layer, x)
        function = partial(
            cross_iteration_norm,
            inputs=x,
            kernel=kernel,
            layer=layer,
            window=window,
            rho=rho,
            momentum=self.momentum,
        )
        groups = x.shape[-1] // kernel.shape[-2]

        def state(_):
            return init_cross_iteration(
                kernel.shape, window=self.window, feature_group_count=groups
            )

        return call_function(
            self,
            layer(x, kernel),
            function,
            options,
            state=state,
            use_running_average=use_running_average,
        )
