"""Switchable Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.nnx._call import Function
from jaxnorm.switchable import (
    _count_kinds,
    _without_batch,
    init_switchable_norm,
    switchable_norm,
)


class SwitchableNorm(Function):
    """Normalization by a learned mixture of instance, layer and batch statistics:
    `switchable.switchable_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Learned logits `mean_logits` and `var_logits`, 1 each at first, weigh the three kinds, in this
    order. Running statistics are `mean` and `var` of the batch part.

    Args:
        num_features: channels.
        use_batch: False leaves the batch part out; then there is no state, and
            `use_running_average` is ignored.
        use_instance: False leaves the instance part out, which in x of shape (N, C) is x itself.
        momentum: weight of the old running statistics per update; the authors use 0.9.
        Others: as `Norm`.

    Raises:
        ValueError: running statistics of another shape, neither an instance nor a batch part.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = SwitchableNorm(16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 16))).shape, layer.mean_logits.shape
        ((4, 8, 8, 16), (3,))

    Reference:
        Differentiable Learning-to-Normalize via Switchable Normalization, 2018, arXiv:1806.10779;
        see `switchable.switchable_norm`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_batch: bool = True,
        use_instance: bool = True,
        momentum: float = 0.99,
        param_dtype: Dtype = jnp.float32,
        **options: Any,
    ):
        self.use_batch, self.momentum = use_batch, momentum
        shape = (_count_kinds(use_instance, use_batch),)
        self.mean_logits, self.var_logits = (
            nnx.Param(jnp.ones(shape, param_dtype)) for _ in range(2)
        )
        state = init_switchable_norm if use_batch else None
        super().__init__(num_features, state=state, param_dtype=param_dtype, **options)

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        logits = {"mean_logits": self.mean_logits[...], "var_logits": self.var_logits[...]}
        if not self.use_batch:
            return self._run(x, partial(_without_batch, **logits), options)
        function = partial(switchable_norm, momentum=self.momentum, **logits)
        return self._run(x, function, options, use_running_average=use_running_average)
