"""Cross-Iteration Batch Normalization: statistics of a window of batches, each carried over to the
present weights."""

from collections.abc import Callable, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import counts, statistic_dtype
from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_flag, check_number
from jaxnorm._core.devices import all_sum, device_groups_of, varying_like
from jaxnorm._core.moments import Moments, as_weights
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import usable
from jaxnorm._core.shared import own_and_wide
from jaxnorm._frame import (
    Options,
    State,
    along_channels,
    applied,
    averaged,
    check_state,
    measured,
    real,
    remembered,
)
from jaxnorm.methods import batch_norm

Linear = Callable[[jax.Array, jax.Array], jax.Array]


def init_cross_iteration(
    kernel_shape: Sequence[int], *, window: int = 3, feature_group_count: int = 1
) -> State:
    """State before the first step: mean 0 and variance 1 for each channel, and no batch in the
    window.

    Args:
        kernel_shape: of the convolution or dense layer in front, (*spatial, inputs, C): outputs
            last, and inputs those of one group of features, as in Flax.
        window: most batches before the present one that are pooled with it.
        feature_group_count: groups of features of a grouped convolution.

    Returns:
        `mean` and `var`, (C,), of inference; and for each batch of the window, newest first,
        `past_count` (window,), its elements or 0; `past_mean` and `past_var`, (window, C);
        `past_patch`, (window, *kernel_shape[:-1], feature_group_count), the mean input patch;
        `past_slope`, (window, *kernel_shape), the derivative of its variance by the kernel.
        float32.

    Raises:
        ValueError: a window below 1, a kernel that is none, groups that do not divide the channels.

    Example:
        >>> state = init_cross_iteration((3, 3, 8, 16), window=2)
        >>> {name: state[name].shape for name in ("past_count", "past_mean", "past_var")}
        {'past_count': (2,), 'past_mean': (2, 16), 'past_var': (2, 16)}
        >>> {name: state[name].shape for name in ("past_patch", "past_slope")}
        {'past_patch': (2, 3, 3, 8, 1), 'past_slope': (2, 3, 3, 8, 16)}
    """
    shape = tuple(kernel_shape)
    if window < 1 or len(shape) < 2 or feature_group_count < 1 or shape[-1] % feature_group_count:
        raise ValueError(
            f"Got window={window}, feature_group_count={feature_group_count} for a kernel of shape "
            f"{shape}. Expected a window of 1 or more, a kernel of shape (..., inputs, C), and "
            "groups that divide C."
        )
    return {
        "mean": jnp.zeros(shape[-1], jnp.float32),
        "var": jnp.ones(shape[-1], jnp.float32),
        "past_count": jnp.zeros(window, jnp.float32),
        "past_mean": jnp.zeros((window, shape[-1]), jnp.float32),
        "past_var": jnp.zeros((window, shape[-1]), jnp.float32),
        "past_patch": jnp.zeros((window, *shape[:-1], feature_group_count), jnp.float32),
        "past_slope": jnp.zeros((window, *shape), jnp.float32),
    }


