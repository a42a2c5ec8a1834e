"""Few-shot classification: classes that were not trained on, from a few images of each.

Prototypical Networks for Few-shot Learning, 2017, arXiv:1703.05175: an episode has N classes with K
support images each; the prototype of a class is the mean of what the network makes of them,

    c_k = (1 / K) sum_i f(x_i),    p(y = k | x) = softmax_k(-|f(x) - c_k|^2),

and queries go to the nearest. Each step of the training is such an episode, of one half of the
classes; test episodes are of the other half.

What shares statistics in an episode? In training, its images are spread over devices in such an
order that each has several classes, and as many images of each as of another. At test time there
are two answers, and both are measured: the running statistics of the training, where a query is
classified alone; and the statistics of the episode, support and queries together, which is
transductive: a query is then classified with the help of the others, and of an equal number of them
from each class.
"""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cells import Settings
from benchmarks.datasets import Data, Images
from benchmarks.plan import Plan
from benchmarks.residual import ResidualNet
from benchmarks.splits import epoch, split
from benchmarks.tasks.fitting import fit, forward, images_together
from benchmarks.tasks.record import Found, Task, Value
from benchmarks.training import IMAGES_PER_STEP, State, compiled

WAYS = 4
SUPPORT = QUERIES = IMAGES_PER_STEP // WAYS // 2
"""Classes of an episode, and images of each in training: together those of a step."""

SHOTS = (1, SUPPORT)
"""Support images of each class at test time."""

TEST_EPISODES = 200

KINDS = ("running", "episode")
"""Statistics at test time."""


