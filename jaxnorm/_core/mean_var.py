"""Stroke 1: mean and variance of sets of elements, with their derivative.

These are the full-size reads of every method; `equations.py` has the formulas alone.
Sums are taken at channel resolution first; groups and devices are one more sum over small arrays,
because everything is linear in the sums. Reverse mode keeps x in its own dtype and small arrays,
and costs what the closed form costs; forward mode, higher derivatives, vmap, scan and remat are
JAX's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from jaxnorm._core.arithmetic import abs2, counts, divide, scale_by, statistic_dtype
from jaxnorm._core.axes import Shape
from jaxnorm._core.blocks import block_sum, spread
from jaxnorm._core.devices import (
    AxisName,
    all_sum,
    axes_named,
    same_on_all_devices,
    varying_like,
)
from jaxnorm._core.platforms import Platform, by_platform
from jaxnorm._core.xla import all_true, barrier, kept_small

CANCELLATION = 16.0
"""Sums about c cost the variance at most one digit while (mean - c)^2 <= 16 var; beyond, they are
taken again about the mean."""


SYNCED = "jaxnorm_synced_moments"
"""`checkpoint_name` of statistics: a remat policy that saves it repeats no collective. All
statistics have it, because under plain jit nothing tells, when the program is traced, whether they
cross devices."""


class Sets(NamedTuple):
    """What is known about the sets when the program is traced."""

    shape: Shape  # the statistic's
    channels: Shape  # of the first sums
    centered: bool
    kept: bool  # for the backward pass
    axis_name: AxisName
    axis_sizes: tuple[int, ...]
    device_groups: tuple[tuple[int, ...], ...] | None


def _counted(x: jax.Array, w: jax.Array | None, s: jax.Array | None = None) -> jax.Array:
    """x - s in the statistics' dtype, and 0 where the weight is: what does not count may be NaN."""
    x = x.astype(statistic_dtype(x.dtype))
    d = x if s is None else x - s
    return d if w is None else jnp.where(counts(w), d, 0)


def _weighed(t: jax.Array, w: jax.Array | None) -> jax.Array:
    """w t, for t that is 0 where w is: a boolean mask has done its part."""
    return t if w is None or w.dtype == bool else scale_by(t, w)


def _totals(
    sets: Sets,
    sums: Sequence[jax.Array],
    to_groups: Callable[[jax.Array, Shape], jax.Array] = block_sum,
) -> list[jax.Array]:
    """Full-size sums to groups and devices.

    The barrier keeps XLA from joining the two stages into one full-size sum.
    """
    return all_sum(
        [to_groups(t, sets.shape) for t in barrier(list(sums))],
        sets.axis_name,
        sets.device_groups,
    )


def _statistics(
    sets: Sets, p: Platform, x: jax.Array, w: jax.Array | None, c: jax.Array | None, n: jax.Array
) -> tuple[jax.Array, ...]:
    """Mean (unless it is fixed) and variance.

    They are made of sums about c, and again about the mean where cancellation would show.
    """

    def deviations(x: jax.Array, w: jax.Array | None, c: jax.Array | None) -> tuple[jax.Array, ...]:
        d = _counted(x, w, None if c is None else p.to_channels(c, x.shape))
        square = _weighed(abs2(d), w)
        return (_weighed(d, w), square) if sets.centered else (square,)

    def about(c: jax.Array | None) -> tuple[jax.Array, ...]:
        sums = _totals(sets, p.sums(deviations, (x, w, c), sets.channels))
        if not sets.centered:
            return (divide(sums[0], n),)
        e = divide(sums[0], n)
        v = jnp.maximum(divide(sums[1], n) - abs2(e), 0)
        exact = (abs2(e) <= CANCELLATION * v) & jnp.isfinite(v)  # also false where squares overflow
        return e if c is None else c + e, v, exact

    if not sets.centered:
        return about(None)
    if p.holds_rows and _are_rows(x.shape, sets):
        return _of_rows(x, w, sets.shape, n)
    m, v, exact = about(c)
    if sets.axis_name is not None and not same_on_all_devices(sets.axis_name, sets.device_groups):
        return about(m)[:2]
    return lax.cond(all_true(exact), lambda m: (m, v), lambda m: about(m)[:2], m)


