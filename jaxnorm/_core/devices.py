"""Several devices: what `axis_name` and `axis_index_groups` mean.

Inside `pmap`, `shard_map` and `vmap(axis_name=...)` an array is one device's part, and statistics
are synchronized by a sum over the named axis. Under plain `jit` with sharded arrays there is no
named axis: the ordinary sum is already global.
"""

import contextlib
import operator
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxnorm._core.checks import check_count

AxisName = Hashable | tuple[Hashable, ...] | None
DeviceGroups = Sequence[Sequence[int]] | None
IndexGroups = tuple[tuple[int, ...], ...]
"""Device groups that are known to name every index of an axis once, in groups of equal size."""


def names_of(axis_name: AxisName) -> tuple[Hashable, ...]:
    """The named axes, as a tuple."""
    if isinstance(axis_name, tuple | list):
        return tuple(axis_name)
    return () if axis_name is None else (axis_name,)


def check_named(axis_name: AxisName, groups: DeviceGroups) -> None:
    """Groups of indices are those of one named axis."""
    if groups is not None and len(names_of(axis_name)) != 1:
        raise ValueError(
            f"axis_index_groups needs one named axis. Got axis_name={axis_name!r}; expected a "
            "single name."
        )


def device_groups_of(axis_name: AxisName, groups: DeviceGroups) -> IndexGroups | None:
    """`groups` as a hashable, or the reason why they are none.

    JAX takes groups of unequal size and divides by the size of the first, and fails inside XLA on
    groups that do not cover the axis; both are refused here.
    """
    for name in names_of(axis_name):
        try:
            lax.axis_size(name)
        except NameError as error:
            raise NameError(
                f"unbound axis name: {name!r}. axis_name names an axis of pmap, shard_map or vmap "
                "that encloses the call. Under plain jit leave it out: sums over sharded arrays "
                "are global already."
            ) from error
    check_named(axis_name, groups)
    if groups is None:
        return None
    try:
        groups = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError as error:
        raise TypeError(
            f"axis_index_groups is a list of lists of device indices. Got {groups!r}; expected for "
            "example [[0, 1], [2, 3]]."
        ) from error
    (name,) = names_of(axis_name)
    size = lax.axis_size(name)
    if len(set(map(len, groups))) != 1 or sorted(sum(groups, ())) != list(range(size)):
        raise ValueError(
            "axis_index_groups must be groups of equal size that name every index of the axis "
            f"once. Got {[list(group) for group in groups]} for axis {name!r} of size {size}; "
            f"expected each of 0 to {size - 1} in exactly one group, and as many indices in each."
        )
    return groups


def device_count(axis_name: AxisName, groups: IndexGroups | None) -> int:
    """On how many devices one set of statistics lives."""
    return lax.axis_size(names_of(axis_name)) if groups is None else len(groups[0])


def axes_named(axis_name: AxisName, sizes: tuple[int, ...]) -> AbstractContextManager[None]:
    """A context for a derivative rule, in which collectives know the axes of its function.

    JAX traces the rule of a function inside `vmap(axis_name=...)` when it takes the derivative.
    With `jax.grad` outside of `jit` outside of the map, the map has been left by then, and a sum
    over its axis would be refused although the map is applied to the rule. In all other orders, and
    in shard_map and pmap, the axes are named already.
    """
    pairs = zip(names_of(axis_name), sizes, strict=True)
    missing = [pair for pair in pairs if not _is_named(*pair)]
    if not missing:
        return contextlib.nullcontext()
    # Private: JAX has no public way to say which axes there are. Imported here, so that a version
    # of JAX without it loses this order of transformations alone.
    from jax._src.core import extend_axis_env_nd

    return extend_axis_env_nd(missing)


def _is_named(name: Hashable, size: int) -> bool:
    try:
        return lax.axis_size(name) == size
    except NameError:
        return False


