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

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxnorm._core.arithmetic import scale_by
from jaxnorm._core.moments import Moments

GhostUpdate = Literal["pooled", "averaged", "sequential", "sequential divided"]
Weights = tuple[jax.Array, jax.Array]


def _averaged(valid: jax.Array, axis: int, rate: jax.Array) -> Weights:
    count = valid.sum(axis, keepdims=True)
    return valid / jnp.where(count > 0, count, 1), jnp.broadcast_to(rate, count.shape)


def _sequential(valid: jax.Array, axis: int, rate: jax.Array) -> Weights:
    later = jnp.flip(jnp.cumsum(jnp.flip(valid, axis), axis), axis) - valid
    weights = valid * (1 - rate) ** later
    total = weights.sum(axis, keepdims=True)
    return (
        weights / jnp.where(total > 0, total, 1),
        1 - (1 - rate) ** valid.sum(axis, keepdims=True),
    )


def _sequential_divided(valid: jax.Array, axis: int, rate: jax.Array) -> Weights:
    return _sequential(valid, axis, rate / valid.shape[axis])


WEIGHTS: dict[str, Callable[[jax.Array, int, jax.Array], Weights]] = {
    "averaged": _averaged,
    "sequential": _sequential,
    "sequential divided": _sequential_divided,
}
"""Weights of the ghosts, adding up to 1, and their weight against the old state's. `valid` is 1 for
ghosts that count, else 0."""


def check_ghost_update(convention: str) -> None:
    if convention not in get_args(GhostUpdate):
        raise ValueError(
            f"ghost_update={convention!r} is no convention. Expected one of "
            f"{get_args(GhostUpdate)}."
        )


def one_update(
    m: Moments, usable: jax.Array, axis: int, rate: jax.Array, convention: str
) -> tuple[Moments, jax.Array]:
    """The ghosts along an axis as one batch: its moments, and the weight with which it enters."""
    weights, rate = WEIGHTS[convention](usable.astype(rate.dtype), axis, rate)

    def average(t: jax.Array) -> jax.Array:
        def weighed(t: jax.Array) -> jax.Array:
            return scale_by(jnp.where(usable, t, 0), weights).sum(axis, keepdims=True)

        first = weighed(t)  # off by what rounded weights lack of 1, a part of the mean
        return first + weighed(t - first)

    counts = jnp.where(usable, m.count, 0).sum(axis, keepdims=True)
    return Moments(counts, average(m.mean), average(m.var)), rate
