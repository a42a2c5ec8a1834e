"""Switchable Normalization: a learned mixture of instance, layer and batch statistics."""

from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.moments import Moments
from jaxnorm.methods._fields import as_value
from jaxnorm.methods._frame import (
    applied,
    averages,
    first_running,
    measured,
    per_device,
    pooled,
    recalled,
)
from jaxnorm.methods._method import Method, Options, Parameters, Result, State
from jaxnorm.methods._options import Axes, Sets, sets_of_pooled
from jaxnorm.methods._table import batch_norm, instance_norm, layer_norm


@as_value
class switchable_norm(Method):
    """Standardize with a mixture of the statistics of instance, layer and batch normalization.

        mean = sum_k softmax(mean_logits)_k mean_k,    var = sum_k softmax(var_logits)_k var_k
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with k over instance, layer and batch. Layer and batch statistics are pooled from the instance
    ones, so x is read once. Inference takes the batch part from the running statistics. For x of
    shape (N, C) leave the instance part out: its mean would be x itself, with variance 0. Without
    the batch part examples do not meet, and training and inference agree. Examples are whole on
    each device; `axis_name` is for the batch part.

    Args:
        use_instance: mix in the statistics of each channel of each example.
        use_batch: mix in the statistics of each channel over the batch.
        momentum: weight of the old state per update; the authors use 0.9.
        epsilon: added to the variance, in the unit of x squared.

    State: `mean` and `var`, (C,), of the batch part; {} without it.

    Options of apply:
        mean_logits, var_logits: learned, from 1 on; one number for each kind of statistics, in the
            order instance, layer, batch.
        momentum: in place of the field.

    Raises:
        ValueError: neither an instance nor a batch part, another number of logits.

    Example:
        >>> x = jnp.array([[[0.0, 1.0], [2.0, 3.0]]])
        >>> only_instance = jnp.array([0.0, -jnp.inf])
        >>> y, _ = switchable_norm(use_batch=False, epsilon=0.0).apply(
        ...     x, {}, train=True, mean_logits=only_instance, var_logits=only_instance
        ... )
        >>> y.tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference:
        Differentiable Learning-to-Normalize via Switchable Normalization, 2018, arXiv:1806.10779.
        The definition was read in the authors' code. Its instance variance divides by n - 1, and
        for (N, C), where it mixes layer and batch, so do both variances; its running variance
        starts at 0.
    """

    use_instance: bool = True
    use_batch: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if not (self.use_instance or self.use_batch):
            raise ValueError(
                "one kind of statistics is nothing to mix. Got use_instance=False and "
                "use_batch=False; expected one of the two, or layer normalization."
            )

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        apart = (instance_norm(), layer_norm()) if self.use_instance else (layer_norm(),)
        sets = [found for row in apart for found in row.sets(x_shape, **axes)]
        if self.use_batch:
            sets.append(sets_of_pooled(batch_norm().shape(x_shape, **axes)))
        return tuple(sets)

    def first_state(self, num_channels: int) -> State:
        return first_running((num_channels,)) if self.use_batch else {}

    def parameters(self, num_channels: int) -> Parameters:
        logits = np.ones(1 + self.use_instance + self.use_batch, np.float32)
        return {"mean_logits": logits, "var_logits": logits}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        mean_logits: ArrayLike,
        var_logits: ArrayLike,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        instance = measured(x, instance_norm(), **per_device(options))
        dtype = instance.var.dtype
        shares = [jax.nn.softmax(jnp.asarray(t, dtype)) for t in (mean_logits, var_logits)]
        kinds = (1 + self.use_instance + self.use_batch,)
        if not shares[0].shape == shares[1].shape == kinds:
            raise ValueError(
                f"mean_logits has shape {shares[0].shape}, var_logits {shares[1].shape}. Expected "
                f"{kinds} for {self}: one number for each kind of statistics."
            )
        parts = [pooled(instance, layer_norm(), **per_device(options))]
        if self.use_instance:
            parts = [instance, *parts]
        if self.use_batch:
            m = recalled(state, x, options)
            if train:
                m = pooled(instance, batch_norm(), **options)
                state = averages(state, m, momentum)
            parts.append(m)
        mean = _mixture([m.mean for m in parts], shares[0])
        var = _mixture([m.var for m in parts], shares[1])
        return applied(x, Moments(instance.count, mean, var), self.epsilon, **options), state


def _mixture(values: Sequence[jax.Array], shares: jax.Array) -> jax.Array:
    """sum_k share_k value_k, by differences.

    The shares add up to 1 but for rounding, which would show where all values are large and equal.
    """
    first, *rest = values
    return first + sum(share * (t - first) for t, share in zip(rest, shares[1:], strict=True))
