"""Running statistics that devices kept apart, made equal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.devices import AxisName, DeviceGroups, all_sum, device_count, device_groups_of
from jaxnorm._core.moments import Moments, as_weights
from jaxnorm._core.pooling import pool


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
    syncing twice equals syncing once, and training continues as before; with cumulative statistics
    the result is exact after any number of rounds.

    Args:
        state: `Moments`, or a pytree with mappings that have "mean" and "var" (and "count") in it,
            such as the collection batch_stats of linen and the pure dict of `nnx.BatchStat`
            variables. "train_mean" and "train_var" beside them (momentum batch norm) are such
            a pair too; "positions", equal on all devices, stays.
        axis_name: axis or axes of pmap, shard_map or vmap over which the devices differ.
        axis_index_groups: groups of indices of that axis that become equal, see `device_groups`.
        weights: how much this device counts, 0 or more, such as its number of examples, in place of
            the state's count. A traced negative one or NaN counts 0, as do statistics that are not
            finite.

    Returns:
        The state, of the same structure, shapes and dtypes.

    Raises:
        TypeError: a leaf that belongs to no running statistics, or another array beside them, such
            as the window of cross-iteration norm, whose union is not defined.
        ValueError: negative weights or NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> per_device = {"norm": {"mean": jnp.array([[0.0], [2.0]]), "var": jnp.ones((2, 1))}}
        >>> sync = jax.vmap(lambda state: sync_running(state, axis_name="i"), axis_name="i")
        >>> sync(per_device)["norm"]["var"].tolist()
        [[2.0], [2.0]]
    """
    groups = device_groups_of(axis_name, axis_index_groups)

    def synced(s: Any) -> Any:
        if not _holds_statistics(s):
            raise TypeError(
                f"sync_running takes running statistics. Got a leaf of type {type(s).__name__}; "
                'expected Moments, or mappings with "mean" and "var", such as batch_stats.'
            )
        if isinstance(s, Moments):
            return together(s)
        new = together(Moments(s.get("count"), s["mean"], s["var"]))
        values = vars(new) | {"positions": s.get("positions")}
        if "train_mean" in s and "train_var" in s:
            new = together(Moments(None, s["train_mean"], s["train_var"]))  # type: ignore[arg-type]  # no count
            values |= {"train_mean": new.mean, "train_var": new.var}
        values |= {name: tree(t) for name, t in s.items() if isinstance(t, Mapping)}
        if unknown := sorted(set(s) - set(values)):
            raise TypeError(
                f"sync_running knows no union of {', '.join(unknown)}. Got {', '.join(sorted(s))}; "
                "expected mean and var, and beside them count, train_mean and train_var, or "
                "positions. Keep such layers equal by their axis_name."
            )
        return type(s)({name: values[name] for name in s})

    def together(s: Moments) -> Moments:
        wide = jax.tree.map(lambda t: t.astype(statistic_dtype(t.dtype)), s)
        w = jnp.ones_like(wide.var) if s.count is None else wide.count
        if weights is not None:
            w = as_weights(weights, wide.var)
        w = jnp.broadcast_to(w.astype(wide.var.dtype), s.var.shape)
        sound = jnp.isfinite(wide.mean) & jnp.isfinite(wide.var) & jnp.isfinite(w) & (w >= 0)
        w = jnp.where(sound, w, 0)
        # before the first update all devices count alike
        w = jnp.where(all_sum(w, axis_name, groups) > 0, w, 1)
        m = Moments(w, wide.mean, wide.var)
        new = pool(m, w.shape, axis_name=axis_name, axis_index_groups=axis_index_groups)
        count = jax.tree.map(
            lambda n: all_sum(n, axis_name, groups) / device_count(axis_name, groups), wide.count
        )
        new = dataclasses.replace(new, count=count)
        return jax.tree.map(lambda old, t: t.astype(old.dtype), s, new)

    def tree(state: Any) -> Any:
        return jax.tree.map(synced, state, is_leaf=_holds_statistics)

    return tree(state)


def _holds_statistics(t: Any) -> bool:
    return isinstance(t, Moments) or (isinstance(t, Mapping) and {"mean", "var"} <= set(t))
