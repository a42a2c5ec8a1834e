"""What a training loop does with the layers: whatever cuts the work in parts, the training is that
of one device at once."""

import functools
import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import (
    Moments,
    init_running,
    linen,
    merge,
    methods,
    moments,
    norm,
    normalize,
    pool,
    update_cumulative,
    update_running,
)
from jaxnorm import nnx as nnx_layers

DEVICES, BATCH, CLASSES = 8, 16, 3
WIDE = {"param_dtype": jnp.float64, "force_float32_reductions": False}


def mesh():
    return Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def same(got, want, atol=1e-12):
    chex.assert_trees_all_close(got, want, rtol=0, atol=atol)


def normal(*shape, seed=0, dtype="f8"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def on_devices(context, f, shared=0):
    """f on every device's part of the batch, the first arguments being shared by all; results
    stacked over devices."""

    def part(*args):
        out = f(*args[:shared], *jax.tree.map(lambda t: t[0], args[shared:]))
        return jax.tree.map(lambda t: t[None], out)

    def run(*args):
        parts = jax.tree.map(lambda t: t.reshape(DEVICES, -1, *t.shape[1:]), args[shared:])
        if context in ("pmap", "vmap"):
            over = jax.pmap if context == "pmap" else jax.vmap
            return over(f, in_axes=(None,) * shared + (0,) * len(parts), axis_name="data")(
                *args[:shared], *parts
            )
        specs = (P(),) * shared + (P("data"),) * len(parts)
        sharded = jax.shard_map(
            part, mesh=mesh(), in_specs=specs, out_specs=P("data"), check_vma=context == "shard_map"
        )
        return sharded(*args[:shared], *parts)

    return run


def first(tree):
    """The first device's copy of what must be equal, to the bit, on all."""
    jax.tree.map(lambda t: np.testing.assert_array_equal(t, np.broadcast_to(t[:1], t.shape)), tree)
    return jax.tree.map(lambda t: t[0], tree)


def accumulated(micro, axis_name=None, synced=False):
    """Moments of all micro-batches (k, n, ...) of (x, weights), summed up by one scan."""
    start = init_running((6,), dtype=micro[0].dtype, counted=True)  # count 0: nothing seen so far
    if axis_name is not None and not synced:
        start = lax.pcast(start, axis_name, to="varying")  # each device sums up what it has seen

    def step(seen, batch):
        x, w = batch
        m = moments(x, methods.batch_norm(), weights=w, axis_name=axis_name if synced else None)
        return update_cumulative(seen, m), normalize(x, m)

    seen, _ = lax.scan(step, start, micro)
    return seen if axis_name is None or synced else pool(seen, (6,), axis_name=axis_name)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("context", ("jit", "pmap", "shard_map", "shard_map unchecked"))
def test_moments_of_micro_batches_are_those_of_the_batch(context):
    """Weights differ everywhere; one micro-batch has none on any device, and one device none at
    all."""
    x, w = normal(BATCH * 3, 2, 6) + 5, np.random.default_rng(1).uniform(0, 1, (BATCH * 3, 1, 1))
    w = w.reshape(DEVICES, 3, 2, 1, 1)
    w[:, 1] = w[2] = 0
    w = w.reshape(-1, 1, 1)
    whole = moments(x, methods.batch_norm(), weights=w)
    want = jax.tree.map(lambda t: t[0, 0], whole)
    before = init_running((6,), dtype=x.dtype)
    if context == "jit":
        micro = [
            np.moveaxis(t.reshape(DEVICES, 3, 2, *t.shape[1:]), 1, 0).reshape(
                3, BATCH, *t.shape[1:]
            )
            for t in (x, w)
        ]
        sums = [jit(accumulated)(jax.device_put(micro, NamedSharding(mesh(), P(None, "data"))))]
    else:
        cut = partial(jax.tree.map, lambda t: t.reshape(3, 2, *t.shape[1:]))
        run = [
            jit(on_devices(context, lambda *b, s=s: accumulated(cut(b), "data", s)))
            for s in (True, False)
        ]
        sums = [first(f(x, w)) for f in run]
    for seen in sums:
        same(seen, want)
        same(
            update_running(before, seen, momentum=0.9), update_running(before, whole, momentum=0.9)
        )


def test_merge_of_nothing_is_the_identity():
    m = moments(normal(4, 6, dtype="f4"), (1, 6))
    for nothing in (init_running((1, 6), counted=True), jax.tree.map(jnp.zeros_like, m)):
        chex.assert_trees_all_equal(merge(nothing, m), m)
        chex.assert_trees_all_equal(merge(m, nothing), m)


class Twice(nn.Module):
    """Two layers with running statistics, at different depths."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(2):
            x = nn.Dense(6, param_dtype=jnp.float64)(x)
            x = nn.relu(
                linen.BatchNorm(use_running_average=False, momentum=self.momentum, **WIDE)(
                    x, mask=mask
                )
            )
        return x


def as_moments(batch_stats, count=None):
    """The mean and var of every layer: Moments of `count` elements, or running ones without a
    count."""

    def of_layer(s):
        n = None if count is None else jnp.full(s["mean"].shape, count, s["var"].dtype)
        return Moments(n, s["mean"], s["var"])

    return jax.tree.map(of_layer, batch_stats, is_leaf=lambda t: "var" in t)


def over_layers(f, *trees):
    return jax.tree.map(f, *trees, is_leaf=lambda t: isinstance(t, Moments))


def one_update(old, seen, momentum=0.9):
    """batch_stats of all layers, updated once with what all micro-batches have shown."""
    new = over_layers(lambda o, m: update_running(o, m, momentum=momentum), as_moments(old), seen)
    return over_layers(lambda m: {"mean": m.mean, "var": m.var}, new)


@pytest.mark.usefixtures("x64")
def test_linen_layers_accumulate_and_update_once():
    """With momentum 0 a layer's batch_stats are the micro-batch's own; how much they count, the
    loop knows."""
    x, mask = (
        normal(3, 8, 5),
        np.random.default_rng(1).random((3, 8, 1)) < [[[0.9]], [[0.5]], [[0.2]]],
    )
    variables = jit(Twice().init)(jax.random.key(0), x[0])
    params, old = variables["params"], variables["batch_stats"]

    def loss(params, x, mask):
        y, new = Twice(momentum=0.0).apply(
            variables | {"params": params}, x, mask, mutable="batch_stats"
        )
        return jnp.where(mask, jnp.sin(y), 0).sum() / mask.sum().astype(y.dtype), new["batch_stats"]

    @jit
    def step(params, x, mask):
        def micro(carry, batch):
            seen, total = carry
            grads, stats = jax.grad(loss, has_aux=True)(params, *batch)
            seen = over_layers(merge, seen, as_moments(stats, batch[1].sum()))
            return (seen, jax.tree.map(jnp.add, total, grads)), None

        start = as_moments(old, 0), jax.tree.map(jnp.zeros_like, params)
        (seen, total), _ = lax.scan(micro, start, (x, mask))
        return one_update(old, seen), total

    new, total = step(params, x, mask)
    same(
        total,
        jit(jax.grad(lambda params: jax.vmap(partial(loss, params))(x, mask)[0].sum()))(params),
    )
    apply = partial(
        Twice().apply,
        variables,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    shown = jit(jax.vmap(lambda *batch: apply(*batch)[1]["intermediates"]))(x, mask)
    for i in range(2):
        entered = np.asarray(shown[f"Dense_{i}"]["__call__"][0])[mask[..., 0]]
        same(
            new[f"BatchNorm_{i}"],
            {"mean": 0.1 * entered.mean(0), "var": 0.9 + 0.1 * entered.var(0)},
        )


def test_nnx_layers_accumulate_and_update_once():
    """The same: momentum 0 while accumulating, the layer's own momentum in the one update."""
    group = nnx_layers.Norm(6, methods.group_norm(2), rngs=nnx.Rngs(0))
    model = nnx.Sequential(nnx_layers.BatchNorm(6, rngs=nnx.Rngs(0)), group)
    x = normal(4, 8, 6, dtype="f4") + 3
    model.set_attributes(momentum=0.0, raise_if_not_found=False)
    graphdef, stats, rest = nnx.split(model, nnx.BatchStat, ...)

    @jit
    def step(stats, x):
        def micro(seen, x):
            copy = nnx.merge(graphdef, stats, rest, copy=True)
            copy(x)
            new = nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))
            return over_layers(merge, seen, as_moments(new, x.shape[0])), None

        old = nnx.to_pure_dict(stats)
        seen, _ = lax.scan(micro, as_moments(old, 0), x)
        return one_update(old, seen, momentum=0.5)

    nnx.replace_by_pure_dict(stats, step(stats, x))
    nnx.update(model, stats)
    whole = nnx_layers.BatchNorm(6, momentum=0.5, rngs=nnx.Rngs(0))
    nnx.jit(lambda layer, x: layer(x))(whole, x.reshape(-1, 6))
    same(
        [model.layers[0].mean[...], model.layers[0].var[...]],
        [whole.mean[...], whole.var[...]],
        atol=5e-6,
    )


