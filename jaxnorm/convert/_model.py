"""Whole models: the arrays of every module by a table of names, and one error for what is wrong."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.convert._arrays import as_numpy, flat
from jaxnorm.convert._libraries import LIBRARIES, Library

Names = Mapping[str, str] | Callable[[str], str | None]
COLLECTIONS = {"params", "batch_stats"}
"""Of linen, which has a module's arrays in two trees."""
COUNTS = {"calls", "count"}
"""What a state may have or not: it does not enter inference."""
BOOKKEEPING = {"num_batches_tracked"}
"""What another library may have that a tree need not know."""


def load_model(
    tree: Any, arrays: Any, names: Names, *, library: str = "torch", **options: Any
) -> Any:
    """A model's parameters and running statistics from another library's.

    Kernels of dense and convolution layers, grouped ones too, and embeddings are brought into
    Flax's layout: (O, I, H, W) becomes (H, W, I, O). What has the same shape and another meaning
    cannot be seen: a dense layer behind flattened images has its rows in another order, and a
    transposed convolution its kernel mirrored; docs/coming_from_pytorch.md shows what to do.

    Args:
        tree: of the model here, arrays or `jax.ShapeDtypeStruct`: variables of linen, or
            `nnx.state(model, (nnx.Param, nnx.BatchStat))`.
        arrays: of the other model by name: a state dict of PyTorch, Haiku's `{**params, **state}`,
            `{v.path: v for v in model.variables}` of Keras, `equinox.filter(model,
            equinox.is_array)`, or a tree of linen or nnx.
        names: the path of each module here, "Bottleneck_0/BatchNorm_1", to its name there,
            "layer1.0.bn2"; a mapping, or a function. A module is what holds arrays.
        library: whose arrays they are: "torch", "haiku", "equinox", "keras", "sbx" or "flax".
        **options: of `from_torch` and its relatives, the same for all layers: `decay_rate`,
            `momentum`, `epsilon`.

    Returns:
        The tree with JAX arrays of the dtypes that were given. Counts of updates that it has no
        place for are left out.

    Raises:
        ValueError: modules without a name or without arrays, arrays that are left over, other
            shapes: all of them in one message.

    Example:
        >>> params = {"Dense_0": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
        >>> arrays = {"fc.weight": np.ones((2, 3), "f4"), "fc.bias": np.ones(2, "f4")}
        >>> new = load_model({"params": params}, arrays, {"Dense_0": "fc"})
        >>> new["params"]["Dense_0"]["kernel"].shape
        (3, 2)

    Reference:
        Flax's layouts and PyTorch's; no paper is followed.
    """
    kind = _library(library)
    leaves, structure = jax.tree.flatten(tree)
    places = [_place(path) for path in flat(tree)]
    wanted = _by_module(zip(places, leaves, strict=True))
    table, wrong = _table(wanted, names)
    theirs, left = _grouped(arrays, set(table.values()), strip=library == "flax")
    wrong += [f"{key} is not used" for key in left]
    new: dict[tuple[str, str], np.ndarray] = {}
    for module, name in table.items():
        want, prefix = wanted[module], f"{module}/" if module else ""
        if name not in theirs:
            wrong.append(f"{module} has no arrays: there are none of {name!r}")
            continue
        try:
            found = kind.arrays_of(set(want), theirs[name], **options)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
            continue
        for leaf, t in want.items():
            if leaf not in found:
                got = ", ".join(theirs[name])
                wrong.append(f"{prefix}{leaf} is missing: of {name!r} there are {got}")
            elif found[leaf].shape != tuple(t.shape):
                shapes = f"{tuple(t.shape)} here and {found[leaf].shape} from {name!r}"
                wrong.append(f"{prefix}{leaf} has shape {shapes}")
        for leaf in sorted(set(found) - set(want) - COUNTS):
            wrong.append(f"{leaf} of {name!r} has no place in {module or 'the tree'}")
        new |= {(module, leaf): t for leaf, t in found.items()}
    _check(wrong, "load_model", library)
    return jax.tree.unflatten(structure, [jnp.asarray(new[place]) for place in places])


