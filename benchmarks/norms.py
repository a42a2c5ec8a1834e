"""The normalizations the benchmarks compare: each row is a name and the layer it stands for."""

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
        module: class of the layer, in jaxnorm.linen.
        options: its fields.
        pools_batch: whether examples share statistics in training.
        dense: the linear layer in front.
        takes_dense: whether the normalization calls that layer, because it reads the kernel too.
        activates: whether it is the activation as well; where none follows, `NO_ACTIVATION` takes
            its place.
        schedule: what the call takes, by the finished part of the training.
        double_forward: whether statistics come from a second forward pass, with the new parameters.
    """

    module: type[nn.Module]
    options: tuple[tuple[str, Any], ...] = ()
    pools_batch: bool = True
    dense: type[nn.Module] = nn.Dense
    takes_dense: bool = False
    activates: bool = False
    schedule: Schedule | None = None
    double_forward: bool = False

    def __str__(self) -> str:
        """What tells it from others in files."""
        row = dict(self.options).get("method")
        if self.module is linen.Norm and self.dense is nn.Dense:
            return str(row)
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.dense.__name__}, {self.module.__name__}({options})"


class Row(NamedTuple):
    """A normalization under comparison.

    Attributes:
        label: what tables and figures call it.
        at: (batch_size, num_channels) -> the layer, where batch_size examples are normalized
            together.
    """

    label: str
    at: Callable[[int, int], Layer]


def of_table(method: Method, dense: type[nn.Module] = nn.Dense) -> Layer:
    """A row of the table of methods."""
    return Layer(
        linen.Norm, (("method", method), ("momentum", MOMENTUM)), method.pools_batch, dense
    )


NO_ACTIVATION = of_table(methods.group_norm(NUM_GROUPS))
"""What normalizes where a layer that is an activation as well has no place: in front of a sum."""


def _batch_group_norm(batch_size: int, num_channels: int) -> Layer:
    num_groups = batch_group_count(batch_size, num_channels)
    return of_table(
        methods.batch_norm() if num_groups == num_channels else methods.batch_group_norm(num_groups)
    )


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
    options = (("momentum", inference_momentum(batch_size)),)
    return Layer(linen.MomentumBatchNorm, options, schedule=_TrainMomentum(batch_size))


def _burn_in(done: jax.Array) -> Mapping[str, Any]:
    return {"window": cross_iteration_window(100 * done, burn_in=25)}


def _warm_up(done: jax.Array) -> Mapping[str, Any]:
    return {"average_from": 100, "correct_from": 200}


def _moving_average(batch_size: int, num_channels: int) -> Layer:
    window = max(1, IDEAL_BATCH // batch_size)
    return Layer(
        linen.MovingAverageNorm, (("window", window),), takes_dense=True, schedule=_warm_up
    )


def _ghost_batch(batch_size: int, num_channels: int) -> Layer:
    return Layer(linen.GhostBatchNorm, (("ghost_size", max(1, batch_size // 2)), *_KEPT))


def _batch_and_group(batch_size: int, num_channels: int) -> Layer:
    return Layer(
        linen.BatchAndGroupNorm, (("ghost_size", max(1, batch_size // 2)), *_GROUPS, *_KEPT)
    )


def _always(layer: Layer) -> Callable[[int, int], Layer]:
    return lambda batch_size, num_channels: layer


def _row(label: str, method: Method) -> Row:
    return Row(label, _always(of_table(method)))


_GROUPS = (("num_groups", NUM_GROUPS),)
_KEPT = (("momentum", MOMENTUM),)

METHODS: Mapping[str, Row] = MappingProxyType(
    {
        "batch": _row("BatchNorm", methods.batch_norm()),
        "batch_group": Row("BatchGroupNorm", _batch_group_norm),
        "group": _row(f"GroupNorm({NUM_GROUPS})", methods.group_norm(NUM_GROUPS)),
        "layer": _row("LayerNorm", methods.layer_norm()),
        "positional": _row("PositionalNorm", methods.positional_norm()),
        "rms": _row("RMSNorm", methods.rms_norm()),
        "instance": _row("InstanceNorm", methods.instance_norm()),
        "ghost_batch": Row("GhostBatchNorm", _ghost_batch),
        "batch_and_group": Row("BatchAndGroupNorm", _batch_and_group),
        "batch_renorm": Row(
            "BatchRenorm", _always(Layer(linen.BatchRenorm, _KEPT, schedule=_renorm_bounds))
        ),
        "momentum": Row("MomentumBatchNorm", _momentum_batch_norm),
        "memorized": Row(
            "MemorizedBatchNorm",
            _always(
                Layer(
                    linen.MemorizedBatchNorm,
                    (("memory_weights", (1, 1, 1, 1)),),
                    double_forward=True,
                )
            ),
        ),
        "cross_iteration": Row(
            "CrossIterationNorm",
            _always(
                Layer(
                    linen.CrossIterationNorm, (("window", 3),), takes_dense=True, schedule=_burn_in
                )
            ),
        ),
        "moving_average": Row("MovingAverageNorm", _moving_average),
        "switchable": Row("SwitchableNorm", _always(Layer(linen.SwitchableNorm, _KEPT))),
        "group_plus": Row("GroupNormPlus", _always(Layer(linen.GroupNormPlus, (*_GROUPS, *_KEPT)))),
        "frn": Row(
            "FilterResponseNorm",
            _always(
                Layer(
                    linen.FilterResponseNorm,
                    (("use_learned_epsilon", True),),
                    pools_batch=False,
                    activates=True,
                )
            ),
        ),
        "evonorm_b0": Row("EvoNormB0", _always(Layer(linen.EvoNormB0, _KEPT, activates=True))),
        "evonorm_s0": Row(
            "EvoNormS0", _always(Layer(linen.EvoNormS0, _GROUPS, pools_batch=False, activates=True))
        ),
        "proxy": Row(
            "ProxyNorm",
            _always(
                Layer(
                    linen.ProxyNorm,
                    (("method", methods.group_norm(NUM_GROUPS)),),
                    pools_batch=False,
                    activates=True,
                )
            ),
        ),
        "group_ws": Row(
            f"GroupNorm({NUM_GROUPS}) + WS",
            _always(of_table(methods.group_norm(NUM_GROUPS), linen.WSDense)),
        ),
    }
)

TABLE = ("batch", "batch_group", "group", "layer", "positional", "rms", "instance")
"""Methods that differ in their sets alone."""
