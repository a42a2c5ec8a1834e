"""What the rules of methods share between `moments` and `normalize`.

A rule goes from the moments of x, and what the method remembers, to the moments to normalize with,
and what it remembers next. It is ordinary JAX on small arrays, so its gradient is too, and
schedules enter as numbers or traced scalars.

State is a dict of arrays of fixed shapes, float32, with the channels last.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of
from jaxnorm._core.devices import varying_like
from jaxnorm._core.groups import Specification
from jaxnorm._core.moments import Moments, moments
from jaxnorm._core.normalize import broadcast_parameter, normalize
from jaxnorm._core.pooling import pool, toward
from jaxnorm._core.running import rate_of, update_running, usable, warn_of_half_precision
from jaxnorm._core.shared import own_and_wide
from jaxnorm._core.state import init_running
from jaxnorm._population import POPULATION
from jaxnorm.methods._method import AXES, Options, State, signature


def measured(
    x: jax.Array,
    groups: Specification,
    *,
    center: jax.Array | None = None,
    two_pass: bool = False,
    **options: Unpack[Options],
) -> Moments:
    """`moments` of x in a rule, with those of its options that concern them.

    Args:
        x: as the rule got it.
        groups: which elements share statistics: `Groups`, a row of the table or the statistic's
            shape.
        center: a value near the mean, such as the running one. Over devices sums are taken about
            it, which spares a round; on one device a second read of x, where it is needed, costs
            less.
        two_pass: take them about the mean of a pass of its own, always.
        **options: of `Method.apply`.

    Returns:
        `Moments` of the sets.

    Example:
        >>> measured(jnp.array([[1.0, 3.0]]), (1, 1), scale=jnp.ones(2)).mean.tolist()
        [[2.0]]
    """
    sets = taken_by(moments, options)
    center = None if options.get("axis_name") is None else center
    if two_pass:
        center = jax.lax.stop_gradient(moments(x, groups, center=center, **sets).mean)
    return moments(x, groups, center=center, **sets)


def per_device(options: Options) -> Options:
    """The options on one device: what is whole on each has nothing to sum over a named axis."""
    return {**options, "axis_name": None, "axis_index_groups": None}


def pooled(m: Moments, groups: Specification, **options: Unpack[Options]) -> Moments:
    """`pool` of m, with the options that concern it."""
    return pool(m, groups, **taken_by(pool, options))


def applied(
    x: jax.Array,
    m: Moments,
    epsilon: float,
    *,
    centered: bool = True,
    after: Callable[..., jax.Array] | None = None,
    arrays: Sequence[jax.Array] = (),
    **options: Unpack[Options],
) -> jax.Array:
    """`normalize` x in a rule, with those of its options that concern it.

    Args:
        x: as the rule got it, or what was made of it.
        m: moments whose shape divides x's.
        epsilon: added to the variance, in the unit of x squared.
        centered: False, where the mean is known to be 0, leaves it out.
        after: what becomes of y in the same pass, see `normalize`.
        arrays: of `after`.
        **options: of `Method.apply`.

    Returns:
        y, of x's shape: the result of the rule.

    Example:
        >>> m = Moments(jnp.ones((1, 1)), jnp.full((1, 1), 2.0), jnp.ones((1, 1)))
        >>> applied(jnp.array([[1.0, 3.0]]), m, 0.0, bias=jnp.ones(2), axis_name=None).tolist()
        [[0.0, 2.0]]
    """
    given = taken_by(normalize, options)
    own = own_and_wide(x)[0]
    arrays = [varying_like(t, own) for t in arrays]
    return normalize(x, m, epsilon=epsilon, centered=centered, after=after, arrays=arrays, **given)


def taken_by(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a function takes, of those given."""
    return {name: options[name] for name in signature(function).parameters if name in options}


def axes_in(options: Mapping[str, Any]) -> dict[str, Any]:
    """The axes among the options, or their defaults, the batch's first."""
    return {name: options.get(name, default) for name, default in AXES.items()}


