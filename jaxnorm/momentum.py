"""Momentum Batch Normalization: training normalizes with running statistics that the batch has just
entered."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_flag
from jaxnorm._core.pooling import toward
from jaxnorm._core.running import rate_of, usable
from jaxnorm._frame import Options, State, applied, averaged, check_state, measured, real, recalled
from jaxnorm.methods import batch_norm


def init_momentum_batch_norm(num_channels: int) -> State:
    """State before the first step: two pairs of mean 0 and variance 1 for each channel.

    Args:
        num_channels: C.

    Returns:
        `train_mean` and `train_var`, with which training normalizes, and `mean` and `var` of
        inference; (C,), float32.

    Example:
        >>> {name: t.shape for name, t in init_momentum_batch_norm(3).items()}
        {'train_mean': (3,), 'train_var': (3,), 'mean': (3,), 'var': (3,)}
    """
    zeros, ones = jnp.zeros(num_channels, jnp.float32), jnp.ones(num_channels, jnp.float32)
    return {"train_mean": zeros, "train_var": ones, "mean": zeros, "var": ones}


def momentum_batch_norm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    train_momentum: ArrayLike | None = None,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Batch normalization with the batch blended into the running statistics first, so that small
    batches vary less.

        train_mean <- lambda train_mean + (1 - lambda) mean
        train_var <- lambda train_var + (1 - lambda) var
        y = (x - train_mean) / sqrt(train_var + epsilon) * scale + bias

    with the values just updated, through which the batch keeps 1 - lambda of its gradient; old
    values are constants. Inference uses a second pair, the running mean and variance of batch
    normalization. With lambda = 0 it is batch normalization.

    Args:
        x: real floating array with examples and channels.
        state: see `init_momentum_batch_norm`.
        train: use the blended statistics and update the state, or use the pair of inference.
        train_momentum: lambda, the weight of the old training statistics, 0 to 1; a number or
            traced scalar, see `train_momentum_schedule`. Training needs it. A traced one beyond 0
            or 1 is taken as 0 or 1.
        momentum: tau, the weight of the old inference statistics per update, 0 to 1; see
            `inference_momentum`.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        channels' state; an empty set is normalized with the old training statistics.

    Raises:
        TypeError: x is complex or integer.
        ValueError: training without `train_momentum`, state of another number of channels or of
            another method, a momentum outside 0 to 1.

    Example:
        >>> x = jnp.array([[0.0], [4.0]])
        >>> y, state = momentum_batch_norm(
        ...     x, init_momentum_batch_norm(1), train=True, train_momentum=0.5, epsilon=0.0
        ... )
        >>> state["train_mean"].tolist(), state["train_var"].tolist()
        ([1.0], [2.5])

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020, in the
        proceedings of ECCV; there is no arXiv version that we know of. The definition was read in
        an independent reproduction, not in the paper.
    """
    check_flag(train, "train")
    x = real(x, "momentum_batch_norm")
    check_state(state, "momentum_batch_norm", train_mean=1, train_var=1, mean=1, var=1)
    channel_axis = options.get("channel_axis", -1)
    if not train:
        return applied(x, recalled(state, x, channel_axis), epsilon, **options), state
    if train_momentum is None:
        raise ValueError(
            "training needs the weight of the old training statistics. Got train_momentum=None; "
            "expected 0 (batch normalization) to 1, for example train_momentum_schedule(epoch, "
            "epochs=200, batch_size=4)."
        )
    old = lax.stop_gradient(recalled(state, x, channel_axis, "train_"))
    m = measured(x, batch_norm(), center=old.mean, **options)
    rate = rate_of(train_momentum, old.var.dtype, "train_momentum")
    used = jax.tree.map(lambda t, new: jnp.where(m.count > 0, toward(t, new, rate), t), old, m)
    keep = usable(m)
    new = {
        "train_mean": averaged(state["train_mean"], m.mean, train_momentum, keep),
        "train_var": averaged(state["train_var"], m.var, train_momentum, keep),
        "mean": averaged(state["mean"], m.mean, momentum, keep),
        "var": averaged(state["var"], m.var, momentum, keep),
    }
    return applied(x, used, epsilon, **options), new
