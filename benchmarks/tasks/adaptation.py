"""Unsupervised domain adaptation: labels of one domain, images of another.

Domain-Adversarial Training of Neural Networks, 2016, arXiv:1505.07818: a second head learns to tell
source from target by the features, and its gradient is reversed on the way to them:

    min_{features, classes} min_domain  L_classes(source) + L_domain(source, target),
    where features get -lambda times the gradient of L_domain,
    lambda = c (2 / (1 + exp(-10 p)) - 1) for the finished part p of the training.

In the paper c is 1 and the learning rate starts at 0.01; here that rises to 0.1, and c is 0.1, or
else what domains ask of the features drowns what classes do.

Each device has as many images of the source as of the target, and their statistics are shared: what
a network with batch statistics sees of the source depends on the target. Beside it the same network
is trained on the source alone: with lambda 0 and, in place of the target's, more images of the
source, whose labels are not used.

For digits the target is MNIST at 8x8, and for all other data sets their own images with noise.
"""

import time
from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cells import Settings
from benchmarks.datasets import Data, Images
from benchmarks.norms import Layer
from benchmarks.plan import Plan
from benchmarks.residual import ResidualNet
from benchmarks.shifts import SHIFTS, mnist_like_digits
from benchmarks.splits import Split, epoch, split
from benchmarks.tasks.fitting import begin, epoch_of, forward, images_together
from benchmarks.tasks.record import Found, Task, Value
from benchmarks.training import (
    IMAGES_PER_STEP,
    Ran,
    compiled,
    compiled_epoch,
    correct,
    run_epochs,
    stack,
)

HIDDEN = 48
"""Units of the head that tells domains apart."""

STRENGTH = 0.1
"""c, see above."""

SHIFT = "noisy"
"""The target of data sets that have no sibling."""


class Domains(NamedTuple):
    """Images of a seed: those of the source, unlabelled ones of the target, and others of it to
    test on."""

    source: Split
    unlabelled: np.ndarray
    test: Images


def reversed_gradient(x: jax.Array, weight: jax.Array | float) -> jax.Array:
    """x, with minus `weight` times the gradient.

    >>> jax.grad(lambda x: 3.0 * reversed_gradient(x, 0.5))(2.0)
    Array(-1.5, dtype=float32, weak_type=True)
    """
    return jax.lax.stop_gradient((1 + weight) * x) - weight * x


def reversal(done: np.ndarray) -> np.ndarray:
    """lambda after the finished part of the training: from 0 to nearly `STRENGTH`.

    >>> reversal(np.array([0.0, 0.5, 1.0])).round(4).tolist()
    [0.0, 0.0987, 0.1]
    """
    return STRENGTH * (2 / (1 + np.exp(-10 * done)) - 1)


