"""Stroke 3: x standardized with given statistics, in one full-size pass, with its derivative.

Each statistic is spread to the elements on small arrays first; then one pass over x does the rest,
and whatever function of the result follows.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxnorm._core.arithmetic import counts, statistic_dtype
from jaxnorm._core.passes import sum_of_passes
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


class Result(NamedTuple):
    """What is known of the result when the program is traced."""

    dtype: jnp.dtype
    after: Callable[..., jax.Array] | None
    """(y, *arrays) -> what becomes of y, element by element, in the same pass."""
    kept: bool
    """For the backward pass."""
    of_v: Callable[[jax.Array], jax.Array] = inverse_root
    """v -> by what x - mean is multiplied."""


def _coefficients(
    result: Result,
    p: Platform,
    x: jax.Array,
    mean: jax.Array | None,
    v: jax.Array,
    g: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    """s, a and g, spread over the groups of every axis that is split.

    s is None where the mean is 0, g where a carries it.
    """
    shape, s, a = x.shape, mean, result.of_v(v).astype(statistic_dtype(x.dtype))
    if any(k not in (1, n) for n, k in zip(shape, a.shape, strict=True)):
        s, a = None if s is None else p.to_channels(s, shape), p.to_channels(a, shape)
    if g is not None and any(
        p == q == 1 != n for p, q, n in zip(a.shape, g.shape, shape, strict=True)
    ):
        a, g = a * g, None  # one small product instead of a multiplication at full size
    return s, a, g


def _affine(x, seen, s, a, g, b):
    """(x - s) a g + b for x in the dtype of the statistics. Where x was not seen, x - s is 0.

    Of the others, one that is as large as x may be narrower.
    """
    y = _shifted(x, seen, s) * _scaled(a, g)
    return y if b is None else y + b.astype(y.dtype)


def _wide_and_seen(x: jax.Array, w: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """x in the dtype of its statistics, and where it counts or is finite."""
    seen = None if w is None else counts(w) | jnp.isfinite(x)
    return x.astype(statistic_dtype(x.dtype)), seen


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def standardized(
    result: Result,
    x: jax.Array,
    wide: jax.Array | None,
    w: jax.Array | None,
    mean: jax.Array | None,
    v: jax.Array,
    g: jax.Array | None,
    b: jax.Array | None,
    *rest: jax.Array,
) -> jax.Array:
    """after((x - mean) of_v(v) g + b, *rest), in one pass.

    The derivative by x goes by `wide` where it is given, see `Shared`.
    """
    return by_platform(partial(_pass, result), x, w, mean, v, g, b, *rest)


def _pass(result, p, x, w, mean, v, g, b, *rest):
    s, a, g = _coefficients(result, p, x, mean, v, g)
    # Rows of channels with a scale go on from their statistics in one kernel on a GPU, which a
    # barrier would break in two. Everywhere else the pass must not be joined with what made s and
    # a: XLA would make them again for every element.
    if result.kept or g is None or not p.holds_rows:
        x, s, a, g, b = barrier((x, s, a, g, b))
    y = _affine(*_wide_and_seen(x, w), s, a, g, b)
    return (y if result.after is None else _after(result, y, *rest)).astype(result.dtype)


def _after(result, y, *rest):
    return result.after(y, *(t.astype(y.dtype) for t in rest))


def _coefficients_along(result, p, x, primals, tangents):
    """`_coefficients`, and their derivative along the tangents that are there.

    It is None where there is none.
    """
    live = [i for i, t in enumerate(tangents) if t is not None]

    def f(*ts):
        return _coefficients(
            result, p, x, *(ts[live.index(i)] if i in live else t for i, t in enumerate(primals))
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


def _along(result, p, tangents, x, w, mean, v, g, b, *rest):
    """Derivative of the result along the tangents that are there.

    Without a function after it,

        dy = dx a g + (x - s) g da - a g ds + (x - s) a dg + db

    It is linear in the tangents. In reverse mode JAX transposes it: each term becomes a full-size
    pass over the cotangent, a product for dx and a sum for each small array, which together are the
    closed form. Reverse mode keeps x and the statistics, from which s and a are made again.
    """
    dx, dmean, dv, dg, db, *drest = tangents
    (s, a, g), (ds, da, dg) = _coefficients_along(result, p, x, (mean, v, g), (dmean, dv, dg))
    # The gradient by s is -a g times the sum of the cotangent, that by b the sum itself. Where a
    # carries g and nothing is masked, one sum therefore serves both, if it is one.
    if g is None and w is None and ds is not None:
        joint = jnp.broadcast_shapes(a.shape, *(t.shape for t in (ds, db) if t is not None))
        if joint != x.shape:
            small = -a * ds
            ds, db = None, small if db is None else db + small

    def read(x):
        return _wide_and_seen(x, w)

    small, tangents, derivatives = (s, a, g), (dx, da, ds, dg, db), _OF_AFFINE
    if result.after is not None:
        small, tangents = (s, a, g, b, *rest), (*tangents, *drest)
        derivatives = [partial(_along_affine, result, d) for d in _OF_AFFINE]
        derivatives += [partial(_along_array, result, i) for i in range(len(rest))]
    return sum_of_passes(p, result.dtype, read, derivatives, x, small, tangents)


def _scaled(t, g):
    return t if g is None else t * g.astype(t.dtype)


def _masked(t, seen):
    return t if seen is None else jnp.where(seen, t, 0)


def _shifted(x, seen, s):
    return _masked(x if s is None else x - s.astype(x.dtype), seen)


_OF_AFFINE = (
    lambda t, x, seen, s, a, g: _scaled(_masked(t, seen) * a, g),
    lambda t, x, seen, s, a, g: _scaled(_shifted(x, seen, s), g) * t,
    lambda t, x, seen, s, a, g: _masked(jnp.broadcast_to(_scaled(-a * t, g), x.shape), seen),
    lambda t, x, seen, s, a, g: _shifted(x, seen, s) * a * t,
    lambda t, x, seen, s, a, g: jnp.broadcast_to(t, x.shape),
)
"""The derivative of `_affine` along x, a, s, g and b. XLA:CPU stores products that two of them
share, so t comes last where it can."""


def _along_affine(result, derivative, t, x, seen, s, a, g, b, *rest):
    """The derivative of after(y, *rest) along what `derivative` is y's along."""
    y, dy = _affine(x, seen, s, a, g, b), derivative(t, x, seen, s, a, g)
    return jax.jvp(lambda y: _after(result, y, *rest), (y,), (dy,))[1]


def _along_array(result, i, t, x, seen, s, a, g, b, *rest):
    """The derivative of after(y, *rest) along the i-th of the rest."""
    y, own = _affine(x, seen, s, a, g, b), jnp.broadcast_to(rest[i], t.shape)
    f = lambda v: _after(result, y, *rest[:i], v, *rest[i + 1 :])  # noqa: E731
    return jax.jvp(f, (own,), (t.astype(own.dtype),))[1]


def _along_by_platform(result, *args):
    return by_platform(partial(_along, result), *args)


def _tangent(result, primals, tangents):
    x, wide, w, *small = primals
    dx, dwide, _, *d_small = tangents
    dx = dx if wide is None else dwide
    y = standardized(result._replace(kept=True), x, None, w, *small)
    live = tuple(None if t is None or isinstance(t, SymbolicZero) else t for t in (dx, *d_small))
    if all(t is None for t in live):
        return y, jnp.zeros_like(y)
    if result.after is None:
        small[3] = None  # the derivative of what is linear in b does not depend on b
    return y, kept_small(_along_by_platform, result, live, x, w, *small)


standardized.defjvp(_tangent, symbolic_zeros=True)
