"""Normalization on several devices, as compiled programs: a layer, or a training step of ResNet-50.

Three ways to use several devices: `jit` of arrays that are sharded over an Auto mesh, where sums
are global; `pmap` and `shard_map` (check_vma=True), where a layer is told the name of an axis.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.hlo import Collective, collectives
from benchmarks.libraries import LIBRARIES, Layer
from benchmarks.networks import NETWORKS, resnet50
from benchmarks.shapes import NUM_GROUPS
from jaxnorm import linen as ours
from jaxnorm import methods

CONTEXTS = ("jit", "shard_map", "pmap")

PASSES = {
    "forward": "forward",
    "backward": "forward, and backward for x",
    "step": "the same, gradients of scale and bias, running statistics",
}

CHANNELS, EXAMPLES = 256, 4
"""Channels of x, and its examples on each device."""

PARTS = 8
"""Devices over which split channels lie."""


class Case(NamedTuple):
    """A layer on several devices: keys of `METHODS`, `CONTEXTS`, `PASSES` and `LIBRARIES`."""

    method: str
    context: str
    what: str
    library: str


class Placed(NamedTuple):
    """A layer to be compiled: how x lies on the mesh, and how parameters and state do."""

    layer: Layer | None
    mesh: Mesh
    x: P
    parameters: P = P()


Method = Callable[[Case, Sequence[Any], int, jnp.dtype], Placed]


def _line(devices: Sequence[Any]) -> Mesh:
    return _mesh(devices, ("i",), (len(devices),))


def _mesh(devices: Sequence[Any], names: tuple[str, ...], shape: tuple[int, ...]) -> Mesh:
    return Mesh(
        np.array(devices, dtype=object).reshape(shape),
        names,
        axis_types=(AxisType.Auto,) * len(shape),
    )


def _x(
    case: Case, devices: int, dtype: jnp.dtype, channels: int = CHANNELS
) -> jax.ShapeDtypeStruct:
    """x as the layer sees it: all of it in jit, a device's part in the others."""
    return jax.ShapeDtypeStruct(
        (EXAMPLES * (devices if case.context == "jit" else 1), 4, 4, channels), dtype
    )


def _made(case: Case, x: jax.ShapeDtypeStruct, method: str, **options: Any) -> Layer | None:
    return LIBRARIES[case.library].layer(method, x, **options)


