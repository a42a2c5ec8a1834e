"""The normalizations the benchmarks compare: each row is a name and the layer it stands for."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxnorm import Method, linen, methods
from jaxnorm.methods import batch_group_count
from jaxnorm.schedules import (
    batch_renorm_bounds,
    cross_iteration_window,
    inference_momentum,
    train_momentum_schedule,
)

NUM_GROUPS = 4
"""Groups of group normalization, at every channel count."""

MOMENTUM = 0.9
"""Weight of the old value in the running statistics, per step."""

IDEAL_BATCH = 32
"""Examples that the methods which look at several batches reach for."""

Schedule = Callable[[jax.Array], Mapping[str, Any]]


class Layer(NamedTuple):
    """A layer after a convolution, equal to another where it computes the same.

    Attributes:
        method: of the layer. One that works on the layer in front calls it.
        pools_batch: whether examples share statistics in training.
        dense: the linear layer in front.
        activates: whether it is the activation as well; where none follows, `NO_ACTIVATION` takes
            its place.
        activation: what the method takes as its activation.
        schedule: options of the call by the finished part of the training.
        double_forward: whether statistics come from a second forward pass, with the new parameters.
        sets: what shares statistics, of a method that is no row of the table; batch norm's sets by
            default.
    """

    method: Method
    pools_batch: bool = True
    dense: type[nn.Module] = nn.Dense
    activates: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    schedule: Schedule | None = None
    double_forward: bool = False
    sets: Method | None = None

    def elements(self, x_shape: tuple[int, ...]) -> int:
        """How many elements of x share a statistic in training."""
        return math.prod(x_shape) // math.prod(self._rows().shape(x_shape))

    def _rows(self) -> Any:
        for method in (self.sets, self.method):
            if isinstance(method, methods.Row | methods.batch_group_norm):
                return method
        return _BATCH_NORM.method

    def __str__(self) -> str:
        """What tells it from others in files."""
        in_front = "" if self.dense is nn.Dense else f"{self.dense.__name__}, "
        return in_front + str(self.method)


class Row(NamedTuple):
    """A normalization under comparison.

    Attributes:
        label: what tables and figures call it.
        at: (batch_size, num_channels) -> the layer, where batch_size examples are normalized
            together.
    """

    label: str
    at: Callable[[int, int], Layer]


NO_ACTIVATION = Layer(methods.group_norm(NUM_GROUPS), pools_batch=False)
"""What normalizes where a layer that is an activation as well has no place: in front of a sum."""

_BATCH_NORM = Layer(methods.batch_norm(momentum=MOMENTUM))


def _batch_group_norm(batch_size: int, num_channels: int) -> Layer:
    num_groups = batch_group_count(batch_size, num_channels)
    if num_groups == num_channels:
        return _BATCH_NORM
    return Layer(methods.batch_group_norm(num_groups, momentum=MOMENTUM))


def _renorm_bounds(done: jax.Array) -> Mapping[str, Any]:
    # the paper's schedule, with this training as its 40,000 steps
    rmax, dmax = batch_renorm_bounds(40_000 * done)
    return {"rmax": rmax, "dmax": dmax}


class _TrainMomentum(NamedTuple):
    """The paper's schedule, with this training as its 100 epochs."""

    batch_size: int

    def __call__(self, done: jax.Array) -> Mapping[str, Any]:
        return {
            "train_momentum": train_momentum_schedule(
                1 + 99 * done, epochs=100, batch_size=self.batch_size
            )
        }


def _momentum_batch_norm(batch_size: int, num_channels: int) -> Layer:
    method = methods.momentum_batch_norm(momentum=inference_momentum(batch_size))
    return Layer(method, schedule=_TrainMomentum(batch_size))


def _burn_in(done: jax.Array) -> Mapping[str, Any]:
    return {"window": cross_iteration_window(100 * done, burn_in=25)}


