"""GN+ as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape
from jaxnorm._layers import StateOptions
from jaxnorm.group_plus import group_norm_plus, init_group_norm_plus
from jaxnorm.nnx._call import Function, ones


class GroupNormPlus(Function):
    """GN+, group normalization mixed with its output standardized over the batch:
    `group_plus.group_norm_plus`.

        y = (w z + (1 - w) u) * scale + bias,    w = sigmoid(mixture)

    with z group normalization of x and u batch normalization of z. Running statistics of z are
    `mean` and `var`; parameters are `scale` and `bias`, (C,), and the scalar `mixture`.

    Args:
        num_features: channels.
        num_groups: groups of channels, a divisor of their number.
        per_position: batch statistics for each position, (H, W, C), which ties the layer to one
            image size; False pools the positions, (C,).
        x_shape: shape of an input, needed with `per_position`; any number of examples.
        mixture_init: initializer of the logit of z's weight.
        momentum: weight of the old running statistics per update.
        correction: 1 divides both variances by n - 1, as the authors' code does.
        epsilon_outside: add epsilon to both standard deviations instead, as that code does.
        Others: as `Norm`.

    Raises:
        ValueError: `x_shape` missing, running statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = GroupNormPlus(6, 3, x_shape=(1, 8, 8, 6), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 6))).shape, layer.mean.shape
        ((4, 8, 8, 6), (8, 8, 6))

    Reference:
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972; see
        `group_plus.group_norm_plus`.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        per_position: bool = True,
        x_shape: Shape | None = None,
        mixture_init: Initializer = ones,
        momentum: float = 0.99,
        correction: int = 0,
        epsilon_outside: bool = False,
        batch_axis: int = 0,
        channel_axis: int = -1,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if x_shape is None and per_position:
            raise ValueError(
                "running statistics of GN+ keep positions apart. Got x_shape=None; expected the "
                "shape of an input, any number of examples, or per_position=False."
            )
        self.num_groups, self.per_position, self.momentum = num_groups, per_position, momentum
        self.correction, self.epsilon_outside = correction, epsilon_outside

        def state(num_channels: int):
            if per_position and x_shape is not None:
                return init_group_norm_plus(
                    x_shape, batch_axis=batch_axis, channel_axis=channel_axis
                )
            return init_group_norm_plus((1, num_channels), per_position=False)

        super().__init__(
            num_features,
            state=state,
            batch_axis=batch_axis,
            channel_axis=channel_axis,
            rngs=rngs,
            **options,
        )
        self.mixture = nnx.Param(mixture_init(rngs.params(), (), self.param_dtype))

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        names = ("num_groups", "per_position", "momentum", "correction", "epsilon_outside")
        static = {name: getattr(self, name) for name in names}
        function = partial(group_norm_plus, mixture=self.mixture[...], **static)
        return self._run(x, function, options, use_running_average=use_running_average)
