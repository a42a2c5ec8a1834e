"""Switchable Normalization: its definition and gradient, and the three normalizations that it
mixes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import nnx as fnnx
from helpers import close, data

from jaxnorm import linen, methods, nnx

SHAPE, E = (6, 3, 4), 1e-3
AXES = {"instance": (1,), "layer": (1, 2), "batch": (0, 1)}


def state():
    return {"mean": np.arange(4.0), "var": np.arange(1.0, 5.0)}


def logits(n, seed=5):
    return tuple(np.random.default_rng(seed).normal(size=(2, n)))


@partial(jit, static_argnames="train")
def differentiated(x, gy, state, mean_logits, var_logits, train=True):
    method = methods.switchable_norm(use_batch=bool(state), momentum=0.7, epsilon=E)

    def f(x, a, b):
        return method.apply(x, state, train=train, mean_logits=a, var_logits=b)

    y, pull, new = jax.vjp(f, x, mean_logits, var_logits, has_aux=True)
    return y, pull(gy), new


def by_hand(np, x, mean_logits, var_logits, batch=None):
    """Each kind of statistic taken from x itself, by mean and variance of its axes."""
    kinds = [(x.mean(axes, keepdims=True), x.var(axes, keepdims=True)) for axes in AXES.values()]
    kinds[2] = kinds[2] if batch is None else batch
    shares = [np.exp(t) / np.exp(t).sum() for t in (mean_logits, var_logits)]
    mean, var = (
        sum(w * m[i] for w, m in zip(share, kinds, strict=False)) for i, share in enumerate(shares)
    )
    return (x - mean) / np.sqrt(var + E)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n", (3, 2))
def test_definition(n):
    """Values by NumPy; the gradient of x and of the logits by differentiating the plain formula."""
    x, gy, start = data(*SHAPE), data(*SHAPE, seed=1), state() if n == 3 else {}
    y, gradients, new = differentiated(x, gy, start, *logits(n))
    close(y, by_hand(np, x, *logits(n)))
    with jax.numpy_rank_promotion("allow"):
        plain = jit(lambda *args: jax.vjp(partial(by_hand, jnp), *args)[1](gy))(x, *logits(n))
    close(gradients, plain)
    evaluated, _, same = differentiated(x, gy, start, *logits(n), train=False)
    if n == 2:
        assert new == same == {}
        close(evaluated, y)
        return
    close(
        dict(new),
        {
            "mean": 0.7 * start["mean"] + 0.3 * x.mean((0, 1)),
            "var": 0.7 * start["var"] + 0.3 * x.var((0, 1)),
        },
    )
    close(evaluated, by_hand(np, x, *logits(n), batch=(start["mean"], start["var"])))


@pytest.mark.usefixtures("x64")
def test_variance_is_between_those_it_mixes():
    """The blend of variances is at least the smallest: |dy/dx| at constant statistics is 1 /
    sqrt(var + epsilon)."""
    x, (a, b) = data(*SHAPE), logits(3)
    smallest = np.min(
        [np.broadcast_to(x.var(axes, keepdims=True), SHAPE) for axes in AXES.values()], axis=0
    )
    largest = np.max(
        [np.broadcast_to(x.var(axes, keepdims=True), SHAPE) for axes in AXES.values()], axis=0
    )
    y = differentiated(x, x, state(), a, b)[0]
    # two positions share their statistics
    var = ((x[:, :1] - x[:, 1:2]) / (y[:, :1] - y[:, 1:2])) ** 2 - E
    assert (var >= smallest[:, :1] - 1e-9).all() and (var <= largest[:, :1] + 1e-9).all()


def test_logits_and_state_belong_together():
    x, with_batch = jnp.ones((6, 4)), methods.switchable_norm()
    start, without = with_batch.init(x.shape), methods.switchable_norm(use_batch=False)
    assert without.init(x.shape) == {}
    for (m, n), expected, method, given in (
        ((3, 2), 3, with_batch, start),
        ((4, 4), 3, with_batch, start),
        ((2, 2), 3, with_batch, start),
        ((3, 3), 2, without, {}),
    ):
        assert method.parameters(4)["mean_logits"].shape == (expected,)
        with pytest.raises(ValueError, match=rf"Expected \({expected},\) for switchable_norm\("):
            method.apply(x, given, train=True, mean_logits=jnp.ones(m), var_logits=jnp.ones(n))
    for method, given in ((with_batch, {}), (without, start)):
        with pytest.raises(ValueError, match="switchable_norm got a state with"):
            method.apply(x, given, train=True)


@pytest.mark.usefixtures("x64")
def test_layer_and_batch_of_two_axes():
    """Two logits with a state, as the authors have it for (N, C); in both frameworks' layers."""
    x, (a, b), start = data(6, 4), logits(2), state()
    shares = [np.exp(t) / np.exp(t).sum() for t in (a, b)]
    method = methods.switchable_norm(use_instance=False, momentum=0.7, epsilon=E)
    own = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    for train in (True, False):
        y, new = jit(method.apply, static_argnames="train")(
            x, start, train=train, mean_logits=a, var_logits=b
        )
        batch = (x.mean(0), x.var(0)) if train else (start["mean"], start["var"])
        mean, var = (w[0] * t + w[1] * u for w, t, u in zip(shares, own, batch, strict=True))
        close(y, (x - mean) / np.sqrt(var + E))
        moved = 0.3 * train
        for name, t in zip(("mean", "var"), (x.mean(0), x.var(0)), strict=True):
            close(new[name], (1 - moved) * start[name] + moved * t)

    y, variables = linen.Norm(method, use_running_average=False).init_with_output(
        jax.random.key(0), x
    )
    mean, var = ((t + u) / 2 for t, u in zip(own, (x.mean(0), x.var(0)), strict=True))
    close(y, (x - mean) / np.sqrt(var + E))
    assert variables["params"]["mean_logits"].shape == (2,)
    layer = nnx.Norm(4, method, use_running_average=False, rngs=fnnx.Rngs(0))
    close(layer(x), np.asarray(y))
    with pytest.raises(ValueError, match="nothing to mix"):
        methods.switchable_norm(use_instance=False, use_batch=False)