def dump_model(
    tree: Any,
    names: Names,
    *,
    library: str = "torch",
    like: Any = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """The inverse of `load_model`: another library's arrays of a model, by name.

    Args:
        tree: of the model here, as `load_model` returns it.
        names: as for `load_model`.
        library: which names and layouts to write.
        like: the other model's own arrays. The result then has all of their names and their
            shapes, or it is an error; counts of batches that are not known here are theirs.
        **options: of `to_torch` and its relatives, the same for all layers.

    Returns:
        Arrays by name, as a state dict has them.

    Raises:
        ValueError: modules without a name, names or shapes that are not those of `like`: all of
            them in one message.

    Example:
        >>> params = {"Dense_0": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}
        >>> arrays = dump_model({"params": params}, {"Dense_0": "fc"})
        >>> arrays["fc.weight"].shape, arrays["fc.bias"].shape
        ((2, 3), (2,))

    Reference:
        See `load_model`.
    """
    kind = _library(library)
    leaves = [(_place(path), as_numpy(t)) for path, t in flat(tree).items()]
    modules = _by_module(leaves)
    table, wrong = _table(modules, names)
    new: dict[str, np.ndarray] = {}
    for module, name in table.items():
        try:
            theirs = kind.arrays_for(modules[module], **options)
        except ValueError as error:
            wrong.append(f"{module}: {error}")
            continue
        for leaf, t in theirs.items():
            inner = "~/" * ("/" in leaf)  # a module that a method of another made, in Haiku
            key = f"{name}{kind.separator}{inner}{leaf}" if name else inner + leaf
            if key in new and not np.array_equal(new[key], t):
                wrong.append(f"{key} is written twice, with different values")
            new[key] = t
    if like is not None:
        new, more = _fitted(new, flat(like))
        wrong += more
    _check(wrong, "dump_model", library)
    return new


def _library(library: str) -> Library:
    if library not in LIBRARIES:
        raise ValueError(f"library is one of {', '.join(map(repr, LIBRARIES))}. Got {library!r}.")
    return LIBRARIES[library]


def _place(path: str) -> tuple[str, str]:
    """The module and the name in it of an array, without the collection of linen."""
    module, _, leaf = path.rpartition("/")
    first, _, rest = module.partition("/")
    return (rest if first in COLLECTIONS else module), leaf


def _by_module(leaves: Any) -> dict[str, dict[str, Any]]:
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    for (module, leaf), t in leaves:
        modules[module][leaf] = t
    return dict(modules)


def _table(modules: Mapping[str, Any], names: Names) -> tuple[dict[str, str], list[str]]:
    """The name of each module, and what is wrong with them."""
    if callable(names):
        given = {module: names(module) for module in modules}
    else:
        given = {module: names.get(module) for module in modules}
    table = {module: name for module, name in given.items() if name is not None}
    wrong = [f"{module} has no name" for module in modules if module not in table]
    if not callable(names):
        unknown = [module for module in names if module not in modules]
        wrong += [f"{module} is in names and not in the tree" for module in unknown]
    return table, wrong


def _grouped(
    arrays: Any, names: set[str], *, strip: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The arrays of each of these modules, and the names of those that belong to none.

    An array is of the module with the longest name that its own begins with. A tilde, with which
    Haiku names the inner modules of a module, is left out.
    """
    by_path = {name.replace(".", "/"): name for name in names}
    modules: dict[str, dict[str, Any]] = defaultdict(dict)
    left = []
    for key, t in flat(arrays).items():
        path = key.replace(".", "/")
        if strip and path.split("/")[0] in COLLECTIONS:
            path = path.partition("/")[2]
        ends = [i for i, letter in enumerate(path) if letter == "/"]
        end = next((i for i in reversed(ends) if path[:i] in by_path), None)
        if end is not None:
            modules[by_path[path[:end]]][path[end + 1 :].removeprefix("~/")] = t
        elif "" in by_path:
            modules[by_path[""]][path.removeprefix("~/")] = t
        else:
            left.append(key)
    return modules, left


def _fitted(
    new: dict[str, np.ndarray], like: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays with the names and shapes of others, and what does not fit."""
    wrong = [f"{key} is not in like" for key in new if key not in like]
    fitted = {}
    for key, old in like.items():
        if key not in new:
            if key.replace(".", "/").split("/")[-1] in BOOKKEEPING:
                fitted[key] = as_numpy(old)
            else:
                wrong.append(f"{key} of like is missing")
            continue
        shape, want = new[key].shape, tuple(np.shape(old))
        if [n for n in shape if n != 1] != [n for n in want if n != 1]:
            wrong.append(f"{key} has shape {want} in like and {shape} from the tree")
        else:
            fitted[key] = new[key].reshape(want)
    return fitted, wrong


def _check(wrong: list[str], function: str, library: str) -> None:
    if wrong:
        raise ValueError(
            f"{function} found {len(wrong)} mismatches between the tree and {library}:\n  "
            + "\n  ".join(wrong)
            + "\nExpected a name for each module here, and for each array there a place of its "
            "shape; correct names, or leave out or add arrays."
        )
