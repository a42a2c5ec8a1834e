"""Trains a network on all seeds at once by an objective that a task brings along."""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.plan import Plan
from benchmarks.splits import Split
from benchmarks.training import (
    IMAGES_PER_STEP,
    RATE_PER_IMAGE,
    State,
    Trained,
    compiled_epoch,
    initialize,
    make_optimizer,
    run_epochs,
)

Objective = Callable[..., tuple[jax.Array, Any]]
"""(params, on_devices, batch, the key of the step) -> (loss, the new running statistics of each
device), of one seed."""


def images_together(plan: Plan) -> int:
    """How many images share statistics, or stand on a device where none do."""
    return plan.key.batch_size or IMAGES_PER_STEP


def forward(
    net: nn.Module, params: Any, on_devices: Any, pixels: jax.Array, **options: Any
) -> tuple[Any, Any]:
    """What the network returns in training for the images of each device, (devices, N, ...), and
    the new running statistics of each."""

    def on_device(on_device: Any, pixels: jax.Array) -> tuple[Any, Any]:
        variables = {"params": params, **on_device}
        return net.apply(variables, pixels, train=True, mutable=["batch_stats"], **options)

    return jax.vmap(on_device)(on_devices, pixels)


def descend(
    optimizer: optax.GradientTransformation, state: State, gradient: Any, on_devices: Any
) -> State:
    """The state after a step along this gradient."""
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params, on_devices, optimizer_state, state.step + 1, state.key)


def begin(
    net: nn.Module, plan: Plan, shape: tuple[int, ...], *, steps: int, images: int = IMAGES_PER_STEP
) -> tuple[optax.GradientTransformation, State]:
    """The optimizer of the other programs, and what each seed starts from, with a key.

    Args:
        net: the network.
        plan: the cell; its key says how many images share statistics.
        shape: of an image.
        steps: of an epoch.
        images: of a step, spread over devices.
    """
    optimizer = make_optimizer(RATE_PER_IMAGE * IMAGES_PER_STEP, steps, plan.settings.epochs)
    devices = images // images_together(plan)
    state = initialize(net, optimizer, devices, shape, range(plan.seeds))
    return optimizer, state._replace(key=jax.vmap(jax.random.key)(jnp.arange(plan.seeds)))


def epoch_of(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[State, Any], tuple[State, None]]:
    """All steps of an epoch of one seed, each along the gradient of the objective."""
    differentiate = jax.grad(objective, has_aux=True)

    def step(state: State, batch: Any) -> tuple[State, None]:
        key = jax.random.fold_in(state.key, state.step)  # type: ignore[arg-type]
        gradient, new = differentiate(state.params, state.on_devices, batch, key)
        return descend(optimizer, state, gradient, new), None

    return lambda state, batches: jax.lax.scan(step, state, batches)


def fit(
    net: Any,
    plan: Plan,
    splits: list[Split],
    objective: Objective,
    batches: Callable[[int], Any],
    on_epoch: Callable[[int], None],
) -> Trained:
    """Trains `net` with the seeds of a plan.

    Args:
        net: the network.
        plan: the cell.
        splits: the images of each seed.
        objective: what a step takes the gradient of.
        batches: of an epoch by its number, with leading axes of seeds and steps.
        on_epoch: as in `benchmarks.training.fit`.
    """
    start = time.perf_counter()
    first = batches(0)
    steps, shape = jax.tree.leaves(first)[0].shape[1], splits[0].train.pixels.shape[1:]
    optimizer, state = begin(net, plan, shape, steps=steps)
    initial_seconds = time.perf_counter() - start
    program, compile_seconds = compiled_epoch(epoch_of(objective, optimizer), state, first)
    ran = run_epochs(program, state, batches, plan.settings.epochs, on_epoch)
    return Trained(net, ran.carry, splits, initial_seconds + compile_seconds, ran.train_seconds)
