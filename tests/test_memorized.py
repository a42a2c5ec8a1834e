"""Memorized Batch Normalization: the memory, the two combinations, and the double forward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiled import jit
from helpers import close

from jaxnorm import methods
from jaxnorm.training import double_forward

SHAPE, E = (6, 3, 4), 1e-3


def data(seed=0):
    return np.random.default_rng(seed).normal(seed, 1 + seed, SHAPE)


def of(size, **fields):
    """A memory of so many batches, all of one weight."""
    return methods.memorized_batch_norm((1.0,) * (size + 1), **fields)


def empty(size):
    return jax.tree.map(lambda t: np.asarray(t, "f8"), of(size).init(SHAPE))


@partial(jit, static_argnames=("variance", "train"))
def differentiated(x, gy, state, weights, variance="pool", train=True):
    method = of(len(weights) - 1, variance=variance, epsilon=E)
    y, pull, new = jax.vjp(
        lambda x: method.apply(x, state, train=train, memory_weights=weights), x, has_aux=True
    )
    return y, pull(gy)[0], new


def combined(moments, weights, variance):
    a = np.array(weights) / np.sum(weights)
    mean = sum(w * m for w, (m, _) in zip(a, moments, strict=True))
    between = sum(w * (m - mean) ** 2 for w, (m, _) in zip(a, moments, strict=True))
    return mean, sum(w * v for w, (_, v) in zip(a, moments, strict=True)) + (
        between if variance == "pool" else 0
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variance", ("pool", "blend"))
def test_definition(variance):
    """Five batches through a memory of three: filling, then dropping the oldest; the same rule in
    inference."""
    weights, state, memory = (0.1, 0.5, 0.2, 0.7), empty(3), []
    y = differentiated(data(), data(), state, np.array(weights), variance, train=False)[0]
    close(y, data() / np.sqrt(1 + E))
    for seed in range(5):
        x, g = data(seed), data(10 + seed)
        own = x.mean((0, 1)), x.var((0, 1))
        y, dx, state = differentiated(x, g, state, np.array(weights), variance)
        used = weights[3 - len(memory) :]
        mean, var = combined([*memory, own], used, variance)
        a, s = used[-1] / sum(used), np.sqrt(var + E)
        x_hat = (x - mean) / s
        center = mean if variance == "pool" else own[0]
        close(y, x_hat)
        close(dx, (g - a * (g.mean((0, 1)) + (x - center) / s * (g * x_hat).mean((0, 1)))) / s)
        memory = [*memory, own][-3:]
        for i, name in enumerate(("mean", "var")):
            close(state[name][3 - len(memory) :], np.array([m[i] for m in memory]))
        close(state["count"], np.full(4, float(len(memory))))
        mean, var = combined(memory, weights[3 - len(memory) : 3], variance)
        y = differentiated(x, g, state, np.array(weights), variance, train=False)[0]
        close(y, (x - mean) / np.sqrt(var + E))


@pytest.mark.usefixtures("x64")
def test_equal_weights_are_batch_norm_of_the_batches_together():
    """Also while the memory fills. The gradient is that of the whole for the batch's part."""
    state = empty(2)
    for seed in range(3):
        x = np.concatenate([data(i) for i in range(seed + 1)])
        gy = np.concatenate([np.zeros((6 * seed, 3, 4)), data(5)])
        o = oracle.normalized(
            x, oracle.set_numbers(x.shape, lambda n, p, c, *_: (c,)), epsilon=E, gy=gy
        )
        y, dx, state = differentiated(data(seed), data(5), state, np.ones(3))
        close((y, dx), (o.y[-6:], o.dx[-6:]))


@pytest.mark.usefixtures("x64")
def test_double_forward():
    """Only the second pass is remembered: with a learning rate of 0 one forward pass, else that of
    the new parameters."""
    x, state, method = data(1), empty(2), of(2, epsilon=E)

    def loss(params, state, x):
        y, state = method.apply(x * params, state, train=True)
        return jnp.mean(y**3 + x * params), state

    start = np.full((1, 1, 4), 0.5)
    step = jit(
        lambda rate: double_forward(loss, lambda g, opt, p: (p - rate * g, opt + 1))(
            start, 0, state, x
        )
    )
    once = jit(jax.value_and_grad(loss, has_aux=True))
    (first, alone), gradient = once(start, state, x)
    for rate in (0.0, 0.1):
        params, steps, new, value = step(rate)
        close((params, steps, value), (start - rate * gradient, 1, first))
        close(dict(new), dict(once(params, state, x)[0][1]))
        if rate == 0:
            close(dict(new), dict(alone))
        else:
            assert np.abs(new["mean"] - alone["mean"]).max() > 1e-3


def test_errors():
    x, method = jnp.ones((6, 4)), of(2)
    state = method.init(x.shape)
    with pytest.raises(
        ValueError, match=r"shape \(2,\), and the state remembers 2 batches\. Expected \(3,\)"
    ):
        method.apply(x, state, train=True, memory_weights=[1, 1])
    with pytest.raises(ValueError, match=r"mean of shape \(2, 4\).* mean of shape \(1, 4\)"):
        of(1).apply(x, state, train=True)
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match="memory_weights is .*of at least 0"):
            method.apply(x, state, train=True, memory_weights=[1, wrong, 1])
    with pytest.raises(ValueError, match="memory_weights is -1.0.*of at least 0"):
        methods.memorized_batch_norm((1, -1.0, 1))
    with pytest.raises(ValueError, match="Got variance='mix'; expected 'pool' or 'blend'"):
        of(2, variance="mix")
    for few in ((1.0,), (), 0.5):
        with pytest.raises(ValueError, match="Got memory_weights=.*expected two numbers or more"):
            methods.memorized_batch_norm(few)


@pytest.mark.usefixtures("x64")
def test_traced_negative_weights_count_nothing():
    state, method = empty(2), of(2)
    for seed in range(2):
        _, state = method.apply(data(seed), state, train=True)
    run = jit(lambda weights: method.apply(data(5), state, train=True, memory_weights=weights)[0])
    for wrong in (-2.0, np.nan):
        np.testing.assert_array_equal(run(np.array([1, wrong, 1])), run(np.array([1, 0.0, 1])))


def test_weights_in_a_list_may_be_traced():
    """Among plain numbers, as a schedule gives one of them."""
    x, method = jnp.asarray(data(), jnp.float32), of(2)
    run = partial(method.apply, x, method.init(SHAPE), train=True)
    scheduled = jax.jit(lambda a: run(memory_weights=[0.2, a, 0.5])[0])(0.3)
    np.testing.assert_allclose(scheduled, run(memory_weights=[0.2, 0.3, 0.5])[0], atol=1e-6)
    with pytest.raises(ValueError, match="memory_weights is .*at least 0"):
        jax.jit(lambda: run(memory_weights=[0.2, -0.3, 0.5])[0])()
