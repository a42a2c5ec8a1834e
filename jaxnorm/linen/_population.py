"""Running statistics of whole linen models, measured anew."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import core

from jaxnorm import _population

Path = tuple[str, ...]


def population_statistics(
    forward: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    reducer: str = "pooled",
) -> dict[str, Any]:
    """Running statistics measured anew over many batches with fixed parameters (PreciseBN).

        pooled:     mean and var of all elements of all batches
        averaged:   means over batches of mean and of var n / (n - 1)

    Every pair of `mean` and `var` in the collection batch_stats is replaced, in one pass over the
    batches, whose order does not matter; only one batch is held at a time. Layers above the first
    normalize with the statistics of each batch, so theirs depend on the size of batches: take that
    of training. A layer that is not used keeps its statistics.

    Args:
        forward: (variables, batch) -> (anything, updates), a training-mode call of the model with
            mutable batch_stats. It is compiled, once for each shape of batch.
        variables: of the model, with the collection batch_stats.
        batches: what `forward` takes, read once.
        reducer: "pooled" or "averaged".

    Returns:
        `variables` with other batch_stats, of the same dtypes; a `count` (`debias=True`) is 1.
        Variances that are pooled are biased.

    Raises:
        ValueError: no batches or nothing updated, another reducer, a layer that is called twice in
            a batch, a layer with another rule of update, such as Flax's own, or with other
            statistics, such as those of `batch_renorm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm.linen import BatchNorm
        >>> layer = BatchNorm(use_running_average=False)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 1)))
        >>> def forward(variables, x):
        ...     return layer.apply(variables, x, mutable="batch_stats")
        >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[4.0]])]
        >>> population_statistics(forward, variables, batches)["batch_stats"]["mean"].tolist()
        [2.0]

    Reference:
        Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576. The definition was read in fvcore's
        code.
    """
    count = _population.count_of(reducer)
    tree = core.unfreeze(dict(variables))
    nodes = dict(_nodes(tree.get("batch_stats", {})))
    old = {path: node for path, node in nodes.items() if {"mean", "var"} <= set(node)}
    start = {
        path: node | _population.start(node["mean"], node["var"], count)
        for path, node in old.items()
    }
    step = jax.jit(lambda tree, batch: core.unfreeze(dict(forward(tree, batch)[1]))["batch_stats"])
    now, done = start, 0
    for batch in batches:
        new = dict(_nodes(step(_replaced(tree, now), batch)))
        for path, node in new.items():
            if path not in old:
                _population.check_unchanged("/".join(path), nodes.get(path, node), node)
        now = {path: new.get(path, node) for path, node in now.items()}
        done += 1
        if done == 1:
            _population.uses(start, now, done)
    used = _population.uses(start, now, done)
    _population.check_any(used.values(), done)
    new = {}
    for path in (path for path in old if used[path]):
        node = old[path]
        new[path] = node | {
            name: now[path][name].astype(node[name].dtype) for name in ("mean", "var")
        }
        if "count" in node:
            new[path]["count"] = jax.numpy.ones_like(node["count"])
    return _replaced(tree, new)


def _nodes(tree: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The dicts of a collection that hold running statistics, without what is nested in them."""
    if isinstance(tree, Mapping):
        arrays = {name: t for name, t in tree.items() if not isinstance(t, Mapping)}
        if _population.STATISTICS & set(arrays):
            yield path, arrays
        for name, node in tree.items():
            yield from _nodes(node, (*path, name))


def _replaced(tree: dict[str, Any], nodes: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """Variables with other dicts at these paths of batch_stats."""

    def at(node: Any, path: Path) -> Any:
        if not isinstance(node, dict):
            return node
        return {name: at(t, (*path, name)) for name, t in (node | nodes.get(path, {})).items()}

    return tree | {"batch_stats": at(tree["batch_stats"], ())}
