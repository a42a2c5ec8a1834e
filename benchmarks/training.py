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

from benchmarks.datasets import Data, Images
from benchmarks.residual import ResidualNet
from benchmarks.splits import Split, epoch, split
from jaxnorm.optim import add_norm_decay

IMAGES_PER_STEP = 32
"""Images of a step where they are spread over devices."""

RATE_PER_IMAGE = 0.1 / 32
"""Peak learning rate for each image of a step."""

WEIGHT_DECAY = 5e-4

IMAGES_AT_ONCE = 1024
"""Images of a seed that are evaluated together: what their patches take is held for all seeds."""


class State(NamedTuple):
    """What a step changes. `on_devices` are the variables that each device has for itself, with a
    leading axis of devices: the collections batch_stats and, of layers whose backward pass has
    state, _overwrite_with_gradient. `key` is there where the network draws noise."""

    params: Any
    on_devices: Any
    optimizer: optax.OptState
    step: jax.Array
    key: jax.Array | None = None


class Curves(NamedTuple):
    """What each step had before its update, (seeds, steps): the loss of its images and the norm of
    the gradient of all parameters."""

    loss: Any
    gradient_norm: Any


class Ran(NamedTuple):
    """What `run_epochs` returns: what all seeds ended with, what each step had, (seeds, steps), and
    the seconds that it took."""

    carry: Any
    kept: Any
    train_seconds: float


class Trained(NamedTuple):
    """A network trained once per seed, the seeds in the leading axis of `state`; `curves` are there
    where they were asked for."""

    net: ResidualNet
    state: State
    splits: list[Split]
    compile_seconds: float
    train_seconds: float
    curves: Curves | None = None


def fit(
    net: ResidualNet,
    seeds: Sequence[int],
    *,
    data: Data,
    num_train: int,
    devices: int,
    images_per_device: int,
    epochs: int,
    on_epoch: Callable[[int], None],
    num_held_out: int | None = None,
    rate: float | None = None,
    norm_decay: float = 0.0,
    arrange: Callable[[Images], Images] | None = None,
    curves: bool = False,
) -> Trained:
    """Trains `net` once per seed.

    Args:
        net: a `ResidualNet`.
        seeds: each decides split, initial parameters, order and shifts of the images.
        data: the images.
        num_train: number of training images.
        devices: number of simulated devices a step is spread over.
        images_per_device: number of images whose statistics are shared.
        epochs: number of passes over the training images; the first warms the learning rate up.
        on_epoch: called with the number of finished epochs, first with 0, when the training is
            compiled.
        num_held_out: at most so many images validate and so many test; None is all there are.
        rate: peak learning rate; None is `RATE_PER_IMAGE` for each image of a step.
        norm_decay: weight decay of the scales of norms toward 1 and of their biases toward 0.
        arrange: what is done to the images of an epoch, (seeds, steps, devices, images, ...).
        curves: whether to keep what each step had.
    """
    steps = num_train // (devices * images_per_device)
    splits = [split(data, seed, num_train, num_held_out) for seed in seeds]
    if rate is None:
        rate = RATE_PER_IMAGE * devices * images_per_device
    optimizer = make_optimizer(rate, steps, epochs, norm_decay)

    def batches(index: int) -> Images:
        images = stack(
            epoch(split.train, seed, index) for split, seed in zip(splits, seeds, strict=True)
        )
        leading = (len(seeds), steps, devices, images_per_device)
        images = jax.tree.map(lambda part: part.reshape(*leading, *part.shape[2:]), images)
        return arrange(images) if arrange else images

    start = time.perf_counter()
    state = jax.block_until_ready(initialize(net, optimizer, devices, data.shape, seeds))
    if net.noise:
        state = state._replace(key=jax.vmap(jax.random.key)(jnp.asarray(seeds)))
    initial_seconds = time.perf_counter() - start
    train_epoch = partial(_train_epoch, net, optimizer, steps * epochs, curves=curves)
    program, compile_seconds = compiled_epoch(train_epoch, state, batches(0))
    ran = run_epochs(program, state, batches, epochs, on_epoch)
    return Trained(
        net, ran.carry, splits, initial_seconds + compile_seconds, ran.train_seconds, ran.kept
    )


def compiled_epoch(
    train_epoch: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batches: Any
) -> tuple[Callable[..., Any], float]:
    """An epoch of all seeds, which takes the place of `carry` in memory, and the seconds that its
    compilation took.

    Args:
        train_epoch: (carry, the batches of an epoch) -> (carry, what each step had), of one seed.
        carry: what it starts from, the seeds in the leading axis.
        batches: of an epoch, with leading axes of seeds and steps.
    """
    return compiled(jax.vmap(train_epoch), carry, batches, donate_argnums=0)


def run_epochs(
    program: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    batches: Callable[[int], Any],
    epochs: int,
    on_epoch: Callable[[int], None],
) -> Ran:
    """Trains all seeds by what `compiled_epoch` returns.

    Args:
        program: an epoch.
        carry: what it starts from.
        batches: of an epoch by its number.
        epochs: how many.
        on_epoch: called with the number of finished epochs, first with 0.
    """
    begin = time.perf_counter()
    on_epoch(0)
    kept = []
    for index in range(epochs):
        carry, of_epoch = jax.block_until_ready(program(carry, batches(index)))
        kept.append(of_epoch)
        on_epoch(index + 1)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *kept)
    return Ran(carry, joined, time.perf_counter() - begin)


