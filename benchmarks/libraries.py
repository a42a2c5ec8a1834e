"""The same normalization as a layer of each library, as pure functions."""

from collections.abc import Callable
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.shapes import NUM_GHOSTS, NUM_GROUPS
from jaxnorm import linen as ours

METHODS = {
    "batch": "BatchNorm",
    "group": f"GroupNorm({NUM_GROUPS})",
    "instance": "InstanceNorm",
    "token_layer": "LayerNorm, tokens",
    "batch_group": f"BatchGroupNorm({NUM_GROUPS})",
    "ghost_batch": f"GhostBatchNorm({NUM_GHOSTS})",
}
"""What the methods of `benchmarks.shapes` are called."""


Train = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""(parameters, state, x) -> y and the new state."""


class Layer(NamedTuple):
    """A layer as pure functions.

    Attributes:
        train: normalizes with the statistics of x.
        infer: the same with the running statistics; None where there are none.
        parameters: arrays that are learned, or their shapes.
        state: other arrays, the running statistics.
        channels_last: whether the library wants channels last; else they follow the batch.
    """

    train: Train
    infer: Train | None
    parameters: Any
    state: Any
    channels_last: bool = True


def _linen(layers: Any, method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    """A layer of flax.linen, or of jaxnorm.linen, which take the same arguments."""
    running = method in ("batch", "batch_group", "ghost_batch")
    made = {
        "batch": lambda use: layers.BatchNorm(use_running_average=use, dtype=x.dtype),
        "group": lambda use: layers.GroupNorm(NUM_GROUPS, dtype=x.dtype),
        "instance": lambda use: layers.InstanceNorm(dtype=x.dtype),
        "token_layer": lambda use: layers.LayerNorm(dtype=x.dtype),
    }
    if layers is ours:
        made["batch_group"] = lambda use: ours.BatchGroupNorm(num_groups=NUM_GROUPS, use_running_average=use, dtype=x.dtype)
        made["ghost_batch"] = lambda use: ours.GhostBatchNorm(num_ghosts=NUM_GHOSTS, use_running_average=use, dtype=x.dtype)
    if method not in made:
        return None

    def apply(use: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return made[method](use).apply({"params": parameters, **state}, x, mutable=list(state))

    variables = dict(jax.eval_shape(made[method](False).init, jax.random.key(0), x))
    return Layer(partial(apply, False), partial(apply, True) if running else None, variables.pop("params"), variables)


def _jaxnorm(method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    return _linen(ours, method, x)


def _flax_linen(method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    from flax import linen

    return _linen(linen, method, x)


def _flax_nnx(method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    from flax import nnx

    settings: dict[str, Any] = {"dtype": x.dtype, "rngs": nnx.Rngs(0)}
    channels = x.shape[-1]
    made: dict[str, Callable[[], nnx.Module]] = {
        "batch": lambda: nnx.BatchNorm(channels, **settings),
        "group": lambda: nnx.GroupNorm(channels, NUM_GROUPS, **settings),
        "instance": lambda: nnx.InstanceNorm(channels, **settings),
        "token_layer": lambda: nnx.LayerNorm(channels, **settings),
    }
    if method not in made:
        return None
    graph, parameters, state = nnx.split(made[method](), nnx.Param, nnx.BatchStat)

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        # Its own copy of the variables: those that were made outside a derivative cannot be changed inside.
        layer: Any = nnx.merge(graph, parameters, jax.tree.map(lambda t: t, state))
        y = layer(x, use_running_average=inference) if method == "batch" else layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    return Layer(partial(apply, False), partial(apply, True) if method == "batch" else None, parameters, state)


def _haiku(method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    import haiku as hk  # pyright: ignore[reportMissingImports]  # may be installed or not

    learned = {"create_scale": True, "create_offset": True}
    made: dict[str, Callable[[jax.Array, bool], jax.Array]] = {
        "batch": lambda x, inference: hk.BatchNorm(decay_rate=0.99, **learned)(x, is_training=not inference),
        "group": lambda x, inference: hk.GroupNorm(NUM_GROUPS, **learned)(x),
        "instance": lambda x, inference: hk.InstanceNorm(**learned)(x),
        "token_layer": lambda x, inference: hk.LayerNorm(axis=-1, param_axis=-1, **learned)(x),
    }
    if method not in made:
        return None
    pure = hk.transform_with_state(made[method])

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return pure.apply(parameters, state, None, x, inference)

    parameters, state = jax.eval_shape(lambda x: pure.init(None, x, False), x)
    return Layer(partial(apply, False), partial(apply, True) if method == "batch" else None, parameters, state)


def _equinox(method: str, x: jax.ShapeDtypeStruct) -> Layer | None:
    """Equinox normalizes one example, channels first; a batch is vmap's."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]  # may be installed or not

    channels = x.shape[-1]
    made: dict[str, Callable[[], Any]] = {
        "batch": lambda: eqx.nn.BatchNorm(channels, axis_name="batch", mode="batch", dtype=jnp.float32),
        "group": lambda: eqx.nn.GroupNorm(NUM_GROUPS, channels),
        "instance": lambda: eqx.nn.GroupNorm(channels, channels),
        "token_layer": lambda: eqx.nn.LayerNorm(channels),
    }
    if method not in made:
        return None
    layer, state = eqx.nn.make_with_state(made[method])()
    parameters, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = eqx.combine(parameters, static)
        if method == "batch":
            layer = eqx.nn.inference_mode(layer, inference)
            y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
            return y.astype(x.dtype), state
        for _ in range(x.ndim - 1 if method == "token_layer" else 1):
            layer = jax.vmap(layer)
        return layer(x), state

    infer = partial(apply, True) if method == "batch" else None
    return Layer(partial(apply, False), infer, parameters, state, channels_last=method == "token_layer")


class Library(NamedTuple):
    """A library: the module that it is imported from, and (method, x) -> its layer, or None where it has none."""

    module: str
    layer: Callable[[str, jax.ShapeDtypeStruct], Layer | None]


LIBRARIES = {
    "jaxnorm": Library("jaxnorm", _jaxnorm),
    "flax.linen": Library("flax", _flax_linen),
    "flax.nnx": Library("flax", _flax_nnx),
    "haiku": Library("haiku", _haiku),
    "equinox": Library("equinox", _equinox),
}


def installed() -> list[str]:
    """The libraries that can be imported."""
    return [name for name, library in LIBRARIES.items() if util.find_spec(library.module)]
