"""What is remembered between steps: running statistics as a pure function of old ones and a batch's
moments.

State is `Moments` without the axes that hold no information: the batch axis and spatial axes of
size 1 are dropped, the channel axis stays. Its `count` is None, no leaf at all, except where a rule
needs it: see `init_running`. The shape and dtypes of state are the same after an update, so it can
be the carry of a `lax.scan`.
"""

import dataclasses
import functools
import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._checks import check_number, known
from jaxnorm._devices import (
    AxisName,
    DeviceGroups,
    all_sum,
    device_count,
    device_groups_of,
    in_explicit_meshes,
)
from jaxnorm._ghosts import GhostUpdate, check_ghost_update, one_update
from jaxnorm._groups import Groups, Method, Shape, single_axis
from jaxnorm._mean_var import abs2, statistic_dtype
from jaxnorm._moments import Moments
from jaxnorm._parity import corrected
from jaxnorm._pooling import pool, toward


def running_shape(
    groups: Groups | Method, x_shape: Shape, *, batch_axis: int = 0, channel_axis: int = -1
) -> tuple[Shape, Shape]:
    """Shape of the running state, and the shape in which it serves x.

    Args:
        groups: the method. Its batch number does not matter: running statistics are those of all
            examples.
        x_shape: shape of x; the number of examples does not matter.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        The state's shape and the statistic's shape with the batch pooled.

    Raises:
        ValueError: axes that do not split.

    Example:
        >>> from jaxnorm._groups import EACH, Groups
        >>> running_shape(Groups(batch=4, spatial=1, channel=EACH), (64, 8, 8, 256))
        ((256,), (1, 1, 1, 256))
    """
    groups = groups.groups if isinstance(groups, Method) else groups
    if not isinstance(groups, Groups):
        raise TypeError(f"running statistics belong to a Groups or a Method. Got {groups!r}.")
    statistic = dataclasses.replace(groups, batch=1).shape(
        x_shape, batch_axis=batch_axis, channel_axis=channel_axis
    )
    batch, channel = single_axis(batch_axis, x_shape), single_axis(channel_axis, x_shape)
    state = tuple(g for i, g in enumerate(statistic) if i == channel or (i != batch and g != 1))
    return state, statistic


def init_running(shape: Shape, *, dtype: DTypeLike = jnp.float32, counted: bool = False) -> Moments:
    """Running statistics before the first step: mean 0, variance 1.

    Args:
        shape: of the state, see `running_shape`.
        dtype: of the mean; complex for complex x. The variance is real. In half precision an
            average stops short of where it goes: `update_running` warns.
        counted: whether to keep a count, starting at 0. `update_running` then divides the zeros it
            started from out of the average, and `update_cumulative` needs it.

    Returns:
        `Moments` of that shape, with count None unless counted.

    Example:
        >>> init_running((3,)).var.tolist()
        [1.0, 1.0, 1.0]
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"running statistics are floating or complex. Got dtype {jnp.dtype(dtype).name};"
            " expected float32."
        )
    real = jnp.finfo(dtype).dtype
    count = jnp.zeros(shape, statistic_dtype(real)) if counted else None
    return Moments(count, jnp.zeros(shape, dtype), jnp.ones(shape, real))  # type: ignore[arg-type]  # count is optional here


def running_moments(
    state: Moments,
    groups: Groups | Method,
    x_shape: Shape,
    *,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> Moments:
    """Running state in the shape that `normalize` takes.

    Args:
        state: running statistics.
        groups: the method they belong to.
        x_shape: shape of the x to normalize; any number of examples.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        `Moments` that serve x.

    Raises:
        ValueError: the state belongs to another number of channels, groups or positions.

    Example:
        >>> from jaxnorm._groups import EACH, Groups
        >>> running_moments(init_running((3,)), Groups(1, 1, EACH), (8, 4, 4, 3)).mean.shape
        (1, 1, 1, 3)
    """
    expected, statistic = running_shape(
        groups, x_shape, batch_axis=batch_axis, channel_axis=channel_axis
    )
    return serving(state, expected, statistic, x_shape)


def serving(state: Moments, expected: Shape, statistic: Shape, x_shape: Shape) -> Moments:
    """State of the expected shape, in the statistic's shape."""
    check_running(state, "state")
    if not state.mean.shape == state.var.shape == expected or math.prod(expected) != math.prod(
        statistic
    ):
        raise ValueError(
            f"running statistics of shape {state.mean.shape} do not fit x of shape"
            f" {tuple(x_shape)}, whose statistics have shape {statistic}. State that keeps"
            " positions apart is tied to the image size, and all state to the number of channels,"
            " with which it was made; feed x of that size."
        )
    return jax.tree.map(lambda t: t.reshape(statistic), state)


