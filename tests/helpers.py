"""What tests of every kind share: arrays to try, derivatives, and how close two results are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def data(*shape, seed=0, dtype="f8"):
    """Numbers about 1 of standard deviation 2."""
    return np.random.default_rng(seed).normal(1, 2, shape).astype(dtype)


def close(got, want, atol=1e-11, rtol=0.0):
    """Trees of the same arrays, up to rounding."""
    chex.assert_trees_all_close(got, want, atol=atol, rtol=rtol)


def differentiated(f, has_aux=True):
    """f compiled as a function that returns y, its derivatives along one cotangent, and what f has
    beside y."""

    def run(*args):
        y, pull, *aux = jax.vjp(f, *args, has_aux=has_aux)
        return y, pull(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), *aux

    return jax.jit(run)


def double(tree):
    """Its arrays in double precision."""
    return jax.tree.map(lambda t: t.astype(jnp.float64), tree)
