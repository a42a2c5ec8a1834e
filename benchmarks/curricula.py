"""How much each example counts in a training with corrupted labels: curricula, from losses to
weights from 0 to 1.

The source is MentorNet: Learning Data-Driven Curriculum for Very Deep Neural Networks on Corrupted
Labels, 2018, arXiv:1712.05055. The paper itself was not read: definitions are those of the authors'
code, google/mentornet, and where this file differs it says so. An example is seen through

    loss     its cross-entropy l with the label it has,
    excess   l - m, where m <- 0.9 m + 0.1 percentile(losses of the step), from 0 on,
    label    the class it is said to have,
    done     the finished part of the training.

In the code the label is always 0 and the decay is 0.9 or 0.5; the percentile is an option there,
and here the share of labels that are right. No one knows that share of new data: it favors
curricula. There the weights of random examples may also be dropped to 0, which is left out here.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.datasets import Images

DECAY = 0.9
"""Of the moving percentile, per step."""

BURN_IN = 0.2
"""The first part of a training, in which every weight is 1. It is 0.18 in a default of the authors'
code, and 0 in another."""

KNOWN = 0.1
"""Share of the training images of which a learned curriculum knows whether their label is right."""

HIDDEN = 20
"""Units of the learned curriculum."""

FIT_STEPS, FIT_RATE = 300, 0.02
"""How a curriculum is learned: steps of Adam on all that is known, and their rate."""


class Seen(NamedTuple):
    """What a curriculum sees of examples, arrays of one shape."""

    loss: jax.Array
    excess: jax.Array
    label: jax.Array
    done: jax.Array


def corrupted(train: Images, share: float, num_classes: int, seed: int) -> Images:
    """The images with labels (N, 2): that to train with, and the true one.

    Of round(share N) images, drawn from `seed`, the first is another class than the true one, each
    with the same probability. With a larger share the images drawn with a smaller one are among
    them, and have the same wrong labels.
    """
    rng = np.random.default_rng((seed, 3))
    number = len(train.labels)
    chosen = rng.permutation(number)[: round(share * number)]
    moved = rng.integers(1, num_classes, number)[chosen]
    labels = train.labels.copy()
    labels[chosen] = (labels[chosen] + moved) % num_classes
    return Images(train.pixels, np.stack([labels, train.labels], axis=-1))


def moving_percentile(old: jax.Array, losses: jax.Array, percent: jax.Array) -> jax.Array:
    """The moving percentile m after a step with these losses."""
    return DECAY * old + (1 - DECAY) * jnp.percentile(losses, percent)


def self_paced(seen: Seen) -> jax.Array:
    """1 where the loss is at most the moving percentile, else 0.

    This is self-paced learning, whose threshold moves as in the predefined curriculum of MentorNet.
    The authors' network approximates such a rule, and this is the rule.
    """
    return (seen.excess <= 0).astype(seen.loss.dtype)


class Mentor(nn.Module):
    """A learned curriculum: sigmoid(w tanh(W [loss, excess, one-hot label, done])).

    That of the paper reads loss and excess by an LSTM, of one step in the authors' code, and embeds
    the percentage of done at random; after burn-in the code keeps it where it is.
    """

    num_classes: int

    @nn.compact
    def __call__(self, seen: Seen) -> jax.Array:
        """Logits of the weights."""
        parts = [jnp.stack([seen.loss, seen.excess, seen.done], axis=-1)]
        parts.append(jax.nn.one_hot(seen.label, self.num_classes))
        hidden = nn.tanh(nn.Dense(HIDDEN)(jnp.concatenate(parts, axis=-1)))
        return nn.Dense(1)(hidden)[..., 0]

    def weights(self, params: object, seen: Seen) -> jax.Array:
        """From 0 to 1."""
        return jax.nn.sigmoid(self.apply({"params": params}, seen))  # type: ignore[arg-type]


def learn(mentor: Mentor, seed: int, seen: Seen, right: jax.Array) -> object:
    """Parameters of a mentor that tells right labels from wrong ones, by logistic regression on
    what was seen of them, all (N,), in a training without weights."""
    params = mentor.init(jax.random.key(seed), seen)["params"]
    optimizer = optax.adam(FIT_RATE)

    def loss(params: object) -> jax.Array:
        logits = mentor.apply({"params": params}, seen)  # type: ignore[arg-type]
        return optax.sigmoid_binary_cross_entropy(logits, right.astype(jnp.float32)).mean()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, FIT_STEPS)
    return params
