"""EvoNorm B0 and S0 as layers."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._layers import CallOptions, StateOptions
from jaxnorm.evonorm import evonorm_b0, evonorm_s0, init_evonorm_b0
from jaxnorm.linen._call import Layer, call_function, channel_parameter, ones


class EvoNormB0(Layer, kw_only=True):
    """EvoNorm B0, normalization and activation at once: `evonorm.evonorm_b0`.

        y = x / max(sqrt(var_nhw + epsilon), v x + sqrt(var_hw + epsilon)) * scale + bias

    The collection `batch_stats` holds `var`, the running variance; parameters are `scale`, `bias`
    and `v`, (C,).

    Args:
        momentum: weight of the old running variance per update.
        v_init: initializer of v.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, a running variance of another
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = EvoNormB0()
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((4, 8, 8, 3)), use_running_average=True
        ... )
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'var': (3,)}

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967; see `evonorm.evonorm_b0`.
    """

    momentum: float = 0.9
    v_init: Initializer = ones

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(
            evonorm_b0, v=channel_parameter(self, "v", self.v_init, x), momentum=self.momentum
        )
        return call_function(
            self,
            x,
            function,
            options,
            state=init_evonorm_b0,
            use_running_average=use_running_average,
        )


class EvoNormS0(Layer, kw_only=True):
    """EvoNorm S0, normalization and activation at once, without statistics of the batch:
    `evonorm.evonorm_s0`.

        y = x sigmoid(v x) / sqrt(var_hwg + epsilon) * scale + bias

    Parameters are `scale`, `bias` and `v`, (C,).

    Args:
        num_groups: groups of channels, a divisor of their number.
        v_init: initializer of v.
        Others: as `Norm`.

    Raises:
        ValueError: groups that do not divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer, x = EvoNormS0(num_groups=3), jnp.ones((4, 8, 8, 6))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (4, 8, 8, 6)

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967; see `evonorm.evonorm_s0`.
    """

    num_groups: int = 32
    v_init: Initializer = ones

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        function = partial(
            evonorm_s0, v=channel_parameter(self, "v", self.v_init, x), num_groups=self.num_groups
        )
        return call_function(self, x, function, options)