def all_sum(tree: Any, axis_name: AxisName, groups: IndexGroups | None) -> Any:
    """The sum of every leaf over the named axes, within `groups` where they are given."""
    if axis_name is None:
        return tree
    try:
        return _sum_over(tree, axis_name, groups)
    except (AssertionError, ValueError) as error:
        meshes = set(jax.sharding.get_abstract_mesh().manual_axes)
        mapped = [name for name in names_of(axis_name) if name not in meshes]
        if not meshes or not mapped:
            raise
        raise NotImplementedError(
            f"JAX has no sum over {mapped[0]!r}, an axis of vmap, inside "
            "shard_map(check_vma=True). Expected names of the mesh's axes alone. Pass "
            "check_vma=False to shard_map, or call without vmap on an x that has these examples "
            "in its batch."
        ) from error


def _sum_over(tree: Any, axis_name: AxisName, groups: IndexGroups | None) -> Any:
    if groups is None:
        return lax.psum(tree, axis_name)
    # JAX has no psum over groups under vmap nor under shard_map's check_vma=True. One sum with a
    # row for each group works in every context and differs only in volume.
    places = np.argsort(np.ravel(groups))  # of the devices, in the groups one after the other
    mine = jnp.asarray(places // len(groups[0]))[lax.axis_index(names_of(axis_name)[0])]

    def grouped(t: jax.Array) -> jax.Array:
        rows = jnp.zeros((len(groups), *t.shape), t.dtype).at[mine].set(t)
        return lax.dynamic_index_in_dim(lax.psum(rows, axis_name), mine, keepdims=False)

    return jax.tree.map(grouped, tree)


def same_on_all_devices(axis_name: AxisName, groups: IndexGroups | None) -> bool:
    """Whether a value summed over `axis_name` is equal on every device that runs this program.

    A collective may stand inside a `lax.cond` only if all devices take the same branch; a program
    that waits for a device which took the other one hangs. A sum over some of the mesh's axes, or
    within groups, differs between the rest.
    """
    differing = set(jax.sharding.get_abstract_mesh().manual_axes) - set(names_of(axis_name))
    return groups is None and not differing


def varying(t: jax.Array) -> frozenset[Hashable]:
    """The axes over which t differs between devices, where shard_map's check_vma=True tracks it."""
    return frozenset(getattr(getattr(jax.typeof(t), "manual_axis_type", None), "varying", ()))


def varying_like(t: jax.Array, x: jax.Array) -> jax.Array:
    """t, marked as differing between the devices over which x differs.

    Under shard_map's check_vma=True a statistic that is equal on all devices would be marked where
    it meets x, at full size, and the sum over devices of its cotangent, too, would then be taken at
    full size.
    """
    missing = tuple(sorted(varying(x) - varying(t), key=str))
    return lax.pcast(t, missing, to="varying") if missing else t


def device_groups(num_devices: int, *, size: int, strided: bool = False) -> IndexGroups:
    """Groups of devices for `axis_index_groups`: each index of a named axis in one group of `size`.

    Args:
        num_devices: size of the named axis.
        size: devices in a group, a divisor of it.
        strided: False puts neighbours together; True takes every (num_devices / size)-th, which are
            far apart.

    Returns:
        The groups, a tuple of tuples of indices.

    Raises:
        ValueError: the devices do not split into groups of that size.

    Example:
        >>> device_groups(8, size=4)
        ((0, 1, 2, 3), (4, 5, 6, 7))
        >>> device_groups(8, size=4, strided=True)
        ((0, 2, 4, 6), (1, 3, 5, 7))
    """
    num_devices, size = check_count(num_devices, "num_devices"), check_count(size, "size")
    if num_devices % size:
        raise ValueError(
            f"{num_devices} devices do not split into groups of {size}. Expected a divisor of the "
            f"number of devices: {[d for d in range(1, num_devices + 1) if num_devices % d == 0]}."
        )
    count = num_devices // size
    return tuple(
        tuple(range(i, num_devices, count) if strided else range(i * size, (i + 1) * size))
        for i in range(count)
    )
