"""EvoNorm B0 and S0 as layers."""

from functools import partial
from typing import Any, Unpack

import jax
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._layers import CallOptions, StateOptions
from jaxnorm.evonorm import evonorm_b0, evonorm_s0, init_evonorm_b0
from jaxnorm.nnx._call import Function, ones


class EvoNormB0(Function):
    """EvoNorm B0, normalization and activation at once: `evonorm.evonorm_b0`.

        y = x / max(sqrt(var_nhw + epsilon), v x + sqrt(var_hw + epsilon)) * scale + bias

    The running variance is `var`; parameters are `scale`, `bias` and `v`, (C,).

    Args:
        num_features: channels.
        momentum: weight of the old running variance per update.
        v_init: initializer of v.
        Others: as `Norm`.

    Raises:
        ValueError: a running variance of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = EvoNormB0(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.var.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967; see `evonorm.evonorm_b0`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        v_init: Initializer = ones,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.momentum = momentum
        super().__init__(num_features, state=init_evonorm_b0, rngs=rngs, **options)
        self.v = nnx.Param(v_init(rngs.params(), (num_features,), self.param_dtype))

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(evonorm_b0, v=self.v[...], momentum=self.momentum)
        return self._run(x, function, options, use_running_average=use_running_average)


class EvoNormS0(Function):
    """EvoNorm S0, normalization and activation at once, without statistics of the batch:
    `evonorm.evonorm_s0`.

        y = x sigmoid(v x) / sqrt(var_hwg + epsilon) * scale + bias

    Parameters are `scale`, `bias` and `v`, (C,).

    Args:
        num_features: channels.
        num_groups: groups of channels, a divisor of their number.
        v_init: initializer of v.
        Others: as `Norm`.

    Raises:
        ValueError: groups that do not divide the channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> EvoNormS0(6, num_groups=3, rngs=nnx.Rngs(0))(jnp.ones((4, 8, 8, 6))).shape
        (4, 8, 8, 6)

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967; see `evonorm.evonorm_s0`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 32,
        v_init: Initializer = ones,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.num_groups = num_groups
        super().__init__(num_features, rngs=rngs, **options)
        self.v = nnx.Param(v_init(rngs.params(), (num_features,), self.param_dtype))

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        return self._run(x, partial(evonorm_s0, v=self.v[...], num_groups=self.num_groups), options)