def _moving_average(batch_size: int, num_channels: int) -> Layer:
    window = max(1, IDEAL_BATCH // batch_size)
    return Layer(methods.moving_average_norm(window, average_from=100, correct_from=200))


def _ghost_batch(batch_size: int, num_channels: int) -> Layer:
    size = max(1, batch_size // 2)
    return Layer(methods.ghost_batch_norm(ghost_size=size, momentum=MOMENTUM))


def _batch_and_group(batch_size: int, num_channels: int) -> Layer:
    size = max(1, batch_size // 2)
    row = methods.batch_and_group_norm(ghost_size=size, num_groups=NUM_GROUPS, momentum=MOMENTUM)
    return Layer(row)


def _always(label: str, method: Method, **rest: Any) -> Row:
    return Row(label, lambda batch_size, num_channels: Layer(method, **rest))


def _alone(label: str, method: Method, **rest: Any) -> Row:
    """A method that does not pool the batch."""
    return _always(label, method, pools_batch=False, **rest)


METHODS: Mapping[str, Row] = MappingProxyType(
    {
        "batch": _always("BatchNorm", _BATCH_NORM.method),
        "batch_group": Row("BatchGroupNorm", _batch_group_norm),
        "group": _alone(f"GroupNorm({NUM_GROUPS})", methods.group_norm(NUM_GROUPS)),
        "layer": _alone("LayerNorm", methods.layer_norm()),
        "positional": _alone("PositionalNorm", methods.positional_norm()),
        "rms": _alone("RMSNorm", methods.rms_norm()),
        "instance": _alone("InstanceNorm", methods.instance_norm()),
        "ghost_batch": Row("GhostBatchNorm", _ghost_batch),
        "batch_and_group": Row("BatchAndGroupNorm", _batch_and_group),
        "batch_renorm": _always(
            "BatchRenorm", methods.batch_renorm(momentum=MOMENTUM), schedule=_renorm_bounds
        ),
        "momentum": Row("MomentumBatchNorm", _momentum_batch_norm),
        "memorized": _always(
            "MemorizedBatchNorm", methods.memorized_batch_norm((1, 1, 1, 1)), double_forward=True
        ),
        "cross_iteration": _always(
            "CrossIterationNorm", methods.cross_iteration_norm(window=3), schedule=_burn_in
        ),
        "moving_average": Row("MovingAverageNorm", _moving_average),
        "switchable": _always("SwitchableNorm", methods.switchable_norm(momentum=MOMENTUM)),
        "group_plus": _always(
            "GroupNormPlus", methods.group_norm_plus(NUM_GROUPS, momentum=MOMENTUM)
        ),
        "frn": _alone(
            "FilterResponseNorm",
            methods.filter_response_norm(use_learned_epsilon=True),
            activates=True,
            sets=methods.instance_norm(),
        ),
        "evonorm_b0": _always("EvoNormB0", methods.evonorm_b0(momentum=MOMENTUM), activates=True),
        "evonorm_s0": _alone(
            "EvoNormS0",
            methods.evonorm_s0(NUM_GROUPS),
            activates=True,
            sets=methods.group_norm(NUM_GROUPS),
        ),
        "proxy": _alone(
            "ProxyNorm",
            methods.proxy_norm(methods.group_norm(NUM_GROUPS)),
            activates=True,
            activation=nn.relu,
            sets=methods.group_norm(NUM_GROUPS),
        ),
        "group_ws": _alone(
            f"GroupNorm({NUM_GROUPS}) + WS", methods.group_norm(NUM_GROUPS), dense=linen.WSDense
        ),
    }
)


def named(name: str) -> Row:
    """The row of a key of `METHODS`, or of any method by its configuration, as it says."""
    if name in METHODS:
        return METHODS[name]
    method = methods.from_config(name)
    if isinstance(method, methods.domain_batch_norm):
        raise ValueError("the network cannot tell it the domain of each example")
    activation = nn.relu if isinstance(method, methods.proxy_norm) else None

    def at(batch_size: int, num_channels: int) -> Layer:
        sets = method.sets((batch_size, 1, 1, num_channels))
        pools = not sets or any(s.sent != 0 for s in sets)
        return Layer(method, pools, activates=method.activates, activation=activation)

    return Row(name, at)


TABLE = ("batch", "batch_group", "group", "layer", "positional", "rms", "instance")
"""Methods that differ in their sets alone."""
