"""An activation as a value: what it computes, apart from the arrays that it is closed over."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function of arrays, equal to another if both compute the same, so that jit knows it again.

    Every call of a layer may define its activation anew.
    """

    jaxpr: Jaxpr = dataclasses.field(compare=False)  # of consts and arguments
    text: str

    def __call__(self, y: jax.Array, *consts: jax.Array) -> jax.Array:
        return jaxpr_as_fun(ClosedJaxpr(self.jaxpr, consts))(y)[0]


def traced(f: Callable[[jax.Array], jax.Array], y: jax.Array) -> tuple[Traced, Sequence[jax.Array]]:
    """A function (y, *arrays) that is f, and the arrays that f is closed over."""
    closed = jax.make_jaxpr(lambda y: f(y))(y)  # JAX would remember what f itself was closed over
    return Traced(closed.jaxpr, str(closed.jaxpr)), closed.consts
