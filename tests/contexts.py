"""Where a function runs: on parts of arrays by named axes, or on whole arrays that are sharded."""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESHES = {"N": (8,), "H": (8,), "NH": (2, 4), "NC": (4, 2)}
"""Sizes of the device axes i and j that cut the batch N, the height H and the channels C of (N, H,
W, C)."""

AXES = {"N": 0, "H": 1, "C": 3}


def mesh(cut: str, kind: AxisType = AxisType.Auto) -> Mesh:
    sizes = MESHES[cut]
    return jax.make_mesh(sizes, ("i", "j")[: len(sizes)], axis_types=(kind,) * len(sizes))


def spec(cut: str) -> P:
    entries = [None] * 4
    for name, letter in zip("ij", cut, strict=False):
        entries[AXES[letter]] = name
    return P(*entries)


def parts(t, cut: str):
    """t with leading axes for the devices."""
    for k, (count, letter) in enumerate(zip(MESHES[cut], cut, strict=True)):
        axis = AXES[letter] + k
        t = t.reshape(*t.shape[:axis], count, -1, *t.shape[axis + 1 :])
        t = np.moveaxis(t, axis, k) if isinstance(t, np.ndarray) else jax.numpy.moveaxis(t, axis, k)
    return t


def whole(t, cut: str):
    """The inverse of `parts`."""
    for k, letter in reversed(list(enumerate(cut))):
        axis = AXES[letter] + k
        t = np.moveaxis(np.asarray(t), k, axis)
        t = t.reshape(*t.shape[:axis], -1, *t.shape[axis + 2 :])
    return t


def _shard_map(f, cut, check_vma):
    return jax.jit(
        jax.shard_map(
            f, mesh=mesh(cut), in_specs=spec(cut), out_specs=spec(cut), check_vma=check_vma
        )
    )


def _mapped(maps, f, cut):
    for mapped, name in list(zip(maps, "ij"[: len(cut)], strict=False))[::-1]:
        f = mapped(f, axis_name=name)

    def run(*args):
        return jax.tree.map(lambda t: whole(t, cut), f(*(parts(t, cut) for t in args)))

    return run


def _sharded(f, cut, kind, set_mesh=False, jit=True):
    where = mesh(cut, kind)

    def run(*args):
        with jax.set_mesh(where) if set_mesh else contextlib.nullcontext():
            placed = [jax.device_put(t, NamedSharding(where, fitting(t, cut))) for t in args]
            return (jax.jit(f) if jit else f)(*placed)

    return run


def fitting(t, cut):
    """The sharding of x as far as an array, such as a statistic of x, can have it."""
    counts = dict(zip("ij", MESHES[cut], strict=False)) | {None: 1}
    return P(
        *(
            name if n % counts[name] == 0 else None
            for n, name in zip(t.shape, spec(cut), strict=True)
        )
    )


@dataclasses.dataclass(frozen=True)
class Context:
    """`run(f, cut)` is f as a function of whole arrays of rank 4; f itself sees parts where
    `named`."""

    name: str
    named: bool
    run: Callable[..., Callable]

    def __str__(self):
        return self.name


NAMED = (
    Context("pmap", True, partial(_mapped, (jax.pmap, jax.vmap))),
    Context("vmap", True, partial(_mapped, (jax.vmap, jax.vmap))),
    Context("shard_map", True, partial(_shard_map, check_vma=True)),
    Context("shard_map unchecked", True, partial(_shard_map, check_vma=False)),
)
SHARDED = (
    Context("jit", False, partial(_sharded, kind=AxisType.Auto)),
    Context("jit explicit", False, partial(_sharded, kind=AxisType.Explicit)),
    Context("jit set_mesh", False, partial(_sharded, kind=AxisType.Explicit, set_mesh=True)),
)
EAGER = (
    Context("explicit", False, partial(_sharded, kind=AxisType.Explicit, jit=False)),
    Context("set_mesh", False, partial(_sharded, kind=AxisType.Explicit, set_mesh=True, jit=False)),
)
CONTEXTS = (*NAMED, *SHARDED)
