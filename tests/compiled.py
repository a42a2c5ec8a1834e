"""What tests compile: without optimizations, since operation by operation takes longer and so does an optimized program."""

from functools import partial

import jax

from jaxnorm import norm

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnames="method")
def norm_and_gradient(x, gy, method, epsilon):
    """Output of a row of the table, and the gradient of x."""
    y, pull = jax.vjp(lambda x: norm(x, method, epsilon=epsilon)[0], x)
    return y, pull(gy)[0]
