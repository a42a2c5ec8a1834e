"""Architecture search: a cell whose edges mix operations, then the network that it chooses.

DARTS: Differentiable Architecture Search, 2018, arXiv:1806.09055. A cell is a graph of nodes where
each edge (i, j) mixes operations,

    x_j = sum_{i < j} sum_o softmax(alpha_ij)_o o(x_i),

and its output is that of all nodes but the first, side by side. The alphas are shared by the cells
of the network. Each step first moves the alphas along the gradient of the loss of held-out images,
with the present weights (first order), and then the weights along that of training images. The
derived network keeps, of the edges into a node, the two whose strongest operation, none left out,
is strongest, with this operation alone, and is trained anew on all images.

Smaller than there: one input of a cell, three nodes behind it, five operations, three cells at the
width and on the maps of the first stage. Norms inside of cells have no scale and bias, which would
scale what the alphas weigh; in DARTS the derived network has them.

One program trains both networks. Its step takes the gradient by alphas and by weights, and a turn
says which of the two moves; the derived network is that of alphas so far apart that their softmax
is 0 and 1, and it is always the turn of its weights. Networks that differ from seed to seed are
trained at once that way, and what has weight 0 is computed for nothing.
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

from benchmarks import residual
from benchmarks.cells import Settings
from benchmarks.datasets import Data, Images
from benchmarks.norms import Layer
from benchmarks.plan import Plan
from benchmarks.serving import percent
from benchmarks.splits import epoch, split
from benchmarks.tasks.fitting import begin, descend, forward, images_together
from benchmarks.tasks.record import Found, Task, Value
from benchmarks.training import (
    IMAGES_PER_STEP,
    Ran,
    State,
    compiled,
    compiled_epoch,
    correct,
    run_epochs,
    stack,
)
from jaxnorm.linen import Norm

OPERATIONS = ("none", "skip", "pool", "conv1x1", "conv3x3")

NODES = 3
"""Of a cell, behind its input."""

EDGES = [(source, node) for node in range(1, NODES + 1) for source in range(node)]
"""From which node to which, in the order of the alphas."""

CELLS = 3
"""One behind the other, with the same alphas."""

KEPT = 2
"""Edges into a node of the derived cell."""

ALPHA_OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(3e-3, b1=0.5))
"""That of the paper with ten times its rate: there are fifty times as many steps."""

MIX = len(EDGES), len(OPERATIONS)

APART = 1e4
"""Of alphas whose softmax is 0 and 1."""


class Normalized(nn.Module):
    """The normalization of a layer, without a learned scale and bias."""

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = Norm(self.layer.method, use_scale=False, use_bias=False, name="norm")
        return norm(x, use_running_average=not train)


class Mixed(nn.Module):
    """The weighted sum of all operations on x, each with stride 1 and as many channels as x."""

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array, weights: jax.Array, train: bool) -> jax.Array:
        normalized = partial(Normalized, self.layer)
        dense = partial(nn.Dense, x.shape[-1], use_bias=False)
        active = nn.relu(x)
        pooled = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
        one = dense(name="conv1x1")(active)
        nine = dense(name="conv3x3")(residual.patches(active, 1))
        found = (
            jnp.zeros_like(x),
            x,
            normalized(name="norm_pool")(pooled, train=train),
            normalized(name="norm1x1")(one, train=train),
            normalized(name="norm3x3")(nine, train=train),
        )
        return jnp.tensordot(weights, jnp.stack(found), axes=1)


Fan = nn.vmap(
    Mixed,
    in_axes=(None, 0, None),  # type: ignore[arg-type]
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
)
"""All edges out of a node, in a leading axis."""


class Cell(nn.Module):
    """A cell of mixed edges: (N, H, W, C) -> (N, H, W, NODES C)."""

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array, *, train: bool) -> jax.Array:
        into: list[list[jax.Array]] = [[] for _ in range(NODES + 1)]
        nodes = [x]
        for source in range(NODES):
            out = [e for e, edge in enumerate(EDGES) if edge[0] == source]
            found = Fan(self.layer, name=f"from_{source}")(nodes[source], mix[np.array(out)], train)
            for e, y in zip(out, found, strict=True):
                into[EDGES[e][1]].append(y)
            nodes.append(sum(into[source + 1][1:], into[source + 1][0]))
        return jnp.concatenate(nodes[1:], axis=-1)


class Behind(nn.Module):
    """A cell behind a 1x1 convolution that leads back to its width."""

    layer: Layer

    @nn.compact
    def __call__(self, x: jax.Array, mix: jax.Array, train: bool) -> tuple[jax.Array, None]:
        inner = residual.Unit(self.layer, x.shape[-1] // NODES, size=1, name="unit")
        inner = inner(x, train=train, done=jnp.float32(1))
        return Cell(self.layer, name="cell")(inner, mix, train=train), None


Chain = nn.scan(
    Behind,
    in_axes=(nn.broadcast, nn.broadcast),  # type: ignore[arg-type]
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    length=CELLS,
)
"""Cells one behind the other, as one program."""


class SearchNet(nn.Module):
    """Stem, a convolution with the stride of the first stage, cells; then a convolution for each
    other stage, mean over the last map, linear classifier.

    Attributes:
        layers: the normalization at each width.
        strides: the stride of each stage.
        num_classes: size of the output.
    """

    layers: tuple[Layer, ...]
    strides: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mix: jax.Array | None = None) -> jax.Array:
        """Logits of images, where the edges of all cells mix operations with weights `mix`,
        (edges, operations); None weighs all alike."""
        if mix is None:
            mix = jnp.full(MIX, 1 / len(OPERATIONS))
        now = {"train": train, "done": jnp.float32(1)}
        x = residual.Unit(self.layers[0], residual.WIDTHS[0], name="stem")(x, **now)
        stages = zip(self.layers, residual.WIDTHS, self.strides, strict=True)
        for i, (layer, features, stride) in enumerate(stages):
            x = residual.Unit(layer, features, stride)(x, **now)
            if i == 0:
                x, _ = Chain(layer, name="cells")(jnp.tile(x, NODES), mix, train)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class Alphas(NamedTuple):
    """The alphas, (edges, operations), and the state of their optimizer."""

    values: jax.Array
    optimizer: optax.OptState


def derive(alphas: np.ndarray) -> np.ndarray:
    """The alphas of the derived network: all weight is on the operation that is kept of an edge, or
    on none.

    Args:
        alphas: (edges, operations).
    """
    strength, best = alphas[:, 1:].max(axis=-1), 1 + alphas[:, 1:].argmax(axis=-1)
    strength = strength - np.logaddexp.reduce(alphas, axis=-1)  # log of the weight
    chosen = np.zeros(len(alphas), int)
    for node in range(1, NODES + 1):
        into = [e for e, (_, target) in enumerate(EDGES) if target == node]
        kept = sorted(into, key=lambda e: -strength[e])[:KEPT]
        chosen[kept] = best[kept]
    return APART * np.eye(len(OPERATIONS), dtype=np.float32)[chosen]


def train_epoch(
    net: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[tuple[State, Alphas], tuple[Images, jax.Array]], tuple[Any, None]]:
    """All steps of an epoch of one seed: images, and whether it is the turn of the alphas."""

    def loss(both: tuple[Any, jax.Array], on_devices: Any, images: Images) -> tuple[jax.Array, Any]:
        params, alphas = both
        mix = jax.nn.softmax(alphas)
        logits, new = forward(net, params, on_devices, jnp.asarray(images.pixels), mix=mix)
        labels = jnp.asarray(images.labels)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    def step(
        carry: tuple[State, Alphas], batch: tuple[Images, jax.Array]
    ) -> tuple[tuple[State, Alphas], None]:
        state, alphas = carry
        images, turn = batch
        both = state.params, alphas.values
        (by_params, by_alphas), new = jax.grad(loss, has_aux=True)(both, state.on_devices, images)
        updates, chosen = ALPHA_OPTIMIZER.update(by_alphas, alphas.optimizer, alphas.values)
        moved = Alphas(jnp.asarray(optax.apply_updates(alphas.values, updates)), chosen)
        held = descend(optimizer, state, by_params, new), alphas
        return jax.tree.map(partial(jnp.where, turn), (state, moved), held), None

    return lambda carry, batches: jax.lax.scan(step, carry, batches)


def measure(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Found:
    """Searches, and trains what was found. The test error is that of the derived network; `mixed`
    is that of the searched one, and names of operations are their share in % of the kept edges."""
    start = time.perf_counter()
    net: Any = SearchNet(plan.layers, plan.strides, data.num_classes)
    settings, seeds, size = plan.settings, range(plan.seeds), images_together(plan)
    splits = [split(data, seed, settings.train_images, settings.test_images) for seed in seeds]
    steps = settings.train_images // IMAGES_PER_STEP // 2 * 2
    leading = (plan.seeds, steps, IMAGES_PER_STEP // size, size)

    def batches(index: int, *, searches: bool) -> tuple[Images, np.ndarray]:
        """All training images, half of them for the turns of the alphas where it searches."""
        turns = np.arange(steps) % 2 == (0 if searches else 2)
        parts = _alternating if searches else epoch
        images = stack(
            parts(one.train, seed, index) for one, seed in zip(splits, seeds, strict=True)
        )
        images = jax.tree.map(
            lambda t: t[:, : steps * IMAGES_PER_STEP].reshape(*leading, *t.shape[2:]), images
        )
        return images, np.tile(turns, (plan.seeds, 1))

    optimizer, state = begin(net, plan, data.shape, steps=steps)
    values = 1e-3 * jax.vmap(lambda key: jax.random.normal(key, MIX))(state.key)
    first = batches(0, searches=True)
    carry = state, _alphas(values)
    program, _ = compiled_epoch(train_epoch(net, optimizer), carry, first)
    compile_seconds = time.perf_counter() - start

    def trained(alphas: jax.Array | np.ndarray, epochs: int, *, searches: bool) -> Ran:
        fresh = jax.tree.map(jnp.copy, state)  # what a step changes is donated to it
        these = partial(batches, searches=searches)
        return run_epochs(program, (fresh, _alphas(alphas)), these, epochs, on_epoch)

    # Weights move in every other step of the search: in twice the epochs as often as in the other.
    searched = trained(values, 2 * settings.epochs, searches=True)
    found = np.stack([derive(one) for one in np.asarray(searched.carry[1].values)])
    derived = trained(found, settings.epochs, searches=False)

    test = stack(one.test for one in splits)
    evaluate, _ = compiled(jax.vmap(partial(_hits, net)), carry, test)
    derived_errors, mixed_errors = (
        [100 - value for value in percent(evaluate(ran.carry, test))] for ran in (derived, searched)
    )
    chosen = found.argmax(axis=-1)
    shares = {
        name: [100 * float((one == i).sum() / (one > 0).sum()) for one in chosen]
        for i, name in enumerate(OPERATIONS)
        if i
    }
    return Found(
        derived_errors,
        {"mixed": mixed_errors, **shares},
        compile_seconds,
        searched.train_seconds + derived.train_seconds,
    )


def _alphas(values: Any) -> Alphas:
    """Those of all seeds, with what their optimizer starts from."""
    copy = jnp.array(values)
    return Alphas(copy, jax.vmap(ALPHA_OPTIMIZER.init)(copy))


def _alternating(train: Images, seed: int, index: int) -> Images:
    """An epoch whose steps are in turn of the one half of the images and of the other."""
    halves = [jax.tree.map(lambda t, h=h: t[h::2], train) for h in (0, 1)]
    number = len(halves[1].labels) // IMAGES_PER_STEP

    def cut(t: np.ndarray) -> np.ndarray:
        return t[: number * IMAGES_PER_STEP].reshape(number, 1, IMAGES_PER_STEP, *t.shape[1:])

    parts = [jax.tree.map(cut, epoch(half, seed, index)) for half in halves]
    images = jax.tree.map(lambda *t: np.concatenate(t, axis=1), *parts)
    return jax.tree.map(lambda t: t.reshape(-1, *t.shape[3:]), images)


def _hits(net: Any, carry: tuple[State, Alphas], images: Images) -> jax.Array:
    state, alphas = carry
    return correct(net, state, images, mix=jax.nn.softmax(alphas.values))


TASK = Task(
    "search",
    "Architecture search",
    f"A cell of {NODES} nodes whose {len(EDGES)} edges mix {', '.join(OPERATIONS[:-1])} and "
    f"{OPERATIONS[-1]} by a softmax, in three cells on the maps of the first stage. Alphas and "
    "weights take turns, each on half of the training images. Measured is the test error of the "
    "mixed network; that of the derived one, which keeps the strongest operation of up to "
    f"{KEPT} edges into each node and is trained anew on all training images; and which operations "
    "it keeps, in % of its edges. "
    "DARTS: Differentiable Architecture Search, 2018, arXiv:1806.09055 (first order).",
    measure,
    (
        Value("mixed", "mixed"),
        Value("error", "derived", claimed=True),
        *(Value(name, f"{name}, %") for name in OPERATIONS[1:]),
    ),
    MappingProxyType(
        {8: Settings(1024, None, 20), 28: Settings(4096, 2048, 8), 32: Settings(4096, 2048, 8)}
    ),
    MappingProxyType(
        {8: Settings(1024, None, 10), 28: Settings(2048, 512, 4), 32: Settings(2048, 512, 4)}
    ),
    compile_seconds=25.0,
    work=4.0,
    limits="The cell has a fraction of the operations and nodes of DARTS's; which search space the "
    "batch group norm paper used was not read.",
)
