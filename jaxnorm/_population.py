"""Running statistics measured anew: what the linen and the nnx function of that name share.

The layers measure: where a count of `POPULATION` stands beside a layer's running statistics, their
update is that of a population instead of a moving average, and `calls` counts the updates. So
whatever maps, scans or shards a model's running statistics does the same here, one batch is in
memory at a time, and the layers need no other mode.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.averages import update_averaged, update_cumulative

REDUCERS = {"pooled": "elements", "averaged": "batches"}
"""How `population_statistics` makes one from the statistics of batches, and what it counts."""
POPULATION = {"elements": update_cumulative, "batches": update_averaged}
"""Names of the counts that, beside running statistics, turn their update into that of a population:
of what is counted."""


def count_of(reducer: str) -> str:
    """What a reducer counts, once it is known to be one."""
    if reducer not in REDUCERS:
        raise ValueError(f"reducer is one of {', '.join(map(repr, REDUCERS))}. Got {reducer!r}.")
    return REDUCERS[reducer]


STATISTICS = {"mean", "var", "std", "mean_square"}
"""Names of running statistics; a layer that has other of them than a mean and a var is not
measured."""


def start(mean: jax.Array, var: jax.Array, count: str) -> dict[str, jax.Array]:
    """What a layer's mean and var become while a population is measured: wide, and counted."""
    mean, var = (t.astype(statistic_dtype(t.dtype)) for t in (mean, var))
    return {"mean": mean, "var": var, count: jnp.zeros_like(var), "calls": jnp.zeros_like(var)}


def uses(
    start: Mapping[Any, Mapping[str, Any]], end: Mapping[Any, Mapping[str, Any]], batches: int
) -> dict[Any, bool]:
    """Whether each layer was used, by its path."""
    return {
        path: was_used("/".join(map(str, path)), start[path], end[path], batches) for path in start
    }


def was_used(name: str, start: Mapping[str, Any], end: Mapping[str, Any], batches: int) -> bool:
    """Whether a layer was used, once it is certain that it was measured as it should be."""
    calls = int(np.max(end["calls"], initial=0))
    if calls > batches:
        raise ValueError(
            f"layer {name} was called {calls} times in {batches} batches, so its statistics would "
            "mix two inputs. Expected one call a batch; give each call a layer of its own."
        )
    if calls == 0:
        check_unchanged(name, *({key: t[key] for key in ("mean", "var")} for t in (start, end)))
    return calls > 0


def check_unchanged(name: str, start: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    """A layer whose running statistics are not measured did not update them."""
    own = {key: t for key, t in start.items() if key in STATISTICS}
    if any(np.any(np.asarray(t) != np.asarray(end[key])) for key, t in own.items()):
        raise ValueError(
            f"layer {name} updates its running statistics by a rule of its own. Got "
            f"{', '.join(sorted(own))}; expected a layer of jaxnorm that keeps the moments of "
            "its input: BatchNorm (which loads the checkpoints of Flax's), or Norm of one of the "
            "rows of the table."
        )


def check_any(used: Iterable[bool], batches: int) -> None:
    """There is something to return."""
    if not any(used):
        raise ValueError(
            f"no running statistics were updated in {batches} batches. Expected batches, and a "
            "forward function that runs the model in training mode, so that its layers with "
            "running statistics update them."
        )
