"""What tests compile: without optimizations, since operation by operation takes longer and so does
an optimized program."""

from functools import partial

import jax

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