def _are_rows(shape: Shape, sets: Sets) -> bool:
    """Whether one kernel of a GPU goes from x to what uses its statistics, moving x and y alone.

    It does where each set is the last axis. Over several axes XLA breaks it up, which moves 4 times
    the tensor; so do statistics that are kept for the backward pass as well. Sums about `center`
    then move 3.
    """
    return not sets.kept and sets.axis_name is None and sets.shape == (*shape[:-1], 1)


def _of_rows(
    x: jax.Array, w: jax.Array | None, shape: Shape, n: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of rows, exact to rounding without a guard.

    Rounding moves the sum of a row, and so its mean, by some units in the last place. That shows
    where the mean is large beside the standard deviation, and in a constant row it is all there is.
    More reads correct it. On a chip they cost nothing, as long as each takes its mean from the one
    before: XLA keeps any other order in memory, 4 to 5 times the tensor.
    """

    def mean_of(t: jax.Array) -> jax.Array:
        return divide(block_sum(_weighed(t, w), shape), n)

    def about(t: jax.Array, c: jax.Array) -> jax.Array:
        return _counted(t, w, spread(c, x.shape))

    m = mean_of(_counted(x, w))
    m = m + mean_of(about(x, m))
    d = about(x, m)
    return m, mean_of(abs2(about(d, mean_of(d))))  # the mean was rounded again


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=0)
def mean_var(
    sets: Sets,
    x: jax.Array,
    wide: jax.Array | None,
    w: jax.Array | None,
    c: jax.Array | None,
    n: jax.Array,
) -> tuple[jax.Array, ...]:
    """Mean (unless it is fixed) and variance.

    The result does not depend on c, which therefore has no derivative; that along n is part of that
    along w, and that along x comes by `wide` where it is given, see `Shared`.
    """
    return by_platform(partial(_statistics, sets), x, w, c, n)


def _along_dx(sets, p, dx, x, w, m, n):
    """Derivative of mean and variance along dx: linear in dx, and in reverse mode the closed form.

    dmean = sum w dx / n and dvar = 2 sum w (x - mean) dx / n.
    """
    dx = _weighed(_counted(dx, w), w)
    x, m = p.alias((x, m))
    d = _counted(x, w, None if m is None else p.to_channels(m, x.shape))
    product = d.real * dx.real + d.imag * dx.imag if jnp.iscomplexobj(d) else d * dx
    sums = [block_sum(t, sets.channels) for t in ((dx, product) if sets.centered else (product,))]
    sums = _totals(sets, sums, p.to_groups)
    return tuple(divide(s, n) for s in (*sums[:-1], 2 * sums[-1]))


def _along_dx_by_platform(sets, *args):
    return by_platform(partial(_along_dx, sets), *args)


def _along_dw(sets, dw, x, w, m, v, n):
    """Derivative along the weights.

    dmean = sum dw (x - mean) / n and dvar = sum dw (|x - mean|^2 - var) / n.
    """
    finite = jnp.isfinite(x)
    d = x.astype(statistic_dtype(x.dtype))
    d = jnp.where(finite, d if m is None else d - spread(m, x.shape), 0)
    spare = jnp.where(finite, abs2(d) - spread(v, x.shape), 0)
    terms = (d, spare) if sets.centered else (spare,)
    return tuple(
        divide(s, n)
        for s in _totals(sets, [block_sum(scale_by(t, dw), sets.channels) for t in terms])
    )


def _tangent(sets, primals, tangents):
    with axes_named(sets.axis_name, sets.axis_sizes):
        return _derivative(sets, primals, tangents)


def _derivative(sets, primals, tangents):
    x, wide, w, c, n = primals
    dx, dwide, dw = tangents[:3]
    dx = dx if wide is None else dwide
    out = mean_var(sets._replace(kept=True), x, None, w, c, n)
    out = tuple(checkpoint_name(t, SYNCED) for t in out)
    m, v = jax.tree.map(lambda t: varying_like(t, x), (out[0] if sets.centered else None, out[-1]))
    d_out = None
    if not isinstance(dx, SymbolicZero):
        d_out = kept_small(_along_dx_by_platform, sets, dx, x, w, m, n)
    if w is not None and not isinstance(dw, SymbolicZero):
        of_dw = kept_small(_along_dw, sets, dw, x, w, m, v, n)
        d_out = of_dw if d_out is None else tuple(a + b for a, b in zip(d_out, of_dw, strict=True))
    return out, tuple(jnp.zeros_like(t) for t in out) if d_out is None else d_out


mean_var.defjvp(_tangent, symbolic_zeros=True)
