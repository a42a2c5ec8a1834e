"""Stroke 3: x standardized with given statistics, in one full-size pass, with its derivative.

Each statistic is spread to the elements on small arrays first; then one pass over x does the rest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxnorm._core.arithmetic import counts, statistic_dtype
from jaxnorm._core.axes import Shape
from jaxnorm._core.platforms import Platform, by_platform
from jaxnorm._core.xla import barrier, kept_small


@jax.custom_jvp
def inverse_root(v: jax.Array) -> jax.Array:
    """1 / sqrt(v), whose derivative does not pass through v^(-3/2).

    JAX divides 1 / sqrt(v) by v before it multiplies by the tangent. In float32 that is 0 from
    v = 4e25 on, where the gradient by the variance would vanish, and infinite below 1e-26.
    """
    return lax.rsqrt(v)


@inverse_root.defjvp
def _(primals, tangents):
    a = inverse_root(*primals)
    return a, -0.5 * a * (tangents[0] / primals[0])


def _coefficients(
    p: Platform, shape: Shape, mean: jax.Array, v: jax.Array, g: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """s, a and g of y = (x - s) a g + b, spread over the groups of every axis that is split.

    g is None where a carries it.
    """
    s, a = mean, inverse_root(v).astype(mean.dtype)
    if any(k not in (1, n) for t in (s, a) for n, k in zip(shape, t.shape, strict=True)):
        s, a = (p.to_channels(t, shape) for t in (s, a))
    if g is not None and any(
        p == q == 1 != n for p, q, n in zip(a.shape, g.shape, shape, strict=True)
    ):
        a, g = a * g, None  # one small product instead of a multiplication at full size
    return s, a, g


def _seen(t: jax.Array, x: jax.Array, w: jax.Array | None) -> jax.Array:
    """t, and 0 where x does not count and is not finite."""
    return t if w is None else jnp.where(counts(w) | jnp.isfinite(x), t, 0)


def _shifted(x: jax.Array, w: jax.Array | None, s: jax.Array) -> jax.Array:
    return _seen(x.astype(statistic_dtype(x.dtype)) - s, x, w)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1))
def standardized(
    dtype: jnp.dtype,
    kept: bool,
    x: jax.Array,
    wide: jax.Array | None,
    w: jax.Array | None,
    mean: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    b: jax.Array | None,
) -> jax.Array:
    """y = (x - mean) / sqrt(v) g + b, in one pass; `kept` where it will be differentiated.

    The derivative by x goes by `wide` where it is given, see `Shared`.
    """
    return by_platform(partial(_pass, dtype, kept), x, w, mean, v, g, b)


def _pass(dtype, kept, p, x, w, mean, v, g, b):
    s, a, g = _coefficients(p, x.shape, mean, v, g)
    # Rows of channels with a scale go on from their statistics in one kernel on a GPU, which a
    # barrier would break in two. Everywhere else the pass must not be joined with what made s and
    # a: XLA would make them again for every element.
    if kept or g is None or not p.rows_on_chip:
        x, s, a, g, b = barrier((x, s, a, g, b))
    y = _shifted(x, w, s) * a
    y = y if g is None else y * g
    return (y if b is None else y + b).astype(dtype)


def _coefficients_along(p, shape, primals, tangents):
    """`_coefficients`, and their derivative along the tangents that are there.

    It is None where there is none.
    """
    live = [i for i, t in enumerate(tangents) if t is not None]

    def f(*ts):
        return _coefficients(
            p, shape, *(ts[live.index(i)] if i in live else t for i, t in enumerate(primals))
        )

    if not live:
        return f(), (None, None, None)
    (s, a, g), (ds, da, dg) = jax.jvp(f, [primals[i] for i in live], [tangents[i] for i in live])
    of_mean, of_v, of_g = (i in live for i in range(3))
    return (s, a, g), (
        ds if of_mean else None,
        da if of_v or (of_g and g is None) else None,
        dg if of_g else None,
    )


def _along(dtype, p, tangents, x, w, mean, v, g):
    """Derivative of y along the tangents that are there.

        dy = dx a g + (x - s) g da - a g ds + (x - s) a dg + db

    It is linear in the tangents. In reverse mode JAX transposes it: each term becomes one full-size
    pass over the cotangent, a product for dx and a sum for each small array, which together are the
    closed form. Reverse mode keeps x and the statistics, from which s and a are made again.
    """
    (s, a, g), small = _coefficients_along(p, x.shape, (mean, v, g), tangents[1:4])
    tangents = zip(("dx", "ds", "da", "dg", "db"), (tangents[0], *small, tangents[4]), strict=True)
    tangents = {name: t for name, t in tangents if t is not None}
    # The gradient by s is -a g times the sum of the cotangent, that by b the sum itself. Where a
    # carries g and nothing is masked, one sum therefore serves both.
    if g is None and w is None and "ds" in tangents:
        small = -a * tangents.pop("ds")
        tangents["db"] = tangents["db"] + small if "db" in tangents else small

    def scaled(t, g):
        return t if g is None else t * g

    passes = {
        "dx": lambda t, x, s, a, g: scaled(_seen(t.astype(statistic_dtype(t.dtype)), x, w) * a, g),
        "da": lambda t, x, s, a, g: scaled(_shifted(x, w, s), g) * t,
        "ds": lambda t, x, s, a, g: _seen(scaled(-a * t, g), x, w),
        "dg": lambda t, x, s, a, g: _shifted(x, w, s) * a * t,
        "db": lambda t, x, s, a, g: t,
    }
    terms = []
    x, s, a, g = p.alias((x, s, a, g))
    for name in [name for name in passes if name in tangents]:
        t = tangents.pop(name)
        # The tangent of a small array is spread in two steps, so that in reverse mode the sum over
        # the cotangent is taken in two: at channel resolution, and over groups.
        term = passes[name](t if name == "dx" else p.by_first_sums(t, x.shape), x, s, a, g)
        term = p.as_result(term, x.shape, dtype)
        # On a CPU every pass reads an alias of its own, made after the pass before: otherwise XLA
        # stores a float32 copy of x that several share. The tangents are tied apart from x,
        # because JAX takes whatever is tied to a tangent for linear, too.
        x, s, a, g = p.alias((x, s, a, g))
        term, tangents = p.alias((term, tangents))
        terms.append(term)
    return jnp.broadcast_to(sum(terms[1:], terms[0]), x.shape).astype(dtype)


def _along_by_platform(dtype, *args):
    return by_platform(partial(_along, dtype), *args)


def _tangent(dtype, kept, primals, tangents):
    x, wide, w, mean, v, g, b = primals
    dx, dwide, _, *small = tangents
    dx = dx if wide is None else dwide
    y = standardized(dtype, True, x, None, *primals[2:])
    live = tuple(None if t is None or isinstance(t, SymbolicZero) else t for t in (dx, *small))
    if all(t is None for t in live):
        return y, jnp.zeros_like(y)
    return y, kept_small(_along_by_platform, dtype, live, x, w, mean, v, g)


standardized.defjvp(_tangent, symbolic_zeros=True)