def compiled(f: Callable[..., Any], *args: Any, **how: Any) -> tuple[Callable[..., Any], float]:
    """The program of f for arguments like these, and the seconds that its compilation took; `how`
    are options of `jax.jit`."""
    start = time.perf_counter()
    program = jax.jit(f, **how).lower(*args).compile()
    return program, time.perf_counter() - start


def stack(images: Iterable[Images]) -> Images:
    """Those of several seeds in one array, (seeds, N, ...)."""
    return jax.tree.map(lambda *parts: np.stack(parts), *images)


def make_optimizer(
    rate: float, steps_per_epoch: int, epochs: int, norm_decay: float = 0.0
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay, see `fit`; the rate rises in the first epoch and falls
    with a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=rate,
        warmup_steps=steps_per_epoch,
        decay_steps=steps_per_epoch * epochs,
    )
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_is_kernel),
        *([add_norm_decay(norm_decay)] if norm_decay else []),
        optax.sgd(schedule, momentum=0.9),
    )


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda param: param.ndim > 1, params)


def initialize(
    net: nn.Module,
    optimizer: optax.GradientTransformation,
    devices: int,
    shape: tuple[int, ...],
    seeds: Sequence[int],
) -> State:
    """What each seed starts from, the seeds in the leading axis."""

    def one(seed: int) -> State:
        variables: Any = net.init(jax.random.key(seed), jnp.zeros((1, *shape)), train=False)
        params = variables.pop("params")
        return State(
            params,
            jax.tree.map(lambda s: jnp.stack([s] * devices), variables),
            optimizer.init(params),
            jnp.array(0),
        )

    # Operation by operation: one program of all of them would be compiled for every method anew.
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(one, seeds))


def mean_loss(
    params: Any,
    taps: Any,
    on_devices: Any,
    batch: Images,
    net: nn.Module,
    done: jax.Array,
    keys: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """Cross-entropy, averaged over devices, and the running statistics of each device; `keys`, one
    for each device, are those of noise."""

    def on_device(
        on_device: Any, taps: Any, images: Images, key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        variables = {"params": params, **on_device, **taps}
        logits, updates = net.apply(
            variables,
            images.pixels,
            train=True,
            done=done,
            mutable=["batch_stats"],
            rngs=None if key is None else {"noise": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, images.labels)
        return losses.mean(), updates

    losses, on_devices = jax.vmap(on_device)(on_devices, taps, batch, keys)
    return losses.mean(), on_devices


def _train_epoch(
    net: ResidualNet,
    optimizer: optax.GradientTransformation,
    steps: int,
    state: State,
    batches: Images,
    curves: bool = False,
) -> tuple[State, Curves | None]:
    differentiate = jax.value_and_grad(mean_loss, (0, 1), has_aux=True)

    def step(state: State, batch: Images) -> tuple[State, Curves | None]:
        on_devices = dict(state.on_devices)
        taps = {
            name: on_devices.pop(name) for name in (OVERWRITE_WITH_GRADIENT,) if name in on_devices
        }
        keys = None
        if state.key is not None:
            keys = jax.random.split(jax.random.fold_in(state.key, state.step), len(batch.labels))
        rest = on_devices, batch, net, state.step / steps, keys
        (loss, new), (gradient, taps) = differentiate(state.params, taps, *rest)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if any(layer.double_forward for layer in net.layers):
            new = mean_loss(params, taps, *rest)[1]
        taps = jax.tree.map(lambda t: t * len(t), taps)  # of the sum over devices, not the mean
        kept = Curves(loss, optax.tree.norm(gradient)) if curves else None
        return State(params, {**new, **taps}, optimizer_state, state.step + 1, state.key), kept

    return jax.lax.scan(step, state, batches)


def correct(net: nn.Module, state: State, images: Images, **options: Any) -> jax.Array:
    """Whether each image is classified rightly with the running statistics averaged over devices,
    (N,), computed for some of the images at a time; `options` are those of every normalization."""
    on_devices = jax.tree.map(lambda s: s.mean(axis=0), state.on_devices)
    variables = {"params": state.params, **on_devices}

    def some(images: Images) -> jax.Array:
        logits: Any = net.apply(variables, images.pixels, train=False, **options)
        return logits.argmax(axis=-1) == images.labels

    return in_chunks(some, images)


def in_chunks(f: Callable[[Images], jax.Array], images: Images) -> jax.Array:
    """f of all images, (N,), called with some of them at a time."""
    number = len(images.labels)
    if number <= IMAGES_AT_ONCE:
        return f(images)
    chunks = -(-number // IMAGES_AT_ONCE)
    size = -(-number // chunks)

    def cut(t: jax.Array) -> jax.Array:
        """In chunks of one size, the last one filled up with zeros."""
        filled = jnp.pad(t, [(0, chunks * size - number), *[(0, 0)] * (t.ndim - 1)])
        return filled.reshape(chunks, size, *t.shape[1:])

    return jax.lax.map(f, jax.tree.map(cut, images)).reshape(-1)[:number]
