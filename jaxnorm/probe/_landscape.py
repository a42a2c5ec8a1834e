"""How the loss and its gradient change on the way along the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import check_number
from jaxnorm.probe._trees import check_alike, distance, l2, named_leaves


class AlongGradient(NamedTuple):
    """What `along_gradient` returns.

    Args:
        loss: where the steps begin, ().
        gradient_norm: l2 norm of the gradient there, ().
        losses: after each step, (K,); the band of the loss landscape is from their least to their
            largest.
        gradient_changes: how far the gradient after each step is from the first in l2 norm, (K,);
            gradient predictiveness, the smaller the better the gradient predicts.
        smoothness: this change over the distance of the step, (K,); its largest is the effective
            beta-smoothness.

    Reference:
        See `along_gradient`.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    losses: jax.Array
    gradient_changes: jax.Array
    smoothness: jax.Array


def along_gradient(
    loss: Callable[..., jax.Array], params: Any, *batch: Any, steps: ArrayLike
) -> AlongGradient:
    """Loss and gradient on a line through the parameters, down the gradient.

    With g(w) the gradient of the loss L on the batch and p_k = w - s_k g(w),

        losses_k = L(p_k)
        gradient_changes_k = ||g(p_k) - g(w)||
        smoothness_k = ||g(p_k) - g(w)|| / ||p_k - w||

    The parameters stay as they are; it costs 1 + K gradients, one after another, with the memory of
    one. Each loss sees the same batch, and the same random key where `batch` has one. For a loss
    with auxiliary outputs give `lambda params, batch: loss(params, batch)[0]`.

    Args:
        loss: `loss(params, *batch)` returns a real scalar.
        params: a tree of floating or complex arrays.
        *batch: what else the loss takes.
        steps: s, (K,), above 0, in the unit of a learning rate of gradient descent: a grid around
            that of training shows what its next step may meet.

    Returns:
        `AlongGradient`. The distance of a step is that between the parameters as rounded to their
        dtype. Smoothness is NaN where a step does not move them, as where the gradient is 0.

    Raises:
        TypeError: parameters or steps that are not numbers.
        ValueError: no parameters, steps that are not one axis of numbers above 0.

    Example:
        >>> loss = lambda w, curvature: jnp.sum(curvature * w**2) / 2
        >>> w = jnp.array([0.75, 1.0])
        >>> seen = along_gradient(loss, w, 4.0, steps=jnp.array([0.125, 0.25]))
        >>> seen.losses.tolist(), float(seen.gradient_norm)
        ([0.78125, 0.0], 5.0)
        >>> seen.smoothness.tolist()
        [4.0, 4.0]

    Reference:
        How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604, where the steps are
        along the gradient of training. The abstract and summaries of the paper were read.
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972, gives these names,
        in the authors' code, to the change of the gradient of the last layer from one step of
        training to the next, which is `gradient_change`, over runs with different learning rates.
    """
    named_leaves(params, "params")
    steps = jnp.asarray(steps)
    if steps.ndim != 1 or steps.size == 0:
        raise ValueError(
            f"steps has shape {steps.shape}. Expected (K,), such as jnp.geomspace(0.5, 4, 8) times "
            "the learning rate."
        )
    check_number(steps, "steps", above=0, shape=steps.shape)
    at = jax.value_and_grad(loss)
    value, gradient = at(params, *batch)

    def after(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def moved(w: jax.Array, g: jax.Array) -> jax.Array:
            wide = statistic_dtype(w.dtype)  # of complex parameters JAX's gradient is the conjugate
            return (w.astype(wide) - step.astype(wide) * jnp.conj(g).astype(wide)).astype(w.dtype)

        there = jax.tree.map(moved, params, gradient)
        lower, other = at(there, *batch)
        return lower, distance(other, gradient), distance(there, params)

    losses, changes, distances = lax.map(after, steps)
    norm = l2(jax.tree.leaves(gradient))
    return AlongGradient(value, norm, losses, changes, changes / distances)


def gradient_change(before: Any, after: Any) -> jax.Array:
    """How far two gradients are from each other, as from one step of training to the next.

        ||after - before||_2, over all arrays of the tree

    Args:
        before: gradients, a tree of floating or complex arrays.
        after: a tree of the same arrays.

    Returns:
        A scalar, in float32 or wider.

    Raises:
        TypeError: arrays that are not floating or complex.
        ValueError: trees of different arrays.

    Example:
        >>> before = {"kernel": jnp.array([1.0, 1.0]), "bias": jnp.array([2.0])}
        >>> after = {"kernel": jnp.array([4.0, 1.0]), "bias": jnp.array([-2.0])}
        >>> float(gradient_change(before, after))
        5.0

    Reference:
        See `along_gradient`.
    """
    named_leaves(before, "before")
    named_leaves(after, "after")
    check_alike(before, after, "before", "after")
    return distance(jax.tree.map(jnp.asarray, after), jax.tree.map(jnp.asarray, before))