SAVED = jax.checkpoint_policies.save_only_these_names("jaxnorm_synced_moments")
REMAT = {
    "plain": lambda f: f,
    "saved by name": partial(jax.checkpoint, policy=SAVED),
    "nothing saved": jax.checkpoint,
}


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def all_reduces(program):
    return len(re.findall(r" all-reduce(?:-start)?\(", program.as_text()))


def conv(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def some(rows, default):
    """Test parameters: those that are not in `default` are slow."""
    return [pytest.param(*row, marks=[] if row in default else [pytest.mark.slow]) for row in rows]


KINDS = [
    (context, weighted)
    for context in ("jit", "pmap", "shard_map", "shard_map unchecked")
    for weighted in (True, False)
]


@pytest.mark.parametrize(
    "context, weighted", some(KINDS, [("jit", True), ("pmap", True), ("shard_map", False)])
)
def test_remat_repeats_no_collective(context, weighted):
    """In a convolutional network whose statistics are saved by name, as many all-reduces as without
    remat."""
    x, kernels = (
        normal(BATCH, 4, 4, 2, dtype="f4"),
        [normal(3, 3, 2, 2, seed=i, dtype="f4") for i in range(2)],
    )
    axis_name = None if context == "jit" else "data"

    def gradient(remat, kernels, x):
        @remat
        def block(kernel, x):
            w = (x[:, :1, :1, :1] > 0) if weighted else None
            return jax.nn.relu(
                norm(conv(x, kernel), methods.batch_norm(), weights=w, axis_name=axis_name)[0]
            )

        def loss(kernels):
            y = x
            for kernel in kernels:
                y = block(kernel, y)
            return (y**2).sum()

        return jax.grad(loss)(kernels)

    counts = {}
    for name, remat in REMAT.items():
        f, args = partial(gradient, remat), (kernels, x)
        if context == "jit":
            args = jax.device_put(
                args, (NamedSharding(mesh(), P()), NamedSharding(mesh(), P("data")))
            )
        else:
            f = on_devices(context, f, shared=1)
        counts[name] = all_reduces(compiled(f, *args))
    assert counts["saved by name"] == counts["plain"] < counts["nothing saved"]


class Block(nn.Module):
    """A residual block of a convolutional network, as `nn.scan` likes it."""

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
        y = linen.BatchNorm(use_running_average=False, momentum=0.5, axis_name="data", **WIDE)(y)
        return x + nn.relu(y), None


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3, 3), param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx_layers.BatchNorm(
            4, momentum=0.5, axis_name="data", param_dtype=jnp.float64, rngs=rngs
        )

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x)))


