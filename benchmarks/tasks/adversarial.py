"""Adversarial training, and how many test images a projected gradient ascent leaves right.

Training minimizes the loss at the worst image near each one, after Towards Deep Learning Models
Resistant to Adversarial Attacks, 2017, arXiv:1706.06083:

    min_params E max_{|d|_inf <= epsilon} loss(x + d, y; params).

The inner maximum is looked for by projected gradient ascent (PGD): from a random point of the box
it goes `step` along the sign of the gradient, back into the box and into the range of pixels, as
often as `steps` says.

In training the attack sees what the step sees: the statistics of the attacked batch itself. Running
statistics take up the attacked images, once a step. At test time network and attack use the running
statistics, so that the attack on an image does not depend on the others.
"""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.cells import Settings
from benchmarks.datasets import Data, Images
from benchmarks.plan import Plan
from benchmarks.residual import ResidualNet
from benchmarks.serving import percent
from benchmarks.splits import epoch, split
from benchmarks.tasks.fitting import fit, forward, images_together
from benchmarks.tasks.record import Found, Task, Value
from benchmarks.training import IMAGES_PER_STEP, State, compiled, in_chunks, stack


class Attack(NamedTuple):
    """Projected gradient ascent in a box.

    Attributes:
        epsilon: half the side of the box, of pixels from -1 to 1.
        step: how far each pixel goes in a step, relative to epsilon.
        steps: how many.
    """

    epsilon: Any
    step: float
    steps: int


EPSILON = 0.2
"""A tenth of the range of pixels."""

TRAINING = Attack(EPSILON, 1 / 2, 3)
TEST = Attack(EPSILON, 1 / 4, 20)
"""At test time the steps and their length are those of the paper on CIFAR-10; in training it has 7
steps of this length."""


def pgd(
    gradient: Callable[[jax.Array], jax.Array], pixels: jax.Array, key: jax.Array, attack: Attack
) -> jax.Array:
    """The images that the attack ends at.

    Args:
        gradient: of what the attack maximizes, by the images.
        pixels: images from -1 to 1.
        key: of the random start.
        attack: how far and how often.

    >>> pgd(jnp.ones_like, jnp.zeros(3), jax.random.key(0), Attack(0.25, 0.5, 4)).tolist()
    [0.25, 0.25, 0.25]
    """
    low = jnp.maximum(pixels - attack.epsilon, -1)
    high = jnp.minimum(pixels + attack.epsilon, 1)

    def step(_: Any, x: jax.Array) -> jax.Array:
        x = x + attack.epsilon * attack.step * jnp.sign(gradient(x))
        return optax.projections.projection_box(x, low, high)

    start = jax.random.uniform(key, pixels.shape, pixels.dtype, low, high)
    return jax.lax.fori_loop(0, attack.steps, step, start)


def objective(
    net: nn.Module, params: Any, on_devices: Any, batch: Images, key: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss at the attacked images of a step."""

    def loss(params: Any, pixels: jax.Array) -> tuple[jax.Array, Any]:
        logits, new = forward(net, params, on_devices, pixels)
        labels = jnp.asarray(batch.labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    against = jax.grad(partial(loss, jax.lax.stop_gradient(params)), has_aux=True)
    attacked = pgd(lambda x: against(x)[0], jnp.asarray(batch.pixels), key, TRAINING)
    return loss(params, attacked)


def withstood(net: Any, state: State, images: Images, epsilon: jax.Array) -> jax.Array:
    """Whether each image is classified rightly after the attack on it in a box of this size, (N,);
    as it is where epsilon is 0."""
    on_devices = jax.tree.map(lambda s: s.mean(axis=0), state.on_devices)
    variables = {"params": state.params, **on_devices}

    def some(images: Images) -> jax.Array:
        labels = jnp.asarray(images.labels)

        def loss(pixels: jax.Array) -> jax.Array:
            logits: Any = net.apply(variables, pixels, train=False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

        pixels = jnp.asarray(images.pixels)
        attack = TEST._replace(epsilon=epsilon)
        attacked = pgd(jax.grad(loss), pixels, jax.random.key(0), attack)
        logits: Any = net.apply(variables, attacked, train=False)
        return logits.argmax(axis=-1) == labels

    return in_chunks(some, images)


def measure(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Found:
    """Trains against attacks; errors on test images as they are, and attacked with the bound of the
    training (`attacked`) or half of it (`half`)."""
    settings, seeds, size = plan.settings, range(plan.seeds), images_together(plan)
    net: Any = ResidualNet(plan.layers, plan.strides, data.num_classes)
    splits = [split(data, seed, settings.train_images, settings.test_images) for seed in seeds]
    leading = (plan.seeds, -1, IMAGES_PER_STEP // size, size)

    def batches(index: int) -> Images:
        parts = (epoch(s.train, seed, index) for s, seed in zip(splits, seeds, strict=True))
        return jax.tree.map(lambda t: t.reshape(*leading, *t.shape[2:]), stack(parts))

    trained = fit(net, plan, splits, partial(objective, net), batches, on_epoch)
    test = stack(one.test for one in splits)
    each_seed = jax.vmap(partial(withstood, net), in_axes=(0, 0, None))
    evaluate, _ = compiled(each_seed, trained.state, test, jnp.float32(0))

    def errors(epsilon: float) -> list[float]:
        right = percent(evaluate(trained.state, test, jnp.float32(epsilon)))
        return [100 - value for value in right]

    return Found(
        errors(0),
        {"half": errors(EPSILON / 2), "attacked": errors(EPSILON)},
        trained.compile_seconds,
        trained.train_seconds,
    )


TASK = Task(
    "adversarial",
    "Adversarial training",
    f"Training on images that projected gradient ascent has moved by up to {EPSILON / 2:g} of the "
    f"range of pixels, in {TRAINING.steps} steps of {TRAINING.step:g} of the bound from "
    "a random start, against the statistics of the attacked batch itself. Measured is the error on "
    f"test images as they are, and attacked in {TEST.steps} steps of {TEST.step:g} of "
    "the bound, with the running statistics, which the attack knows. Towards Deep Learning Models "
    "Resistant to Adversarial Attacks, 2017, arXiv:1706.06083.",
    measure,
    (
        Value("error", "clean"),
        Value("half", "attacked, half the bound"),
        Value("attacked", "attacked", claimed=True),
    ),
    MappingProxyType(
        {8: Settings(1024, None, 20), 28: Settings(4096, 1024, 8), 32: Settings(4096, 1024, 8)}
    ),
    MappingProxyType(
        {8: Settings(1024, None, 10), 28: Settings(2048, 256, 4), 32: Settings(2048, 256, 4)}
    ),
    compile_seconds=18.0,
    work=4.0,
    limits="One random start and no other attack: a network may be less robust than it looks.",
)
