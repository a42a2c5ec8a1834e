"""A real model changes its norm layers by changing an import: it trains the same, from a checkpoint
saved by Flax."""

import contextlib
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization

KEY = jax.random.key(0)
COMPILE = {"compiler_options": {"xla_backend_optimization_level": 0}}


@contextlib.contextmanager
def promotions_of(home):
    """Flax's own layers rely on JAX's default promotions."""
    if home.startswith("jaxnorm"):
        yield
    else:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


class Block(nn.Module):
    """Two convolutions and a way around them, as in Flax's ImageNet example."""

    features: int
    norm: object
    strides: int = 1

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(self.norm()(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = self.norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The module `home` is where the norm classes are imported from."""

    home: str

    @nn.compact
    def __call__(self, x, train):
        norms = importlib.import_module(self.home)
        norm = functools.partial(
            norms.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = nn.relu(norm(name="bn_init")(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for features, strides in ((8, 1), (16, 2)):
            x = Block(features, norm, strides)(x)
        x = norms.GroupNorm(4)(x).mean((1, 2))
        return nn.Dense(4)(norms.LayerNorm()(x))


def examples():
    """Four classes of images that differ in the direction of a wave."""
    rng = np.random.default_rng(0)
    labels = np.arange(32) % 4
    i, j = np.mgrid[:8, :8] / 8
    waves = [np.sin(2 * np.pi * (a * i + b * j)) for a, b in ((1, 0), (0, 1), (1, 1), (1, -1))]
    x = np.stack([waves[k] for k in labels])[..., None] + rng.normal(0, 0.7, (32, 8, 8, 3)) + 0.5
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels)


def trainer(home):
    model, optimizer = ResNet(home), optax.sgd(0.1, momentum=0.9)

    def start(key, x):
        with promotions_of(home):
            variables = model.init(key, x, train=False)
        return dict(variables) | {"optimizer": optimizer.init(variables["params"])}

    def step(state, x, labels):
        def loss(params):
            with promotions_of(home):
                variables = {"params": params, "batch_stats": state["batch_stats"]}
                logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, slots = optimizer.update(grads, state["optimizer"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "batch_stats": new["batch_stats"], "optimizer": slots}, value

    def evaluate(state, x):
        with promotions_of(home):
            return model.apply({k: state[k] for k in ("params", "batch_stats")}, x, train=False)

    return [jax.jit(f, **COMPILE) for f in (start, step, evaluate)]


def run(step, state, steps):
    losses = []
    for _ in range(steps):
        state, value = step(state, *examples())
        losses.append(float(value))
    return state, losses


def test_a_resnet_goes_on_with_jaxnorm_from_a_checkpoint_of_flax():
    start, step, evaluate = trainer("flax.linen")
    state, before = run(step, start(KEY, examples()[0][:1]), 4)
    saved = serialization.to_bytes(state)
    expected_state, expected = run(step, state, 4)

    start, step, evaluate_ours = trainer("jaxnorm.linen")
    blank = start(jax.random.key(1), examples()[0][:1])
    loaded = serialization.from_bytes(blank, saved)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, blank)
    chex.assert_trees_all_equal(loaded, state)
    x = examples()[0][:3]
    np.testing.assert_allclose(evaluate_ours(loaded, x), evaluate(state, x), atol=1e-4)

    ours_state, ours = run(step, loaded, 4)
    np.testing.assert_allclose(ours, expected, rtol=1e-3)
    chex.assert_trees_all_close(
        ours_state["batch_stats"], expected_state["batch_stats"], rtol=2e-3, atol=2e-3
    )
    assert before[0] > before[-1] > ours[-1] and ours[-1] < 0.6 * before[0]


class Net(nnx.Module):
    """Convolution, norm, and a linear layer."""

    def __init__(self, home, rngs):
        norms = importlib.import_module(home)
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = norms.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.groups = norms.GroupNorm(8, num_groups=2, rngs=rngs)
        self.linear = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.linear(nnx.silu(self.groups(nnx.silu(self.norm(self.conv(x))))).mean((1, 2)))


@nnx.jit(static_argnames="home")
def nnx_step(model, optimizer, x, labels, home):
    def loss(model):
        with promotions_of(home):
            logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def test_an_nnx_model_goes_on_with_jaxnorm_from_the_state_of_flax():
    def trained(home, model, steps):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        return [float(nnx_step(model, optimizer, *examples(), home)) for _ in range(steps)]

    theirs, ours = Net("flax.nnx", nnx.Rngs(0)), Net("jaxnorm.nnx", nnx.Rngs(1))
    before = trained("flax.nnx", theirs, 3)
    nnx.update(ours, jax.tree.map(jnp.copy, nnx.state(theirs)))
    after, expected = trained("jaxnorm.nnx", ours, 3), trained("flax.nnx", theirs, 3)
    np.testing.assert_allclose(after, expected, rtol=1e-4)
    assert before[0] > before[-1] > after[-1]
    ours.eval(), theirs.eval()
    with promotions_of("flax.nnx"):
        wanted = theirs(examples()[0])
    np.testing.assert_allclose(ours(examples()[0]), wanted, atol=1e-3)


@pytest.mark.slow
def test_a_resnet_learns_as_with_flax_from_the_start():
    runs = {}
    for home in ("flax.linen", "jaxnorm.linen"):
        start, step, _ = trainer(home)
        runs[home] = run(step, start(KEY, examples()[0][:1]), 20)[1]
    ours, theirs = runs["jaxnorm.linen"], runs["flax.linen"]
    np.testing.assert_allclose(ours[:8], theirs[:8], rtol=1e-2)
    assert ours[-1] < 0.1 * ours[0]
