"""Arrays on meshes with axes of type Explicit."""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxnorm._core.devices import names_of

F = TypeVar("F", bound=Callable[..., Any])


def in_explicit_meshes(f: F) -> F:
    """f, also for arrays on a mesh with axes of type Explicit, as `jax.make_mesh` makes them.

    There JAX asks how the result of a reshape is sharded, and for groups that span shards no
    PartitionSpec says it. So f runs with these axes as Auto ones, and what it returns is typed
    afterwards: see `_spec`. Elsewhere f is called as it is. Its arguments are arrays, pytrees of
    them, hashable options and functions, of which the activation sees arrays as they are typed
    outside; the first array's sharding is the one that results take.
    """

    @functools.wraps(f)
    def call(*args: Any, **options: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, options))
        arrays = [t if isinstance(t, jax.Array | np.ndarray) else None for t in leaves]
        meshes = (jax.typeof(t).sharding.mesh for t in arrays if t is not None)
        mesh = next((mesh for mesh in meshes if mesh.explicit_axes), None)
        if mesh is None:
            return f(*args, **options)
        rest = tuple(t if array is None else None for t, array in zip(leaves, arrays, strict=True))
        with jax.sharding.use_abstract_mesh(mesh):
            if not any(callable(t) and not isinstance(t, type) for t in rest):
                return _compiled(f, tree, rest, arrays)
            # compiled for this call only: what a function closes over may be another value, or
            # tracer, next time
            return jax.jit(functools.partial(_run_in_auto_mode, f, tree, rest))(arrays)

    return call  # type: ignore[return-value]  # with the signature of f


def _run_in_auto_mode(
    f: Callable[..., Any], tree: Any, rest: tuple[Any, ...], arrays: list[Any]
) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    first = jax.typeof(next(t for t in arrays if t is not None))
    auto = mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))

    def typed(out: Any) -> Any:
        return jax.sharding.reshard(out, jax.tree.map(lambda t: _spec(t.shape, first), out))

    def enter(g: Callable[..., Any], *args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(auto):
            return g(*jax.sharding.reshard(args, PartitionSpec()))

    def run(*arrays: Any) -> Any:
        args, options = jax.tree.unflatten(
            tree, [t if a is None else a for a, t in zip(arrays, rest, strict=True)]
        )
        if (activation := options.get("activation")) is not None:

            def outside(y: jax.Array) -> jax.Array:
                """It may use arrays that were made outside of here."""
                with jax.sharding.use_abstract_mesh(mesh):
                    return enter(lambda y: y, activation(typed(y)))

            options["activation"] = outside
        return f(*args, **options)

    return typed(enter(run, *arrays))


# Under jit, because outside of it what f makes from nothing belongs to no mesh.
_compiled = jax.jit(_run_in_auto_mode, static_argnums=(0, 1, 2))


def _spec(shape: tuple[int, ...], x: Any) -> PartitionSpec:
    """The sharding of a statistic of x, or of y.

    It is x's on every axis whose groups are whole on each device, and replicated on the others.
    """
    if len(shape) != x.ndim:
        return PartitionSpec()
    entries: list[Any] = []
    for n, names in zip(shape, x.sharding.spec, strict=True):
        names = names_of(names)
        sizes = [x.sharding.mesh.shape[name] for name in names]
        whole = max(i for i in range(len(names) + 1) if n % math.prod(sizes[:i]) == 0)
        entries.append(names[:whole] or None)
    return PartitionSpec(*entries)
