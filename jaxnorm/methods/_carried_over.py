"""Statistics of past batches for the present kernel, to first order.

This is what `cross_iteration_norm` remembers and how it is used.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import counts, statistic_dtype
from jaxnorm._core.devices import all_sum, device_groups_of, varying_like
from jaxnorm._core.moments import Moments, as_weights
from jaxnorm._core.platforms import total
from jaxnorm.methods._frame import along_channels
from jaxnorm.methods._method import Options, State

Linear = Callable[[jax.Array, jax.Array], jax.Array]


def carried_over(
    state: State,
    kernel: jax.Array,
    window: ArrayLike,
    rho: ArrayLike,
    y: jax.Array,
    options: Options,
) -> Moments:
    """The window's moments for the present kernel, (window, 1, 1, 1, C).

    The count of what is outside of the window is 0.
    """
    wide = statistic_dtype(y.dtype)
    count, mean, var, patch, slope = (
        lax.stop_gradient(state[f"past_{name}"]).astype(wide)
        for name in ("count", "mean", "var", "patch", "slope")
    )
    size, groups, channels = len(count), patch.shape[-1], kernel.shape[-1]
    used = (count > 0) & (jnp.arange(size, dtype=wide) < jnp.asarray(window, wide))
    kernel, rho = kernel.astype(wide), jnp.asarray(rho, wide)
    patch, slope = patch.reshape(size, -1, groups), slope.reshape(size, -1, channels)
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    d = product("krg,rgc->kgc", patch, kernel.reshape(-1, groups, channels // groups))
    d = d.reshape(mean.shape) - mean
    e = product("kro,ro->ko", slope, kernel.reshape(-1, channels)) - 2 * var
    mean, var = mean + rho * d, jnp.maximum(var + rho * e - jnp.square(rho * d), 0)
    count = jnp.broadcast_to(jnp.where(used, count, 0)[:, None], mean.shape)
    return Moments(*(along_channels(t, y, options) for t in (count, mean, var)))


def derivatives(
    y: jax.Array,
    inputs: jax.Array,
    kernel: jax.Array,
    m: Moments,
    layer: Linear,
    groups: int,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Derivatives of the mean and of the variance by the kernel.

    That of the mean is the mean input patch, the same for all channels of a group; that of the
    variance is twice the mean of patch times centered y.
    """
    batch, channel = options["batch_axis"], options["channel_axis"]
    axis_name, weights = options.get("axis_name"), options.get("weights")
    inputs, kernel = (t.astype(statistic_dtype(y.dtype)) for t in (inputs, kernel))
    # else shard_map's check_vma=True sums over devices also without an axis_name
    kernel = varying_like(kernel, y)
    of_group = kernel.shape[-1] // groups
    count = jnp.where(m.count > 0, m.count, 1)
    centered = y.astype(m.mean.dtype) - m.mean
    # The patches do not depend on the output channel: one for each group will do, and without
    # weights the sum over examples is taken first.
    if weights is None:
        shape = tuple(1 if i == batch else n for i, n in enumerate(inputs.shape))
        examples, share = _total(inputs, shape, inputs.dtype), jnp.ones([1] * y.ndim, count.dtype)
    else:
        w = as_weights(weights, y)
        centered = jnp.where(counts(w), centered, 0) * w.astype(centered.dtype)
        share, examples = w.astype(count.dtype), inputs
    centered = centered / count
    slope = _by_kernel(layer, inputs, kernel, centered)
    share = share / lax.slice_in_dim(count, 0, 1, axis=channel)
    patch = _by_kernel(layer, examples, kernel[..., ::of_group], share)

    # 0, but for the rounding of the mean
    residual = centered.sum([i for i in range(y.ndim) if i != channel])
    devices = device_groups_of(axis_name, options.get("axis_index_groups"))
    patch, slope, residual = all_sum((patch, slope, residual), axis_name, devices)
    residual = residual.reshape([1] * (kernel.ndim - 1) + [-1])
    return patch, 2 * (slope - residual * jnp.repeat(patch, of_group, axis=-1))


def _by_kernel(
    layer: Linear, inputs: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> jax.Array:
    """The derivative of <cotangent, layer(inputs, kernel)> by the kernel."""
    out = jax.eval_shape(layer, inputs, kernel)
    cotangent = jnp.broadcast_to(varying_like(cotangent, inputs), out.shape).astype(out.dtype)
    return jax.linear_transpose(lambda k: layer(inputs, k), kernel)(cotangent)[0]


# Outside of jit every call would compile its branches again.
_total = jax.jit(total, static_argnums=(1, 2))
