"""Memorized Batch Normalization: the batch's statistics combined with those of the batches before.

A reconstruction: of the paper only its idea is known to us, not the number of remembered batches,
nor the weights, nor how variances are combined. The weights are the user's, and both combinations
of variances are here.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_flag, check_number, known
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import usable
from jaxnorm._frame import (
    Options,
    State,
    along_channels,
    applied,
    check_state,
    measured,
    real,
    remembered,
)
from jaxnorm.methods import batch_norm


def init_memorized_batch_norm(num_channels: int, memory_size: int) -> State:
    """State before the first step: an empty memory.

    Args:
        num_channels: C.
        memory_size: K, remembered batches, 1 or more.

    Returns:
        `mean` and `var`, (K, C), oldest batch first, and `count`, (C,), the batches remembered so
        far; float32.

    Raises:
        ValueError: a memory of no batches.

    Example:
        >>> {name: t.shape for name, t in init_memorized_batch_norm(3, 2).items()}
        {'mean': (2, 3), 'var': (2, 3), 'count': (3,)}
    """
    if memory_size < 1:
        raise ValueError(
            f"inference needs a remembered batch. Got memory_size={memory_size}; expected 1 or "
            "more."
        )
    shape = (memory_size, num_channels)
    return {
        "mean": jnp.zeros(shape, jnp.float32),
        "var": jnp.ones(shape, jnp.float32),
        "count": jnp.zeros(num_channels, jnp.float32),
    }


def memorized_batch_norm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    memory_weights: ArrayLike | Sequence[float],
    variance: Literal["pool", "blend"] = "pool",
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Batch normalization with a weighted combination of the last K batches' statistics and the
    batch's own.

        mean = sum_i a_i mean_i,    var = sum_i a_i (var_i + (mean_i - mean)^2)
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    over the batches that are remembered and, in training, this one; a_i are the weights, divided by
    the sum of those in use. "blend" leaves out (mean_i - mean)^2. Remembered statistics are
    constants. A training step then replaces the oldest batch by this one. Equal weights and "pool"
    are batch normalization over all these batches together, if equally large; all weight on the
    last is batch normalization.

    Args:
        x: real floating array with examples and channels.
        state: see `init_memorized_batch_norm`.
        train: include the batch's statistics and remember them, or use the memory alone.
        memory_weights: (K + 1,), 0 or more: those of the remembered batches, oldest first, and last
            that of the batch itself. While the memory fills, its last places are in use. A traced
            negative one or NaN counts 0.
        variance: "pool" for the variance of the batches' mixture, "blend" for the average of
            variances.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        channels' state. Where no weight is in use, as in inference before the first step, mean 0
        and variance 1 are used.

    Raises:
        TypeError: x is complex or integer.
        ValueError: another number of weights, negative ones, an unknown `variance`, state of
            another number of channels or of another method.

    Example:
        >>> state = init_memorized_batch_norm(1, 1)
        >>> for value in (0.0, 2.0):
        ...     x = jnp.array([[value - 1], [value + 1]])
        ...     y, state = memorized_batch_norm(
        ...         x, state, train=True, memory_weights=[0.5, 0.5], epsilon=0.0
        ...     )
        >>> y.tolist(), state["mean"].tolist()  # mean 1, variance 1 + 1
        ([[0.0], [1.414...]], [[2.0]])

    Reference:
        Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947. A
        reconstruction from summaries: see the module.
    """
    check_flag(train, "train")
    x = real(x, "memorized_batch_norm")
    if variance not in ("pool", "blend"):
        raise ValueError(
            f"variances are combined in two ways. Got variance={variance!r}; expected 'pool' or "
            "'blend'."
        )
    check_state(state, "memorized_batch_norm", mean=2, var=2, count=1)
    channel_axis = options.get("channel_axis", -1)
    mean, var, count = (
        lax.stop_gradient(along_channels(state[n], x, channel_axis))
        for n in ("mean", "var", "count")
    )
    size = mean.shape[0]
    weights = jnp.asarray(memory_weights, var.dtype)
    if weights.shape != (size + 1,):
        raise ValueError(
            f"memory_weights has shape {weights.shape}, and the state remembers {size} batches. "
            f"Expected ({size + 1},): one weight for each of them, oldest first, and one for the "
            "batch itself."
        )
    values = known(memory_weights)
    check_number(
        weights if values is None else values, "memory_weights", at_least=0, shape=weights.shape
    )
    weights = jnp.where(weights >= 0, weights, 0).reshape(-1, *(1 for _ in x.shape))
    age = jnp.arange(size, 0, -1, dtype=count.dtype).reshape(-1, *(1 for _ in x.shape))
    memory = Moments(jnp.where(age <= count[None], weights[:-1], 0), mean, var)
    if not train:
        return applied(x, _combined(memory, variance), epsilon, **options), state
    m = measured(x, batch_norm(), center=mean[-1], **options)
    own = Moments(jnp.where(m.count > 0, weights[-1], 0), m.mean, m.var)
    entries = jax.tree.map(lambda old, t: jnp.concatenate([old, t[None]]), memory, own)
    keep = usable(m)
    new = {
        "mean": remembered(state["mean"], entries.mean[1:], keep),
        "var": remembered(state["var"], entries.var[1:], keep),
        "count": remembered(state["count"], jnp.minimum(count + 1, size), keep),
    }
    return applied(x, _combined(entries, variance), epsilon, **options), new