def cross_iteration_norm(
    y: ArrayLike,
    state: State,
    *,
    train: bool,
    inputs: ArrayLike,
    kernel: ArrayLike,
    layer: Linear = jnp.matmul,
    window: ArrayLike | None = None,
    rho: ArrayLike = 1.0,
    momentum: ArrayLike = 0.9,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Batch normalization of y = layer(inputs, kernel) over this batch and the last ones, as if
    with the present kernel.

    With m and v the mean and variance of batch t in the window, W_t its kernel and W the present
    one, the first-order change of m and of the mean square m^2 + v along rho (W - W_t) makes

        d = <dm/dW, W - W_t>,    e = <dv/dW, W - W_t>
        m' = m + rho d,    v' = max(v + rho e - (rho d)^2, 0)

    These are pooled with those of the present batch, weighted by count:

        mean = sum n m' / sum n,    var = sum n (v' + (m' - mean)^2) / sum n

    Gradients flow through the present batch alone. No old kernel is kept: y is linear in W, so that
    <dm/dW, W_t> = m and <dv/dW, W_t> = 2 v. d is exact for fixed inputs; v' is never more than what
    the old inputs give under W.

    With rho = 0 the old statistics are pooled as they are; with window = 0, which is how training
    begins, this is batch normalization. While the kernel does not change, as in gradient
    accumulation, both are exactly the statistics of the concatenated batches for any rho: window =
    the number of the micro-batch within its step, from 0, is then Cross mini-Batch Normalization
    (CmBN). Inference uses running statistics of the batches, each by itself, as batch
    normalization.

    Args:
        y: output of the layer in front, real; normalized.
        state: see `init_cross_iteration`.
        train: pool and update the state, or use the running mean and variance.
        inputs: input of the layer in front, real, with y's batch and channel axes.
        kernel: its weights, outputs last; no bias.
        layer: the layer in front, `y = layer(inputs, kernel)`: linear in each, for any number of
            examples, and of output channels that is a multiple of the groups. For example
            `functools.partial(lax.conv_general_dilated, ...)`; a dense layer without one.
        window: batches before this one to pool with, at most the state's: a number or traced
            scalar, see `cross_iteration_window`. None takes all.
        rho: how far statistics are carried over, 0 to 1.
        momentum: weight of the old running statistics per update.
        epsilon: added to the variance, in the unit of y squared.
        **options: as `norm`. With `weights`, which may not differ between channels, the inputs must
            be finite also where they do not count, as for the kernel's gradient. `axis_name` also
            sums one array of the kernel's size.

    Returns:
        The normalized y, and the new state. A batch that is empty or not finite does not enter it.

    Raises:
        TypeError: y is complex or integer.
        ValueError: state of another kernel, weights that differ between channels, rho outside of 0
            to 1, a negative window.

    Example:
        >>> kernel, state = jnp.ones((1, 1)), init_cross_iteration((1, 1))
        >>> for inputs in (jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])):
        ...     y = inputs @ kernel
        ...     z, state = cross_iteration_norm(
        ...         y, state, train=True, inputs=inputs, kernel=kernel, epsilon=0.0
        ...     )
        >>> (z * jnp.sqrt(5.0)).round(5).tolist()  # mean 3 and variance 5 of both batches
        [[1.0], [3.0]]

    Reference:
        Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712. The definition follows the
        authors' code, except for these: the maximum in v', which is the paper's as cited by others,
        where the code drops the entry; epsilon inside the root, which is a switch there; weights by
        count, where every batch weighs the same there; biased variances, where the running ones and
        those that normalize during burn-in are divided by n - 1 there. Their scale starts uniform
        in [0, 1), ours at 1: `scale_init=jax.nn.initializers.uniform(1.0)` in the layers is theirs.
        CmBN: AlexeyAB's darknet.
    """
    check_flag(train, "train")
    y, *others = (real(t, "cross_iteration_norm") for t in (y, inputs, kernel))
    inputs, kernel = (own_and_wide(t)[0] for t in others)
    channel_axis = options.get("channel_axis", -1)
    check_state(
        state,
        "cross_iteration",
        mean=1,
        var=1,
        past_count=1,
        past_mean=2,
        past_var=2,
        past_patch=kernel.ndim + 1,
        past_slope=kernel.ndim + 1,
    )
    _check(state, y, inputs, kernel, channel_axis, options.get("weights"))
    mean, var = (along_channels(state[name], y, channel_axis) for name in ("mean", "var"))
    if not train:
        return applied(y, Moments(jnp.ones_like(mean), mean, var), epsilon, **options), state
    check_number(rho, "rho", at_least=0, at_most=1)
    if window is not None:
        check_number(window, "window", at_least=0)
    present = measured(y, batch_norm(), **options)
    past = _carried_over(state, lax.stop_gradient(kernel), window, rho, y, channel_axis)
    union = pool(
        jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), present, past), (1, *mean.shape)
    )
    z = applied(y, jax.tree.map(lambda t: t[0], union), epsilon, **options)

    patch, slope = _derivatives(
        *lax.stop_gradient((own_and_wide(y)[0], inputs, kernel, present)),
        layer,
        state["past_patch"].shape[-1],
        options,
    )
    keep = usable(present)
    entry = {
        "count": present.count.reshape(-1)[0],
        "mean": present.mean,
        "var": present.var,
        "patch": patch,
        "slope": slope,
    }
    finite = keep.all() & jnp.isfinite(patch).all() & jnp.isfinite(slope).all()
    new = {"mean": averaged(state["mean"], present.mean, momentum, keep)}
    new["var"] = averaged(state["var"], present.var, momentum, keep)
    for name, value in entry.items():
        old = state[f"past_{name}"]
        pushed = jnp.concatenate([value.reshape(1, *old.shape[1:]).astype(old.dtype), old[:-1]])
        new[f"past_{name}"] = remembered(old, pushed, finite)
    return z, new


def _carried_over(
    state: State,
    kernel: jax.Array,
    window: ArrayLike | None,
    rho: ArrayLike,
    y: jax.Array,
    channel_axis: int,
) -> Moments:
    """The window's moments for the present kernel, (window, 1, 1, 1, C); the count of what is
    outside of it is 0."""
    wide = statistic_dtype(y.dtype)
    count, mean, var, patch, slope = (
        lax.stop_gradient(state[f"past_{name}"]).astype(wide)
        for name in ("count", "mean", "var", "patch", "slope")
    )
    used = (
        count > 0
        if window is None
        else (count > 0) & (jnp.arange(len(count), dtype=wide) < jnp.asarray(window, wide))
    )
    kernel, rho = kernel.astype(wide), jnp.asarray(rho, wide)
    by_group = kernel.reshape(-1, patch.shape[-1], kernel.shape[-1] // patch.shape[-1])
    patch, slope = (
        patch.reshape(len(count), *by_group.shape[:2]),
        slope.reshape(len(count), -1, kernel.shape[-1]),
    )
    exact = lax.Precision.HIGHEST
    d = jnp.einsum("krg,rgc->kgc", patch, by_group, precision=exact).reshape(mean.shape) - mean
    e = (
        jnp.einsum("kro,ro->ko", slope, kernel.reshape(-1, kernel.shape[-1]), precision=exact)
        - 2 * var
    )
    mean, var = mean + rho * d, jnp.maximum(var + rho * e - jnp.square(rho * d), 0)
    count = jnp.broadcast_to(jnp.where(used, count, 0)[:, None], mean.shape)
    return Moments(*(along_channels(t, y, channel_axis) for t in (count, mean, var)))


def _derivatives(
    y: jax.Array,
    inputs: jax.Array,
    kernel: jax.Array,
    m: Moments,
    layer: Linear,
    groups: int,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Derivatives by the kernel: of the mean, which is the mean input patch, the same for all
    channels of a group; and of the variance, twice the mean of patch times centered y."""
    axis_name, batch = options.get("axis_name"), single_axis(options.get("batch_axis", 0), y.shape)
    channel, weights = single_axis(options.get("channel_axis", -1), y.shape), options.get("weights")
    w = None if weights is None else as_weights(weights, y)
    inputs, kernel = (t.astype(statistic_dtype(y.dtype)) for t in (inputs, kernel))
    # else shard_map's check_vma=True sums over devices also without an axis_name
    kernel = varying_like(kernel, y)
    count = jnp.where(m.count > 0, m.count, 1)

    centered = y.astype(m.mean.dtype) - m.mean
    if w is not None:
        centered = jnp.where(counts(w), centered, 0) * w.astype(centered.dtype)
    centered = centered / count
    slope = _by_kernel(layer, inputs, kernel, centered)

    # The patches do not depend on the output channel: one for each group will do, and without
    # weights the sum over examples is taken first.
    share = (
        jnp.full([1] * y.ndim, y.shape[batch], count.dtype) if w is None else w.astype(count.dtype)
    )
    share = share / lax.slice_in_dim(count, 0, 1, axis=channel)
    inputs = inputs.mean(batch, keepdims=True) if w is None else inputs
    patch = _by_kernel(layer, inputs, kernel[..., :: kernel.shape[-1] // groups], share)

    # 0, but for the rounding of the mean
    residual = centered.sum([i for i in range(y.ndim) if i != channel])
    sums = all_sum(
        (patch, slope, residual),
        axis_name,
        device_groups_of(axis_name, options.get("axis_index_groups")),
    )
    patch, slope, residual = sums
    residual = residual.reshape([1] * (kernel.ndim - 1) + [-1])
    return patch, 2 * (slope - residual * jnp.repeat(patch, kernel.shape[-1] // groups, axis=-1))


def _by_kernel(
    layer: Linear, inputs: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> jax.Array:
    """The derivative of <cotangent, layer(inputs, kernel)> by the kernel."""
    out = jax.eval_shape(layer, inputs, kernel)
    cotangent = jnp.broadcast_to(varying_like(cotangent, inputs), out.shape).astype(out.dtype)
    return jax.linear_transpose(lambda k: layer(inputs, k), kernel)(cotangent)[0]


def _check(
    state: State,
    y: jax.Array,
    inputs: jax.Array,
    kernel: jax.Array,
    channel_axis: int,
    weights: ArrayLike | None,
) -> None:
    shape, groups = state["past_slope"].shape[1:], state["past_patch"].shape[-1]
    channel = single_axis(channel_axis, y.shape)
    if (
        kernel.shape != shape
        or shape[-1] != y.shape[channel]
        or shape[-2] * groups != inputs.shape[channel]
    ):
        raise ValueError(
            f"state is that of a kernel of shape {shape} in {groups} groups: {shape[-2] * groups} "
            f"channels in, {shape[-1]} out. Got a kernel of shape {kernel.shape}, inputs of shape "
            f"{inputs.shape}, y of shape {y.shape} with channel_axis={channel_axis}. Expected the "
            "state that init_cross_iteration makes for this kernel."
        )
    if weights is not None and as_weights(weights, y).shape[channel] != 1:
        raise ValueError(
            f"weights of shape {jnp.shape(weights)} differ between the channels of y, shape "
            f"{y.shape}. Expected size 1 on axis {channel_axis}: all channels of cross-iteration "
            "statistics have the same input patches."
        )
