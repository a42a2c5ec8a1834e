"""Batch Normalization Embeddings: the bank of statistics, distances to its rows, and the weighted
prediction."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiled import jit
from flax import linen as nn
from flax import nnx
from helpers import close, data

from jaxnorm import domains, linen, methods
from jaxnorm import nnx as layers

SHAPE, D, E = (6, 3, 4), 3, 1e-3
DOMAIN = np.array([2, 0, 2, 2, 0, 0], "i4")  # 1 is absent


def bank(count=D, dtype="f8"):
    rng = np.random.default_rng(9)
    return {
        "mean": rng.normal(1, 1, (count, 4)).astype(dtype),
        "var": rng.uniform(0.5, 4, (count, 4)).astype(dtype),
    }


@partial(jit, static_argnames=("batch_axis", "channel_axis"))
def distance(x, state, **options):
    return methods.domain_batch_norm(len(state["mean"])).observe(x, state, **options)["distance"]


@partial(jit, static_argnames="train")
def differentiated(x, gy, state, domain, train=True):
    method = methods.domain_batch_norm(len(state["mean"]), momentum=0.7, epsilon=E)
    y, pull, new = jax.vjp(
        lambda x: method.apply(x, state, train=train, domain=domain), x, has_aux=True
    )
    return y, pull(gy)[0], new


@pytest.mark.usefixtures("x64")
def test_a_mixed_batch_is_one_batch_for_each_domain():
    x, gy, state = data(*SHAPE), data(*SHAPE, seed=1), bank()
    y, dx, new = differentiated(x, gy, state, DOMAIN)
    sets = oracle.set_numbers(SHAPE, lambda n, p, c, *_: (DOMAIN[n], c))
    o = oracle.normalized(x, sets, epsilon=E, gy=gy)
    close((y, dx), (o.y, o.dx))
    want = jax.tree.map(np.copy, state)
    for d in (0, 2):
        mine = x[DOMAIN == d]
        want["mean"][d] = 0.7 * state["mean"][d] + 0.3 * mean_of(mine)
        want["var"][d] = 0.7 * state["var"][d] + 0.3 * mine.var((0, 1))
    close(dict(new), want)
    for name, old in state.items():
        np.testing.assert_array_equal(new[name][1], old[1])
    y, dx, _ = differentiated(x, gy, state, DOMAIN, train=False)
    mean, var = (state[name][DOMAIN][:, None] for name in ("mean", "var"))
    close((y, dx), ((x - mean) / np.sqrt(var + E), gy / np.sqrt(var + E)))


@pytest.mark.usefixtures("x64")
def test_devices_with_examples_of_several_domains():
    """Each domain's statistics are those of its examples, on whatever device they are."""
    x, state, method = data(*SHAPE), bank(), methods.domain_batch_norm(D, epsilon=E)

    def step(x, domain, **options):
        return method.apply(x, state, train=True, domain=domain, **options)

    want = jit(step)(x, DOMAIN)
    over = jax.vmap(partial(step, axis_name="i"), axis_name="i")
    y, new = jit(over)(x[:, None], DOMAIN[:, None])
    close((y[:, 0], jax.tree.map(lambda t: t[0], new)), want)


def mean_of(x):
    return x.mean((0, 1))


@pytest.mark.usefixtures("x64")
def test_one_domain_for_the_batch_or_for_each_example():
    """The only one or one of several; it alone is updated."""
    x, gy = data(*SHAPE), data(*SHAPE, seed=1)
    for count, d in ((1, 0), (D, 2)):
        state = bank(count)
        per_batch = differentiated(x, gy, state, d)
        close(differentiated(x, gy, state, np.full(6, d, "i4")), per_batch)
        close(per_batch[2]["var"][d], 0.7 * state["var"][d] + 0.3 * x.var((0, 1)))
        np.testing.assert_array_equal(per_batch[2]["var"][:d], state["var"][:d])


def test_a_domain_that_is_none_gives_nan_and_changes_no_row():
    x, state = data(*SHAPE).astype("f4"), bank(dtype="f4")
    for domain in (-1, D, np.array([0, 1, -1, 1, 0, D], "i4")):
        for train in (True, False):
            y, _, new = differentiated(x, x, state, domain, train=train)
            outside = (
                np.broadcast_to((domain == -1) | (domain == D), 6)
                if np.ndim(domain)
                else np.full(6, True)
            )
            np.testing.assert_array_equal(np.isnan(y).all((1, 2)), outside)
            assert np.isfinite(y[~outside]).all()
            for name, old in state.items():
                np.testing.assert_array_equal(new[name][2], old[2])


@pytest.mark.usefixtures("x64")
def test_distance_is_wasserstein():
    x, state = data(*SHAPE), bank()
    m, v = x.mean(1), x.var(1)

    def by_hand(mean, var):
        return ((mean - m) ** 2 + var + v - 2 * np.sqrt(var * v)).sum(-1)

    for d in range(D):
        close(distance(x, state, domain=np.int32(d)), by_hand(state["mean"][d], state["var"][d]))
    mixed = distance(x, state, domain=DOMAIN)
    close(mixed, by_hand(state["mean"][DOMAIN], state["var"][DOMAIN]))
    first = distance(np.moveaxis(x, -1, 1), state, domain=DOMAIN, channel_axis=1)
    last = distance(np.moveaxis(x, 0, 1), state, domain=DOMAIN, batch_axis=1)
    close((first, last), (mixed, mixed))
    own = {"mean": m, "var": v}  # each example's own statistics as its domain
    close(distance(x, own, domain=np.arange(6)), np.zeros(6))
    # symmetric
    close(distance(x[0:1], own, domain=np.int32(1)), distance(x[1:2], own, domain=np.int32(0)))
    padded = distance(x, state, domain=DOMAIN, weights=np.arange(6).reshape(6, 1, 1) < 4)
    close(padded, np.where(np.arange(6) < 4, mixed, 0))
    # one position: variance 0
    observe = methods.domain_batch_norm(D).observe
    flat = jit(jax.grad(lambda x: observe(x, state, domain=0)["distance"].sum()))(x[:, 0])
    close(flat, 2 * (x[:, 0] - state["mean"][0]))


