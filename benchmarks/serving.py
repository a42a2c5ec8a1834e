"""How a trained network does with other statistics at test time than its running ones, which tells
bad training from a mismatch between training and inference."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.datasets import Images
from benchmarks.norms import Layer
from benchmarks.residual import ResidualNet
from benchmarks.training import (
    IMAGES_AT_ONCE,
    IMAGES_PER_STEP,
    State,
    Trained,
    compiled,
    correct,
    stack,
)
from jaxnorm import methods

LAST_STAGE = "Block_2"


@dataclass(frozen=True)
class Others:
    """What each seed measured with other statistics than the running ones.

    Attributes:
        batch: test accuracy in % with the statistics of each test batch, of the size of training.
        population: with mean and variance of all elements of many batches of training images.
        variance_ratio: running variance over that of the population, the geometric mean over the
            channels of the last stage.
        effective_positions: how many independent elements an image is worth in the last stage: the
            variance of what is normalized there over the variance between images of their means,
            the geometric mean over channels, of the layer where it is least. It is 1 where all
            positions of an image are alike, and their number where they are independent.
    """

    batch: list[float]
    population: list[float]
    variance_ratio: list[float]
    effective_positions: list[float]


@dataclass(frozen=True)
class Serving:
    """Test accuracy in % with the running statistics, as networks are used, for each seed; and with
    others, of methods that remember mean and variance of batches."""

    running: list[float]
    others: Others | None = None


def running(trained: Trained, **options: Any) -> list[float]:
    """Test accuracy in % with the running statistics, for each seed.

    Args:
        trained: what `benchmarks.training.fit` returns.
        **options: of every normalization.
    """
    test = stack(split.test for split in trained.splits)
    evaluate, _ = compiled(jax.vmap(partial(correct, trained.net, **options)), trained.state, test)
    return percent(evaluate(trained.state, test))


def serve(trained: Trained, images_per_device: int) -> Serving:
    """Evaluates a trained network on its test images, also with other statistics.

    Args:
        trained: what `benchmarks.training.fit` returns.
        images_per_device: number of images that shared statistics in training.
    """
    net, state, splits = trained.net, trained.state, trained.splits
    train, test = (stack(parts) for parts in zip(*((s.train, s.test) for s in splits), strict=True))
    evaluate, _ = compiled(jax.vmap(partial(correct, net)), state, test)
    running = percent(evaluate(state, test))
    steps = min(train.labels.shape[1], test.labels.shape[1]) // IMAGES_PER_STEP
    if steps == 0 or not all(_remembers_moments(layer) for layer in net.layers):
        return Serving(running)

    def batches(images: Images) -> Images:
        leading = (len(splits), steps, IMAGES_PER_STEP // images_per_device, images_per_device)
        used = steps * IMAGES_PER_STEP
        return jax.tree.map(lambda t: t[:, :used].reshape(*leading, *t.shape[2:]), images)

    train, test_batches = batches(train), batches(test)
    forward, _ = compiled(jax.vmap(partial(_in_training, _forgetful(net))), state, train)
    population = _pooled(forward(state, train)[1])
    known = state.on_devices["batch_stats"]
    served = jax.tree.map(
        lambda p, s: jnp.broadcast_to(p[:, None], s.shape).astype(s.dtype), population, known
    )
    ratios = jax.tree.map(lambda s, p: jnp.where(p > 0, s.mean(axis=1) / p, 1), known, population)
    some = test.pixels[:, :IMAGES_AT_ONCE]
    positions, _ = compiled(jax.vmap(partial(_effective_positions, net)), state, some)
    others = Others(
        batch=percent(forward(state, test_batches)[0]),
        population=percent(evaluate(state._replace(on_devices={"batch_stats": served}), test)),
        variance_ratio=_last_stage_mean(ratios),
        effective_positions=np.asarray(positions(state, some)).tolist(),
    )
    return Serving(running, others)


def percent(hits: jax.Array) -> list[float]:
    """The share of what is true in %, for each seed."""
    return (100 * np.asarray(hits).reshape(len(hits), -1).mean(axis=1)).tolist()


def _remembers_moments(layer: Layer) -> bool:
    rows = isinstance(layer.method, methods.Row | methods.batch_group_norm)
    return rows and layer.pools_batch and layer.schedule is None


def _forgetful(net: ResidualNet) -> ResidualNet:
    """The network whose layers remember the last batch alone."""
    layers: Any = tuple(
        layer._replace(method=replace(layer.method, momentum=0.0))  # type: ignore[type-var]
        for layer in net.layers
    )
    return net.clone(layers=layers)


def _in_training(net: ResidualNet, state: State, batches: Images) -> tuple[jax.Array, Any]:
    """With the statistics of each batch: whether each image is classified rightly, (steps, devices,
    images); and these statistics, (steps, devices, C)."""

    def on_device(stats: Any, images: Images) -> tuple[jax.Array, Any]:
        variables = {"params": state.params, **stats}
        logits, updates = net.apply(variables, images.pixels, train=True, mutable=["batch_stats"])
        return logits.argmax(axis=-1) == images.labels, updates["batch_stats"]

    return jax.lax.map(lambda batch: jax.vmap(on_device)(state.on_devices, batch), batches)


def _pooled(moments: Any) -> Any:
    """Mean and variance of all batches together, (seeds, C) of (seeds, steps, devices, C)."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(moments)
    pooled = {}
    for path, mean in flat.items():
        if path[-1] == "mean":
            var = (*path[:-1], "var")
            pooled[path] = mean.mean(axis=(1, 2))
            pooled[var] = flat[var].mean(axis=(1, 2)) + mean.var(axis=(1, 2))
    return unflatten_dict(pooled)


def _last_stage_mean(ratios: Any) -> list[float]:
    """The geometric mean of what stands under `var`, over the channels and layers of the last
    stage, for each seed."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(ratios)
    found = [value for path, value in flat.items() if path[0] == LAST_STAGE and path[-1] == "var"]
    return np.exp(np.log(np.concatenate(found, axis=1)).mean(axis=1)).tolist()


def _effective_positions(net: ResidualNet, state: State, pixels: jax.Array) -> jax.Array:
    """Of these images, at inference: the statistics of batches would make their means alike."""
    on_devices = jax.tree.map(lambda s: s.mean(axis=0), state.on_devices)
    _, captured = net.apply(
        {"params": state.params, **on_devices},
        pixels,
        train=False,
        capture_intermediates=lambda module, _: module.name == "conv",
        mutable=["intermediates"],
    )

    def independent(x: jax.Array) -> jax.Array:
        of_images = x.mean(axis=(1, 2)).var(axis=0)
        ratio = x.var(axis=(0, 1, 2)) / jnp.where(of_images > 0, of_images, 1)
        alive = of_images > 0
        return jnp.exp(jnp.log(jnp.where(alive, ratio, 1)).sum() / alive.sum())

    return jnp.stack(
        [independent(x) for x in jax.tree.leaves(captured["intermediates"][LAST_STAGE])]
    ).min()
