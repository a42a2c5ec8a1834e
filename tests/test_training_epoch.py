"""Every layer trains: after one epoch of handwritten digits, compiled, the loss is lower than
before."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiled import jit
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from registry import NAMES, REGISTRY, C

from benchmarks import training
from benchmarks.datasets import Images, load
from benchmarks.norms import METHODS, Layer
from benchmarks.residual import Unit
from benchmarks.splits import epoch, split
from jaxnorm import Method, methods, norm
from jaxnorm import nnx as layers

STEPS, BATCH, WIDTH = 64, 16, 12
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def batches() -> Images:
    """An epoch, (steps, images of a step, ...)."""
    images = epoch(split(load("digits"), 0, STEPS * BATCH).train, 0, 0)
    return jax.tree.map(lambda t: jnp.asarray(t.reshape(STEPS, BATCH, *t.shape[1:])), images)


def quarter(images: Images, index: int) -> Images:
    size = STEPS // 4
    return jax.tree.map(lambda t: t[index * size : (index + 1) * size], images)


class Small(nn.Module):
    """Two convolutions, each normalized and activated, and a classifier."""

    layers: tuple[Layer, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, done: jax.Array | float = 1.0) -> jax.Array:
        for layer in self.layers:
            x = Unit(layer, WIDTH, stride=2)(x, train=train, done=jnp.asarray(done))
        return nn.Dense(10)(x.reshape(len(x), -1))


def some(names, often):
    """`often` by default, one in six of the others in the slow run."""
    others = [name for name in names if name not in often]
    return [
        *often,
        *(
            pytest.param(name, marks=pytest.mark.rest if place % 6 else pytest.mark.slow)
            for place, name in enumerate(others)
        ),
    ]


@pytest.mark.parametrize("name", some(METHODS, ("moving_average",)))
def test_linen_layers_of_the_comparison_train(name):
    """By the steps of the main job, on one device; the loss of the first quarter before, that of
    the last after."""
    net: Any = Small((METHODS[name].at(BATCH // 4, WIDTH),) * 2)
    images = jax.tree.map(lambda t: t[:, None], batches())  # of one device
    state = jit(partial(training.initialize, net, OPTIMIZER, 1, (8, 8, 1)))(jnp.zeros(1, "i4"))
    state = jax.tree.map(lambda t: t[0], state)

    @jit
    def loss(state, images):
        on_devices = dict(state.on_devices)
        taps = {key: on_devices.pop(key) for key in (OVERWRITE_WITH_GRADIENT,) if key in on_devices}

        def one(batch):
            return training.mean_loss(
                state.params, taps, on_devices, batch, net, state.step / STEPS
            )[0]

        return jax.lax.map(one, images).mean()

    after = jit(partial(training._train_epoch, net, OPTIMIZER, STEPS))(state, images)[0]
    assert int(after.step) == STEPS
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert all(jax.tree.leaves(changed)), changed
    chex.assert_tree_all_finite(after)
    assert float(loss(after, quarter(images, 3))) < 0.8 * float(loss(state, quarter(images, 0)))


class Network(nnx.Module):
    """A convolution, what stands behind it, and a classifier."""

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs):
        self.middle: Any = make(rngs)
        self.last = nnx.Linear(16 * C, 10, rngs=rngs)

    def __call__(self, x: jax.Array, **now: Any) -> jax.Array:
        x = jax.nn.silu(self.middle(x, **now))
        return self.last(x.reshape(len(x), -1))


def conv(rngs, **options):
    return nnx.Conv(1, C, (3, 3), strides=2, rngs=rngs, **options)


class Behind(nnx.Module):
    """A convolution and a normalization."""

    def __init__(self, norm, rngs):
        self.conv, self.norm = conv(rngs, use_bias=False), norm(C, rngs=rngs)

    def __call__(self, x, **now):
        return self.norm(self.conv(x), **now)


class Shortcut(nnx.Module):
    """Positional norm whose moments come back after a convolution."""

    def __init__(self, rngs):
        self.conv = conv(rngs)
        self.shortcut = layers.DynamicMomentShortcut(C, hidden_features=4, rngs=rngs)

    def __call__(self, x):
        return self.shortcut(*norm(self.conv(x), methods.positional_norm()))


class StandardizedDense(nnx.Module):
    def __init__(self, rngs):
        self.dense = layers.WSDense(64, 16 * C, use_gain=True, rngs=rngs)

    def __call__(self, x):
        return self.dense(x.reshape(len(x), -1))


def of_method(method: Method) -> Callable[[nnx.Rngs], nnx.Module]:
    """A network of the layer of a method."""
    if method.in_front is not None:
        return lambda rngs: layers.Norm(C, method, layer=conv(rngs, use_bias=False), rngs=rngs)
    return partial(Behind, partial(layers.Norm, method=method, x_shape=(BATCH, 4, 4, C)))


# Averages over steps begin when some have been taken.
LATER = methods.moving_average_norm(window=4, average_from=10, correct_from=20)
ENTRIES = {entry.constructor: entry for entry in reversed(REGISTRY)}
NNX: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    name: of_method(LATER if name == "moving_average_norm" else entry.method)
    for name, entry in ENTRIES.items()
} | {
    "BatchNorm": partial(Behind, layers.BatchNorm),
    "GroupNorm": partial(Behind, partial(layers.GroupNorm, num_groups=4)),
    "InstanceNorm": partial(Behind, layers.InstanceNorm),
    "LayerNorm": partial(Behind, layers.LayerNorm),
    "RMSNorm": partial(Behind, layers.RMSNorm),
    "DynamicMomentShortcut": Shortcut,
    "WSConv": lambda rngs: layers.WSConv(1, C, (3, 3), strides=2, use_gain=True, rngs=rngs),
    "WSDense": StandardizedDense,
}


def test_each_nnx_layer_has_a_network():
    modules = {
        name for name, t in vars(layers).items() if inspect.isclass(t) and issubclass(t, nnx.Module)
    }
    assert set(NNX) - set(NAMES) == modules - {"Norm", "FoldedNorm"}  # one serves alone


@pytest.mark.parametrize("name", some(NNX, ("domain_batch_norm",)))
def test_nnx_layers_train(name):
    model, entry = Network(NNX[name], nnx.Rngs(0)), ENTRIES.get(name)
    now = {} if entry is None else {**entry.options, **entry.by_example(BATCH)}
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    old = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer, images):
        def loss(model):
            logits = model(images.pixels, **now)
            return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()

        value, gradients = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, (nnx.Param, layers.Tap))
        )(model)
        params, taps = nnx.split_state(gradients, nnx.Param, layers.Tap)
        optimizer.update(model, params)
        nnx.update(model, taps)
        return value

    images = batches()
    losses = [
        float(step(model, optimizer, jax.tree.map(lambda t, i=i: t[i], images)))
        for i in range(STEPS)
    ]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), old, nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(changed)), changed
    size = STEPS // 4
    assert np.mean(losses[-size:]) < 0.8 * np.mean(losses[:size])
