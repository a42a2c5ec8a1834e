"""The divisors of released code: with an unbiased variance, or epsilon outside the root.

Where authors' code and the definition used here differ in these two, a function has the options
`correction` and `epsilon_outside`, and what they mean stands here once.
"""

import dataclasses

import jax.numpy as jnp

from jaxnorm._moments import Moments


def with_divisor(
    m: Moments, epsilon: float, *, correction: int = 0, epsilon_outside: bool = False
) -> Moments:
    """m whose variance is the square of what x - mean is divided by, to be normalized with epsilon
    0.

    sqrt(v + epsilon), or outside the root sqrt(v) + epsilon, with v = var n / (n - correction). The
    root of a variance of 0 has derivative 0 here.
    """
    var = m.var
    if correction:
        n = m.count.astype(var.dtype)
        var = var * n / jnp.maximum(n - correction, 1)
    if epsilon_outside:
        varies = var > 0
        var = jnp.square(jnp.where(varies, jnp.sqrt(jnp.where(varies, var, 1)), 0) + epsilon)
    else:
        var = var + epsilon
    return dataclasses.replace(m, var=var)
