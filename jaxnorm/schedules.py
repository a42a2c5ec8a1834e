"""Schedules: what methods take at each step, as functions of the step or of the batch size."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_number


def batch_renorm_bounds(step: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The paper's schedule of rmax and dmax: batch normalization for 5,000 steps, then wider.

    rmax grows linearly from 1 at step 5,000 to 3 at step 40,000, dmax from 0 at step 5,000 to 5 at
    step 25,000.

    Args:
        step: number of the training step, from 0; a number or traced scalar.

    Returns:
        rmax and dmax, float32 scalars.

    Example:
        >>> [tuple(float(t) for t in batch_renorm_bounds(step)) for step in (0, 15_000, 40_000)]
        [(1.0, 0.0), (1.571..., 2.5), (3.0, 5.0)]

    Reference:
        Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        2017, arXiv:1702.03275, by its summaries; the text itself was not read.
    """
    step = jnp.asarray(step, jnp.float32)
    return 1 + 2 * jnp.clip((step - 5000) / 35000, 0, 1), 5 * jnp.clip((step - 5000) / 20000, 0, 1)


def train_momentum_schedule(
    epoch: ArrayLike, *, epochs: int, batch_size: int, ideal_batch_size: int = 32
) -> jax.Array:
    """The paper's schedule of lambda for Momentum Batch Normalization.

    It begins with batch normalization in the first epoch and keeps ever more of the past.

        lambda(t) = q^((T - t) / (T - 1)) - q,    q = min(batch size / ideal batch size, 1)

    from 0 at t = 1 to 1 - q at the last epoch T and after; 0 for batches of the ideal size or
    larger.

    Args:
        epoch: t, counted from 1; a number or traced scalar.
        epochs: T, 2 or more.
        batch_size: examples that share statistics, over all devices that do.
        ideal_batch_size: batch size whose noise is wanted.

    Returns:
        lambda, a float32 scalar.

    Raises:
        ValueError: fewer than 2 epochs, or sizes below 1.

    Example:
        >>> [
        ...     round(float(train_momentum_schedule(t, epochs=200, batch_size=2)), 4)
        ...     for t in (1, 100, 200)
        ... ]
        [0.0, 0.1858, 0.9375]

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020, in the
        proceedings of ECCV; see `methods.momentum_batch_norm`.
    """
    check_number(epoch, "epoch")
    if not epochs >= 2:
        raise ValueError(
            f"the schedule runs from the first epoch to another. Got epochs={epochs}; expected 2 "
            "or more."
        )
    q = min(_relative(batch_size, ideal_batch_size), 1.0)
    left = jnp.clip((epochs - jnp.asarray(epoch, jnp.float32)) / (epochs - 1), 0, 1)
    return jnp.maximum(q**left - q, 0)


def inference_momentum(batch_size: int, *, ideal_batch_size: int = 32, base: float = 0.9) -> float:
    """tau, the momentum of inference statistics that remembers as many examples at any batch size.

        tau = base^(batch size / ideal batch size)

    Args:
        batch_size: examples that share statistics.
        ideal_batch_size: batch size at which tau is `base`.
        base: weight of the old value per update at that size.

    Returns:
        tau.

    Raises:
        ValueError: sizes below 1, a base outside 0 to 1.

    Example:
        >>> round(inference_momentum(2), 5)
        0.99344

    Reference:
        Momentum Batch Normalization for Deep Learning with Small Batch Size, 2020, in the
        proceedings of ECCV; see `methods.momentum_batch_norm`.
    """
    check_number(base, "base", at_least=0, at_most=1)
    return base ** _relative(batch_size, ideal_batch_size)


def _relative(batch_size: int, ideal_batch_size: int) -> float:
    if not (batch_size >= 1 and ideal_batch_size >= 1):
        raise ValueError(
            f"batch sizes are 1 or more. Got batch_size={batch_size} and "
            f"ideal_batch_size={ideal_batch_size}; expected the numbers of examples that share "
            "statistics."
        )
    return batch_size / ideal_batch_size


def cross_iteration_window(
    step: ArrayLike, *, burn_in: int, window: int = 3, growing: bool = False
) -> jax.Array:
    """How many batches before this one to pool with, while training begins.

    In two stages, batch normalization for `burn_in` steps, then the batches since: min(max(step -
    burn_in, 0), window). Or growing: floor(window min(step / burn_in, 1)).

    Args:
        step: number of the training step, from 0; a number or traced scalar.
        burn_in: steps until the batches count.
        window: most batches; the state's.
        growing: let the window grow during these steps, instead of starting after them.

    Returns:
        An integer scalar.

    Raises:
        ValueError: negative burn_in, a window below 1, or growing in no steps.

    Example:
        >>> [int(cross_iteration_window(step, burn_in=2)) for step in range(7)]
        [0, 0, 0, 1, 2, 3, 3]
        >>> [int(cross_iteration_window(step, burn_in=6, growing=True)) for step in range(7)]
        [0, 0, 1, 1, 2, 2, 3]

    Reference:
        Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712, by the authors' code.
    """
    check_number(burn_in, "burn_in", at_least=1 if growing else 0)
    check_number(window, "window", at_least=1)
    step = jnp.asarray(step, jnp.int32)
    return jnp.clip(window * step // burn_in if growing else step - burn_in, 0, window)