def linen_layers(remat):
    """Two blocks, as a function of their stacked parameters and statistics: the output and the new
    statistics."""
    block = {
        "plain": Block,
        "saved by name": nn.remat(Block, policy=SAVED),
        "nothing saved": nn.remat(Block),
    }[remat]
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    layers = nn.scan(block, **axes, length=2)()
    variables = jit(layers.init)(jax.random.key(0), jnp.ones((1, 4, 4, 4), jnp.float64))

    def apply(params, stats, x):
        (y, _), new = layers.apply(
            {"params": params, "batch_stats": stats}, x, mutable="batch_stats"
        )
        return y, new["batch_stats"]

    return apply, variables["params"], variables["batch_stats"]


def nnx_layers_of(remat):
    call = {
        "plain": lambda block, x: block(x),
        "saved by name": nnx.remat(lambda block, x: block(x), policy=SAVED),
        "nothing saved": nnx.remat(lambda block, x: block(x)),
    }[remat]
    layers = nnx.vmap(lambda key: NnxBlock(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    graphdef, params, stats = nnx.split(layers, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x):
        copy = nnx.merge(graphdef, params, stats, copy=True)
        y = nnx.scan(call, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(copy, x)
        return y, nnx.state(copy, nnx.BatchStat)

    return apply, params, stats


SCANNED = [
    (layers, context)
    for layers in (linen_layers, nnx_layers_of)
    for context in ("shard_map", "pmap")
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layers, context", some(SCANNED, []))
def test_remat_of_scanned_layers_updates_once(layers, context):
    """remat inside scan over layers: as many collectives, the same gradients, the same running
    statistics."""
    x, results, counts = normal(BATCH, 4, 4, 4), {}, {}
    for remat in REMAT:
        apply, params, stats = layers(remat)

        def gradient(params, stats, x, apply=apply):
            def loss(params):
                y, new = apply(params, stats, x)
                return jnp.sin(y).sum(), new

            return jax.grad(loss, has_aux=True)(params)

        program = compiled(on_devices(context, gradient, shared=2), params, stats, x)
        counts[remat], (grads, new) = all_reduces(program), program(params, stats, x)
        results[remat] = (
            jax.tree.map(lambda t: t.sum(0), grads) if context == "pmap" else first(grads),
            first(new),
        )
    same(results["saved by name"], results["plain"])
    same(results["nothing saved"], results["plain"])
    assert counts["saved by name"] == counts["plain"] < counts["nothing saved"]


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, mask=None, train=True):
        options = WIDE | {"axis_name": self.axis_name}
        x = nn.Conv(4, (3, 3), param_dtype=jnp.float64)(x)
        x = nn.relu(
            linen.BatchNorm(use_running_average=not train, momentum=0.9, **options)(x, mask=mask)
        )
        x = linen.GroupNorm(2, param_dtype=jnp.float64)(x)
        return nn.Dense(CLASSES, param_dtype=jnp.float64)(x.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, axis_name, rngs):
        wide = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (3, 3), **wide)
        self.batch_norm = nnx_layers.BatchNorm(4, momentum=0.9, axis_name=axis_name, **wide)
        self.group_norm = nnx_layers.GroupNorm(4, 2, **wide)
        self.dense = nnx.Linear(4, CLASSES, **wide)

    def __call__(self, x, mask=None):
        x = self.group_norm(nnx.relu(self.batch_norm(self.conv(x), mask=mask)))
        return self.dense(x.mean((1, 2)))


def linen_net(axis_name):
    """The network as a function of (params, statistics, x, mask, train), and its initial state."""
    net = Net(axis_name)
    variables = jit(Net().init)(jax.random.key(0), jnp.ones((1, 4, 4, 2), jnp.float64))

    def apply(params, stats, x, mask=None, train=True):
        y, new = net.apply(
            {"params": params, "batch_stats": stats}, x, mask, train, mutable="batch_stats"
        )
        return y, new["batch_stats"]

    return apply, variables["params"], variables["batch_stats"]


def nnx_net(axis_name):
    graphdef, params, stats = nnx.split(NnxNet(axis_name, nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def apply(params, stats, x, mask=None, train=True):
        copy = nnx.merge(graphdef, params, stats, copy=True)
        copy.set_attributes(use_running_average=not train, raise_if_not_found=False)
        return copy(x, mask), nnx.state(copy, nnx.BatchStat)

    return apply, params, stats


def batches(even):
    """Three batches of images, labels and weights of the examples; device 3 has no example that
    counts."""
    x, labels = (
        normal(3, BATCH, 4, 4, 2),
        np.random.default_rng(1).integers(CLASSES, size=(3, BATCH)),
    )
    w = (
        np.ones((3, BATCH))
        if even
        else np.random.default_rng(2).uniform(0, 1, (3, BATCH)) * (np.arange(BATCH) % 5 > 0)
    )
    if not even:
        w[:, 6:8] = 0
    return x, labels, w


def training_step(apply, axis_name, reduced):
    """One step of gradient descent; `reduced` says what is averaged over devices, the loss or its
    gradient.

    The loss of a device's part divides by the mean number of examples of a device, not by its own:
    the mean over devices is then that over examples.
    """

    def step(params, stats, x, labels, w):
        def loss(params):
            logits, new = apply(params, stats, x, w[:, None, None, None])
            picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
            count = w.sum() if axis_name is None else lax.pmean(w.sum(), axis_name)
            value = -(w * picked).sum() / count
            return lax.pmean(value, axis_name) if reduced == "loss" else value, new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        if reduced == "gradient":
            value, grads = lax.pmean((value, grads), axis_name)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), new, value

    return step


def trained(net, context, reduced, even):
    """Parameters, statistics and losses after three steps, and the network's outputs with running
    statistics."""
    axis_name = "data" if reduced else None
    apply, params, stats = net(axis_name)
    step, evaluate = (
        training_step(apply, axis_name, reduced),
        lambda *args: apply(*args, None, False)[0],
    )
    data, losses = batches(even), []
    if reduced:
        step, evaluate = (
            on_devices(context, step, shared=2),
            on_devices(context, evaluate, shared=2),
        )
    elif context == "jit":
        data = jax.device_put(data, NamedSharding(mesh(), P(None, "data")))
    step = jit(step)
    for batch in zip(*data, strict=True):
        out = step(params, stats, *batch)
        params, stats, value = first(out) if reduced else out
        losses.append(value)
    return params, stats, losses, jit(evaluate)(params, stats, data[0][0]).reshape(BATCH, -1)


@functools.cache
def trained_on_one_device(net, even):
    return trained(net, "one device", None, even)


CONTEXTS = [
    ("pmap", "gradient"),
    ("vmap", "gradient"),
    ("shard_map unchecked", "gradient"),
    ("shard_map", "loss"),
    ("jit", None),
]
RUNS = [
    (net, *how, even) for net in (linen_net, nnx_net) for how in CONTEXTS for even in (False, True)
]
DEFAULT = [
    *((linen_net, *how, False) for how in CONTEXTS if how[0] != "shard_map unchecked"),
    (nnx_net, "shard_map", "loss", False),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("net, context, reduced, even", some(RUNS, DEFAULT))
def test_training_is_that_of_one_device(net, context, reduced, even):
    """Parameters, statistics, losses and evaluation to rounding; on all devices the same parameters
    and statistics to the bit. nnx keeps running statistics in float32."""
    got, want = trained(net, context, reduced, even), trained_on_one_device(net, even)
    same((got[0], got[2]), (want[0], want[2]))
    same((got[1], got[3]), (want[1], want[3]), atol=1e-12 if net is linen_net else 1e-6)


def linen_ensemble():
    """Three networks at once, on the same images."""
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    nets = nn.vmap(Net, **axes, in_axes=None, axis_size=3)()
    variables = jit(nets.init)(jax.random.key(0), jnp.ones((1, 4, 4, 2), jnp.float64))

    def apply(params, stats, x, mask):
        y, new = nets.apply(
            {"params": params, "batch_stats": stats}, x, mask, mutable="batch_stats"
        )
        return y, new["batch_stats"]

    return apply, variables["params"], variables["batch_stats"]


def nnx_ensemble():
    nets = nnx.vmap(lambda key: NnxNet(None, nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))
    graphdef, params, stats = nnx.split(nets, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x, mask):
        copy = nnx.merge(graphdef, params, stats, copy=True)
        y = nnx.vmap(lambda net, x: net(x, mask), in_axes=(0, None))(copy, x)
        return y, nnx.state(copy, nnx.BatchStat)

    return apply, params, stats


ENSEMBLES = [(linen_ensemble, linen_net), (nnx_ensemble, nnx_net)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("ensemble, net", some(ENSEMBLES, ENSEMBLES[:1]))
def test_an_ensemble_trains_as_its_members_alone(ensemble, net):
    """Each member with its own statistics, in nn.vmap and nnx.vmap."""
    apply, params, stats = ensemble()
    single = net(None)[0]

    def trained(apply, params, stats):
        def step(carry, batch):
            params, stats = carry
            x, w = batch

            def loss(params):
                y, new = apply(params, stats, x, w[:, None, None, None])
                return jnp.sin(y).sum(), new

            grads, new = jax.grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), new), None

        x, _, w = batches(even=False)
        return lax.scan(step, (params, stats), (x, w))[0]

    together = jit(partial(trained, apply))(params, stats)
    alone = jit(partial(trained, single))
    members = [alone(*jax.tree.map(lambda t, i=i: t[i], (params, stats))) for i in range(3)]
    same(together[0], jax.tree.map(lambda *t: jnp.stack(t), *members)[0])
    same(
        together[1],
        jax.tree.map(lambda *t: jnp.stack(t), *members)[1],
        atol=1e-12 if net is linen_net else 1e-6,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("api", ("linen", "nnx"))
def test_a_mapped_data_axis_shares_synced_statistics(api):
    """nn.vmap and nnx.vmap over parts of the batch, parameters and statistics broadcast: the whole
    batch at once."""
    x = normal(BATCH, 4, 4, 2)
    parts = x.reshape(4, -1, *x.shape[1:])
    if api == "linen":
        apply, params, stats = linen_net(None)
        axes = {
            "variable_axes": {"params": None, "batch_stats": None},
            "split_rngs": {"params": False},
        }
        variables = {"params": params, "batch_stats": stats}
        nets = nn.vmap(Net, **axes, in_axes=0, axis_name="data")(axis_name="data")
        y, new = jit(lambda v, x: nets.apply(v, x, mutable="batch_stats"))(variables, parts)
        new = new["batch_stats"]
    else:
        apply, params, stats = nnx_net(None)
        net = NnxNet("data", nnx.Rngs(0))
        y = nnx.jit(nnx.vmap(lambda net, x: net(x), in_axes=(None, 0), axis_name="data"))(
            net, parts
        )
        new = nnx.state(net, nnx.BatchStat)
    want = jit(apply)(params, stats, x)
    same(y.reshape(BATCH, -1), want[0])
    same(new, want[1], atol=1e-12 if api == "linen" else 1e-6)
