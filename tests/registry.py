"""Every method, once: its value, and what a step of training needs beside x."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from flax import nnx as fnnx

from jaxnorm import linen, methods, nnx
from jaxnorm.methods import Method

SHAPE = (8, 8, 3, 8)
"""Of x, unless a test says otherwise: every axis that devices may share has a part for each."""
C = SHAPE[-1]


def labels(n):
    """Domains 0 and 2 of three, for n examples: the second is absent."""
    return (np.arange(n) * 7 % 3 % 2 * 2).astype("i4")


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A method: entry(x, state) is its `apply` with what it needs beside x.

    Attributes:
        name: that of its constructor, and after a comma what is special.
        method: the method.
        axis: of x, over which its sets can go on: several devices share that axis.
        options: of `apply`, which a step of training needs.
        has_labels: whether each example has a domain.
        each_channel: whether every channel has statistics of its own, and the state too.
    """

    name: str
    method: Method
    axis: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    has_labels: bool = False
    each_channel: bool = False

    def __str__(self):
        return self.name

    @property
    def constructor(self) -> str:
        return self.name.split(",")[0]

    @property
    def is_row(self) -> bool:
        """Whether it is a row of the table for x of these tests."""
        try:
            return bool(self.method.row(SHAPE))
        except (TypeError, ValueError):
            return False

    @property
    def has_ghosts(self) -> bool:
        """Whether the examples have to split: by 2 or by 4."""
        return self.method != self.method.any_batch()

    @property
    def needs_kernel(self) -> bool:
        """Whether it works on the layer in front of it: x is then that layer's input."""
        return "kernel" in self.method.options

    @property
    def learned(self) -> dict[str, np.ndarray]:
        """What the method learns, away from the values with which training begins."""
        rng = np.random.default_rng(5)
        return {
            name: (t + rng.uniform(-0.5, 0.5, t.shape)).astype("f4")
            for name, t in self.method.parameters(C).items()
        }

    def parameters(self, dtype="f4") -> dict[str, np.ndarray]:
        """All that a layer learns."""
        affine = {name: np.random.default_rng(i).uniform(0.5, 1.5, C) for i, name in AFFINE}
        return {name: t.astype(dtype) for name, t in (affine | self.learned).items()}

    def by_example(self, n: int) -> dict[str, np.ndarray]:
        """Options of `apply` with a number for each of n examples."""
        return {"domain": labels(n)} if self.has_labels else {}

    def init(self, x_shape, **axes) -> dict[str, jax.Array]:
        """State before the first step."""
        more = {"kernel_shape": KERNEL.shape} if self.needs_kernel else {}
        return self.method.init(x_shape, **more, **axes)

    def some_state(self, x_shape=SHAPE, dtype="f4") -> dict[str, np.ndarray]:
        """As after many steps of training, so that no number in it is special."""
        rng = np.random.default_rng(9)
        state = {
            name: np.asarray(t) + rng.uniform(0.1, 0.5, t.shape)
            for name, t in self.init(x_shape).items()
        }
        counts = {
            name: np.full(state[name].shape, n) for name, n in COUNTS.items() if name in state
        }
        return {name: t.astype(dtype) for name, t in (state | counts).items()}

    def in_linen(self, **fields) -> linen.Norm:
        """The layer of the method."""
        front = fnn.Dense(C, use_bias=False) if self.needs_kernel else None
        return linen.Norm(self.method, layer=front, **fields)

    def in_nnx(self, x_shape=SHAPE, **fields) -> nnx.Norm:
        """The layer of the method, with Flax's nnx."""
        front, rngs = None, fields.pop("rngs", fnnx.Rngs(0))
        if self.needs_kernel:
            front = fnnx.Linear(C, C, use_bias=False, rngs=rngs)
        if self.method.keeps_positions(C):
            fields["x_shape"] = x_shape
        return nnx.Norm(C, self.method, layer=front, **fields, rngs=rngs)

    def __call__(self, x, state, train=True, **options):
        options = self.options | self.learned | options
        x = jnp.asarray(x)
        if self.has_labels and "domain" not in options:
            options |= self.by_example(x.shape[options.get("batch_axis", 0)])
        if self.needs_kernel:
            x, front = self.method.in_front(x, jnp.asarray(KERNEL, x.dtype), dense(options))
            options |= front
        return self.method.apply(x, state, train=train, **options)


KERNEL = np.random.default_rng(9).normal(0, 0.5, (C, C)).astype("f4")
"""Of the layer in front, for a method that works on one."""
AFFINE = ((0, "scale"), (1, "bias"))
COUNTS = {"step": 4, "count": 1, "past_count": 12}
"""State that is a count, after some steps."""


