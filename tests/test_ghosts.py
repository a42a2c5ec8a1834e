"""Conventions by which ghost batches enter running statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import nnx
from helpers import close

from jaxnorm import init_running, linen, methods, moments, update_running
from jaxnorm import nnx as layers

K, D = 4, 0.7
SIZE = 2
CONVENTIONS = ("pooled", "averaged", "sequential", "sequential divided")
conventions = pytest.mark.parametrize("convention", CONVENTIONS)


def data():
    return np.random.default_rng(0).normal(1, 2, (K * SIZE, 3, 4)) * np.arange(1, 9).reshape(
        8, 1, 1
    )


@partial(jit, static_argnames=("convention", "correction"))
def step(state, m, momentum, convention, correction):
    return update_running(
        state, m, momentum=momentum, correction=correction, ghost_update=convention
    )


def start(counted=False):
    state = init_running((4,), dtype="f8", counted=counted)
    return step(state, ghosts(data()[::-1] + 1, methods.batch_norm()), 0.5, "pooled", 0)


def update(m, convention, state=None, correction=0, momentum=D):
    return step(start() if state is None else state, m, momentum, convention, correction)


@partial(jit, static_argnames=("method", "batch_axis", "channel_axis"))
def ghosts(x, method=methods.ghost_batch_norm(K), **options):  # noqa: B008
    return moments(x, method, **options)


@pytest.mark.usefixtures("x64")
def test_closed_forms():
    """In NumPy, with d^k and d^(k - 1 - i) written out; only pooled includes the variance between
    ghosts."""
    x, state = data(), start()
    parts = x.reshape(K, SIZE, 3, 4)
    s = np.stack([parts.mean((1, 2)), parts.var((1, 2))])
    old = np.stack([state.mean, state.var])
    i = np.arange(K).reshape(K, 1)
    divided = 1 - (1 - D) / K
    whole = np.stack([x.mean((0, 1)), x.var((0, 1))])
    want = {
        "pooled": D * old + (1 - D) * whole,
        "averaged": D * old + (1 - D) * s.mean(1),
        "sequential": D**K * old + ((1 - D) * D ** (K - 1 - i) * s).sum(1),
        "sequential divided": divided**K * old + ((1 - D) / K * divided ** (K - 1 - i) * s).sum(1),
    }
    for convention in CONVENTIONS:
        new = update(ghosts(x), convention)
        close((new.mean, new.var), tuple(want[convention]))
    np.testing.assert_allclose(want["averaged"][1], want["pooled"][1] - (1 - D) * s[0].var(0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("counted", (False, True))
@pytest.mark.parametrize("correction", (0, 1))
def test_sequential_is_one_update_after_the_other(counted, correction):
    """Debiased or not, with each ghost's own correction; a ghost that is empty or not finite is
    left out, by channel."""
    x, w = data(), np.ones((K * SIZE, 1, 1))
    w[2:4] = 0
    for convention, momentum in (("sequential", D), ("sequential divided", 1 - (1 - D) / K)):
        for nan in (False, True):
            x[5, 0, 1] = np.nan if nan else 1.0
            m = ghosts(x, weights=w)
            state = start(counted)
            for i in range(K):
                one = jax.tree.map(lambda t, i=i: t[i : i + 1], m)
                state = update(one, "pooled", state, correction, momentum)
            new = update(m, convention, start(counted), correction)
            close((new.mean, new.var), (state.mean, state.var))
            if counted:
                close(new.count, state.count)


@pytest.mark.usefixtures("x64")
@conventions
def test_one_ghost_is_plain_and_none_usable_changes_nothing(convention):
    x = data()
    close(update(ghosts(x, methods.batch_norm()), convention).var, update(ghosts(x), "pooled").var)
    for m in (ghosts(x, weights=np.zeros((1, 1, 1))), ghosts(x * np.nan)):
        new = update(m, convention)
        assert all((a == b).all() for a, b in ((new.mean, start().mean), (new.var, start().var)))


@pytest.mark.usefixtures("x64")
def test_without_memory_the_last_ghost_remains():
    new = update(ghosts(data()), "sequential", momentum=0.0)
    close((new.mean, new.var), (data()[-SIZE:].mean((0, 1)), data()[-SIZE:].var((0, 1))))


@pytest.mark.usefixtures("x64")
def test_ghosts_on_another_axis():
    x = data()
    other = ghosts(x.transpose(2, 1, 0), batch_axis=2, channel_axis=0)
    want = update(ghosts(x), "sequential")
    new = update_running(start(), other, momentum=D, ghost_update="sequential", batch_axis=2)
    close((new.mean, new.var), (want.mean, want.var))


@pytest.mark.parametrize(
    "convention",
    ["sequential", *(pytest.param(c, marks=pytest.mark.slow) for c in CONVENTIONS[::3])],
)
def test_layers_take_the_convention(convention):
    x = jnp.asarray(data(), "f4")
    want = update_running(init_running((4,)), ghosts(x), momentum=D, ghost_update=convention)
    method = methods.ghost_batch_norm(ghost_size=SIZE, ghost_update=convention, momentum=D)
    ours = linen.Norm(method, use_running_average=False)
    variables = jit(ours.init)(jax.random.key(0), x[:1])
    new = jit(lambda x: ours.apply(variables, x, mutable="batch_stats"))(x)
    theirs = layers.Norm(4, method, rngs=nnx.Rngs(0))
    nnx.jit(lambda layer, x: layer(x))(theirs, x)
    for got in (new[1]["batch_stats"]["var"], theirs.var[...]):
        np.testing.assert_allclose(got, want.var, rtol=1e-5)


@pytest.mark.parametrize("use_running_average", (True, False))
def test_one_example_initializes_a_layer(use_running_average):
    method = methods.batch_and_group_norm(ghost_size=SIZE, num_groups=2)
    layer = linen.Norm(method, use_running_average=use_running_average)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3, 4)))
    assert variables["batch_stats"]["mean"].shape == (4,)


def test_another_convention_is_refused():
    with pytest.raises(
        ValueError,
        match="ghost_update='mean' is no convention. Expected one of .*'sequential divided'",
    ):
        update_running(init_running((4,)), moments(jnp.ones((2, 4)), (2, 4)), ghost_update="mean")
