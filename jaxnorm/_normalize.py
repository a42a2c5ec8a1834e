"""Applying statistics: y = (x - mean) / sqrt(var + epsilon) * scale + bias.

The statistic's shape says which elements share it, so no axes are named. Each statistic is spread
to the elements on small arrays first; then one pass over x does the rest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._checks import check_epsilon
from jaxnorm._devices import AxisName, DeviceGroups, in_explicit_meshes, varying_like
from jaxnorm._groups import Shape, Specification, axes_of, check_divides, single_axis
from jaxnorm._mean_var import counts, own_and_wide, shared, statistic_dtype
from jaxnorm._moments import Moments, as_weights, check_moments, inexact, moments
from jaxnorm._xla import barrier, by_first_sums, by_platform, kept_small, to_channels


@in_explicit_meshes
def normalize(
    x: ArrayLike,
    m: Moments,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-5,
    weights: ArrayLike | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> jax.Array:
    """Standardize x with given moments, then scale and shift it.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    The moments may be those of x, running ones, or anything made from them: gradients flow into all
    of them. That by the variance is sum(g z) / (2 (var + epsilon)) with z = (x - mean) / sqrt(var +
    epsilon) and g = scale dy, and it is right while the quotient is between 1.2e-38 and 3.4e38: for
    standard deviations from 1e-17 to 1e17 where sum(g z) is of the order of 1.

    Args:
        x: floating or complex array.
        m: moments whose shape divides x's: each statistic serves a block of x.
        scale: gamma, (C,), or (N, C) to scale each example differently. None is 1.
        bias: beta, likewise. None is 0.
        epsilon: added to the variance inside the root, in the unit of x squared: one number, 0 or
            more.
        weights: the weights that the moments were computed with, if some are 0: where x is not
            finite under a zero weight, y is the bias and the gradient 0. Elsewhere they change
            nothing.
        activation: applied to y. It is recomputed in the backward pass, so that normalization and
            activation together keep x and small arrays.
        dtype: of y. None keeps x's.
        batch_axis: axis of the examples, for scale and bias of shape (N, C).
        channel_axis: axis of the channels, -1 for NHWC, 1 for NCHW; a tuple gives scale and bias
            those axes' sizes.

    Returns:
        y, of x's shape.

    Raises:
        TypeError: x is not floating or complex, m is not `Moments`.
        ValueError: moments that do not divide x, scale or bias of another shape, an epsilon below 0
            or for each channel.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[0.0, 2.0], [4.0, 6.0]])
        >>> m = Moments(jnp.ones((1, 2)), jnp.array([[1.0, 2.0]]), jnp.full((1, 2), 4.0))
        >>> normalize(x, m, scale=jnp.array([2.0, 2.0]), epsilon=0.0).tolist()
        [[-1.0, 0.0], [3.0, 4.0]]
    """
    x, wide = own_and_wide(inexact(x))
    check_moments(m, "m")
    check_epsilon(epsilon)
    mean, var = (jnp.asarray(t) for t in (m.mean, m.var))
    check_divides(var.shape, x.shape, "m.var")
    _check_holds(mean, x, dtype)
    axes = axes_of(channel_axis, x.shape)
    g, b = (
        placed(t, name, x, batch_axis, axes, channel_axis)
        for t, name in ((scale, "scale"), (bias, "bias"))
    )
    mean, var, g, b = jax.tree.map(lambda t: varying_like(t, x), (mean, var, g, b))
    var = var.astype(statistic_dtype(x.dtype, real=True))
    v = var + jnp.asarray(epsilon, var.dtype)
    w = None if weights is None else as_weights(weights, x)
    arguments = (x, wide, w, mean.astype(statistic_dtype(x.dtype)), v, g, b)
    out = jnp.dtype(x.dtype if dtype is None else dtype)
    if activation is None:
        return _standardized(out, False, *arguments)
    return jax.checkpoint(
        lambda *args: activation(_standardized(out, False, *args)), prevent_cse=False
    )(*arguments)


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
    cpu: bool, shape: Shape, mean: jax.Array, v: jax.Array, g: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """s, a and g of y = (x - s) a g + b, spread over the groups of every axis that is split; g None
    where a carries it."""
    s, a = mean, inverse_root(v).astype(mean.dtype)
    if any(k not in (1, n) for t in (s, a) for n, k in zip(shape, t.shape, strict=True)):
        s, a = (to_channels(cpu, t, shape) for t in (s, a))
    if g is not None and any(
        p == q == 1 != n for p, q, n in zip(a.shape, g.shape, shape, strict=True)
    ):
        a, g = a * g, None  # one small product instead of a multiplication at full size
    return s, a, g


def _check_holds(mean: jax.Array, x: jax.Array, dtype: DTypeLike | None) -> None:
    if jnp.iscomplexobj(mean) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"m.mean is complex ({mean.dtype}) and x is {x.dtype}. Expected both real, or x"
            " complex."
        )
    if dtype is not None and not jnp.issubdtype(
        dtype, jnp.complexfloating if jnp.iscomplexobj(x) else jnp.inexact
    ):
        raise TypeError(
            f"dtype {jnp.dtype(dtype).name} cannot hold the result for x of dtype {x.dtype}. Pass a"
            " wider one."
        )


def placed(
    t: ArrayLike | None,
    name: str,
    x: jax.Array,
    batch_axis: int,
    axes: Shape,
    channel_axis: int | Sequence[int],
) -> jax.Array | None:
    """Scale or bias with a size-1 axis for each axis of x that it does not have."""
    if t is None:
        return None
    t = jnp.asarray(t)
    batch = single_axis(batch_axis, x.shape)
    features = tuple(x.shape[i] for i in axes)
    per_example = features if batch in axes else (x.shape[batch], *features)
    if t.shape not in (features, per_example):
        message = (
            f"{name} has shape {t.shape}, but axis {channel_axis} of x, shape {x.shape}, has size "
        )
        message += (
            f"{features[0] if len(features) == 1 else features}. Expected {features}, or"
            f" {per_example} per example."
        )
        fitting = [i for i, n in enumerate(x.shape) if i != batch and t.shape == (n,)]
        if fitting == [1]:
            message += (
                " This looks like NCHW data: pass channel_axis=1 (axis=1 or feature_axes=1 to"
                " Flax's layers)."
            )
        elif fitting:
            message += (
                f" Axis {fitting[0]} has that size: pass channel_axis={fitting[0]} if it holds the"
                " channels."
            )
        raise ValueError(message)
    if jnp.iscomplexobj(t) and not jnp.iscomplexobj(x):
        raise TypeError(
            f"{name} is complex ({t.dtype}) and x is {x.dtype}. Expected both real, or x complex."
        )
    t = t.astype(statistic_dtype(x.dtype))
    if t.shape != features:
        examples = jnp.moveaxis(
            t.reshape(per_example[:1] + features), 0, sum(i < batch for i in axes)
        )
        return examples.reshape([n if i in (*axes, batch) else 1 for i, n in enumerate(x.shape)])
    return t.reshape([n if i in axes else 1 for i, n in enumerate(x.shape)])


def _seen(t: jax.Array, x: jax.Array, w: jax.Array | None) -> jax.Array:
    """t, and 0 where x does not count and is not finite."""
    return t if w is None else jnp.where(counts(w) | jnp.isfinite(x), t, 0)


def _shifted(x: jax.Array, w: jax.Array | None, s: jax.Array) -> jax.Array:
    return _seen(x.astype(statistic_dtype(x.dtype)) - s, x, w)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
@partial(jax.jit, static_argnums=(0, 1))
def _standardized(
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


def _pass(dtype, kept, cpu, x, w, mean, v, g, b):
    s, a, g = _coefficients(cpu, x.shape, mean, v, g)
    if (
        cpu or kept or g is None
    ):  # else rows of channels: one kernel on a GPU, from the statistics on
        x, s, a, g, b = barrier((x, s, a, g, b))
    y = _shifted(x, w, s) * a
    y = y if g is None else y * g
    return (y if b is None else y + b).astype(dtype)


def _coefficients_along(cpu, shape, primals, tangents):
    """`_coefficients`, and their derivative along the tangents that are there; None where there is
    none."""
    live = [i for i, t in enumerate(tangents) if t is not None]

    def f(*ts):
        return _coefficients(
            cpu, shape, *(ts[live.index(i)] if i in live else t for i, t in enumerate(primals))
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


def _along(dtype, cpu, tangents, x, w, mean, v, g):
    """Derivative of y along the tangents that are there: linear in them, and read backwards the
    closed form.

    s and a are made again from the statistics, so that reverse mode keeps x and these.

    Read backwards each term is a full-size pass over the cotangent: dx, and a sum for each small
    array. On the CPU each pass gets its own alias of what it reads, tied to the result of the pass
    before, so that none shares a float32 copy with another; a GPU wants them together.
    """
    tie = barrier if cpu else lambda tree: tree
    (s, a, g), small = _coefficients_along(cpu, x.shape, (mean, v, g), tangents[1:4])
    tangents = zip(("dx", "ds", "da", "dg", "db"), (tangents[0], *small, tangents[4]), strict=True)
    tangents = {name: t for name, t in tangents if t is not None}
    if g is None and w is None and "ds" in tangents:  # the same sum serves s and b
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
    x, s, a, g = tie((x, s, a, g))
    for name in [name for name in passes if name in tangents]:
        t = tangents.pop(name)
        term = passes[name](t if name == "dx" else by_first_sums(cpu, t, x.shape), x, s, a, g)
        term = jnp.broadcast_to(term, x.shape).astype(dtype) if cpu else term
        x, s, a, g = tie((x, s, a, g))
        term, tangents = tie(
            (term, tangents)
        )  # apart from x: what is tied to a tangent counts as linear
        terms.append(term)
    return jnp.broadcast_to(sum(terms[1:], terms[0]), x.shape).astype(dtype)


def _along_by_platform(dtype, *args):
    return by_platform(partial(_along, dtype), *args)


def _tangent(dtype, kept, primals, tangents):
    x, wide, w, mean, v, g, b = primals
    dx, dwide, _, *small = tangents
    dx = dx if wide is None else dwide
    y = _standardized(dtype, True, x, None, *primals[2:])
    live = tuple(None if t is None or isinstance(t, SymbolicZero) else t for t in (dx, *small))
    if all(t is None for t in live):
        return y, jnp.zeros_like(y)
    return y, kept_small(_along_by_platform, dtype, live, x, w, mean, v, g)


_standardized.defjvp(_tangent, symbolic_zeros=True)


@in_explicit_meshes
def norm(
    x: ArrayLike,
    groups: Specification,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    epsilon: float = 1e-5,
    weights: ArrayLike | None = None,
    mean: Literal[0] | None = None,
    center: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: DeviceGroups = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    dtype: DTypeLike | None = None,
    batch_axis: int = 0,
    channel_axis: int | Sequence[int] = -1,
) -> tuple[jax.Array, Moments]:
    """Normalize x with its own statistics: `moments`, then `normalize`.

    Args:
        x: floating or complex array.
        groups: which elements share statistics: `Groups`, `Method` or the statistic's shape.
        scale: gamma, (C,) or (N, C).
        bias: beta, (C,) or (N, C).
        epsilon: added to the variance inside the root, in the unit of x squared.
        weights: how much each element counts in the statistics; broadcasts against x.
        mean: 0 fixes the mean at zero.
        center: see `moments`.
        axis_name: named axis or axes over which sets go on.
        axis_index_groups: groups of indices of that axis.
        activation: see `normalize`.
        dtype: of y. None keeps x's.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        y, of x's shape, and the moments of x, to be folded into running ones where a method has
        them.

    Raises:
        TypeError, ValueError: as `moments` and `normalize`.

    Example:
        >>> import jax.numpy as jnp
        >>> y, m = norm(jnp.ones((8, 4, 4, 6)), (8, 1, 1, 3))  # group norm, 3 groups
        >>> y.shape, m.var.shape
        ((8, 4, 4, 6), (8, 1, 1, 3))
    """
    x = shared(inexact(x))
    m = moments(
        x,
        groups,
        weights=weights,
        mean=mean,
        center=center,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
    )
    y = normalize(
        x,
        m,
        scale=scale,
        bias=bias,
        epsilon=epsilon,
        weights=weights,
        activation=activation,
        dtype=dtype,
        batch_axis=batch_axis,
        channel_axis=channel_axis,
    )
    return y, m
