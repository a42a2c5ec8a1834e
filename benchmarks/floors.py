"""What no layer can do without: passes over memory, timed beside it, and the bytes that it moves.

Two floors, each a time in every round. `floor` is made of passes that XLA and torch make over a
tensor, sums among them; in half precision XLA's sums are slow, and so is that floor. `bytes floor`
knows of no arithmetic: it is the fewest reads and writes of x, at the speed at which a copy moves
bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.libraries import TOKEN_METHODS
from benchmarks.shapes import NUM_GHOSTS
from benchmarks.timing import Call, compiled

Calls = dict[tuple[str, str], Call]
"""Calls by library and what they do."""

FLOOR = {"forward": ("copy", "sum"), "step": ("copy", "sum", "dot", "ternary")}
"""No forward pass can do without a sum and a copy, no backward pass without a sum over two arrays
and a pass that reads two and writes one."""

HELD_BYTES = 2**20
"""What a core keeps in a cache of its own between two reads: a second read of more than that counts
as one of memory."""


def passes(xs: Sequence[jax.Array], cts: Sequence[jax.Array]) -> Calls:
    """JAX's passes over memory."""

    def on_inputs(f: Callable[[jax.Array, jax.Array], jax.Array]) -> Call:
        f, _ = compiled(f, xs[0], cts[0])
        return Call(lambda i: f(xs[i % len(xs)], cts[i % len(xs)]))

    return {
        ("jax", "copy"): on_inputs(lambda x, ct: jnp.copy(x)),
        ("jax", "sum"): on_inputs(lambda x, ct: jnp.sum(x, dtype=jnp.float32)),
        ("jax", "dot"): on_inputs(
            lambda x, ct: jnp.sum(x.astype(jnp.float32) * ct.astype(jnp.float32))
        ),
        ("jax", "ternary"): on_inputs(lambda x, ct: 2 * x + ct),
    }


def least_passes(method: str, dims: Sequence[int], itemsize: int) -> dict[str, int]:
    """How often forward and a step read or write all of x, of its cotangent or of y, at least.

    Forward reads x for its statistics, reads it again to normalize it, and writes y. Backward reads
    x and the cotangent for two sums, reads both again, and writes the gradient. The second reads
    cost nothing where the smallest part of x that has whole sets, such as an example, stays in a
    core's cache.

    >>> least_passes("batch", (8, 56, 56, 256), 4)
    {'forward': 3, 'step': 8}
    >>> least_passes("token_layer", (16, 197, 768), 4)
    {'forward': 2, 'step': 5}
    """
    rows = math.prod(dims[:-1])
    parts = dict.fromkeys(TOKEN_METHODS, rows) | {
        "group": dims[0],
        "instance": dims[0],
        "ghost_batch": NUM_GHOSTS,
    }
    part = math.prod(dims) * itemsize / parts.get(method, 1)
    forward = 2 if part <= HELD_BYTES else 3
    backward = 3 if 2 * part <= HELD_BYTES else 5
    return {"forward": forward, "step": forward + backward}


def floors(
    times: Mapping[tuple[str, str], Sequence[float]], least: Mapping[str, int]
) -> dict[str, dict[str, list[float]]]:
    """Both floors in each round, from the times of passes, each as fast as the faster library does
    it in that round; `least` is of `least_passes`."""
    best = {
        part: np.min([rounds for (_, name), rounds in times.items() if name == part], axis=0)
        for part in FLOOR["step"]
    }
    return {
        "floor": {
            kind: np.sum([best[part] for part in parts], axis=0).tolist()
            for kind, parts in FLOOR.items()
        },
        # A copy reads all bytes of x and writes as many.
        "bytes floor": {kind: (count / 2 * best["copy"]).tolist() for kind, count in least.items()},
    }
