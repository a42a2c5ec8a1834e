"""Trains the network of the benchmarks on corrupted labels, with weights of examples that enter the
loss, the statistics of the normalization, or both.

Without weights this is `benchmarks.training.fit`. The loss of a step of N images is

    (1 / N) sum_i v_i l_i,

as in the authors' code of MentorNet: it is not divided by the sum of the weights v. They have no
gradient. Where they enter statistics a first forward pass, whose statistics are not weighted, gives
the losses that the weights come from.
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.curricula import (
    BURN_IN,
    KNOWN,
    Mentor,
    Seen,
    corrupted,
    learn,
    moving_percentile,
    self_paced,
)
from benchmarks.datasets import Data, Images
from benchmarks.residual import ResidualNet
from benchmarks.splits import epoch, split
from benchmarks.training import RATE_PER_IMAGE, State, Trained, initialize, make_optimizer, stack

CURRICULA = ("none", "self_paced", "learned")

ENTERS = {"loss": (True, False), "norm": (False, True), "both": (True, True)}
"""Whether weights enter the loss, and whether they enter statistics."""


class Weighing(NamedTuple):
    """Where weights come from and what they enter, known before a training is compiled."""

    curriculum: str = "none"
    enters: str = "loss"
    num_classes: int = 10

    def weights(self, mentor: Any, seen: Seen) -> jax.Array:
        """Those of examples; 1 in the burn-in."""
        if self.curriculum == "none":
            return jnp.ones_like(seen.loss)
        learned = self.curriculum == "learned"
        after = Mentor(self.num_classes).weights(mentor, seen) if learned else self_paced(seen)
        return jax.lax.stop_gradient(jnp.where(seen.done < BURN_IN, 1.0, after))


class Curriculum(NamedTuple):
    """What a step changes or reads beside the network's state: the moving percentile of losses,
    which percentile that is, and the parameters of the mentor where there is one."""

    level: jax.Array
    percent: jax.Array
    mentor: Any = None


class Step(NamedTuple):
    """What happened in a step, (devices, images of a device) each."""

    seen: Seen
    weights: jax.Array
    right: jax.Array


class Noisy(NamedTuple):
    """A network trained once per seed; `steps` has leading axes of seeds and steps, and
    `identities` says which training image was where."""

    trained: Trained
    steps: Step
    identities: np.ndarray


def statistics_weights(weights: jax.Array, pools_batch: bool) -> jax.Array:
    """The weights (N,) as those of statistics, (N, 1, 1, 1).

    A set that no weight is left of has no statistics, so all of its elements count alike: the batch
    of a device if all weights are 0, and the single example where it is a set of its own.
    """
    empty = (weights if not pools_batch else weights.max(axis=0)) <= 0
    return jnp.where(empty, 1.0, weights)[:, None, None, None]


def losses(
    net: ResidualNet, params: Any, on_devices: Any, batch: Images, weights: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Cross-entropy of each image, (devices, N), and the new running statistics of each device,
    where images count with `weights`, (devices, N), in the statistics of the step."""
    pools_batch = net.layers[0].pools_batch

    def on_device(
        on_device: Any, images: Images, weights: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        options: dict[str, Any] = {}
        if weights is not None:
            options["mask"] = statistics_weights(weights, pools_batch)
        variables = {"params": params, **on_device}
        logits, updates = net.apply(
            variables, images.pixels, train=True, mutable=["batch_stats"], **options
        )
        labels = images.labels[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), updates

    return jax.vmap(on_device)(on_devices, batch, weights)


def fit(
    net: ResidualNet,
    seeds: Sequence[int],
    weighing: Weighing = Weighing(),  # noqa: B008 (it is a value)
    *,
    share: float,
    data: Data,
    num_train: int,
    devices: int,
    images_per_device: int,
    epochs: int,
    on_epoch: Callable[[int], None],
    num_held_out: int | None = None,
    mentors: Any = None,
) -> Noisy:
    """Trains `net` once per seed.

    Args:
        net: whose layers have neither schedule nor second forward pass.
        weighing: of examples.
        share: of training labels that are corrupted; validation and test keep theirs.
        mentors: parameters of learned curricula, the seeds in their leading axis.
        seeds, data, num_train, devices, images_per_device, epochs, on_epoch, num_held_out: as in
            `benchmarks.training.fit`.
    """
    steps = num_train // (devices * images_per_device)
    splits = [split(data, seed, num_train, num_held_out) for seed in seeds]
    trains = [
        _numbered(corrupted(one.train, share, data.num_classes, seed))
        for one, seed in zip(splits, seeds, strict=True)
    ]
    schedule = RATE_PER_IMAGE * devices * images_per_device, steps, epochs
    leading = (len(seeds), steps, devices, images_per_device)

    def batches(index: int) -> Images:
        images = stack(epoch(train, seed, index) for train, seed in zip(trains, seeds, strict=True))
        return jax.tree.map(lambda part: part.reshape(*leading, *part.shape[2:]), images)

    start = time.perf_counter()
    state = initialize(net, make_optimizer(*schedule), devices, data.shape, seeds)
    same = jnp.ones(len(seeds))
    mentors = jax.tree.map(jnp.copy, mentors)  # what a step changes is donated to it
    carry = state, Curriculum(0 * same, 100 * (1 - share) * same, mentors)
    leaves, tree = jax.tree.flatten((carry, batches(0)))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    network: Any = net  # hashable, which its type does not say
    train_epoch = _compiled(network, schedule, weighing, tree, shapes)
    begin = time.perf_counter()
    on_epoch(0)

    kept, identities = [], []
    for index in range(epochs):
        images = batches(index)
        carry, happened = jax.block_until_ready(train_epoch(carry, images))
        kept.append(jax.tree.map(np.asarray, happened))
        identities.append(images.labels[..., 2])
        on_epoch(index + 1)
    trained = Trained(net, carry[0], splits, begin - start, time.perf_counter() - begin)
    together = partial(np.concatenate, axis=1)
    return Noisy(trained, jax.tree.map(lambda *t: together(t), *kept), together(identities))


@cache
def _compiled(
    net: ResidualNet,
    schedule: tuple[float, int, int],
    weighing: Weighing,
    tree: Any,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
) -> Callable[..., Any]:
    """An epoch of all seeds for arguments of these shapes, which trainings that differ in their
    data share."""
    _, steps, epochs = schedule
    run = partial(_train_epoch, net, make_optimizer(*schedule), weighing, steps * epochs)
    return jax.jit(jax.vmap(run), donate_argnums=0).lower(*tree.unflatten(shapes)).compile()


def _numbered(train: Images) -> Images:
    """With the number of each image as the last of its labels."""
    numbers = np.arange(len(train.labels), dtype=train.labels.dtype)
    return train._replace(labels=np.concatenate([train.labels, numbers[:, None]], axis=-1))


def _train_epoch(
    net: ResidualNet,
    optimizer: optax.GradientTransformation,
    weighing: Weighing,
    steps: int,
    carry: tuple[State, Curriculum],
    batches: Images,
) -> tuple[tuple[State, Curriculum], Step]:
    enters_loss, enters_norm = ENTERS[weighing.enters]

    def step(carry: tuple[State, Curriculum], batch: Images) -> tuple[Any, Step]:
        state, curriculum = carry

        def weigh(values: jax.Array) -> tuple[jax.Array, Step, jax.Array]:
            values = jax.lax.stop_gradient(values)
            level = moving_percentile(curriculum.level, values, curriculum.percent)
            labels = jnp.asarray(batch.labels)
            label, true = labels[..., 0], labels[..., 1]
            done = jnp.full_like(values, state.step / steps)
            seen = Seen(values, values - level, label, done)
            weights = weighing.weights(curriculum.mentor, seen)
            return weights, Step(seen, weights, label == true), level

        def objective(params: Any) -> tuple[jax.Array, Any]:
            if enters_norm:
                values, _ = losses(net, params, state.on_devices, batch, None)
                weights, happened, level = weigh(values)
                values, new = losses(net, params, state.on_devices, batch, weights)
            else:
                values, new = losses(net, params, state.on_devices, batch, None)
                weights, happened, level = weigh(values)
            weighted = values * weights if enters_loss else values
            return weighted.mean(axis=-1).mean(), (new, happened, level)

        gradient, (new, happened, level) = jax.grad(objective, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        state = State(params, new, optimizer_state, state.step + 1)
        return (state, curriculum._replace(level=level)), happened

    return jax.lax.scan(step, carry, batches)


def learned(noisy: Noisy, seeds: Sequence[int], num_classes: int) -> Any:
    """The parameters of one mentor for each seed, learned from what a training without weights saw
    of the first `KNOWN` of its images, whose true labels are known, after the burn-in."""
    number = int(noisy.identities.max()) + 1
    mentor = Mentor(num_classes)
    found = []
    for index, seed in enumerate(seeds):
        one = jax.tree.map(lambda t, index=index: t[index], noisy.steps)
        known = (noisy.identities[index] < KNOWN * number) & (one.seen.done >= BURN_IN)
        seen = jax.tree.map(lambda t, known=known: t[known], one.seen)
        found.append((seed, seen, one.right[known]))
    fitted = jax.jit(partial(learn, mentor))
    # The burn-in may end inside of an epoch, where seeds saw unlike numbers of what is known: with
    # the fewest for all, one program learns all mentors.
    least = min(len(right) for _, _, right in found)
    parts = [fitted(seed, *jax.tree.map(lambda t: t[:least], rest)) for seed, *rest in found]
    return jax.tree.map(lambda *t: jnp.stack(t), *parts)


def mean_weights(noisy: Noisy) -> dict[str, list[float]]:
    """The mean weight in % of right and of wrong labels in the last tenth of the steps, for each
    seed that has such labels."""
    last = -max(1, noisy.steps.weights.shape[1] // 10)
    weights, right = noisy.steps.weights[:, last:], noisy.steps.right[:, last:]
    sides = {"right": right, "wrong": ~right}
    return {
        name: [float(100 * w[s].mean()) for w, s in zip(weights, side, strict=True) if s.any()]
        for name, side in sides.items()
    }