def _combined(entries: Moments, variance: str) -> Moments:
    """Moments over the first axis, weighted by count; mean 0 and variance 1 where nothing has a
    weight."""
    pooled = pool(entries, (1, *entries.mean.shape[1:]))
    some = pooled.count > 0
    var = pooled.var
    if variance == "blend":
        share = entries.count / jnp.where(some, pooled.count, 1)
        var = (share * jnp.where(entries.count > 0, entries.var, 0)).sum(0, keepdims=True)
    return Moments(pooled.count[0], pooled.mean[0], jnp.where(some, var, 1)[0])


def double_forward(
    loss: Callable[..., tuple[jax.Array, State]], update: Callable[[Any, Any, Any], tuple[Any, Any]]
) -> Callable[..., tuple[Any, Any, Any, jax.Array]]:
    """A training step that remembers the statistics that the new parameters give, not the old ones.

    The gradient is taken with the remembered statistics as they are; after the update the same
    batch passes once more forward, with the new parameters, and only the statistics of that pass
    are kept. It costs a second forward pass.

    Args:
        loss: `loss(params, state, *batch)` returns the loss, a scalar, and the new state, any tree.
        update: `update(gradients, optimizer_state, params)` returns the new parameters and
            optimizer state.

    Returns:
        `step(params, optimizer_state, state, *batch)`, which returns the new params,
        optimizer_state and state, and the loss of the first pass. Random numbers, such as a dropout
        key, belong to the batch and are the same in both passes.

    Example:
        >>> def loss(params, state, x):
        ...     y, state = memorized_batch_norm(
        ...         params * x, state, train=True, memory_weights=[0.5, 0.5]
        ...     )
        ...     return jnp.sum(y**4), state
        >>> step = double_forward(loss, lambda gradients, _, params: (params + 1, None))
        >>> params, _, state, value = step(
        ...     jnp.ones(()), None, init_memorized_batch_norm(1, 1), jnp.array([[0.0], [2.0]])
        ... )
        >>> state["mean"].tolist()  # of 2 x
        [[2.0]]

    Reference:
        arXiv:2010.04947; see `memorized_batch_norm`. Whether the second pass uses the memory is not
        known; here it does, so that later layers see what they will in training.
    """

    def step(
        params: Any, optimizer_state: Any, state: Any, *batch: Any
    ) -> tuple[Any, Any, Any, jax.Array]:
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, state, *batch)
        params, optimizer_state = update(gradients, optimizer_state, params)
        _, state = loss(params, state, *batch)
        return params, optimizer_state, state, value

    return step