def _batch(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    options = {} if case.context == "jit" else {"axis_name": "i"}
    return Placed(
        _made(case, _x(case, len(devices), dtype), "batch", **options), _line(devices), P("i")
    )


def _batch_groups(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    """Ghosts that lie on several devices; or one of two axes of a mesh, which pmap has not."""
    mesh = _mesh(devices, ("group", "member"), (len(devices) // group, group))
    x = _x(case, len(devices), dtype)
    if case.context == "jit":
        ghosts = _made(case, x, "ghost_batch", num_ghosts=len(devices) // group)
        return Placed(ghosts, _line(devices), P("i"))
    named = None if case.context == "pmap" else _made(case, x, "batch", axis_name="member")
    return Placed(named, mesh, P(("group", "member")))


def _batch_index_groups(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    index = np.arange(len(devices)).reshape(-1, group).tolist()
    options = {"axis_name": "i", "axis_index_groups": index}
    layer = (
        None
        if case.context == "jit"
        else _made(case, _x(case, len(devices), dtype), "batch", **options)
    )
    return Placed(layer, _line(devices), P("i"))


def _ghost(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    """Two ghosts on each device; of libraries without ghosts, in maps, the device's own batch."""
    x = _x(case, len(devices), dtype)
    ghosts = _made(case, x, "ghost_batch", num_ghosts=x.shape[0] * 2 // EXAMPLES)
    if ghosts is None and case.context != "jit":
        ghosts = _made(case, x, "batch")
    return Placed(ghosts, _line(devices), P("i"))


def _group(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    return Placed(_made(case, _x(case, len(devices), dtype), "group"), _line(devices), P("i"))


def _group_channels(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    """As many whole groups of channels on each device as on any other."""
    mesh = _mesh(devices, ("i", "channels"), (len(devices) // PARTS, PARTS))
    if case.context == "jit":
        layer = _made(case, _x(case, len(devices) // PARTS, dtype), "group")
    else:
        local = _x(case, len(devices), dtype, CHANNELS // PARTS)
        layer = (
            None
            if case.context == "pmap"
            else _made(case, local, "group", num_groups=NUM_GROUPS // PARTS)
        )
    return Placed(layer, mesh, P("i", None, None, "channels"), P("channels"))


def _layer(case: Case, devices: Sequence[Any], group: int, dtype: jnp.dtype) -> Placed:
    return Placed(_made(case, _x(case, len(devices), dtype), "token_layer"), _line(devices), P("i"))


class Named(NamedTuple):
    """A method's title and what makes it."""

    title: str
    place: Method


METHODS = {
    "batch": Named("BN, all devices", _batch),
    "batch_groups": Named("BN, groups of devices", _batch_groups),
    "batch_index_groups": Named("BN, axis_index_groups", _batch_index_groups),
    "ghost": Named("ghost BN", _ghost),
    "group": Named("GN", _group),
    "group_channels": Named("GN, channels split", _group_channels),
    "layer": Named("LN of tokens", _layer),
}


def of_layer(
    case: Case, devices: Sequence[Any], *, group: int, dtype: str
) -> list[Collective] | None:
    """The collectives of a layer.

    Args:
        case: which one.
        devices: to compile for, a multiple of `PARTS`.
        group: devices that share statistics, where not all do; a divisor of their number.
        dtype: of x.

    Returns:
        Its collectives; None where the library has no such layer in this context.
    """
    # other libraries promote silently
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        placed = METHODS[case.method].place(case, devices, group, jnp.dtype(dtype))
        if placed.layer is None:
            return None
        compiled = (_pmapped if case.context == "pmap" else _sharded)(
            case, placed, len(devices), jnp.dtype(dtype)
        )
    return collectives(compiled.as_text() or "")


def _function(case: Case, layer: Layer) -> Callable[..., Any]:
    """(parameters, state, x, dy) -> whatever the pass is for."""

    def y_of_x(parameters: Any, state: Any, x: jax.Array) -> jax.Array:
        return layer.train(parameters, state, x)[0]

    def forward(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        return {"y": y_of_x(parameters, state, x)}

    def backward(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, back = jax.vjp(partial(y_of_x, parameters, state), x)
        return {"y": y, "dx": back(dy)[0]}

    def step(parameters: Any, state: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, back, state = jax.vjp(
            lambda parameters, x: layer.train(parameters, state, x), parameters, x, has_aux=True
        )
        d_parameters, dx = back(dy)
        return {"y": y, "dx": dx, "parameters": d_parameters, "state": state}

    return {"forward": forward, "backward": backward, "step": step}[case.what]


def _sharded(case: Case, placed: Placed, devices: int, dtype: jnp.dtype) -> Any:
    layer, mesh = placed.layer, placed.mesh
    assert layer is not None
    split = math.prod(mesh.shape[name] for name in mesh.axis_names if name != "channels")
    shape, x = (EXAMPLES * split, 4, 4, CHANNELS), placed.x
    if not layer.channels_last:
        shape, x = (
            (shape[0], shape[3], *shape[1:3]),
            P(*(placed.x[i] for i in (0, 3, 1, 2)[: len(placed.x)])),
        )
    f = _function(case, layer)
    # parameters and state lie as channels do, but those of layers in a map are a part already
    specs = {"y": x, "dx": x, "parameters": placed.parameters, "state": placed.parameters}
    if case.context == "shard_map":
        inner = f

        def f(*args: Any) -> Any:
            out = inner(*args)
            # running statistics may differ between devices, where they are not synchronized: an
            # axis says so
            return out | (
                {"state": jax.tree.map(lambda t: t[None], out["state"])} if "state" in out else {}
            )

        specs["state"] = P(mesh.axis_names)
    outs = {
        name: specs[name]
        for name in {"forward": ("y",), "backward": ("y", "dx"), "step": specs}[case.what]
    }
    if case.context == "shard_map":
        ins = (placed.parameters, P(), x, x)
        f = jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs)
    parts = PARTS if case.context == "shard_map" and placed.parameters else 1

    def whole(t: Any, spec: P) -> jax.ShapeDtypeStruct:
        dims = (t.shape[0] * parts, *t.shape[1:]) if parts > 1 else t.shape
        return jax.ShapeDtypeStruct(dims, t.dtype, sharding=NamedSharding(mesh, spec))

    parameters = jax.tree.map(lambda t: whole(t, placed.parameters), layer.parameters)
    state = jax.tree.map(
        lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=NamedSharding(mesh, P())),
        layer.state,
    )
    given = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, x))
    out_shardings = {name: NamedSharding(mesh, spec) for name, spec in outs.items()}
    return jax.jit(f, out_shardings=out_shardings).lower(parameters, state, given, given).compile()


def _pmapped(case: Case, placed: Placed, devices: int, dtype: jnp.dtype) -> Any:
    layer = placed.layer
    assert layer is not None
    shape = (EXAMPLES, 4, 4, CHANNELS) if layer.channels_last else (EXAMPLES, CHANNELS, 4, 4)
    f = _function(case, layer)

    def averaged(*args: Any) -> Any:
        out = f(*args)
        return out | (
            {"parameters": lax.pmean(out["parameters"], "i")} if "parameters" in out else {}
        )

    x = jax.ShapeDtypeStruct((devices, *shape), dtype)
    mapped = jax.pmap(
        averaged, "i", in_axes=(None, None, 0, 0), devices=list(placed.mesh.devices.flat)
    )
    return mapped.lower(layer.parameters, layer.state, x, x).compile()


class Norms(NamedTuple):
    """Batch norm for ResNet-50.

    Attributes:
        title: what it is called.
        contexts: where it can be used.
        make: (devices, devices in a group) -> the module class.
    """

    title: str
    contexts: tuple[str, ...]
    make: Callable[[int, int], Any]


def _ghosts(num_ghosts: int) -> Any:
    return partial(ours.Norm, methods.ghost_batch_norm(num_ghosts))


NORMS = {
    "jaxnorm": Norms("jaxnorm, all devices", CONTEXTS, lambda devices, group: ours.BatchNorm),
    "flax": Norms("flax.linen, all devices", CONTEXTS, lambda devices, group: flax.linen.BatchNorm),
    "two_pass": Norms(
        "flax.linen, two-pass",
        CONTEXTS,
        lambda devices, group: partial(flax.linen.BatchNorm, use_fast_variance=False),
    ),
    "groups": Norms(
        "jaxnorm, groups of devices", ("jit",), lambda devices, group: _ghosts(devices // group)
    ),
    "ghost": Norms("jaxnorm, ghosts", ("jit",), lambda devices, group: _ghosts(devices)),
    "local": Norms(
        "jaxnorm, each device alone", ("shard_map", "pmap"), lambda devices, group: ours.BatchNorm
    ),
}
"""Batch norms, of which `local` sends nothing: what is left are the gradients."""


def of_network(
    norms: str, context: str, devices: Sequence[Any], *, group: int, dtype: str, image: int
) -> list[Collective]:
    """The collectives of a training step of ResNet-50: loss, gradients, running statistics, and the
    update of parameters.

    Args:
        norms: a key of `NORMS`.
        context: one of its contexts.
        devices: to compile for; each has two images.
        group: devices that share statistics with `groups`.
        dtype: of the activations.
        image: height and width of the images.
    """
    options = {} if context == "jit" or norms == "local" else {"axis_name": "i"}
    model = resnet50(
        SimpleNamespace(BatchNorm=partial(NORMS[norms].make(len(devices), group), **options)), dtype
    )
    mesh = _line(devices)
    images, labels = (2, image, image, 3), (2,)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        f = partial(_train, model, context)
        variables = jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32)
        )
        if context == "pmap":
            f = jax.pmap(f, "i", in_axes=(None, 0, 0), devices=list(devices))
            whole, cut = None, None
            images, labels = (len(devices), *images), (len(devices), *labels)
        else:
            whole, cut = NamedSharding(mesh, P()), NamedSharding(mesh, P("i"))
            images, labels = (len(devices) * images[0], *images[1:]), (len(devices) * labels[0],)
            outs = {"params": P(), "batch_stats": P("i" if norms == "local" else None), "loss": P()}
            if context == "shard_map":
                f = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("i"), P("i")), out_specs=outs)
            f = jax.jit(
                f, out_shardings={name: NamedSharding(mesh, spec) for name, spec in outs.items()}
            )
        variables = jax.tree.map(
            lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=whole), variables
        )
        given = (
            jax.ShapeDtypeStruct(images, jnp.float32, sharding=cut),
            jax.ShapeDtypeStruct(labels, jnp.int32, sharding=cut),
        )
        compiled = f.lower(variables, *given).compile()
    return collectives(compiled.as_text() or "")


def _train(model: Any, context: str, variables: Any, images: jax.Array, labels: jax.Array) -> Any:
    """A step of SGD, averaged over devices in the way of each context."""

    def mean_loss(parameters: Any) -> tuple[jax.Array, Any]:
        given = {"params": parameters, "batch_stats": variables["batch_stats"]}
        y, updated = model.apply(given, images, mutable=["batch_stats"])
        loss = NETWORKS["resnet50"].loss(y, labels).mean()
        return lax.pmean(loss, "i") if context == "shard_map" else loss, updated

    (loss, updated), gradient = jax.value_and_grad(mean_loss, has_aux=True)(variables["params"])
    if context == "pmap":
        loss, gradient = lax.pmean((loss, gradient), "i")
    return {
        "params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient),
        **updated,
        "loss": loss,
    }
