"""Batch Renormalization: batch statistics, corrected towards the running ones."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.moments import Moments
from jaxnorm.methods._fields import NotNegative, OneOrMore, as_value
from jaxnorm.methods._frame import (
    along_channels,
    applied,
    averages,
    first_running,
    measured,
)
from jaxnorm.methods._method import Method, Options, Result, State
from jaxnorm.methods._table import batch_norm


@as_value
class batch_renorm(Method):
    """Batch normalization, corrected by how far the batch is from the running statistics.

        std = sqrt(var + epsilon),    r = clip(std / running_std, 1 / rmax, rmax)
        d = clip((mean - running_mean) / running_std, -dmax, dmax)
        y = ((x - mean) / std * r + d) * scale + bias

    with the running statistics before this step; no gradient flows into r and d. In inference

        y = (x - running_mean) / running_std * scale + bias

    With rmax = 1 and dmax = 0 it is batch normalization; without clipping the output is that of
    inference, and the gradient r times batch normalization's.

    Args:
        rmax: bound of the correction of the scale, 1 or more.
        dmax: bound of the correction of the mean, in standard deviations, 0 or more.
        momentum: weight of the old state per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.

    State: `mean` and `std`, (C,). Unlike batch normalization's it averages standard deviations.

    Options of apply:
        rmax, dmax: in place of the fields, numbers or traced scalars: see
            `schedules.batch_renorm_bounds`. A traced rmax below 1 is taken as 1, and a traced dmax
            below 0 as 0.
        momentum: in place of the field.

    Raises:
        ValueError: rmax below 1, dmax below 0, a momentum outside 0 to 1.

    Example:
        >>> x = jnp.array([[0.0], [2.0]])
        >>> method = batch_renorm(momentum=0.5, epsilon=0.0)
        >>> y, state = method.apply(x, method.init(x.shape), train=True)
        >>> # the running statistics are still 0 and 1, and x is within the bounds
        >>> y.tolist(), state["mean"].tolist()
        ([[0.0], [2.0]], [0.5])

    Reference:
        Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        2017, arXiv:1702.03275. That the state averages the standard deviation, and is one pair,
        follows Keras's implementation; defaults of rmax and dmax are the end of the paper's
        schedule, as cited by others.
    """

    statistics = (batch_norm(),)

    rmax: float = 3.0
    dmax: float = 5.0
    momentum: float = 0.99
    epsilon: float = 1e-5

    def first_state(self, num_channels: int) -> State:
        first = first_running((num_channels,))
        return {"mean": first["mean"], "std": first["var"]}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        rmax: OneOrMore,
        dmax: NotNegative,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        mean, std = (along_channels(state[name], x, options) for name in ("mean", "std"))
        # An epsilon larger than the one that the state was made with still bounds the division.
        std = jnp.maximum(std, jnp.sqrt(jnp.asarray(self.epsilon, std.dtype)))
        if not train:
            running = Moments(jnp.ones_like(mean), mean, jnp.square(std))
            return applied(x, running, 0.0, **options), state
        m = measured(x, batch_norm(), center=mean, **options)
        batch_std = jnp.sqrt(m.var + self.epsilon)
        rmax, dmax = (
            jnp.maximum(jnp.asarray(t, std.dtype), least) for t, least in ((rmax, 1), (dmax, 0))
        )
        r = lax.stop_gradient(jnp.clip(batch_std / std, 1 / rmax, rmax))
        d = lax.stop_gradient(jnp.clip((m.mean - mean) / std, -dmax, dmax))
        # (x - mean) / std * r + d as one standardization: about mean - d std / r, by std / r.
        corrected = batch_std / r
        used = Moments(m.count, m.mean - d * corrected, jnp.square(corrected))
        new = averages(state, m, momentum, mean=m.mean, std=batch_std)
        return applied(x, used, 0.0, **options), new
