"""What a training loop does with the layers: whatever cuts the work in parts, the training is that of one device at once."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_devices import collectives

from jaxnorm import Moments, init_running, linen, merge, methods, moments, norm, normalize, pool, update_cumulative
from jaxnorm import nnx as nnx_layers
from jaxnorm import update_running

DEVICES, BATCH, CLASSES = 8, 16, 3
WIDE = {"param_dtype": jnp.float64, "force_float32_reductions": False}


def mesh():
    return Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))


def jit(f):
    """Compiled as a whole, without optimizations: operation by operation takes longer."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def same(got, want, atol=1e-12):
    chex.assert_trees_all_close(got, want, rtol=0, atol=atol)


def normal(*shape, seed=0, dtype="f8"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def on_devices(context, f, shared=0):
    """f on every device's part of the batch, the first arguments being shared by all; results stacked over devices."""

    def part(*args):
        out = f(*args[:shared], *jax.tree.map(lambda t: t[0], args[shared:]))
        return jax.tree.map(lambda t: t[None], out)

    @jax.jit
    def run(*args):
        parts = jax.tree.map(lambda t: t.reshape(DEVICES, -1, *t.shape[1:]), args[shared:])
        if context == "pmap":
            return jax.pmap(f, "data", in_axes=(None,) * shared + (0,) * len(parts))(*args[:shared], *parts)
        specs = (P(),) * shared + (P("data"),) * len(parts)
        sharded = jax.shard_map(part, mesh=mesh(), in_specs=specs, out_specs=P("data"), check_vma=context == "shard_map")
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
    """Weights differ everywhere; one micro-batch has none on any device, and one device none at all."""
    x, w = normal(BATCH * 3, 2, 6) + 5, np.random.default_rng(1).uniform(0, 1, (BATCH * 3, 1, 1))
    w = w.reshape(DEVICES, 3, 2, 1, 1)
    w[:, 1] = w[2] = 0
    w = w.reshape(-1, 1, 1)
    whole = moments(x, methods.batch_norm(), weights=w)
    want = jax.tree.map(lambda t: t[0, 0], whole)
    before = init_running((6,), dtype=x.dtype)
    if context == "jit":
        micro = [np.moveaxis(t.reshape(DEVICES, 3, 2, *t.shape[1:]), 1, 0).reshape(3, BATCH, *t.shape[1:]) for t in (x, w)]
        sums = [jit(accumulated)(jax.device_put(micro, NamedSharding(mesh(), P(None, "data"))))]
    else:
        cut = partial(jax.tree.map, lambda t: t.reshape(3, 2, *t.shape[1:]))
        run = [on_devices(context, lambda *b, s=s: accumulated(cut(b), "data", s)) for s in (True, False)]
        sums = [first(f(x, w)) for f in run]
    for seen in sums:
        same(seen, want)
        same(update_running(before, seen, momentum=0.9), update_running(before, whole, momentum=0.9))


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
            x = nn.relu(linen.BatchNorm(use_running_average=False, momentum=self.momentum, **WIDE)(x, mask=mask))
        return x


def as_moments(batch_stats, count=None):
    """The mean and var of every layer: Moments of `count` elements, or running ones without a count."""

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
    """With momentum 0 a layer's batch_stats are the micro-batch's own; how much they count, the loop knows."""
    x, mask = normal(3, 8, 5), np.random.default_rng(1).random((3, 8, 1)) < [[[0.9]], [[0.5]], [[0.2]]]
    variables = jit(Twice().init)(jax.random.key(0), x[0])
    params, old = variables["params"], variables["batch_stats"]

    def loss(params, x, mask):
        y, new = Twice(momentum=0.0).apply(variables | {"params": params}, x, mask, mutable="batch_stats")
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
    same(total, jit(jax.grad(lambda params: jax.vmap(partial(loss, params))(x, mask)[0].sum()))(params))
    apply = partial(Twice().apply, variables, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
    shown = jit(jax.vmap(lambda *batch: apply(*batch)[1]["intermediates"]))(x, mask)
    for i in range(2):
        entered = np.asarray(shown[f"Dense_{i}"]["__call__"][0])[mask[..., 0]]
        same(new[f"BatchNorm_{i}"], {"mean": 0.1 * entered.mean(0), "var": 0.9 + 0.1 * entered.var(0)})


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
    same([model.layers[0].mean[...], model.layers[0].var[...]], [whole.mean[...], whole.var[...]], atol=5e-6)


SAVED = jax.checkpoint_policies.save_only_these_names("jaxnorm_synced_moments")
REMAT = {"plain": lambda f: f, "saved by name": partial(jax.checkpoint, policy=SAVED), "nothing saved": jax.checkpoint}


def conv(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("context", ("jit", "pmap", "shard_map", "shard_map unchecked"))
def test_remat_repeats_no_collective(context, weighted):
    """In a convolutional network whose statistics are saved by name, as many all-reduces as without remat."""
    x, kernels = normal(BATCH, 4, 4, 2, dtype="f4"), [normal(3, 3, 2, 2, seed=i, dtype="f4") for i in range(2)]
    axis_name = None if context == "jit" else "data"

    def gradient(remat, kernels, x):
        @remat
        def block(kernel, x):
            w = (x[:, :1, :1, :1] > 0) if weighted else None
            return jax.nn.relu(norm(conv(x, kernel), methods.batch_norm(), weights=w, axis_name=axis_name)[0])

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
            args = jax.device_put(args, (NamedSharding(mesh(), P()), NamedSharding(mesh(), P("data"))))
            program = jax.jit(f)
        else:
            program = on_devices(context, f, shared=1)
        counts[name] = len(collectives(program, *args))
    assert counts["saved by name"] == counts["plain"] < counts["nothing saved"]


class Conv(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3))(x)
        return nn.relu(linen.BatchNorm(use_running_average=False, momentum=0.5, axis_name=self.axis_name)(x))


class NnxConv(nnx.Module):
    def __init__(self, rngs, axis_name=None):
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.norm = nnx_layers.BatchNorm(4, momentum=0.5, axis_name=axis_name, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))