@in_explicit_meshes
def update_running(
    state: Moments,
    m: Moments,
    *,
    momentum: ArrayLike = 0.99,
    correction: int = 0,
    ghost_update: GhostUpdate = "pooled",
    batch_axis: int = 0,
) -> Moments:
    """Exponential moving average of mean and variance, in Flax's convention.

        state <- momentum * state + (1 - momentum) * m

    computed as state + (1 - momentum) * (m - state), so that the average of values far from 0 is not
    off by the rounding of the two weights. In float32 a step below half of the last digit is lost:
    the mean comes as near as 3e-8 / (1 - momentum) of its size.

    With a counted state (`init_running(counted=True)`) the average is debiased: with W <- momentum
    * W + 1 - momentum the weight of all batches so far, the new batch enters with (1 - momentum) /
    W, so the initial 0 and 1 never count.

    Statistics of several ghost batches are pooled first, so the state is that of plain batch
    normalization whatever the ghost size. Other conventions take k ghosts, of moments s_1 to s_k,
    as they are:

        "averaged"              state <- momentum * state + (1 - momentum) * mean_i s_i
        "sequential"            one update for each ghost in turn: later ghosts weigh more, and k ghosts forget k times as much
        "sequential divided"    the same with the rate 1 - momentum divided by k

    Their variances lack the variance between the ghosts' means. Pooled is the convention of the
    code of arXiv:1906.03548; sequential of arXiv:1705.08741 and TabNet's Keras code, divided of
    MosaicML's Composer, averaged of Keras 2 (from memory).

    Where a set is empty, or its moments or what would be stored are not finite, the state stays;
    where only some ghosts are so, they are left out, but for non-finite ones in a pool.

    Args:
        state: old running statistics.
        m: moments of the batch, of the statistic's shape or of the state's.
        momentum: weight of the OLD value per update, 0 to 1; a number or traced scalar. PyTorch's
            momentum is 1 minus this. A traced one beyond 0 or 1 is taken as 0 or 1, and with NaN
            the state stays.
        correction: 1 stores the unbiased variance, n / (n - 1) times the biased one, as PyTorch
            does; n of the pooled batch, or in the other conventions of each ghost. With real
            weights n is their sum, so they must count elements: multiplied by 10 they give another
            variance. The factor is never below 1, and is 1 up to n = 1.
        ghost_update: how several ghost batches enter.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state; a state that is no `Moments`, such as a dict.
        ValueError: moments of another shape, an unknown convention, a momentum outside 0 to 1.

    Warns:
        UserWarning: the state is of half precision, in which the average stops too early.

    Example:
        >>> import jax.numpy as jnp
        >>> m = Moments(jnp.full((1, 2), 8.0), jnp.ones((1, 2)), jnp.full((1, 2), 3.0))
        >>> new = update_running(init_running((2,)), m, momentum=0.5)
        >>> new.mean.tolist(), new.var.tolist()
        ([0.5, 0.5], [2.0, 2.0])
    """
    check_running(state, "state")
    rate = rate_of(momentum, statistic_dtype(state.var.dtype))
    warn_of_half_precision(state.var.dtype, momentum)
    check_ghost_update(ghost_update)
    if ghost_update == "pooled" or not _has_ghosts(m, state, batch_axis):
        m = corrected(_as_state(m, state, batch_axis), correction)
    else:
        m = corrected(m, correction)
        m, rate = one_update(
            m, usable(m), single_axis(batch_axis, m.mean.shape), rate, ghost_update
        )
        m, rate = _as_state(m, state, batch_axis), rate.reshape(state.mean.shape)
    count = state.count
    if count is not None:
        count = toward(count, jnp.ones_like(count), rate)
        rate = rate / jnp.where(count > 0, count, 1)
    mean, var = (toward(*_alike(*ts), rate) for ts in ((state.mean, m.mean), (state.var, m.var)))
    return _stored(state, m, mean, var, count)


