"""The page of the paper: both full-size computations as the literature writes them.

A statistic has one number for each block of x, and its shape says which elements share it, see
`Groups`. These two functions are what `mean_var` and `standardized` are tested to equal, in values
and in all derivatives, with weights and over devices. Nothing else uses them: read them first, and
the tuned forms as what a compiler needs to take few passes over x and to store nothing of its size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread


def mean_and_variance(
    x: jax.Array,
    w: jax.Array,
    shape: Shape,
    *,
    mean: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """count = sum w,    mean = sum w x / count,    var = sum w |x - mean|^2 / count."""

    def total(t: jax.Array) -> jax.Array:
        t = block_sum(t, shape)
        return t if axis_name is None else lax.psum(t, axis_name)

    w = jnp.broadcast_to(w, x.shape).astype(x.real.dtype)
    x = jnp.where((w != 0) | jnp.isfinite(x), x, 0)  # what does not count may be NaN
    count = total(w)
    n = jnp.where(count > 0, count, 1)
    m = total(w * x) / n if mean is None else jnp.zeros(shape, x.dtype)
    return count, m, total(w * jnp.abs(x - spread(m, x.shape)) ** 2) / n


def standardized(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
) -> jax.Array:
    """y = (x - mean) / sqrt(var + epsilon) * scale + bias."""
    mean, var = (spread(t, x.shape) for t in (mean, var))
    return (x - mean) * lax.rsqrt(var + epsilon) * scale + bias
