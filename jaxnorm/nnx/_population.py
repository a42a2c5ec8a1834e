"""Whole nnx models at test time: running statistics measured anew."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from flax import nnx

from jaxnorm import _population


def population_statistics(
    forward: Callable[[Any, Any], Any],
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    reducer: str = "pooled",
) -> None:
    """Running statistics measured anew over many batches, in place (PreciseBN).

    Parameters stay fixed.

        pooled:     mean and var of all elements of all batches
        averaged:   means over batches of mean and of var n / (n - 1)

    Every pair of `mean` and `var` in the model is replaced, in one pass over the batches, whose
    order does not matter; only one batch is held at a time. Layers above the first normalize with
    the statistics of each batch, so theirs depend on the size of batches: take that of training. A
    layer that is not used keeps its statistics. Nothing else in the model changes.

    Args:
        forward: (model, batch) -> anything, a training-mode call. It is compiled, once for each
            shape of batch.
        model: its `mean` and `var` are replaced, with the same dtypes; a `count` (`debias=True`)
            becomes 1. Variances that are pooled are biased.
        batches: what `forward` takes, read once.
        reducer: "pooled" or "averaged".

    Raises:
        ValueError: no batches or nothing updated, another reducer, a layer that is called twice in
            a batch, a layer with another rule of update, such as Flax's own, or with other
            statistics, such as those of `batch_renorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm.nnx import BatchNorm
        >>> layer = BatchNorm(1, rngs=nnx.Rngs(0))
        >>> population_statistics(
        ...     lambda layer, x: layer(x), layer, [jnp.array([[0.0], [2.0]]), jnp.array([[4.0]])]
        ... )
        >>> layer.mean[...].tolist()
        [2.0]

    Reference:
        Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576. The definition was read in fvcore's
        code.
    """
    copy = nnx.clone(model)
    nodes = _nodes(copy)
    start = _population.started(nodes, reducer)
    for path, layer in nnx.iter_modules(copy):
        for name, value in start.get(path, {}).items():
            if value is not nodes[path].get(name):
                setattr(layer, name, nnx.BatchStat(value))
    graph, parameters, state = nnx.split(copy, nnx.Param, ...)

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(graph, parameters, state)
        forward(model, batch)
        return nnx.state(model, nnx.Not(nnx.Param)), _nodes(model)

    def ends() -> Iterator[_population.Nodes]:
        now = state
        for batch in batches:
            now, end = step(parameters, now, batch)
            yield end

    new = _population.measured(nodes, start, ends())
    for path, layer in nnx.iter_modules(model):
        for name, value in new.get(path, {}).items():
            getattr(layer, name)[...] = value


def _nodes(model: nnx.Module) -> _population.Nodes:
    """What the layers with running statistics remember."""
    nodes = {
        path: {name: t[...] for name, t in vars(layer).items() if isinstance(t, nnx.BatchStat)}
        for path, layer in nnx.iter_modules(model)
    }
    return {path: node for path, node in nodes.items() if _population.STATISTICS & set(node)}
