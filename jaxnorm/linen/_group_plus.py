"""GN+ as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._layers import StateOptions
from jaxnorm.group_plus import group_norm_plus, init_group_norm_plus
from jaxnorm.linen._call import Layer, call_function, ones


class GroupNormPlus(Layer):
    """GN+, group normalization mixed with its output standardized over the batch:
    `group_plus.group_norm_plus`.

        y = (w z + (1 - w) u) * scale + bias,    w = sigmoid(mixture)

    with z group normalization of x and u batch normalization of z. The collection `batch_stats`
    holds `mean` and `var` of z; parameters are `scale` and `bias`, (C,), and the scalar `mixture`.

    Args:
        num_groups: groups of channels, a divisor of their number.
        per_position: batch statistics for each position, (H, W, C), which ties the layer to one
            image size; False pools the positions, (C,).
        mixture_init: initializer of the logit of z's weight.
        momentum: weight of the old running statistics per update.
        correction: 1 divides both variances by n - 1, as the authors' code does.
        epsilon_outside: add epsilon to both standard deviations instead, as that code does.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = GroupNormPlus(3)
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((4, 8, 8, 6)), use_running_average=True
        ... )
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'mean': (8, 8, 6), 'var': (8, 8, 6)}

    Reference:
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972; see
        `group_plus.group_norm_plus`.
    """

    num_groups: int = 32
    per_position: bool = True
    mixture_init: Initializer = ones
    momentum: float = 0.99
    correction: int = 0
    epsilon_outside: bool = False

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        x = as_array(x)
        mixture = self.param("mixture", self.mixture_init, (), self.param_dtype)
        names = ("num_groups", "per_position", "momentum", "correction", "epsilon_outside")
        static = {name: getattr(self, name) for name in names}

        def state(num_channels: int):
            axes = {"batch_axis": self.batch_axis, "channel_axis": self.channel_axis}
            return init_group_norm_plus(x.shape, per_position=self.per_position, **axes)

        function = partial(group_norm_plus, mixture=mixture, **static)
        return call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