def dense(options):
    """A dense layer along the axis of the channels."""
    axis = options.get("channel_axis", -1)

    def layer(inputs, kernel):
        return jnp.moveaxis(jnp.moveaxis(inputs, axis, -1) @ kernel, -1, axis)

    return layer


PER_EXAMPLE = {"axis": 1}  # sets go on over positions
TOKENS = {"axis": 3}  # sets go on over channels
EACH_CHANNEL = {"each_channel": True}
REGISTRY = (
    Entry("batch_norm", methods.batch_norm(momentum=0.7), **EACH_CHANNEL),
    Entry("batch_norm, debiased", methods.batch_norm(momentum=0.7, debias=True), **EACH_CHANNEL),
    Entry("ghost_batch_norm", methods.ghost_batch_norm(2, momentum=0.7), axis=1),
    Entry("batch_group_norm", methods.batch_group_norm(4, momentum=0.7)),
    Entry("batch_group_norm, pieces", methods.batch_group_norm(12, momentum=0.7)),
    Entry(
        "batch_and_group_norm",
        methods.batch_and_group_norm(2, 4, momentum=0.7, example_weight=0.25),
        axis=1,
    ),
    Entry(
        "batch_and_group_norm, ghosts by size",
        methods.batch_and_group_norm(ghost_size=4, group_size=4, momentum=0.7),
        axis=1,
    ),
    Entry(
        "batch_and_group_norm, one ghost",
        methods.batch_and_group_norm(1, 4, momentum=0.7, example_weight=0),
    ),
    Entry("instance_norm", methods.instance_norm(), **PER_EXAMPLE),
    Entry("group_norm", methods.group_norm(4), **PER_EXAMPLE),
    Entry("layer_norm", methods.layer_norm(), **PER_EXAMPLE),
    Entry("token_layer_norm", methods.token_layer_norm(), **TOKENS),
    Entry("positional_norm", methods.positional_norm(epsilon=1e-3), **TOKENS),
    Entry("rms_norm", methods.rms_norm(), **TOKENS),
    Entry("instance_rms_norm", methods.instance_rms_norm(), **PER_EXAMPLE),
    Entry("batch_renorm", methods.batch_renorm(rmax=1.1, dmax=0.2, momentum=0.7), **EACH_CHANNEL),
    Entry(
        "momentum_batch_norm",
        methods.momentum_batch_norm(momentum=0.7),
        options={"train_momentum": 0.4},
        **EACH_CHANNEL,
    ),
    Entry("memorized_batch_norm", methods.memorized_batch_norm((0.2, 0.3, 0.5)), **EACH_CHANNEL),
    Entry("cross_iteration_norm", methods.cross_iteration_norm(window=2, rho=0.5, momentum=0.7)),
    Entry(
        "moving_average_norm",
        methods.moving_average_norm(window=2, average_from=1, correct_from=1, momentum=0.7),
        **EACH_CHANNEL,
    ),
    Entry("switchable_norm", methods.switchable_norm(momentum=0.7), **EACH_CHANNEL),
    Entry("switchable_norm, examples apart", methods.switchable_norm(use_batch=False)),
    Entry("group_norm_plus", methods.group_norm_plus(4, momentum=0.7)),
    Entry(
        "group_norm_plus, positions pooled",
        methods.group_norm_plus(4, per_position=False, momentum=0.7),
    ),
    Entry(
        "domain_batch_norm",
        methods.domain_batch_norm(3, momentum=0.7),
        has_labels=True,
        **EACH_CHANNEL,
    ),
    Entry(
        "domain_batch_norm, one at a time",
        methods.domain_batch_norm(3, momentum=0.7),
        options={"domain": 1},
        **EACH_CHANNEL,
    ),
    Entry(
        "filter_response_norm",
        methods.filter_response_norm(use_slope=True, use_learned_epsilon=True),
        **PER_EXAMPLE,
    ),
    Entry("evonorm_b0", methods.evonorm_b0(momentum=0.7), **EACH_CHANNEL),
    Entry("evonorm_s0", methods.evonorm_s0(4), **PER_EXAMPLE),
    Entry(
        "proxy_norm",
        methods.proxy_norm(methods.group_norm(4)),
        options={"activation": jax.nn.silu},
        **PER_EXAMPLE,
    ),
)
NAMES = tuple(dict.fromkeys(entry.constructor for entry in REGISTRY))
TURNS = itertools.count()
STATEFUL = tuple(entry for entry in REGISTRY if entry.init(SHAPE))


def by_turns(entries=REGISTRY):
    """Every fifth entry, from another one in each test; the others in the slow run."""
    turn = next(TURNS)
    return pytest.mark.parametrize(
        "entry",
        [
            pytest.param(
                entry, id=str(entry), marks=[] if (i + turn) % 5 == 0 else pytest.mark.slow
            )
            for i, entry in enumerate(entries)
        ],
    )
