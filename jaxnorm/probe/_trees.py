"""The length of a tree of arrays, taken as one vector."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxnorm._core.arithmetic import abs2, statistic_dtype

Path = tuple[str, ...]


def named_leaves(tree: Any, name: str) -> list[tuple[Path, jax.Array]]:
    """The floating or complex arrays of a tree with the names on the way to them."""
    leaves = [
        (_names(path), jnp.asarray(t)) for path, t in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    if not leaves:
        raise ValueError(f"{name} has no arrays. Got {tree!r}; expected a tree of them.")
    for path, t in leaves:
        if not jnp.issubdtype(t.dtype, jnp.inexact):
            raise TypeError(
                f"{name} has {t.dtype} of shape {t.shape} at {'/'.join(path)!r}. Expected floating "
                "or complex arrays; leave out the others."
            )
    return leaves


def l2(arrays: Iterable[jax.Array]) -> jax.Array:
    """The root of the sum of all squares, in float32 or wider."""
    wide = [(t, jnp.dtype(statistic_dtype(t.dtype, real=True))) for t in arrays]
    widest = max((dtype for _, dtype in wide), key=lambda dtype: dtype.itemsize)
    total = jnp.zeros((), widest)
    for t, _ in wide:
        total += abs2(t.astype(statistic_dtype(t.dtype))).sum().astype(widest)
    return jnp.sqrt(total)


def distance(a: Any, b: Any) -> jax.Array:
    """The l2 norm of a - b, two trees of one structure."""

    def difference(s: jax.Array, t: jax.Array) -> jax.Array:
        dtype = statistic_dtype(s.dtype)
        return s.astype(dtype) - t.astype(dtype)

    return l2(jax.tree.leaves(jax.tree.map(difference, a, b)))


def check_alike(a: Any, b: Any, name: str, other: str) -> None:
    """Two trees have one structure and arrays of the same shapes and dtypes."""
    shapes = [
        jax.tree.map(lambda t: (jnp.shape(t), jnp.result_type(t).name), tree) for tree in (a, b)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name} and {other} are trees of different arrays. Got {shapes[0]} and {shapes[1]}; "
            "expected the same names, shapes and dtypes in both."
        )


def _names(path: Any) -> Path:
    """Names on the way to a leaf; the value in a variable of nnx has none."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
