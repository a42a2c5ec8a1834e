"""Running statistics of whole linen models, measured anew."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import core
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm import _population


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
    tree = core.unfreeze(dict(variables))
    nodes = _nodes(tree.get("batch_stats", {}))
    start = _population.started(nodes, reducer)
    step = jax.jit(lambda tree, batch: forward(tree, batch)[1]["batch_stats"])

    def ends() -> Iterator[_population.Nodes]:
        now = start
        for batch in batches:
            new = _nodes(step(_replaced(tree, now), batch))
            now = {path: new.get(path, node) for path, node in now.items()}
            yield now

    return _replaced(tree, _population.measured(nodes, start, ends()))


def _nodes(stats: Mapping[str, Any]) -> _population.Nodes:
    """The arrays of a collection by layer, where it has running statistics."""
    nodes: _population.Nodes = defaultdict(dict)
    for (*path, name), value in flatten_dict(stats).items():
        nodes[tuple(path)][name] = value
    return {path: node for path, node in nodes.items() if _population.STATISTICS & set(node)}


def _replaced(tree: dict[str, Any], nodes: _population.Nodes) -> dict[str, Any]:
    """Variables with other arrays in layers of batch_stats."""
    stats = flatten_dict(tree["batch_stats"], keep_empty_nodes=True)
    stats |= {(*path, name): t for path, node in nodes.items() for name, t in node.items()}
    return tree | {"batch_stats": unflatten_dict(stats)}
