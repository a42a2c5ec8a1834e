"""How one training step of several ghost batches enters running statistics: the conventions in use.

With k ghosts of moments s_i, in order, and momentum d:

    "pooled"              state <- d state + (1 - d) moments of the whole batch,
                          the variance between ghosts included
    "averaged"            state <- d state + (1 - d) mean_i s_i
    "sequential"          one update a ghost:
                          state <- d^k state + sum_i (1 - d) d^(k - 1 - i) s_i, i = 0 to k - 1
    "sequential divided"  the same with the rate 1 - d divided by k

Pooled statistics are batch normalization's whatever the ghost size. The variances of the others are
smaller by the variance of the ghosts' means; sequential ones forget k times as fast, which the
divided rate undoes but for terms of order (1 - d)^2. Who uses which stands at `update_running`.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxnorm._core.arithmetic import quotient, scale_by
from jaxnorm._core.axes import resized
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import pool

GhostUpdate = Literal["pooled", "averaged", "sequential", "sequential divided"]


def check_ghost_update(convention: str) -> None:
    if convention not in get_args(GhostUpdate):
        raise ValueError(
            f"ghost_update={convention!r} is no convention. Expected one of "
            f"{get_args(GhostUpdate)}."
        )


def one_update(
    m: Moments, usable: jax.Array, axis: int, rate: jax.Array, convention: str
) -> tuple[Moments, jax.Array]:
    """The ghosts along an axis as one batch: its moments, and the weight with which it enters.

    Those that are not usable are left out, but for those of a pool.
    """
    if convention == "pooled":
        return pool(m, resized(m.mean.shape, axis, 1)), rate
    weights = usable.astype(rate.dtype)
    number = weights.sum(axis, keepdims=True)
    if convention != "averaged":
        rate = rate / usable.shape[axis] if convention == "sequential divided" else rate
        later = number - jnp.cumsum(weights, axis)  # updates after each ghost's own
        weights = weights * (1 - rate) ** later
        rate = 1 - (1 - rate) ** number
    weights = quotient(weights, weights.sum(axis, keepdims=True))

    def average(t: jax.Array) -> jax.Array:
        def weighed(t: jax.Array) -> jax.Array:
            return scale_by(jnp.where(usable, t, 0), weights).sum(axis, keepdims=True)

        first = weighed(t)  # off by what rounded weights lack of 1, a part of the mean
        return first + weighed(t - first)

    count = jnp.where(usable, m.count, 0).sum(axis, keepdims=True)
    return Moments(count, average(m.mean), average(m.var)), jnp.broadcast_to(rate, count.shape)
