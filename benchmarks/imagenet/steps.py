"""The computations of a training: network, optimizer, a step of training and one of evaluation."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.imagenet.placement import AXIS
from benchmarks.resnet import ResNet
from jaxnorm import Row, methods
from jaxnorm.linen import Norm

METHODS = {
    "batch": "batch_norm",
    "ghost_batch": "ghost_batch_norm:ghost_size={ghost}",
    "batch_group": "Row:Groups(batch=1, spatial=1, channel={groups})",
    "batch_and_group": "batch_and_group_norm:ghost_size={ghost},num_groups={groups}",
    "group": "group_norm:{groups}",
    "layer": "layer_norm",
    "instance": "instance_norm",
    "positional": "positional_norm",
    "rms": "rms_norm",
}
"""Rows of the table by name: configurations with the number of channel groups and of images in a
ghost batch left open."""

MOMENTUM = 0.9
"""Weight of the old value in the running statistics, and of the old direction in the optimizer."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels, from 0 to 255."""

Batch = Mapping[str, jax.Array]
"""image: (N, H, W, 3) uint8; label: (N,); weight: (N,), in evaluation."""


def row_named(name: str, groups: int, ghost: int) -> Row:
    """The row of a name of `METHODS` with the momentum of this training, or of a configuration as
    it says; ValueError where it is no row of the table."""
    if name in METHODS:
        row = methods.from_config(METHODS[name].format(groups=groups, ghost=ghost))
        return replace(row, momentum=MOMENTUM)  # type: ignore[return-value]  # as METHODS has rows
    row = methods.from_config(name)
    if not isinstance(row, Row):
        raise ValueError(f"--norm {name} is no row of the table of methods.")
    return row


class State(NamedTuple):
    """What a step of training changes."""

    step: jax.Array
    params: Any
    batch_stats: Any
    optimizer: optax.OptState


class Trainer(NamedTuple):
    """A network with its optimizer. `axis` is the name of pmap's axis, None under jit."""

    model: ResNet
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    label_smoothing: float
    axis: str | None

    def initialize(self, key: jax.Array, size: int) -> State:
        """The state before the first step, for images of `size` x `size` pixels."""
        variables = self.model.init(key, jnp.zeros((1, size, size, 3)), train=False)
        params = variables["params"]
        return State(
            jnp.int32(0), params, variables.get("batch_stats", {}), self.optimizer.init(params)
        )

    def train(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """The state after a step, and loss, accuracy in %, learning rate and the part of images
        that could not be read of it."""

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = self.model.apply(
                variables, _pixels(batch), train=True, mutable=["batch_stats"]
            )
            targets = optax.smooth_labels(
                jax.nn.one_hot(batch["label"], logits.shape[-1]), self.label_smoothing
            )
            return optax.softmax_cross_entropy(logits, targets).mean(), (
                logits,
                updated.get("batch_stats", {}),
            )

        (value, (logits, batch_stats)), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params
        )
        metrics = {
            "loss": value,
            "accuracy": 100 * (logits.argmax(-1) == batch["label"]).mean(),
            "unread": (batch["label"] < 0).mean(),
        }
        if self.axis:
            gradient, batch_stats, metrics = jax.lax.pmean(
                (gradient, batch_stats, metrics), self.axis
            )
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.params)
        metrics["learning_rate"] = jnp.asarray(self.schedule(state.step))
        return (
            State(
                state.step + 1, optax.apply_updates(state.params, updates), batch_stats, optimizer
            ),
            metrics,
        )

    def evaluate(self, state: State, batch: Batch) -> dict[str, jax.Array]:
        """Sums over the images of a batch: how many they are, their losses, their labels among
        the first 1 and 5, and how many could not be read."""
        logits: Any = self.model.apply(
            {"params": state.params, "batch_stats": state.batch_stats}, _pixels(batch), train=False
        )
        first = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == batch["label"][:, None]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        each = {
            "images": jnp.ones_like(losses),
            "loss": losses,
            "top1": first[:, 0],
            "top5": first.any(-1),
        }
        sums = {
            name: jnp.where(batch["weight"] > 0, value, 0).sum() for name, value in each.items()
        }
        sums["unread"] = (batch["label"] < 0).sum()
        return jax.lax.psum(sums, self.axis) if self.axis else sums


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree is infinite or NaN."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _pixels(batch: Batch) -> jax.Array:
    mean, std = (jnp.array(values).reshape(1, 1, 1, 3) for values in (MEAN, STD))
    return (batch["image"].astype(jnp.float32) - mean) / std


def network(
    method: Row,
    *,
    devices: int,
    devices_per_norm: int,
    mapped: bool,
    stages: tuple[int, ...],
    width: int,
    num_classes: int,
    dtype: str,
) -> ResNet:
    """A residual network normalized by `method`.

    Args:
        method: if it pools the whole batch, the part of it on `devices_per_norm` devices is pooled
            instead.
        devices: number of devices that a batch is spread over.
        devices_per_norm: a divisor of it.
        mapped: whether the network runs under pmap, and sees the images of a device, or under jit,
            and sees all.
        stages: as in `ResNet`; so are width and num_classes.
        width: channels of the stem.
        num_classes: size of the output.
        dtype: of the activations.
    """
    across = dict[str, Any]()
    groups: Any = method.groups
    if groups.batch == 1 and not mapped:
        method = replace(method, groups=replace(groups, batch=devices // devices_per_norm))
    elif groups.batch == 1 and devices_per_norm > 1:
        parts = tuple(
            tuple(range(i, i + devices_per_norm)) for i in range(0, devices, devices_per_norm)
        )
        across = {"axis_name": AXIS, "axis_index_groups": parts if len(parts) > 1 else None}
    return ResNet(
        partial(Norm, method, dtype=dtype, **across),
        partial(
            nn.Conv,
            dtype=dtype,
            kernel_init=nn.initializers.variance_scaling(2, "fan_out", "normal"),
        ),
        stages,
        width,
        num_classes,
    )


def learning_rate(kind: str, *, peak: float, steps: int, warmup_steps: int) -> optax.Schedule:
    """A linear rise to `peak`, then half a cosine to zero, or a tenth at 30, 60 and 90 % of the
    steps."""
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup_steps)
    else:
        after = optax.piecewise_constant_schedule(
            peak, {steps * part // 10 - warmup_steps: 0.1 for part in (3, 6, 9)}
        )
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0, peak, warmup_steps), after], [warmup_steps]
    )


def sgd(
    rate: optax.Schedule, *, weight_decay: float, decay_norm: str
) -> optax.GradientTransformation:
    """Nesterov's SGD with decay of kernels, and of scales and biases too where `decay_norm` is
    "zero"."""

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda param: decay_norm == "zero" or param.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.sgd(rate, momentum=MOMENTUM, nesterov=True),
    )
