"""Where arrays and computations are placed: on a mesh of all devices under jit, or a copy on each
under pmap.

Both spread the rows of a batch over all devices in the same order. Outside of a step the state is a
global array, replicated over all devices, whichever computes: `load` takes it into the computation
and `unload` out of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
"""Name of the devices' axis."""


def replicated() -> NamedSharding:
    """A copy on each device of all processes."""
    return _sharding(PartitionSpec())


class Jit:
    """One program on a mesh of all devices."""

    axis = None

    def compile(self, f: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        """f(state, batch), compiled when it is first called. `donate` says which arguments are
        given away."""
        return jax.jit(f, donate_argnums=donate, out_shardings=replicated())

    def batch(self, rows: Any) -> Any:
        """The batch to which this process gives these rows."""
        sharding = _sharding(PartitionSpec(AXIS))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), rows)

    def load(self, state: Any) -> Any:
        return state

    def unload(self, state: Any) -> Any:
        return state

    def value(self, x: jax.Array) -> float:
        """A number that f returned."""
        return float(x)


class Pmap:
    """A copy of the program on each device, in which `AXIS` names the devices."""

    axis = AXIS

    def compile(self, f: Callable[..., Any], *, donate: tuple[int, ...] = ()) -> Callable[..., Any]:
        return jax.pmap(f, AXIS, donate_argnums=donate)

    def batch(self, rows: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(jax.local_device_count(), -1, *x.shape[1:]), rows)

    def load(self, state: Any) -> Any:
        return jax.tree.map(lambda x: np.stack([np.asarray(x)] * jax.local_device_count()), state)

    def unload(self, state: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(replicated(), _first(x)), state
        )

    def value(self, x: jax.Array) -> float:
        return float(_first(x))


Placement = Jit | Pmap


def _sharding(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), spec)


def _first(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_shards[0].data)[0]