class AdaptationNet(nn.Module):
    """The residual network with two heads.

    Attributes:
        layers: the normalization at each width.
        strides: the stride of each stage.
        num_classes: of the source and the target.
    """

    layers: tuple[Layer, ...]
    strides: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, weight: jax.Array | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Logits of classes (N, classes); where `weight` reverses a gradient also those of the
        target, (N,)."""
        net = ResidualNet(self.layers, self.strides, None, name="features")
        features = net(x, train=train)
        logits = nn.Dense(self.num_classes, name="classes")(features)
        features = reversed_gradient(features, 0.0 if weight is None else weight)
        hidden = nn.relu(nn.Dense(HIDDEN, name="hidden")(features))
        target = nn.Dense(1, name="target")(hidden)[..., 0]
        return logits if weight is None else (logits, target)


def domains(name: str, data: Data, settings: Settings, seed: int) -> Domains:
    """Source and target of a seed, which have no image in common."""
    number = settings.train_images
    if name == "digits":
        source = split(data, seed, number, settings.test_images)
        images = mnist_like_digits()
        order = np.random.default_rng((seed, 6)).permutation(len(images.labels))
        test = order[number:][: settings.test_images]
        return Domains(
            source, images.pixels[order[:number]], Images(images.pixels[test], images.labels[test])
        )
    both = split(data, seed, number, settings.test_images).train.pixels
    source = split(data, seed, number // 2, settings.test_images)  # the first half of them
    shift = SHIFTS[SHIFT]
    test = source.test._replace(pixels=shift(source.test.pixels))
    return Domains(source, shift(both[number // 2 :]), test)


def objective(
    net: nn.Module,
    params: Any,
    on_devices: Any,
    batch: tuple[Images, jax.Array, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, Any]:
    """The losses of classes and of domains, of images of the source with labels and of the target,
    (devices, N, ...) each, with the weight of the reversed gradient."""
    source, target, weight = batch
    pixels = jnp.concatenate([source.pixels, target], axis=1)
    labels = jnp.asarray(source.labels)
    half = labels.shape[1]
    (logits, guess), new = forward(net, params, on_devices, pixels, weight=weight)
    classes = optax.softmax_cross_entropy_with_integer_labels(logits[:, :half], labels)
    truth = jnp.broadcast_to(jnp.arange(2 * half) >= half, guess.shape).astype(guess.dtype)
    return classes.mean() + optax.sigmoid_binary_cross_entropy(guess, truth).mean(), new


def measure(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Found:
    """Trains on both domains, and on the source alone, `IMAGES_PER_STEP` labelled images in a step.
    The test error is that on the target after adaptation; `source_only` is that without, and
    `source` that on the source after adaptation."""
    start = time.perf_counter()
    net: Any = AdaptationNet(plan.layers, plan.strides, data.num_classes)
    settings, half = plan.settings, images_together(plan) // 2
    each = [domains(plan.key.data, data, settings, seed) for seed in range(plan.seeds)]
    steps = len(each[0].source.train.labels) // IMAGES_PER_STEP
    leading = (plan.seeds, steps, IMAGES_PER_STEP // half, half)

    def batches(index: int, *, adapt: bool) -> tuple[Images, np.ndarray, np.ndarray]:
        sources = stack(epoch(one.source.train, seed, index) for seed, one in enumerate(each))
        others = [one.unlabelled if adapt else one.source.train.pixels for one in each]
        unlabelled = (Images(pixels, np.zeros(len(pixels))) for pixels in others)
        # Another seed orders and moves them, so that pairs are by chance.
        targets = stack(epoch(one, plan.seeds + s, index) for s, one in enumerate(unlabelled))
        images, pixels = jax.tree.map(
            lambda t: t[:, : steps * IMAGES_PER_STEP].reshape(*leading, *t.shape[2:]),
            (sources, targets.pixels),
        )
        done = (index + np.arange(steps, dtype=np.float32) / steps) / settings.epochs
        return images, pixels, np.tile(adapt * reversal(done), (plan.seeds, 1))

    optimizer, state = begin(net, plan, data.shape, steps=steps, images=2 * IMAGES_PER_STEP)
    train_epoch = epoch_of(partial(objective, net), optimizer)
    program, _ = compiled_epoch(train_epoch, state, batches(0, adapt=True))
    compile_seconds = time.perf_counter() - start

    def trained(*, adapt: bool) -> Ran:
        first = jax.tree.map(jnp.copy, state)  # what a step changes is donated to it
        these = partial(batches, adapt=adapt)
        return run_epochs(program, first, these, settings.epochs, on_epoch)

    adapted, alone = (trained(adapt=adapt) for adapt in (True, False))
    parts = ((one.test, one.source.test) for one in each)
    test = stack(jax.tree.map(lambda *t: np.concatenate(t), *both) for both in parts)
    evaluate, _ = compiled(jax.vmap(partial(correct, net)), state, test)
    number = len(each[0].test.labels)

    def errors(ran: Ran) -> tuple[list[float], list[float]]:
        wrong = 100 - 100 * np.asarray(evaluate(ran.carry, test))
        of_target, of_source = wrong[:, :number], wrong[:, number:]
        return of_target.mean(axis=1).tolist(), of_source.mean(axis=1).tolist()

    target, source = errors(adapted)
    return Found(
        target,
        {"source": source, "source_only": errors(alone)[0]},
        compile_seconds,
        adapted.train_seconds + alone.train_seconds,
    )


TASK = Task(
    "adaptation",
    "Unsupervised domain adaptation",
    "Domain-adversarial training: labelled images of the source and as many unlabelled ones of the "
    "target, half and half in each batch that shares statistics. The target is MNIST at 8x8 where "
    f"the source is digits, and else images of the same data set with normal noise ({SHIFT} in "
    "benchmarks/shifts.py). Measured is the error on the target, that of a network trained on the "
    "source alone, and that on the source after adaptation, with the running statistics, which "
    "are those of both domains. Domain-Adversarial Training of Neural Networks, 2016, "
    "arXiv:1505.07818; which objective the batch group norm paper used was not read.",
    measure,
    (
        Value("error", "target", claimed=True),
        Value("source_only", "target, source only"),
        Value("source", "source"),
    ),
    MappingProxyType(
        {8: Settings(1024, 2048, 20), 28: Settings(8192, 2048, 8), 32: Settings(8192, 2048, 8)}
    ),
    MappingProxyType(
        {8: Settings(1024, 1024, 10), 28: Settings(4096, 512, 4), 32: Settings(4096, 512, 4)}
    ),
    compile_seconds=25.0,
    work=3.5,
    limits="No labels of the target chose anything, and nothing else did.",
)
