"""Switchable Normalization as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._layers import StateOptions
from jaxnorm.linen._call import Layer, call_function, ones
from jaxnorm.switchable import (
    _count_kinds,
    _without_batch,
    init_switchable_norm,
    switchable_norm,
)


class SwitchableNorm(Layer, kw_only=True):
    """Normalization by a learned mixture of instance, layer and batch statistics:
    `switchable.switchable_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Learned logits `mean_logits` and `var_logits`, 1 each at first, weigh the three kinds, in this
    order. The collection `batch_stats` holds `mean` and `var` of the batch part.

    Args:
        use_batch: False leaves the batch part out; then there is no state, and
            `use_running_average` is ignored.
        use_instance: False leaves the instance part out, which in x of shape (N, C) is x itself.
        momentum: weight of the old running statistics per update; the authors use 0.9.
        Others: as `Norm`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another
            shape, neither an instance nor a batch part.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = SwitchableNorm().init(
        ...     jax.random.key(0), jnp.ones((4, 8, 8, 16)), use_running_average=False
        ... )
        >>> {name: t.shape for name, t in variables["params"].items() if "logits" in name}
        {'mean_logits': (3,), 'var_logits': (3,)}

    Reference:
        Differentiable Learning-to-Normalize via Switchable Normalization, 2018, arXiv:1806.10779;
        see `switchable.switchable_norm`.
    """

    use_batch: bool = True
    use_instance: bool = True
    momentum: float = 0.99

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[StateOptions]
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        shape = (_count_kinds(self.use_instance, self.use_batch),)
        logits = {
            name: self.param(name, ones, shape, self.param_dtype)
            for name in ("mean_logits", "var_logits")
        }
        if not self.use_batch:
            return call_function(self, x, partial(_without_batch, **logits), options)
        function = partial(switchable_norm, momentum=self.momentum, **logits)
        state = init_switchable_norm
        return call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
