"""Memorized Batch Normalization: the batch's statistics combined with those of the batches before.

A reconstruction: of the paper only its idea is known to us, not the number of remembered batches,
nor the weights, nor how variances are combined. The weights are the user's, and both combinations
of variances are here.
"""

from collections.abc import Sequence
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_number, known
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import usable
from jaxnorm.methods._fields import as_value
from jaxnorm.methods._frame import (
    along_channels,
    applied,
    first_running,
    measured,
    remembered,
)
from jaxnorm.methods._method import Method, Options, Result, State
from jaxnorm.methods._table import batch_norm


@as_value
class memorized_batch_norm(Method):
    """Batch normalization by a weighted combination of this batch's statistics and the last K's.

        mean = sum_i a_i mean_i,    var = sum_i a_i (var_i + (mean_i - mean)^2)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    over the batches that are remembered and, in training, this one; a_i are the weights, divided by
    the sum of those in use. "blend" leaves out (mean_i - mean)^2. Remembered statistics are
    constants. A training step then replaces the oldest batch by this one. Equal weights and "pool"
    are batch normalization over all these batches together, if equally large; all weight on the
    last is batch normalization. Where no weight is in use, as in inference before the first step,
    mean 0 and variance 1 are used. The training step that goes with it is
    `training.double_forward`.

    Args:
        memory_weights: K + 1 numbers, 0 or more: those of the K remembered batches, oldest first,
            and last that of the batch itself. While the memory fills, its last places are in use.
        variance: "pool" for the variance of the batches' mixture, "blend" for the average of
            variances.
        epsilon: added to the variance, in the unit of x squared.

    State: `mean` and `var`, (K, C), oldest batch first, and `count`, (C,), the batches remembered
    so far.

    Options of apply:
        memory_weights: in place of the field, (K + 1,). A traced negative one or NaN counts 0.

    Raises:
        ValueError: fewer than two weights or negative ones, an unknown `variance`.

    Example:
        >>> method = memorized_batch_norm((0.5, 0.5), epsilon=0.0)
        >>> state = method.init((2, 1))
        >>> for value in (0.0, 2.0):
        ...     x = jnp.array([[value - 1], [value + 1]])
        ...     y, state = method.apply(x, state, train=True)
        >>> y.tolist(), state["mean"].tolist()  # mean 1, variance 1 + 1
        ([[0.0], [1.414...]], [[2.0]])

    Reference:
        Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947. A
        reconstruction from summaries: see the module.
    """

    statistics = (batch_norm(),)

    memory_weights: tuple[float, ...]
    variance: Literal["pool", "blend"] = "pool"
    epsilon: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.memory_weights, tuple) or len(self.memory_weights) < 2:
            raise ValueError(
                "inference needs a remembered batch. Got memory_weights="
                f"{self.memory_weights!r}; expected two numbers or more, the last of them for the "
                "batch itself."
            )
        for weight in self.memory_weights:
            check_number(weight, "memory_weights", at_least=0)
        if self.variance not in ("pool", "blend"):
            raise ValueError(
                f"variances are combined in two ways. Got variance={self.variance!r}; expected "
                "'pool' or 'blend'."
            )

    def first_state(self, num_channels: int) -> State:
        first = first_running((len(self.memory_weights) - 1, num_channels))
        return first | {"count": jnp.zeros(num_channels, jnp.float32)}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        memory_weights: ArrayLike | Sequence[float],
        **options: Unpack[Options],
    ) -> Result:
        mean, var, count = (
            lax.stop_gradient(along_channels(state[n], x, options))
            for n in ("mean", "var", "count")
        )
        size = mean.shape[0]
        weights = jnp.asarray(memory_weights, var.dtype)
        if weights.shape != (size + 1,):
            raise ValueError(
                f"memory_weights has shape {weights.shape}, and the state remembers {size} batches."
                f" Expected ({size + 1},): one weight for each of them, oldest first, and one for "
                "the batch itself."
            )
        values = known(memory_weights)
        check_number(
            weights if values is None else values, "memory_weights", at_least=0, shape=weights.shape
        )
        ages = jnp.arange(size, 0, -1, dtype=count.dtype)
        ages, weights = (
            t.reshape(-1, *(1,) * x.ndim) for t in (ages, jnp.where(weights >= 0, weights, 0))
        )
        memory = Moments(jnp.where(ages <= count[None], weights[:-1], 0), mean, var)
        if not train:
            return applied(x, self._combined(memory), self.epsilon, **options), state
        m = measured(x, batch_norm(), center=mean[-1], **options)
        own = Moments(jnp.where(m.count > 0, weights[-1], 0), m.mean, m.var)
        entries = jax.tree.map(lambda old, t: jnp.concatenate([old, t[None]]), memory, own)
        keep = usable(m)
        new = {"mean": entries.mean[1:], "var": entries.var[1:]}
        new |= {"count": jnp.minimum(count + 1, size)}
        new = {name: remembered(state[name], t, keep) for name, t in new.items()}
        return applied(x, self._combined(entries), self.epsilon, **options), new

    def _combined(self, entries: Moments) -> Moments:
        """Moments over the first axis, weighted by count.

        Mean 0 and variance 1 where nothing has a weight.
        """
        pooled = pool(entries, (1, *entries.mean.shape[1:]))
        some = pooled.count > 0
        var = pooled.var
        if self.variance == "blend":
            share = entries.count / jnp.where(some, pooled.count, 1)
            var = (share * jnp.where(entries.count > 0, entries.var, 0)).sum(0, keepdims=True)
        return Moments(pooled.count[0], pooled.mean[0], jnp.where(some, var, 1)[0])