@pytest.mark.usefixtures("x64")
def test_weights_of_domains():
    distances = np.random.default_rng(0).uniform(0.1, 5, (D, 6))
    w = domains.domain_weights(distances)
    close(w, (1 / distances) / (1 / distances).sum(0))
    close(domains.domain_weights({"a": distances, "b": [2 * distances]}), w)  # layers add up
    close(
        domains.domain_weights(distances, exponent=2.5), distances**-2.5 / (distances**-2.5).sum(0)
    )
    order = [2, 0, 1]
    close(domains.domain_weights(distances[order]), w[np.array(order)])
    close(domains.domain_weights(np.full((D, 6), 3.0)), np.full((D, 6), 1 / 3))
    close(
        domains.domain_weights(np.array([[0.0, 1e-300], [1.0, 1e300]])),
        np.array([[1.0, 1.0], [0.0, 0.0]]),
    )
    close(domains.domain_weights(np.array([[0.0], [2.0], [0.0]])), np.array([[0.5], [0.0], [0.5]]))
    with pytest.raises(ValueError, match="there are no distances.*observe measures"):
        domains.domain_weights({})


class Network(nn.Module):
    """Two layers with statistics for each domain."""

    @nn.compact
    def __call__(self, x, domain):
        for _ in range(2):
            x = linen.Norm(methods.domain_batch_norm(D))(x, use_running_average=True, domain=domain)
            x = jnp.tanh(nn.Dense(4)(x))
        return x.mean(1)


def test_prediction_for_an_unknown_domain():
    """Each domain's pass by itself, then the weighted average: in linen by a mutable collection, in
    nnx by capture."""
    x, states = (
        data(*SHAPE).astype("f4"),
        [bank(dtype="f4"), jax.tree.map(lambda t: t + 0.5, bank(dtype="f4"))],
    )
    network = Network()
    variables = jit(network.init)(jax.random.key(0), x, 0)
    stats = {f"Norm_{i}": state for i, state in enumerate(states)}
    variables = {"params": variables["params"], "batch_stats": stats}

    def forward(domain):
        logits, stored = network.apply(variables, x, domain, mutable="observations")
        return jax.nn.softmax(logits), stored["observations"]

    predicted, weights = jit(lambda: domains.domain_ensemble(forward, D, exponent=1.5))()
    outputs, distances = zip(*map(jit(forward), range(D)), strict=True)
    total = np.array([sum(jax.tree.leaves(t)) for t in distances])
    assert len(jax.tree.leaves(distances[0])) == 2 and total.shape == (D, 6)
    np.testing.assert_allclose(weights, total**-1.5 / (total**-1.5).sum(0), rtol=1e-5)
    np.testing.assert_allclose(
        predicted, sum(w[:, None] * p for w, p in zip(weights, outputs, strict=True)), rtol=1e-5
    )

    layer = layers.Norm(4, methods.domain_batch_norm(D), rngs=nnx.Rngs(0))
    layer.mean[...], layer.var[...] = (jnp.asarray(states[0][name]) for name in ("mean", "var"))
    layer.eval()
    y, stored = nnx.capture(layer, layers.Observation)(x, domain=1)
    np.testing.assert_allclose(
        jax.tree.leaves(stored)[0], distance(x, states[0], domain=1), rtol=1e-5
    )
    graph, state = nnx.split(layer)

    def captured(domain):
        return nnx.capture(nnx.merge(graph, state), layers.Observation)(x, domain=domain)

    predicted, weights = jit(lambda: domains.domain_ensemble(captured, D))()
    far = np.array([distance(x, states[0], domain=d) for d in range(D)])
    np.testing.assert_allclose(weights, (1 / far) / (1 / far).sum(0), rtol=1e-5)
    np.testing.assert_allclose(y, layer(x, domain=1), rtol=1e-5)


def test_errors():
    with pytest.raises(
        TypeError, match="forward returns int32. Expected floating or complex outputs"
    ):
        domains.domain_ensemble(lambda domain: (jnp.full(6, domain, jnp.int32), jnp.ones(6)), D)
    x, method = jnp.ones((6, 4)), methods.domain_batch_norm(D)
    state = method.init(x.shape)
    with pytest.raises(TypeError, match=r"Got float32, shape \(\); expected integers"):
        method.apply(x, state, train=True, domain=1.0)
    with pytest.raises(
        ValueError, match=r"domain has shape \(3,\), and x of shape \(6, 4\) has 6 examples.*\(6,\)"
    ):
        method.apply(x, state, train=False, domain=jnp.zeros(3, int))
    with pytest.raises(TypeError, match="domain_batch_norm needs domain"):
        method.apply(x, state, train=True)
    fewer = methods.domain_batch_norm(D - 1)
    for call in (
        partial(fewer.apply, train=True),
        partial(fewer.apply, train=False),
        fewer.observe,
    ):
        with pytest.raises(
            ValueError, match=r"mean of shape \(3, 4\).*Expected .* mean of shape \(2, 4\)"
        ):
            call(x, state, domain=0)
    with pytest.raises(ValueError, match="num_domains is 0; expected an integer of at least 1"):
        methods.domain_batch_norm(0)
