"""Running statistics measured anew: what the linen and the nnx function of that name share.

The layers measure: where a count of `POPULATION` stands beside a layer's running statistics, their
update is that of a population instead of a moving average, and `calls` counts the updates. So
whatever maps, scans or shards a model's running statistics does the same here, one batch is in
memory at a time, and the layers need no other mode.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.averages import update_averaged, update_cumulative

REDUCERS = {"pooled": "elements", "averaged": "batches"}
"""How `population_statistics` makes one from the statistics of batches, and what it counts."""
POPULATION = {"elements": update_cumulative, "batches": update_averaged}
"""Names of the counts that, beside running statistics, turn their update into that of a population:
of what is counted."""

STATISTICS = {"mean", "var", "std", "mean_square"}
"""Names of running statistics."""
MEASURED = {"mean", "var"}
"""Those of a layer that is measured; one that has others of them is not."""

Nodes = dict[Any, dict[str, Any]]
"""What layers with running statistics remember, by the path of the layer."""


def started(nodes: Nodes, reducer: str) -> Nodes:
    """The state with which a population is measured: mean and var are wide, and counted."""
    if reducer not in REDUCERS:
        raise ValueError(f"reducer is one of {', '.join(map(repr, REDUCERS))}. Got {reducer!r}.")
    start = dict(nodes)
    for path, node in nodes.items():
        if set(node) >= MEASURED:
            wide = {name: node[name].astype(statistic_dtype(node[name].dtype)) for name in MEASURED}
            zeros = jnp.zeros_like(wide["var"])
            start[path] = node | wide | {REDUCERS[reducer]: zeros, "calls": zeros}
    return start


def measured(nodes: Nodes, start: Nodes, ends: Iterable[Nodes]) -> Nodes:
    """What the layers that were used remember of a population.

    Args:
        nodes: the state before.
        start: `started` of it.
        ends: what became of that after each batch.
    """
    batches, end = 0, start
    for batches, end in enumerate(ends, 1):
        if batches == 1:  # what is wrong shows here, and not after hours
            _used(start, end, batches)
    used = _used(start, end, batches)
    if not used:
        raise ValueError(
            f"no running statistics were updated in {batches} batches. Expected batches, and a "
            "forward function that runs the model in training mode, so that its layers with "
            "running statistics update them."
        )
    new = {}
    for path in used:
        old = nodes[path]
        new[path] = {name: end[path][name].astype(old[name].dtype) for name in MEASURED}
        if "count" in old:
            new[path]["count"] = jnp.ones_like(old["count"])
    return new


def _used(start: Nodes, end: Nodes, batches: int) -> list[Any]:
    """The layers that were used, once it is certain that all were measured as they should be."""
    used = []
    for path, node in start.items():
        name, own = "/".join(map(str, path)), sorted(STATISTICS & set(node))
        calls = int(np.max(end[path]["calls"], initial=0)) if set(own) >= MEASURED else 0
        if calls > batches:
            raise ValueError(
                f"layer {name} was called {calls} times in {batches} batches, so its statistics "
                "would mix two inputs. Expected one call a batch; give each call a layer of its "
                "own."
            )
        if calls:
            used.append(path)
        elif any(np.any(np.asarray(node[key]) != np.asarray(end[path][key])) for key in own):
            raise ValueError(
                f"layer {name} updates its running statistics by a rule of its own. Got "
                f"{', '.join(own)}; expected a layer of jaxnorm that keeps the moments of its "
                "input: BatchNorm (which loads the checkpoints of Flax's), or Norm of one of the "
                "rows of the table."
            )
    return used
