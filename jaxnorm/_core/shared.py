"""x of half precision, handed to several functions."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shared:
    """x of half precision that several functions read: the derivative by it is added up in float32.

    In its own dtype every reader would round its part of the cotangent first. In float16 the parts
    may overflow where their sum is 0: x of standard deviation 1e-3 under a cotangent of 400.

    Args:
        x: the values. Readers leave out the derivative along it; those of their derivatives, which
            are of second order, go by x alone.
        wide: the same in float32. Nothing reads it, so it is never stored; readers take the
            derivative along it.
    """

    x: jax.Array
    wide: jax.Array

    @property
    def shape(self) -> Shape:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype


def shared(x: jax.Array) -> jax.Array:
    """x to hand to several functions: x itself where nothing is rounded, or no derivative taken."""
    wide = statistic_dtype(x.dtype)
    if x.dtype == wide or not isinstance(x, Tracer):
        return x
    return Shared(x, x.astype(wide))  # type: ignore[return-value]  # as an array


def widened(x: jax.Array) -> jax.Array:
    """x in the dtype of its statistics, for arithmetic of one's own."""
    return _widened(x.x, x.wide) if isinstance(x, Shared) else x.astype(statistic_dtype(x.dtype))


@jax.custom_jvp
def _widened(x: jax.Array, wide: jax.Array) -> jax.Array:
    return x.astype(wide.dtype)  # so that what is kept is x


_widened.defjvp(lambda primals, tangents: (primals[0].astype(primals[1].dtype), tangents[1]))


def own_and_wide(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """x, and what carries its derivative instead, if anything does."""
    return (x.x, x.wide) if isinstance(x, Shared) else (x, None)