def _alike(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A value of the state and of a batch in a precision that holds both."""
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(statistic_dtype(old.dtype), new.dtype)
    return old.astype(wide), new.astype(wide)


def _stored(
    state: Moments, m: Moments, mean: jax.Array, var: jax.Array, count: jax.Array | None
) -> Moments:
    """New values in the dtypes of the state, and the old ones where m is not usable or a new one
    would not be finite as it is stored."""
    old = (state.mean, state.var) + (() if state.count is None else (state.count,))
    new = (mean, var) + (() if count is None else (count,))
    new = [t.astype(t_old.dtype) for t, t_old in zip(new, old, strict=True)]
    keep = functools.reduce(operator.and_, map(jnp.isfinite, new), usable(m))
    new = [jnp.where(keep, t, t_old) for t, t_old in zip(new, old, strict=True)]
    return Moments(new[2] if len(new) > 2 else None, new[0], new[1])  # type: ignore[arg-type]


def rate_of(momentum: ArrayLike, dtype: jnp.dtype, name: str = "momentum") -> jax.Array:
    """1 - momentum, from 0 to 1, once momentum is known to be a number; a traced one is clipped."""
    check_number(momentum, name, at_least=0, at_most=1)
    return jnp.clip(jnp.asarray(1 - momentum, dtype), 0, 1)


def warn_of_half_precision(dtype: DTypeLike, momentum: ArrayLike | None) -> None:
    """Say so where an average would stop while it is far from where it goes, because steps of less
    than half of the last digit are lost. `momentum` is None where steps become ever smaller.

    It stops at a distance of half of the last digit / (1 - momentum): with 0.99 a part in 10^5 in
    float32, and 4 in 10 in bfloat16.
    """
    digit = float(jnp.finfo(dtype).eps) / 2
    value = None if momentum is None else known(momentum)
    rate = 0.0 if value is None else 1 - float(value)
    if jnp.finfo(dtype).bits >= 32 or value == 1 or digit <= 0.01 * rate:
        return
    which = "a cumulative average" if momentum is None else "an average"
    which += "" if value is None else f" with momentum {float(value):g}"
    warnings.warn(
        f"running statistics in {jnp.dtype(dtype).name}: a step below {digit:.1%} of their value is"
        f" lost, so {which} stops far from where it goes. Keep the state in float32, for example"
        " jax.tree.map(lambda t: t.astype('float32'), state).",
        UserWarning,
        stacklevel=4,
    )


@in_explicit_meshes
def update_cumulative(state: Moments, m: Moments, *, batch_axis: int = 0) -> Moments:
    """Moments of all elements seen so far, the variance between batches included.

        state <- merge(state, m)

    by differences from the state: with N and n the counts, and d = m.mean - mean,

        mean <- mean + d n / (N + n),    var <- var + (m.var - var + |d|^2 N / (N + n)) n / (N + n)

    so that what the mean loses by rounding does not enter the variance, however many the steps. In
    float32 the mean stands still once a step is below half of its last digit.

    Args:
        state: old running statistics with a count: `init_running(shape, counted=True)`.
        m: moments of the batch, of the statistic's shape or of the state's.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state.
        ValueError: a state without count, or moments of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> state = init_running((1,), counted=True)
        >>> for value in (0.0, 2.0):
        ...     state = update_cumulative(state, Moments(jnp.ones((1, 1)), jnp.full((1, 1), value), jnp.zeros((1, 1))))
        >>> state.mean.tolist(), state.var.tolist()
        ([1.0], [1.0])
    """
    check_running(state, "state")
    if state.count is None:
        raise ValueError(
            "a cumulative average needs a count. Got a state without one; make it by"
            " init_running(counted=True)."
        )
    warn_of_half_precision(state.var.dtype, None)
    m = _as_state(m, state, batch_axis)
    total = state.count + m.count.astype(state.count.dtype)
    share = m.count.astype(state.count.dtype) / jnp.where(total > 0, total, 1)
    mean, new_mean = _alike(state.mean, m.mean)
    var, new_var = _alike(state.var, m.var)
    between = (1 - share).astype(var.dtype) * abs2(new_mean - mean)
    mean, var = toward(mean, new_mean, share), toward(var, new_var + between, share)
    return _stored(state, m, mean, var, total)


def sync_running(
    state: Any,
    *,
    axis_name: AxisName,
    axis_index_groups: DeviceGroups = None,
    weights: ArrayLike | None = None,
) -> Any:
    """Each device's own running statistics, made equal on all: those of the union.

    With w_i the weight of device i, its count where the state has one and else 1,

        mean = sum w_i m_i / sum w_i,    var = sum w_i (v_i + |m_i - mean|^2) / sum w_i.

    The variance between the devices' means is included, which the plain average of variances leaves
    out: activations are normalized by one mean afterwards, so the spread of the means about it is
    part of their variance. Counts become their average: each device holds an equal share, so that
    syncing twice is syncing once and the state goes on as before; with cumulative statistics the
    result is exact after any number of rounds.

    Args:
        state: `Moments`, or a pytree with mappings that have "mean" and "var" (and "count") in it,
            such as the collection batch_stats of linen and the pure dict of `nnx.BatchStat`
            variables. "train_mean" and "train_var" beside them (`MomentumBatchNorm`) are such a
            pair too; "positions", equal on all devices, stays.
        axis_name: axis or axes of pmap, shard_map or vmap over which the devices differ.
        axis_index_groups: groups of indices of that axis that become equal, see `device_groups`.
        weights: how much this device counts, 0 or more, such as its number of examples, in place of
            the state's count. A traced negative one or NaN counts 0, as do statistics that are not
            finite.

    Returns:
        The state, of the same structure, shapes and dtypes.

    Raises:
        TypeError: a leaf that belongs to no running statistics, or another array beside them, such
            as the window of `CrossIterationBatchNorm`, whose union is not defined.
        ValueError: negative weights or NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> per_device = {"norm": {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.ones((2, 1))}}
        >>> jax.vmap(lambda s: sync_running(s, axis_name="i"), axis_name="i")(per_device)["norm"]["var"].tolist()
        [[2.0], [2.0]]
    """
    groups = device_groups_of(axis_name, axis_index_groups)
    if weights is not None and not jnp.issubdtype(jnp.result_type(weights), jnp.bool_):
        check_number(weights, "weights", at_least=0, shape=np.shape(weights))

    def synced(s: Any) -> Any:
        if isinstance(s, Moments):
            return together(s)
        if not _holds_statistics(s):
            raise TypeError(
                f"sync_running takes running statistics. Got a leaf of type {type(s).__name__};"
                ' expected Moments, or mappings with "mean" and "var", such as batch_stats.'
            )
        known, new = (
            {"mean", "var", "count", "positions"},
            together(Moments(s.get("count"), s["mean"], s["var"])),
        )
        values = {"mean": new.mean, "var": new.var, "count": new.count}
        if "train_mean" in s and "train_var" in s:
            known |= {"train_mean", "train_var"}
            trained = together(Moments(None, s["train_mean"], s["train_var"]))  # type: ignore[arg-type]  # no count
            values |= {"train_mean": trained.mean, "train_var": trained.var}
        inner = {name: t for name, t in s.items() if isinstance(t, Mapping)}
        if unknown := sorted(set(s) - known - set(inner)):
            raise TypeError(
                f"sync_running knows no union of {', '.join(unknown)}. Got {', '.join(sorted(s))};"
                " expected mean and var, and beside them count, train_mean and train_var, or"
                " positions. Keep such layers equal by their axis_name."
            )
        return type(s)(
            {name: tree(t) if name in inner else values.get(name, t) for name, t in s.items()}
        )

    def together(s: Moments) -> Moments:
        wide = jax.tree.map(lambda t: t.astype(statistic_dtype(t.dtype)), s)
        w = weights if weights is not None else 1 if s.count is None else wide.count
        w = jnp.broadcast_to(jnp.asarray(w).astype(wide.var.dtype), s.var.shape)
        sound = jnp.isfinite(wide.mean) & jnp.isfinite(wide.var)
        w = jnp.where(sound & (w >= 0) & jnp.isfinite(w), w, 0)
        w = jnp.where(
            all_sum(w, axis_name, groups) > 0, w, 1
        )  # before the first update all devices count alike
        m = Moments(w, wide.mean, wide.var)
        new = pool(m, w.shape, axis_name=axis_name, axis_index_groups=axis_index_groups)
        count = jax.tree.map(
            lambda n: all_sum(n, axis_name, groups) / device_count(axis_name, groups), wide.count
        )
        return jax.tree.map(
            lambda old, t: t.astype(old.dtype), s, dataclasses.replace(new, count=count)
        )

    def tree(state: Any) -> Any:
        return jax.tree.map(
            synced, state, is_leaf=lambda t: isinstance(t, Moments) or _holds_statistics(t)
        )

    return tree(state)


def _holds_statistics(t: Any) -> bool:
    return isinstance(t, Mapping) and "mean" in t and "var" in t


def check_running(state: Any, name: str) -> None:
    """`state` is running statistics, with a mean and a variance of one shape."""
    if not isinstance(state, Moments):
        hint = (
            "Moments(None, d['mean'], d['var']), or the function of the method, which takes its dict"
            if isinstance(state, Mapping)
            else "Moments, such as init_running(shape)"
        )
        raise TypeError(f"{name} is a {type(state).__name__}; expected {hint}.")
    if state.mean.shape != state.var.shape:
        raise ValueError(
            f"{name} has a mean of shape {state.mean.shape} and a var of shape {state.var.shape}."
            " Expected one number of each for a set: equal shapes, as init_running(shape) makes."
        )


def usable(m: Moments) -> jax.Array:
    """Where a batch may enter the state: its sets have elements, and finite moments."""
    return (m.count > 0) & jnp.isfinite(m.mean) & jnp.isfinite(m.var)


def _has_ghosts(m: Moments, state: Moments, batch_axis: int) -> bool:
    shape = m.mean.shape
    return (
        m.count is not None
        and shape != state.mean.shape
        and shape[single_axis(batch_axis, shape)] != 1
    )


@in_explicit_meshes
def update_averaged(state: Moments, m: Moments, *, batch_axis: int = 0) -> Moments:
    """Averages of the batches' means and unbiased variances, each batch counting alike.

        k <- k + 1,    mean <- mean + (m - mean) / k,    var <- var + (v n / (n - 1) - var) / k

    It estimates the variance inside batches; `update_cumulative` that of all elements, and is exact
    where batches differ.

    Args:
        state: old running statistics with a count, here of batches:
            `init_running(shape, counted=True)`.
        m: moments of the batch, of the statistic's shape or of the state's.
        batch_axis: axis of the ghost batches in m.

    Returns:
        The new state, of the same shapes and dtypes.

    Raises:
        TypeError: complex moments for a real state.
        ValueError: a state without count, or moments of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> state = init_running((1,), counted=True)
        >>> for value in (0.0, 2.0):
        ...     state = update_averaged(state, Moments(jnp.full((1, 1), 3.0), jnp.full((1, 1), value), jnp.ones((1, 1))))
        >>> state.mean.tolist(), state.var.tolist(), state.count.tolist()
        ([1.0], [1.5], [2.0])
    """
    check_running(state, "state")
    if state.count is None:
        raise ValueError(
            "an average over batches counts them. Got no count; make the state by"
            " init_running(counted=True)."
        )
    warn_of_half_precision(state.var.dtype, None)
    m = corrected(_as_state(m, state, batch_axis), 1)
    k = state.count + 1
    mean, var = (toward(*_alike(*ts), 1 / k) for ts in ((state.mean, m.mean), (state.var, m.var)))
    return _stored(state, m, mean, var, k)


def _as_state(m: Moments, state: Moments, batch_axis: int) -> Moments:
    """A batch's moments with ghost batches pooled, in the state's shape."""
    check_running(m, "m")
    if m.count is None:
        raise ValueError(
            "m has no count. Expected a batch's moments, as moments(x, groups) returns, not running"
            " statistics."
        )
    shape = m.mean.shape
    if shape != state.mean.shape:
        batch = single_axis(batch_axis, shape)
        if shape[batch] != 1:
            m = pool(m, (*shape[:batch], 1, *shape[batch + 1 :]))
        if [n for n in m.mean.shape if n != 1] != [n for n in state.mean.shape if n != 1]:
            raise ValueError(
                f"moments of shape {shape} do not fit running statistics of shape"
                f" {state.mean.shape}. Expected the statistic's shape, whose batch axis and spatial"
                " axes of size 1 are dropped."
            )
        m = jax.tree.map(lambda t: t.reshape(state.mean.shape), m)
    if jnp.iscomplexobj(m.mean) and not jnp.iscomplexobj(state.mean):
        raise TypeError(
            f"the batch's mean is complex and the running mean {state.mean.dtype}. Expected a"
            " complex running mean for complex x: make it so from the start, init_running(shape,"
            " dtype=jnp.complex64)."
        )
    if jnp.iscomplexobj(state.mean):
        m = dataclasses.replace(m, mean=lax.complex(m.mean.real, m.mean.imag))
    return m