def classes(num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Those to train on and those to test on: two halves, drawn from `seed`."""
    order = np.random.default_rng((seed, 3)).permutation(num_classes)
    return order[: num_classes // 2], order[num_classes // 2 :]


def of_classes(images: Images, wanted: np.ndarray) -> Images:
    """The images of these classes."""
    chosen = np.isin(images.labels, wanted)
    return Images(images.pixels[chosen], images.labels[chosen])


def episodes(
    labels: np.ndarray, ways: int, images: int, number: int, rng: np.random.Generator
) -> np.ndarray:
    """Which images episodes are made of: (number, images, ways), where a column is of one class.

    Args:
        labels: of the images to draw from.
        ways: classes of an episode.
        images: of each class in an episode, none of them twice.
        number: of episodes.
        rng: draws.

    Raises:
        ValueError: fewer classes than `ways`, or fewer images of a class than `images`.
    """
    found, counts = np.unique(labels, return_counts=True)
    if len(found) < ways or counts.min(initial=images) < images:
        raise ValueError(
            f"Got {len(found)} classes with {counts.min(initial=0)} images or more; expected at "
            f"least {ways} with {images} each. Use more images, or fewer in an episode."
        )
    members = [np.flatnonzero(labels == label) for label in found]

    def one() -> np.ndarray:
        chosen = rng.choice(len(found), ways, replace=False)
        return np.stack([rng.choice(members[k], images, replace=False) for k in chosen], axis=1)

    return np.stack([one() for _ in range(number)])


def prototype_logits(support: jax.Array, queries: jax.Array) -> jax.Array:
    """Minus the squared distance of queries (Q, D) to the mean of each class of the support
    (K, N, D): (Q, N).

    >>> prototype_logits(jnp.array([[[0.0], [4.0]], [[2.0], [4.0]]]), jnp.array([[1.0]])).tolist()
    [[-0.0, -9.0]]
    """
    prototypes = support.mean(axis=0)
    return -((queries[:, None] - prototypes[None]) ** 2).sum(axis=-1)


def objective(
    net: nn.Module, params: Any, on_devices: Any, pixels: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss of the queries of an episode, whose images stand on devices in the order of the
    rows of `episodes`."""
    features, new = forward(net, params, on_devices, pixels)
    features = features.reshape(SUPPORT + QUERIES, WAYS, -1)
    support, queries = features[:SUPPORT], features[SUPPORT:]
    logits = prototype_logits(support, queries.reshape(QUERIES * WAYS, -1))
    labels = jnp.tile(jnp.arange(WAYS), QUERIES)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new


def errors(net: Any, state: State, pixels: jax.Array) -> dict[str, jax.Array]:
    """The error of the queries in all episodes in %, by the statistics and the number of shots.

    Args:
        net: returns features.
        state: of a seed.
        pixels: (episodes, images, ways, H, W, C); the first of the images support, the last ones
            ask.
    """
    on_devices = jax.tree.map(lambda s: s.mean(axis=0), state.on_devices)
    variables = {"params": state.params, **on_devices}

    def features(pixels: jax.Array, **how: Any) -> Any:
        return net.apply(variables, pixels.reshape(-1, *pixels.shape[2:]), **how)

    def wrong(features: jax.Array, shots: int) -> jax.Array:
        features = features.reshape(-1, WAYS, features.shape[-1])
        queries = features[-QUERIES:].reshape(QUERIES * WAYS, -1)
        logits = prototype_logits(features[:shots], queries)
        return 100 * (logits.argmax(axis=-1) != jnp.tile(jnp.arange(WAYS), QUERIES)).mean()

    def one(pixels: jax.Array) -> dict[str, jax.Array]:
        alone = features(pixels, train=False)
        found = {name("running", shots): wrong(alone, shots) for shots in SHOTS}
        for shots in SHOTS:
            used = jnp.concatenate([pixels[:shots], pixels[-QUERIES:]])
            together, _ = features(used, train=True, mutable=["batch_stats"])
            found[name("episode", shots)] = wrong(together, shots)
        return found

    return jax.tree.map(jnp.mean, jax.lax.map(one, pixels))


def name(kind: str, shots: int) -> str:
    """Of an error in cells."""
    return f"{kind} {shots}"


def measure(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Found:
    """Trains on episodes of one half of the classes; errors in episodes of the other half, by the
    statistics at test time and the number of shots. The test error is that with the running
    statistics and the most shots."""
    settings, seeds, size = plan.settings, range(plan.seeds), images_together(plan)
    net: Any = ResidualNet(plan.layers, plan.strides, None)
    splits = [split(data, seed, settings.train_images, settings.test_images) for seed in seeds]
    steps = settings.train_images // IMAGES_PER_STEP
    halves = [classes(data.num_classes, seed) for seed in seeds]

    def batches(index: int) -> np.ndarray:
        return np.stack([drawn(seed, index) for seed in seeds])

    def drawn(seed: int, index: int) -> np.ndarray:
        images = epoch(of_classes(splits[seed].train, halves[seed][0]), seed, index)
        rng = np.random.default_rng((seed, 4, index))
        which = episodes(images.labels, WAYS, SUPPORT + QUERIES, steps, rng)
        return images.pixels[which].reshape(steps, -1, size, *data.shape)

    trained = fit(net, plan, splits, partial(objective, net), batches, on_epoch)

    def test(seed: int) -> np.ndarray:
        images = of_classes(splits[seed].test, halves[seed][1])
        rng = np.random.default_rng((seed, 5))
        return images.pixels[
            episodes(images.labels, WAYS, max(SHOTS) + QUERIES, TEST_EPISODES, rng)
        ]

    pixels = np.stack([test(seed) for seed in seeds])
    evaluate, _ = compiled(jax.vmap(partial(errors, net)), trained.state, pixels)
    found = {
        name: np.asarray(each).tolist() for name, each in evaluate(trained.state, pixels).items()
    }
    usual = found[name("running", max(SHOTS))]
    return Found(usual, found, trained.compile_seconds, trained.train_seconds)


TASK = Task(
    "few_shot",
    "Few-shot learning",
    f"Prototypical networks: {WAYS}-way episodes of one half of the classes, with {SUPPORT} "
    f"support images and {QUERIES} queries of each class in training; measured are "
    f"{TEST_EPISODES} episodes for each seed of the other half, which were never trained on, with "
    f"{SHOTS[0]} and {SHOTS[1]} support images, with the running statistics (a query is classified "
    "alone) and with those of all images of the episode (transductive). Prototypical Networks for "
    "Few-shot Learning, 2017, arXiv:1703.05175; which learner the batch group norm paper used was "
    "not read.",
    measure,
    tuple(
        Value(name(kind, shots), f"{shots}-shot, {kind} statistics", claimed=shots == max(SHOTS))
        for kind in KINDS
        for shots in SHOTS
    ),
    MappingProxyType(
        {8: Settings(1024, None, 20), 28: Settings(4096, 2048, 8), 32: Settings(4096, 2048, 8)}
    ),
    MappingProxyType(
        {8: Settings(1024, None, 10), 28: Settings(2048, 512, 4), 32: Settings(2048, 512, 4)}
    ),
    compile_seconds=20.0,
    work=1.5,
    limits="Ten classes leave five to train on: few, beside the 64 of the usual data sets.",
)
