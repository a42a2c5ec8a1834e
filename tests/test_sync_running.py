"""State that each device kept for itself, made equal, and the groups of devices that share it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from flax.core import FrozenDict

from jaxnorm import (
    Moments,
    device_groups,
    init_running,
    linen,
    methods,
    moments,
    nnx,
    sync_running,
    update_cumulative,
    update_running,
)

# steps, devices, examples, positions, channels
X = np.random.default_rng(0).normal(size=(3, 8, 4, 5, 6))
METHOD = methods.batch_norm()
CONTEXTS = {"pmap": jax.pmap, "vmap": jax.vmap}
contexts = pytest.mark.parametrize("mapped", CONTEXTS.values(), ids=CONTEXTS)


def local(steps, update, counted):
    """State of one device after its own batches."""
    state = init_running((6,), dtype=steps.dtype, counted=counted)
    for x in steps:
        state = update(state, moments(x, METHOD))
    return state


@pytest.mark.usefixtures("x64")
@contexts
def test_cumulative_statistics_are_those_of_all_data(mapped):
    """Also when devices are synchronized in between, and twice."""

    def f(steps):
        state = sync_running(local(steps[:2], update_cumulative, True), axis_name="i")
        state = update_cumulative(sync_running(state, axis_name="i"), moments(steps[2], METHOD))
        return sync_running(state, axis_name="i")

    state = mapped(f, axis_name="i", in_axes=1)(X)
    for got, wanted in (
        (state.mean, X.mean((0, 1, 2, 3))),
        (state.var, X.var((0, 1, 2, 3))),
        (state.count, 3 * 20),
    ):
        np.testing.assert_allclose(got, np.broadcast_to(wanted, (8, 6)), rtol=1e-12)


@pytest.mark.usefixtures("x64")
@contexts
@pytest.mark.parametrize("weighted", (False, True))
def test_averages_are_pooled_within_groups(mapped, weighted):
    w = np.arange(8.0) if weighted else np.ones(8)

    def f(steps, w):
        state = local(steps, update_running, False)
        groups = device_groups(8, size=4, strided=True)
        return state, sync_running(
            state, axis_name="i", axis_index_groups=groups, weights=w if weighted else None
        )

    old, new = jax.tree.map(np.asarray, mapped(f, axis_name="i", in_axes=(1, 0))(X, w))
    for members in ([0, 2, 4, 6], [1, 3, 5, 7]):
        mean = np.average(old.mean[members], 0, w[members])
        var = np.average(old.var[members] + (old.mean[members] - mean) ** 2, 0, w[members])
        np.testing.assert_allclose(new.mean[members], np.broadcast_to(mean, (4, 6)), rtol=1e-12)
        np.testing.assert_allclose(new.var[members], np.broadcast_to(var, (4, 6)), rtol=1e-12)
    assert new.count is None


def test_before_the_first_update_nothing_changes():
    state = jax.vmap(lambda _: init_running((6,), counted=True))(jnp.arange(8))
    synced = jax.vmap(lambda s: sync_running(s, axis_name="i"), axis_name="i")(state)
    jax.tree.map(np.testing.assert_array_equal, synced, state)


@pytest.mark.parametrize("check_vma", (True, False))
def test_inside_shard_map(check_vma):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "i")
    spec = jax.sharding.PartitionSpec

    def f(steps):
        return sync_running(local(steps[:, 0].astype("f4"), update_cumulative, True), axis_name="i")

    out = spec() if check_vma else spec("i")
    run = jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=spec(None, "i"), out_specs=out, check_vma=check_vma)
    )
    np.testing.assert_allclose(run(X.astype("f4")).var[:6], X.var((0, 1, 2, 3)), rtol=1e-5)


def test_trees_of_layers():
    """batch_stats of linen, frozen or not, with bfloat16 and complex means, and the state of nnx
    layers."""
    m = {"mean": jnp.arange(8.0)[:, None], "var": jnp.ones((8, 1))}
    narrow = {"mean": m["mean"].astype("bfloat16"), "var": m["var"].astype("bfloat16")}
    stats = {
        "block": [{"norm": m}, FrozenDict(m)],
        "deep": {"narrow": narrow, "complex": m | {"mean": m["mean"].astype("complex64") * 1j}},
    }
    synced = jax.vmap(lambda s: sync_running(s, axis_name="i"), axis_name="i")(stats)
    assert jax.tree.map(lambda t: (t.shape, t.dtype), synced) == jax.tree.map(
        lambda t: (t.shape, t.dtype), stats
    )
    for t in (synced["block"][0]["norm"], synced["block"][1], synced["deep"]["complex"]):
        np.testing.assert_allclose(abs(t["mean"]), 3.5)
        np.testing.assert_allclose(t["var"], 1 + 5.25)

    layer = linen.Norm(methods.batch_norm(debias=True), use_running_average=False)
    variables = layer.init(jax.random.key(0), X[0, 0].astype("f4"))
    x = X[0].astype("f4")

    def train(x):
        new = layer.apply(variables, x, mutable="batch_stats")[1]["batch_stats"]
        return sync_running(new, axis_name="i")

    np.testing.assert_allclose(
        jax.vmap(train, axis_name="i")(x)["mean"][3], x.mean((0, 1, 2)), atol=1e-6
    )

    def train_nnx(x):
        layer = nnx.BatchNorm(6, momentum=0.0, rngs=flax_nnx.Rngs(0))
        layer(x)
        state = flax_nnx.state(layer, flax_nnx.BatchStat)
        flax_nnx.replace_by_pure_dict(
            state, sync_running(flax_nnx.to_pure_dict(state), axis_name="i")
        )
        flax_nnx.update(layer, state)
        return layer.var[...]

    np.testing.assert_allclose(
        jax.vmap(train_nnx, axis_name="i")(x)[5], x.var((0, 1, 2)), rtol=1e-5
    )


def test_statistics_with_other_arrays_beside_them():
    """A second pair and what is inside of the mapping become equal too; arrays without a union are
    refused."""
    mean, var = jnp.arange(8.0)[:, None], jnp.ones((8, 1))
    state = methods.momentum_batch_norm().init((8, 1))
    state = {name: jnp.broadcast_to(t, (8, 1)) for name, t in state.items()} | {
        "train_mean": 2 * mean,
        "mean": mean,
    }
    state |= {"positions": jnp.zeros((8, 4, 4)), "inner": {"mean": mean, "var": var}}
    sync = jax.vmap(lambda s: sync_running(s, axis_name="i"), axis_name="i")
    synced = sync(state)
    for name, factor in (("", 1), ("train_", 2)):
        np.testing.assert_allclose(synced[name + "mean"], factor * np.full((8, 1), 3.5))
        np.testing.assert_allclose(synced[name + "var"], np.full((8, 1), 1 + factor**2 * 5.25))
    np.testing.assert_allclose(synced["inner"]["var"], np.full((8, 1), 6.25))
    assert synced["positions"].shape == (8, 4, 4) and not synced["positions"].any()
    with pytest.raises(
        TypeError, match="no union of past_count. Got mean, past_count, var; expected mean and var"
    ):
        sync({"mean": mean, "var": var, "past_count": mean})


def test_what_is_no_state_is_refused():
    with pytest.raises(
        TypeError,
        match=r'a leaf of type .*Tracer; expected Moments, or mappings with "mean" and "var"',
    ):
        jax.vmap(lambda t: sync_running({"mean": t}, axis_name="i"), axis_name="i")(
            jnp.ones((8, 1))
        )
    with pytest.raises(NameError, match="unbound axis name: 'j'"):
        sync_running(Moments(None, jnp.zeros(1), jnp.ones(1)), axis_name="j")


@pytest.mark.parametrize(
    "devices, size, words",
    [
        (8, 3, "8 devices do not split into groups of 3. Expected a divisor"),
        (8, 16, "8 devices do not split into groups of 16. Expected a divisor"),
        (8, 0, "size is 0; expected an integer of at least 1"),
        (8, -2, "size is -2; expected an integer of at least 1"),
        (0, 1, "num_devices is 0; expected an integer of at least 1"),
    ],
)
def test_groups_that_do_not_divide_are_refused(devices, size, words):
    with pytest.raises(ValueError, match=words):
        device_groups(devices, size=size)


def test_groups_of_one_and_of_all():
    assert device_groups(3, size=1) == device_groups(3, size=1, strided=True) == ((0,), (1,), (2,))
    assert device_groups(3, size=3) == device_groups(3, size=3, strided=True) == ((0, 1, 2),)


def synced(state, weights):
    """Of devices with a mean and a weight each."""

    def f(s, w):
        return sync_running(s, axis_name="i", weights=w)

    return jax.vmap(f, axis_name="i")(state, weights)


def test_weights_are_never_negative():
    """Refused where known; traced ones count 0, as NaN does."""
    state = Moments(None, jnp.array([[0.0], [2.0], [8.0]]), jnp.ones((3, 1)))
    for wrong in (-1.0, np.nan, np.array([1.0, -1.0])):
        with pytest.raises(
            ValueError, match="weights say how much .*expected numbers of at least 0"
        ):
            sync_running(Moments(None, jnp.zeros(2), jnp.ones(2)), axis_name=(), weights=wrong)
    for wrong in (-3.0, np.nan, np.inf):
        new = synced(state, jnp.array([1.0, 1.0, wrong]))
        np.testing.assert_allclose(new.mean, np.ones((3, 1)))
        np.testing.assert_allclose(new.var, np.full((3, 1), 2.0))


def test_a_device_without_finite_statistics_does_not_count():
    """Channel by channel: it takes the others' statistics, and they do not take its NaN."""
    mean = jnp.array([[0.0, 0.0], [2.0, 2.0], [jnp.nan, 4.0]])
    new = synced(Moments(None, mean, jnp.ones((3, 2))), jnp.ones(3))
    np.testing.assert_allclose(new.mean, [[1.0, 2.0]] * 3)
    np.testing.assert_allclose(new.var, [[2.0, 1 + 8 / 3]] * 3, rtol=1e-6)


def test_repeated_rounds_do_not_drift():
    """Equal statistics stay, to the bit, also where their mean is far from 0 and weights differ."""

    def f(s, w):
        return jax.lax.fori_loop(0, 1000, lambda _, s: sync_running(s, axis_name="i", weights=w), s)

    state = Moments(None, jnp.full((3, 1), 123456.7), jnp.ones((3, 1)))
    new = jax.jit(jax.vmap(f, axis_name="i"))(state, jnp.array([1.0, 2.0, 4.3]))
    np.testing.assert_array_equal(new.mean, state.mean)
    np.testing.assert_array_equal(new.var, state.var)
