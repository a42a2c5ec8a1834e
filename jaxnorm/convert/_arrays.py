"""Arrays of one layer by name, checked, copied to NumPy and renamed; no library is known here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """The arrays of a normalization layer as jaxnorm has them.

    They are copies, NumPy arrays of the dtypes that they came with, and serve
    `method.apply(x, state, train=..., **params)`. In linen `params` and `state` are the layer's
    part of the collections `params` and `batch_stats`.

    Args:
        params: `scale` and `bias`, where the layer has them.
        state: what the layer remembers, {} where that is nothing.
    """

    params: Arrays
    state: Arrays


def as_numpy(t: Any) -> np.ndarray:
    """A copy of an array as NumPy's, also of a tensor of PyTorch.

    A tensor's own `numpy()` would share the memory that training goes on to change. NumPy has
    bfloat16 through JAX alone, so a tensor of that dtype is handed over by DLPack.
    """
    if hasattr(t, "detach"):
        t = t.detach().cpu().contiguous()
        try:
            t = t.numpy()
        except TypeError:
            t = jnp.from_dlpack(t)
    return np.array(np.asarray(t))


def flat(arrays: Any) -> dict[str, Any]:
    """The leaves of nested dicts, or of another tree, by their path with slashes.

    `value`, which boxes and variables of Flax add, is left out.
    """
    return {
        _joined(path): t
        for path, t in jax.tree_util.tree_flatten_with_path(arrays, is_leaf=_is_tensor)[0]
    }


def _is_tensor(t: Any) -> bool:
    return hasattr(t, "detach")


def _joined(path: tuple[Any, ...]) -> str:
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(
        str(next(getattr(key, field) for field in ("key", "name", "idx") if hasattr(key, field)))
        for key in path
    )


def renamed(
    arrays: Any,
    names: Mapping[str, str],
    function: str,
    *,
    together: tuple[tuple[str, ...], ...] = (),
    scalars: tuple[str, ...] = (),
) -> Arrays:
    """The arrays under our names, once it is certain that they are those of one layer.

    Args:
        arrays: of one layer.
        names: of the arrays that it may have -> ours.
        function: the public one, for messages.
        together: names that come all or not at all.
        scalars: names of those that have no channels.
    """
    found = {name: as_numpy(t) for name, t in flat(arrays).items()}
    wrong = [f"the unknown name {name}" for name in found if name not in names]
    for group in together:
        missing = [name for name in group if name not in found]
        if 0 < len(missing) < len(group):
            there = ", ".join(name for name in group if name in found)
            wrong.append(f"{there} without {', '.join(missing)}")
    shapes = {name: t.shape for name, t in found.items() if name in names and name not in scalars}
    if len(set(shapes.values())) > 1:
        wrong.append("arrays of different shapes, " + _listed(shapes))
    if wrong:
        raise ValueError(
            f"{function} got {'; '.join(wrong)}. Expected the arrays of one layer, "
            f"of one shape and with names among {', '.join(names)}; a whole model is for "
            "load_model."
        )
    return {names[name]: t for name, t in found.items()}


def ours(
    params: Any,
    state: Any,
    names: tuple[str, ...],
    function: str,
    *,
    together: tuple[tuple[str, ...], ...] = (("mean", "var"),),
) -> Arrays:
    """The arrays of our layer, once it is certain that the other library has a place for them."""
    arrays = {**flat(params), **flat(state or {})}
    return renamed(
        arrays, {name: name for name in names}, function, together=together, scalars=("calls",)
    )


def split(arrays: Arrays) -> Layer:
    """Parameters and state."""
    params = {name: arrays[name] for name in ("scale", "bias") if name in arrays}
    return Layer(params, {name: t for name, t in arrays.items() if name not in params})


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
