"""The same normalization as a layer of each library, as pure functions."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.shapes import NUM_GHOSTS, NUM_GROUPS
from jaxnorm import linen as ours
from jaxnorm import methods

METHODS = {
    "batch": "BatchNorm",
    "group": f"GroupNorm({NUM_GROUPS})",
    "instance": "InstanceNorm",
    "token_layer": "LayerNorm, tokens",
    "rms": "RMSNorm, tokens",
    "batch_group": f"BatchGroupNorm({NUM_GROUPS})",
    "ghost_batch": f"GhostBatchNorm({NUM_GHOSTS})",
}
"""What the methods of `benchmarks.shapes` are called."""

TOKEN_METHODS = ("token_layer", "rms")
"""Those that normalize the last axis alone."""

Train = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""(parameters, state, x) -> y and the new state."""


class Options(NamedTuple):
    """What layers are made with; the axis and its groups of devices are batch norm's."""

    num_groups: int = NUM_GROUPS
    num_ghosts: int = NUM_GHOSTS
    axis_name: str | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None


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


def _linen(layers: Any, method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    """A layer of flax.linen, or of jaxnorm.linen, which take the same arguments."""
    running = method in ("batch", "batch_group", "ghost_batch")
    devices = {"axis_name": options.axis_name, "axis_index_groups": options.axis_index_groups}
    made = {
        "batch": lambda use: layers.BatchNorm(use_running_average=use, dtype=x.dtype, **devices),
        "group": lambda use: layers.GroupNorm(options.num_groups, dtype=x.dtype),
        "instance": lambda use: layers.InstanceNorm(dtype=x.dtype),
        "token_layer": lambda use: layers.LayerNorm(dtype=x.dtype),
        "rms": lambda use: layers.RMSNorm(dtype=x.dtype),
    }
    if layers is ours:
        rows = {
            "batch_group": methods.batch_group_norm(options.num_groups),
            "ghost_batch": methods.ghost_batch_norm(options.num_ghosts),
        }
        made |= {
            name: lambda use, row=row: ours.Norm(row, use_running_average=use, dtype=x.dtype)
            for name, row in rows.items()
        }
    if method not in made:
        return None

    def apply(use: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return made[method](use).apply({"params": parameters, **state}, x, mutable=list(state))

    variables = dict(jax.eval_shape(made[method](False).init, jax.random.key(0), x))
    return Layer(
        partial(apply, False),
        partial(apply, True) if running else None,
        variables.pop("params"),
        variables,
    )


def _jaxnorm(method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    return _linen(ours, method, x, options)


def _flax_linen(method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    from flax import linen

    return _linen(linen, method, x, options)


def _flax_nnx(method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    from flax import nnx

    settings: dict[str, Any] = {"dtype": x.dtype, "rngs": nnx.Rngs(0)}
    devices = {"axis_name": options.axis_name, "axis_index_groups": options.axis_index_groups}
    channels = x.shape[-1]
    made: dict[str, Callable[[], nnx.Module]] = {
        "batch": lambda: nnx.BatchNorm(channels, **devices, **settings),
        "group": lambda: nnx.GroupNorm(channels, options.num_groups, **settings),
        "instance": lambda: nnx.InstanceNorm(channels, **settings),
        "token_layer": lambda: nnx.LayerNorm(channels, **settings),
        "rms": lambda: nnx.RMSNorm(channels, **settings),
    }
    if method not in made:
        return None
    graph, parameters, state = nnx.split(made[method](), nnx.Param, nnx.BatchStat)

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        # Its own copy of the variables: those that were made outside a derivative cannot be changed
        # inside.
        layer: Any = nnx.merge(graph, parameters, jax.tree.map(lambda t: t, state))
        y = layer(x, use_running_average=inference) if method == "batch" else layer(x)
        return y, nnx.state(layer, nnx.BatchStat)

    return Layer(
        partial(apply, False),
        partial(apply, True) if method == "batch" else None,
        parameters,
        state,
    )


def _haiku(method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    import haiku as hk  # pyright: ignore[reportMissingImports]  # may be installed or not

    learned = {"create_scale": True, "create_offset": True}
    devices = {
        "cross_replica_axis": options.axis_name,
        "cross_replica_axis_index_groups": options.axis_index_groups,
    }

    def batch(x: jax.Array, inference: bool) -> jax.Array:
        outside = hk.running_init()  # of the map in which a named axis exists
        return hk.BatchNorm(decay_rate=0.99, **learned, **({} if outside else devices))(
            x, is_training=not inference
        )

    made: dict[str, Callable[[jax.Array, bool], jax.Array]] = {
        "batch": batch,
        "group": lambda x, inference: hk.GroupNorm(options.num_groups, **learned)(x),
        "instance": lambda x, inference: hk.InstanceNorm(**learned)(x),
        "token_layer": lambda x, inference: hk.LayerNorm(axis=-1, param_axis=-1, **learned)(x),
        "rms": lambda x, inference: hk.RMSNorm(axis=-1, param_axis=-1)(x),
    }
    if method not in made:
        return None
    pure = hk.transform_with_state(made[method])

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return pure.apply(parameters, state, None, x, inference)

    parameters, state = jax.eval_shape(lambda x: pure.init(None, x, False), x)
    return Layer(
        partial(apply, False),
        partial(apply, True) if method == "batch" else None,
        parameters,
        state,
    )


def _equinox(method: str, x: jax.ShapeDtypeStruct, options: Options) -> Layer | None:
    """Equinox normalizes one example, channels first; a batch is vmap's."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]  # may be installed or not

    channels = x.shape[-1]
    axis_name = ("batch",) if options.axis_name is None else ("batch", options.axis_name)
    made: dict[str, Callable[[], Any]] = {
        "batch": lambda: eqx.nn.BatchNorm(
            channels, axis_name=axis_name, mode="batch", dtype=jnp.float32
        ),
        "group": lambda: eqx.nn.GroupNorm(options.num_groups, channels),
        "instance": lambda: eqx.nn.GroupNorm(channels, channels),
        "token_layer": lambda: eqx.nn.LayerNorm(channels),
        "rms": lambda: eqx.nn.RMSNorm(channels, use_bias=False),
    }
    if method not in made or options.axis_index_groups is not None:
        return None
    layer, state = eqx.nn.make_with_state(made[method])()
    parameters, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(inference: bool, parameters: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        layer = eqx.combine(parameters, static)
        if method == "batch":
            layer = eqx.nn.inference_mode(layer, inference)
            y, state = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
                x, state
            )
            return y.astype(x.dtype), state
        for _ in range(x.ndim - 1 if method in TOKEN_METHODS else 1):
            layer = jax.vmap(layer)
        return layer(x), state

    infer = partial(apply, True) if method == "batch" else None
    return Layer(
        partial(apply, False), infer, parameters, state, channels_last=method in TOKEN_METHODS
    )


class Library(NamedTuple):
    """A library: the module that it is imported from, and (method, x, options) -> its layer, or
    None where it has none."""

    module: str
    make: Callable[[str, jax.ShapeDtypeStruct, Options], Layer | None]

    def layer(self, method: str, x: jax.ShapeDtypeStruct, **options: Any) -> Layer | None:
        """The layer of a method of `METHODS` for this x, with `Options`."""
        return self.make(method, x, Options(**options))


LIBRARIES = {
    "jaxnorm": Library("jaxnorm", _jaxnorm),
    "flax.linen": Library("flax", _flax_linen),
    "flax.nnx": Library("flax", _flax_nnx),
    "haiku": Library("haiku", _haiku),
    "equinox": Library("equinox", _equinox),
}

COLORS = {
    "jaxnorm": "#0072B2",
    "flax.linen": "#D55E00",
    "flax.nnx": "#E69F00",
    "haiku": "#009E73",
    "equinox": "#CC79A7",
    "torch": "#000000",
}
"""The color of each library in every figure, of Okabe and Ito's palette."""


def installed() -> list[str]:
    """The libraries that can be imported."""
    return [name for name, library in LIBRARIES.items() if util.find_spec(library.module)]
