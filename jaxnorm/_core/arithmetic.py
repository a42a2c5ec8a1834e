"""The precision of statistics, and arithmetic with weights and counts."""

import jax
import jax.numpy as jnp


def statistic_dtype(dtype: jnp.dtype, real: bool = False) -> jnp.dtype:
    """float32 or wider; complex for complex unless `real`."""
    info = jnp.finfo(dtype)
    if info.bits < 32:
        return jnp.dtype(jnp.float32)
    return info.dtype if real else jnp.dtype(dtype)


def abs2(t: jax.Array) -> jax.Array:
    return jnp.square(t.real) + jnp.square(t.imag) if jnp.iscomplexobj(t) else jnp.square(t)


def counts(w: jax.Array) -> jax.Array:
    """Where the weight is not 0."""
    return w if w.dtype == bool else w != 0


def scale_by(t: jax.Array, real: jax.Array) -> jax.Array:
    return t * real.astype(t.dtype)


def divide(t: jax.Array, real: jax.Array) -> jax.Array:
    return t / real.astype(t.dtype)


def quotient(total: jax.Array, count: jax.Array) -> jax.Array:
    """total / count, and the total itself where nothing is counted."""
    return divide(total, jnp.where(count > 0, count, 1))
