"""Switchable Normalization: a learned mixture of instance, layer and batch statistics."""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_flag
from jaxnorm._core.moments import Moments
from jaxnorm._core.running import usable
from jaxnorm._frame import (
    Options,
    State,
    applied,
    averaged,
    check_state,
    measured,
    per_device,
    pooled,
    real,
    recalled,
)
from jaxnorm.methods import batch_norm, instance_norm, layer_norm


def init_switchable_norm(num_channels: int) -> State:
    """State before the first step: mean 0 and variance 1 for each channel, of the batch part.

    Args:
        num_channels: C.

    Returns:
        `mean` and `var`, (C,), float32. Without the batch part there is no state: pass {}.

    Example:
        >>> {name: t.shape for name, t in init_switchable_norm(3).items()}
        {'mean': (3,), 'var': (3,)}
    """
    return {
        "mean": jnp.zeros(num_channels, jnp.float32),
        "var": jnp.ones(num_channels, jnp.float32),
    }


def switchable_norm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    mean_logits: ArrayLike,
    var_logits: ArrayLike,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Standardize with a mixture of the statistics of instance, layer and batch normalization.

        mean = sum_k softmax(mean_logits)_k mean_k,    var = sum_k softmax(var_logits)_k var_k
        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with k over instance, layer and batch. Layer and batch statistics are pooled from the instance
    ones, so x is read once. Inference takes the batch part from the running statistics. Two logits
    with a state mix layer and batch alone. That is for x of shape (N, C), whose instance mean would
    be x itself, with variance 0. Two logits without a state mix instance and layer: examples do not
    meet, and training and inference agree.

    Args:
        x: real floating array with examples and channels.
        state: see `init_switchable_norm`; {} without the batch part.
        train: use the batch's statistics and update the state, or use the state.
        mean_logits: (3,) or (2,), of what is mixed, in the order instance, layer, batch; learned,
            from equal values on.
        var_logits: as many.
        momentum: weight of the old state per update; the authors use 0.9.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`. Examples are whole on each device; `axis_name` is for the batch part.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        channels' state.

    Raises:
        TypeError: x is complex or integer.
        ValueError: another number of logits, state of another number of channels or missing.

    Example:
        >>> x = jnp.array([[[0.0, 1.0], [2.0, 3.0]]])
        >>> only_instance = jnp.array([0.0, -jnp.inf])
        >>> y, _ = switchable_norm(
        ...     x, {}, train=True, mean_logits=only_instance, var_logits=only_instance, epsilon=0.0
        ... )
        >>> y.tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]

    Reference:
        Differentiable Learning-to-Normalize via Switchable Normalization, 2018, arXiv:1806.10779.
        The definition was read in the authors' code. Its instance variance divides by n - 1, and
        for (N, C), where it mixes layer and batch, so do both variances; its running variance
        starts at 0.
    """
    check_flag(train, "train")
    x = real(x, "switchable_norm")
    if state != {}:
        check_state(state, "switchable_norm", mean=1, var=1)
    instance = measured(x, instance_norm(), **per_device(options))
    dtype = instance.var.dtype
    shares = [jax.nn.softmax(jnp.asarray(t, dtype)) for t in (mean_logits, var_logits)]
    if shares[0].shape != shares[1].shape or shares[0].shape not in (
        ((2,), (3,)) if state else ((2,),)
    ):
        raise ValueError(
            f"mean_logits has shape {shares[0].shape}, var_logits {shares[1].shape}, and the state "
            f"holds {sorted(state)}. Expected (3,) with the state of init_switchable_norm, or "
            "(2,) with it, without the instance part, or (2,) with {}, without the batch part."
        )
    parts = [pooled(instance, layer_norm(), **per_device(options))]
    if len(shares[0]) == 3 or not state:
        parts = [instance, *parts]
    new = state
    if state:
        m = recalled(state, x, options.get("channel_axis", -1))
        if train:
            m = pooled(instance, batch_norm(), **options)
            keep = usable(m)
            new = {
                name: averaged(state[name], getattr(m, name), momentum, keep)
                for name in ("mean", "var")
            }
        parts.append(m)
    parts = [jax.tree.map(lambda t: jnp.broadcast_to(t, instance.mean.shape), m) for m in parts]
    mean, var = (
        _mixture([getattr(m, name) for m in parts], share)
        for name, share in zip(("mean", "var"), shares, strict=True)
    )
    return applied(x, Moments(instance.count, mean, var), epsilon, **options), new


def _mixture(values: Sequence[jax.Array], shares: jax.Array) -> jax.Array:
    """sum_k share_k value_k, by differences: the shares add up to 1 but for rounding, which would
    show where all values are large and equal."""
    first, *rest = values
    return first + sum(share * (t - first) for t, share in zip(rest, shares[1:], strict=True))


def _count_kinds(use_instance: bool, use_batch: bool) -> int:
    """How many kinds of statistics a layer mixes, that of layer normalization among them."""
    if not (use_instance or use_batch):
        raise ValueError(
            "one kind of statistics is nothing to mix. Got use_instance=False and use_batch=False; "
            "expected one of the two, or layer normalization."
        )
    return 1 + use_instance + use_batch


def _without_batch(x: ArrayLike, **options: Any) -> jax.Array:
    """`switchable_norm` of two logits as a method without state."""
    return switchable_norm(x, {}, train=True, **options)[0]
