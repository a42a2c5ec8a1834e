"""The divisors of released code: with an unbiased variance, or epsilon outside the root.

Where authors' code and the definition used here differ in these two, a function has the options
`correction` and `epsilon_outside`, and what they mean stands here once.
"""

import dataclasses

import jax.numpy as jnp

from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.moments import Moments


def with_divisor(
    m: Moments, epsilon: float, *, correction: int = 0, epsilon_outside: bool = False
) -> Moments:
    """m whose variance is the square of what x - mean is divided by.

    It is to be normalized with epsilon 0.

    sqrt(v + epsilon), or outside the root sqrt(v) + epsilon, with v = `corrected(var)`. The root of
    a variance of 0 has derivative 0 here.
    """
    check_epsilon(epsilon)
    var = corrected(m, correction).var
    if epsilon_outside:
        varies = var > 0
        var = jnp.square(jnp.where(varies, jnp.sqrt(jnp.where(varies, var, 1)), 0) + epsilon)
    else:
        var = var + epsilon
    return dataclasses.replace(m, var=var)


def corrected(m: Moments, correction: int) -> Moments:
    """m with the variance of a sample of n.

    It is var max(n, 1) / max(n - correction, 1), never less than var.

    n is the count, so weights count elements: it has no meaning for weights of another scale, and
    where they add up to less than one element the variance stays the biased one.
    """
    if not correction:
        return m
    n = m.count.astype(m.var.dtype)
    var = m.var * jnp.maximum(n, 1) / jnp.maximum(n - correction, 1)
    return dataclasses.replace(m, var=var)
