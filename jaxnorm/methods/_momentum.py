"""Momentum Batch Normalization: the batch enters running statistics, which then normalize it."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.pooling import toward
from jaxnorm._core.running import rate_of
from jaxnorm.methods._fields import Share, as_value
from jaxnorm.methods._frame import applied, averages, first_running, measured, recalled
from jaxnorm.methods._method import Method, Options, Result, State
from jaxnorm.methods._table import batch_norm


@as_value
class momentum_batch_norm(Method):
    """Batch normalization with the batch blended into the running statistics first.

    Statistics of small batches then vary less:

        train_mean <- lambda train_mean + (1 - lambda) mean
        train_var <- lambda train_var + (1 - lambda) var
        y = (x - train_mean) / sqrt(train_var + epsilon) * scale + bias

    with the values just updated, through which the batch keeps 1 - lambda of its gradient; old
    values are constants. Inference uses a second pair, the running mean and variance of batch
    normalization. With lambda = 0 it is batch normalization. An empty set is normalized with the
    old training statistics.

    Args:
        train_momentum: lambda, the weight of the old training statistics, 0 to 1. Training needs
            it, here or at `apply`.
        momentum: tau, the weight of the old inference statistics per update, 0 to 1; see
            `schedules.inference_momentum`.
        epsilon: added to the variance, in the unit of x squared.

    State: `train_mean` and `train_var`, with which training normalizes, and `mean` and `var` of
    inference; (C,).

    Options of apply:
        train_momentum: in place of the field, a number or traced scalar: see
            `schedules.train_momentum_schedule`. A traced one beyond 0 or 1 is taken as 0 or 1.
        momentum: in place of the field.

    Raises:
        ValueError: training without `train_momentum`, a momentum outside 0 to 1.

    Example:
        >>> x = jnp.array([[0.0], [4.0]])
        >>> method = momentum_batch_norm(epsilon=0.0)
        >>> y, state = method.apply(x, method.init(x.shape), train=True, train_momentum=0.5)
        >>> state["train_mean"].tolist(), state["train_var"].tolist()
        ([1.0], [2.5])

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020, in the
        proceedings of ECCV; there is no arXiv version that we know of. The definition was read in
        an independent reproduction, not in the paper.
    """

    statistics = (batch_norm(),)

    train_momentum: float | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5

    def first_state(self, num_channels: int) -> State:
        first = first_running((num_channels,))
        return {f"train_{name}": t for name, t in first.items()} | first

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        train_momentum: Share | None,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        if not train:
            return applied(x, recalled(state, x, options), self.epsilon, **options), state
        if train_momentum is None:
            raise ValueError(
                "training needs the weight of the old training statistics. Got "
                "train_momentum=None; expected 0 (batch normalization) to 1, for example "
                "schedules.train_momentum_schedule(epoch, epochs=200, batch_size=4)."
            )
        old = lax.stop_gradient(recalled(state, x, options, "train_"))
        m = measured(x, batch_norm(), center=old.mean, **options)
        rate = rate_of(train_momentum, old.var.dtype, "train_momentum")
        used = jax.tree.map(lambda t, new: jnp.where(m.count > 0, toward(t, new, rate), t), old, m)
        new = averages(state, m, train_momentum, train_mean=m.mean, train_var=m.var)
        new |= averages(state, m, momentum)
        return applied(x, used, self.epsilon, **options), new
