"""Whole nnx models at test time: running statistics measured anew."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
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
    count = _population.count_of(reducer)
    names = ("mean", "var", count, "calls")
    copy = nnx.clone(model)
    layers: dict[Any, Any] = {
        path: layer for path, layer in nnx.iter_modules(copy) if _has_pair(layer)
    }
    start = {
        path: _population.start(layer.mean[...], layer.var[...], count)
        for path, layer in layers.items()
    }
    others: dict[Any, Any] = {
        path: layer
        for path, layer in nnx.iter_modules(copy)
        if _statistics(layer) and path not in layers
    }
    old = {path: _statistics(layer) for path, layer in others.items()}
    for path, layer in layers.items():
        for name, value in start[path].items():
            setattr(layer, name, nnx.BatchStat(value))
    graph, parameters, state = nnx.split(copy, nnx.Param, ...)

    @jax.jit
    def step(parameters: Any, state: Any, batch: Any) -> Any:
        model = nnx.merge(graph, parameters, state)
        forward(model, batch)
        return nnx.state(model, nnx.Not(nnx.Param))

    def found(done: int) -> dict[Any, bool]:
        nnx.update(copy, state)
        for path, layer in others.items():
            _population.check_unchanged("/".join(map(str, path)), old[path], _statistics(layer))
        end = {
            path: {name: getattr(layer, name)[...] for name in names}
            for path, layer in layers.items()
        }
        return _population.uses(start, end, done)

    used, done = {}, 0
    for batch in batches:
        state = step(parameters, state, batch)
        done += 1
        if done == 1:
            found(done)
    used = found(done) if done else used
    _population.check_any(used.values(), done)
    for path, module in nnx.iter_modules(model):
        layer: Any = module
        if used.get(path):
            for name in ("mean", "var"):
                variable = getattr(layer, name)
                variable[...] = getattr(layers[path], name)[...].astype(variable.dtype)
            if hasattr(layer, "count"):
                layer.count[...] = jnp.ones_like(layer.count[...])


def _statistics(layer: Any) -> dict[str, Any]:
    """A layer's running statistics."""
    named = {name: getattr(layer, name, None) for name in _population.STATISTICS}
    return {name: t[...] for name, t in named.items() if isinstance(t, nnx.BatchStat)}


def _has_pair(layer: Any) -> bool:
    return all(isinstance(getattr(layer, name, None), nnx.BatchStat) for name in ("mean", "var"))
