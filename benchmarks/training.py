"""Trains one network on all seeds at once, each step spread over simulated devices with statistics
of their own."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

from benchmarks import digits
from benchmarks.residual import ResidualNet

IMAGES_PER_STEP = 32
"""Images of a step where they are spread over devices."""

RATE_PER_IMAGE = 0.1 / 32
"""Peak learning rate for each image of a step."""

WEIGHT_DECAY = 5e-4


class State(NamedTuple):
    """What a step changes. `on_devices` are the variables that each device has for itself, with a
    leading axis of devices: the collections batch_stats and, of layers whose backward pass has
    state, _overwrite_with_gradient."""

    params: Any
    on_devices: Any
    optimizer: optax.OptState
    step: jax.Array


class Outcome(NamedTuple):
    """Accuracies in %, one per seed, and where the time went."""

    validation: list[float]
    test: list[float]
    compile_seconds: float
    train_seconds: float


def train(
    net: ResidualNet,
    seeds: Sequence[int],
    *,
    num_train: int,
    devices: int,
    images_per_device: int,
    epochs: int,
    on_epoch: Callable[[int], None],
) -> Outcome:
    """Trains `net` once per seed and evaluates it with its running statistics averaged over the
    devices.

    Args:
        net: a `ResidualNet`.
        seeds: each decides split, initial parameters, order and shifts of the images.
        num_train: number of training images.
        devices: number of simulated devices a step is spread over.
        images_per_device: number of images whose statistics are shared.
        epochs: number of passes over the training images; the first warms the learning rate up.
        on_epoch: called with the number of finished epochs, first with 0, when everything is
            compiled.
    """
    steps = num_train // (devices * images_per_device)
    splits = [digits.split(seed, num_train) for seed in seeds]
    optimizer = _optimizer(devices * images_per_device, steps, epochs)

    def batches(index: int) -> digits.Images:
        images = _stack(
            digits.epoch(split.train, seed, index)
            for split, seed in zip(splits, seeds, strict=True)
        )
        leading = (len(seeds), steps, devices, images_per_device)
        return jax.tree.map(lambda part: part.reshape(*leading, *part.shape[2:]), images)

    start = time.perf_counter()
    initialize = jax.jit(partial(_initialize, net, optimizer, devices))
    state = jax.block_until_ready(initialize(jnp.asarray(seeds)))
    train_seeds = jax.vmap(partial(_train_epoch, net, optimizer, steps * epochs))
    train_epoch = jax.jit(train_seeds, donate_argnums=0).lower(state, batches(0)).compile()
    held_out = _stack(_held_out(split) for split in splits)
    correct = jax.jit(jax.vmap(partial(_correct, net))).lower(state, held_out).compile()
    compiled = time.perf_counter()
    on_epoch(0)

    for index in range(epochs):
        state = jax.block_until_ready(train_epoch(state, batches(index)))
        on_epoch(index + 1)
    hits = 100 * np.asarray(correct(state, held_out))
    validation, test = np.split(hits, [len(splits[0].validation.labels)], axis=1)
    return Outcome(
        validation.mean(axis=1).tolist(),
        test.mean(axis=1).tolist(),
        compiled - start,
        time.perf_counter() - compiled,
    )


def _stack(images: Iterable[digits.Images]) -> digits.Images:
    return jax.tree.map(lambda *parts: np.stack(parts), *images)


def _held_out(split: digits.Split) -> digits.Images:
    """Validation and test images in one array, so that one compiled program evaluates both."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), split.validation, split.test)


def _optimizer(
    images_per_step: int, steps_per_epoch: int, epochs: int
) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=RATE_PER_IMAGE * images_per_step,
        warmup_steps=steps_per_epoch,
        decay_steps=steps_per_epoch * epochs,
    )
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_is_kernel), optax.sgd(rate, momentum=0.9)
    )


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _initialize(
    net: nn.Module, optimizer: optax.GradientTransformation, devices: int, seeds: jax.Array
) -> State:
    def one(seed: jax.Array) -> State:
        variables = net.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
        params = variables.pop("params")
        return State(
            params,
            jax.tree.map(lambda s: jnp.stack([s] * devices), variables),
            optimizer.init(params),
            jnp.array(0),
        )

    # A loop, because random numbers under vmap take three times as long to compile.
    return jax.lax.map(one, seeds)


def _loss(
    params: Any, taps: Any, on_devices: Any, batch: digits.Images, net: nn.Module, done: jax.Array
) -> tuple[jax.Array, Any]:
    """Cross-entropy, averaged over devices, and the running statistics of each device."""

    def on_device(on_device: Any, taps: Any, images: digits.Images) -> tuple[jax.Array, Any]:
        variables = {"params": params, **on_device, **taps}
        logits, updates = net.apply(
            variables, images.pixels, train=True, done=done, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        return losses.mean(), updates

    losses, on_devices = jax.vmap(on_device)(on_devices, taps, batch)
    return losses.mean(), on_devices


def _train_epoch(
    net: ResidualNet,
    optimizer: optax.GradientTransformation,
    steps: int,
    state: State,
    batches: digits.Images,
) -> State:
    def step(state: State, batch: digits.Images) -> tuple[State, None]:
        on_devices = dict(state.on_devices)
        taps = {
            name: on_devices.pop(name) for name in (OVERWRITE_WITH_GRADIENT,) if name in on_devices
        }
        rest = on_devices, batch, net, state.step / steps
        (gradient, taps), new = jax.grad(_loss, (0, 1), has_aux=True)(state.params, taps, *rest)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if any(layer.double_forward for layer in net.layers):
            new = _loss(params, taps, *rest)[1]
        taps = jax.tree.map(lambda t: t * len(t), taps)  # of the sum over devices, not the mean
        return State(params, {**new, **taps}, optimizer_state, state.step + 1), None

    return jax.lax.scan(step, state, batches)[0]


def _correct(net: nn.Module, state: State, images: digits.Images) -> jax.Array:
    on_devices = jax.tree.map(lambda s: s.mean(axis=0), state.on_devices)
    logits: Any = net.apply({"params": state.params, **on_devices}, images.pixels, train=False)
    return logits.argmax(axis=-1) == images.labels
