"""How much outputs change when inputs or activations are disturbed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import check_number
from jaxnorm._core.groups import Specification, resolve, row_of
from jaxnorm._core.moments import inexact, spread_to
from jaxnorm.probe._trees import check_alike, distance, l2, named_leaves


def noise(
    key: jax.Array,
    x: ArrayLike,
    groups: Specification,
    *,
    mean: ArrayLike = 0.0,
    std: ArrayLike = 1.0,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """Normal noise to add to x, one draw for each set of `groups`.

        noise = mean + std z,    z ~ N(0, 1) for each set

    `Groups()` draws for each element. `methods.group_norm(32)` draws for each example and group of
    channels, which shifts what a group norm has just centered.

    Args:
        key: of `jax.random`, one for each layer and step.
        x: what the noise is for, floating or complex; only its shape and dtype matter. For complex
            x the noise is complex, with E|z|^2 = 1.
        groups: the sets that share a draw: `Groups`, a row of the table, or a statistic's shape.
        mean: a number or traced scalar.
        std: a number or traced scalar, 0 or more.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        An array of x's shape and dtype.

    Raises:
        TypeError: x is not floating or complex, or mean or std is not a number.
        ValueError: axes that do not split, a negative std.

    Example:
        >>> from jaxnorm import methods
        >>> x = jnp.zeros((2, 3, 4))
        >>> t = noise(jax.random.key(0), x, methods.group_norm(2), mean=0.5, std=1.25)
        >>> t.shape, len(set(t.ravel().tolist()))
        ((2, 3, 4), 4)

    Reference:
        How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604: noise of another
        mean and variance in each step behind every batch norm, for each activation.
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972: one draw for each
        example and group, (mean, std) = (0.001, 1.001) and (0.5, 1.25), in the authors' code.
    """
    x = inexact(x)
    check_number(mean, "mean")
    check_number(std, "std", at_least=0)
    sets, _ = row_of(groups, x.shape, batch_axis, channel_axis)
    shape, _ = resolve(sets, x.shape, batch_axis, channel_axis)
    dtype = statistic_dtype(x.dtype)
    z = jax.random.normal(key, shape, dtype)
    draws = jnp.asarray(mean, dtype) + jnp.asarray(std, dtype) * z
    return jnp.broadcast_to(spread_to(draws, x.shape), x.shape).astype(x.dtype)


def sensitivity(forward: Callable[[jax.Array], Any], *, strengths: ArrayLike) -> jax.Array:
    """How much the outputs change with the strength of a disturbance.

        change_k = ||forward(s_k) - forward(0)|| / ||forward(0)||

    in l2 norm over all outputs. What is disturbed is up to `forward`: its input, as in
    `lambda s: model(x + s * noise(key, x, Groups()))`, a contrast, a rotation, or what comes out of
    every normalization, by `linen.alter_norms` or `nnx.alter_norms`.

    Args:
        forward: (strength) -> outputs, or a loss: a tree of floating or complex arrays. It is
            called for 0 and for each strength with a scalar array, so that `jax.jit(forward)`
            compiles once.
        strengths: s, (K,), real, in the unit that `forward` gives them.

    Returns:
        (K,), in float32 or wider. NaN or infinite where all outputs are 0 without a disturbance.

    Raises:
        TypeError: strengths or outputs that are not numbers.
        ValueError: strengths that are not one axis of numbers, outputs of other shapes.

    Example:
        >>> x = jnp.array([3.0, 4.0])
        >>> forward = lambda s: {"logits": x + s * jnp.array([0.0, 1.0])}
        >>> sensitivity(forward, strengths=jnp.array([0.0, 5.0])).tolist()
        [0.0, 1.0]

    Reference:
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972, and How Does Batch
        Normalization Help Optimization?, 2018, arXiv:1805.11604, train under noise and
        compare accuracies. For this measure of one network no paper is followed.
    """
    strengths = jnp.asarray(strengths)
    if strengths.ndim != 1 or strengths.size == 0:
        raise ValueError(
            f"strengths has shape {strengths.shape}. Expected (K,), such as "
            "jnp.array([0.1, 0.2, 0.5])."
        )
    check_number(strengths, "strengths", shape=strengths.shape)
    reference = forward(jnp.zeros((), strengths.dtype))
    size = l2([t for _, t in named_leaves(reference, "the output of forward")])
    changes = []
    for strength in strengths:
        outputs = forward(strength)
        check_alike(reference, outputs, "forward(0)", "forward(strength)")
        changes.append(distance(outputs, reference) / size)
    return jnp.stack(changes)