def first_running(shape: Shape, dtype: DTypeLike = jnp.float32, *, counted: bool = False) -> State:
    """`init_running` as the state of a method."""
    first = init_running(shape, dtype=dtype, counted=counted)
    return {"mean": first.mean, "var": first.var} | ({"count": first.count} if counted else {})


def along_channels(t: ArrayLike, x: jax.Array, options: Options) -> jax.Array:
    """State t, (..., C), in the shape and dtype of statistics that serve x: (..., 1, 1, 1, C)."""
    t = jnp.asarray(t)
    sizes = [t.shape[-1] if i == options["channel_axis"] else 1 for i in range(x.ndim)]
    return t.reshape(*t.shape[:-1], *sizes).astype(statistic_dtype(x.dtype))


def recalled(state: State, x: jax.Array, options: Options, prefix: str = "") -> Moments:
    """The state's mean and variance as moments that serve x."""
    mean, var = (along_channels(state[prefix + name], x, options) for name in ("mean", "var"))
    return Moments(jnp.ones_like(mean), mean, var)


def remembered(old: jax.Array, new: jax.Array, keep: ArrayLike = True) -> jax.Array:
    """`new` in the shape and dtype of the state `old`, without a derivative.

    `old` where `keep` is false, or where what would be stored is not finite.
    """
    new, was = jax.lax.stop_gradient(new).astype(old.dtype), old.reshape(new.shape)
    kept = jnp.where(jnp.asarray(keep), new, was)
    return jnp.where(jnp.isfinite(new), kept, was).reshape(old.shape)


def averages(state: State, m: Moments, momentum: ArrayLike, **new: jax.Array) -> State:
    """momentum old + (1 - momentum) new for names of the state, where m is usable.

    They are m's mean and var where no others are given; shapes and dtypes are those of the state.
    The momentum is checked as `update_running` does.
    """
    new = new or {"mean": m.mean, "var": m.var}

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        rate = rate_of(momentum, new.dtype)
        warn_of_half_precision(old.dtype, momentum)
        wide = old.reshape(new.shape).astype(new.dtype)
        return remembered(old, toward(wide, new, rate), usable(m))

    return {name: average(state[name], value) for name, value in new.items()}


def pushed(old: jax.Array, new: jax.Array, keep: ArrayLike) -> jax.Array:
    """The window `old`, newest first, with `new` in front where `keep` is true."""
    new = new.reshape(1, *old.shape[1:]).astype(old.dtype)
    return remembered(old, jnp.concatenate([new, old[:-1]]), keep)


def running_in(state: State) -> Moments:
    """The running statistics in a state, with the count by which they are updated, if any."""
    return Moments(state.get(_count_in(state)), state["mean"], state["var"])  # type: ignore[arg-type]  # None is no count


def updated(state: State, m: Moments, **options: Any) -> State:
    """State of `mean` and `var` after a batch with moments m: `update_running` of them.

    Where a count of `POPULATION` stands in the state, the update is that of a population. `calls`
    counts the updates where it stands there.
    """
    old, count = running_in(state), _count_in(state)
    if count in POPULATION:
        new = POPULATION[count](old, m, batch_axis=options.get("batch_axis", 0))
    else:
        new = update_running(old, m, **options)
    if "calls" in state:
        state = state | {"calls": state["calls"] + 1}
    values = {"mean": new.mean, "var": new.var, count: new.count}
    return state | {name: values[name] for name in values if name in state}


def _count_in(state: State) -> str:
    """The name of the count: of a population, if it is one that is measured."""
    return next((name for name in POPULATION if name in state), "count")


def parameter(t: ArrayLike, name: str, x: jax.Array, options: Options) -> jax.Array:
    """A parameter of shape (C,), or (N, C), in the shape and dtype in which it meets x."""
    x, _ = own_and_wide(x)
    channel_axis = options["channel_axis"]
    features = axes_of(channel_axis, x.shape)
    out = broadcast_parameter(t, name, x, options["batch_axis"], features, channel_axis)
    assert out is not None
    return varying_like(out, x)
