"""What the linen and the nnx layers share: one call of a layer, with its running statistics.

A layer holds parameters and running statistics; everything it computes is one call of `apply`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

import jax
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.axes import axes_of
from jaxnorm._core.checks import check_flag, check_number
from jaxnorm._core.devices import AxisName, DeviceGroups
from jaxnorm._core.ghosts import GhostUpdate
from jaxnorm._core.groups import EACH, Method, Specification, resolve
from jaxnorm._core.moments import Moments, moments
from jaxnorm._core.normalize import norm, normalize
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import update_running
from jaxnorm._core.shared import shared
from jaxnorm._flax_rules import Axes
from jaxnorm._frame import State
from jaxnorm._population import POPULATION
from jaxnorm.inference import weigh_example

Activation = Callable[[jax.Array], jax.Array]


class CallOptions(TypedDict, total=False):
    """What every layer takes at the call, as `Norm` does.

    `mask` broadcasts against x and says what counts, or how much; `scale` and `bias` stand in for
    the layer's own, also one for each example; `activation` is applied to the output and recomputed
    in the backward pass.
    """

    mask: ArrayLike | None
    scale: ArrayLike | None
    bias: ArrayLike | None
    activation: Activation | None


class StateOptions(CallOptions, total=False):
    """And what a layer with state takes: whether to update it, by default when it is not used."""

    update_running_average: bool | None


def whether_to_update(use: bool, given: bool | None) -> bool:
    """Whether this call updates running statistics: as it was asked, or where they are not used."""
    return not use if given is None else check_flag(given, "update_running_average")


def run(
    function: Callable[..., Any],
    x: jax.Array,
    state: State,
    use: bool,
    update: bool,
    options: dict[str, Any],
) -> tuple[jax.Array, State]:
    """One call of a method with state: y, and the new state where it is to be updated."""
    y, new = function(x, state, train=not use, **options)
    if update and use:
        new = function(x, state, train=True, **options)[1]
    return y, new if update else state


def with_batch(
    function: Callable[..., Any], state: State, x: jax.Array, **options: Any
) -> jax.Array:
    """A method with state as one without: always with the batch's statistics."""
    return function(x, state, train=True, **options)[0]


def is_constant(x: jax.Array, axis: Axes, use: bool | None, options: Mapping[str, Any]) -> bool:
    """Whether a norm with running statistics, called so, does the same to every element of a
    channel, the last axis."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    return bool(use) and given <= {"activation"} and axes_of(axis, x.shape) == (x.ndim - 1,)


def check_call(options: Mapping[str, Any]) -> None:
    """A layer whose method is a function takes these names at the call; its own arguments are not
    among them."""
    if unknown := sorted(set(options) - set(StateOptions.__annotations__)):
        raise TypeError(
            f"unexpected keyword argument {', '.join(unknown)} at the call of a layer. Expected "
            f"the layer's own or some of {', '.join(StateOptions.__annotations__)}."
        )


def needs_running(example_weight: ArrayLike | None) -> None:
    """A layer without running statistics has nothing to weigh an example against."""
    if example_weight is not None:
        raise ValueError(
            f"example_weight={example_weight} weighs an example against running statistics, and "
            "this layer keeps none. Expected a method that shares statistics between examples, "
            "with a momentum."
        )


def only_channel_groups(example_weight: ArrayLike | None) -> None:
    """Statistics that depend on the position in ways of their own have no counterpart in a single
    example."""
    if example_weight is not None:
        raise ValueError(
            f"example_weight={example_weight} with groups that are not groups of channels. Expected"
            " a number of groups that divides the channels; inference.weigh_example takes any row "
            "of the table of methods."
        )


def only_rows(example_weight: ArrayLike | None, layer: str) -> None:
    """A state of another kind than the moments that normalize has no rule for weighing an
    example."""
    if example_weight is not None:
        raise ValueError(
            f"example_weight={example_weight} for {layer}, whose method is no row of the table of "
            "methods. Expected BatchNorm, Norm or another row, or a model in which other layers "
            "do not use running statistics."
        )


def trained_weight(
    given: ArrayLike | None, use: bool, own: ArrayLike | None, ghost_size: int | None
) -> ArrayLike | None:
    """Weight of an example at inference: given at the call, the layer's, or what it had in
    training."""
    if given is not None or not use:
        return given
    if own is not None:
        return own
    if ghost_size is None:
        raise ValueError(
            "an example's weight at inference is 1 / ghost_size by default. Got num_ghosts, which "
            "does not tell the size; expected ghost_size, or an example_weight."
        )
    return 1 / ghost_size


def per_channel(method: Method) -> Method:
    """The method with a statistic for every channel."""
    return dataclasses.replace(method, groups=dataclasses.replace(method.groups, channel=EACH))


def whole_batch(method: Method) -> Method:
    """The method with the batch in one group, which any batch can be."""
    return dataclasses.replace(method, groups=dataclasses.replace(method.groups, batch=1))


@dataclasses.dataclass(frozen=True)
class Running:
    """The running statistics of a layer and what this call does with them.

    Args:
        moments: the old ones, in the statistic's shape for this x with the batch pooled.
        use: normalize with them instead of the batch's.
        update: fold the batch's moments into them.
        momentum: weight of the old value.
        correction: 1 stores the unbiased variance.
        ghost_update: how several ghost batches enter, see `update_running`.
        measured: the sets of these statistics, where those of the method are coarser.
        example_weight: pool them with each example's own moments, of this weight, before they are
            used.
        population: a name of `POPULATION` where the update is that of a population, and their count
            its.
    """

    moments: Moments
    use: bool
    update: bool
    momentum: ArrayLike = 0.99
    correction: int = 0
    ghost_update: GhostUpdate = "pooled"
    measured: Specification | None = None
    example_weight: ArrayLike | None = None
    population: str | None = None

    def __post_init__(self):
        if self.example_weight is not None and not self.use:
            raise ValueError(
                f"example_weight={self.example_weight} weighs an example against running "
                "statistics. Got use_running_average=False; expected True, or no example_weight."
            )
        check_number(self.momentum, "momentum", at_least=0, at_most=1)

    def updated(self, batch: Moments, batch_axis: int) -> Moments:
        """The running statistics after this batch."""
        if self.population is not None:
            return POPULATION[self.population](self.moments, batch, batch_axis=batch_axis)
        return update_running(
            self.moments,
            batch,
            momentum=self.momentum,
            correction=self.correction,
            ghost_update=self.ghost_update,
            batch_axis=batch_axis,
        )

    def with_values(self, mean: jax.Array, var: jax.Array) -> "Running":
        """The same with other values, such as cast ones."""
        return dataclasses.replace(self, moments=Moments(self.moments.count, mean, var))


def apply(
    x: jax.Array,
    groups: Specification,
    *,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: float,
    dtype: Any,
    mean: Literal[0] | None = None,
    running: Running | None = None,
    mask: ArrayLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: DeviceGroups = None,
    use_fast_variance: bool = True,
    activation: Activation | None = None,
    batch_axis: int = 0,
    channel_axis: Axes = -1,
) -> tuple[jax.Array, Moments | None]:
    """One call of a layer: y, and the new running statistics in the shape of the old ones."""
    axes: Any = {"weights": mask, "batch_axis": batch_axis, "channel_axis": channel_axis}
    affine: Any = {
        "scale": scale,
        "bias": bias,
        "epsilon": epsilon,
        "activation": activation,
        "dtype": dtype,
    }
    sets: Any = {
        "mean": mean,
        "axis_name": axis_name,
        "axis_index_groups": axis_index_groups,
        # About the running mean, one round of sums over devices is enough; on one device a second
        # look is cheaper.
        "center": None if running is None or axis_name is None else running.moments.mean,
    }
    x = shared(x)
    used = running.moments if running is not None and running.use else None
    if running is not None and used is not None and running.example_weight is not None:
        used = weigh_example(x, used, groups, example_weight=running.example_weight, **axes)
    if running is not None and used is not None and not running.update:
        return normalize(x, used, **affine, **axes), None
    measured = groups if running is None or running.measured is None else running.measured
    if not use_fast_variance:
        sets["center"] = lax.stop_gradient(moments(x, measured, **sets, **axes).mean)
    if used is None and measured is groups:
        y, batch = norm(x, groups, **sets, **affine, **axes)
    else:
        batch = moments(x, measured, **sets, **axes)
        if used is None:
            used = pool(batch, resolve(groups, x.shape, batch_axis, channel_axis)[0])
        y = normalize(x, used, **affine, **axes)
    if running is None or not running.update:
        return y, None
    return y, running.updated(batch, batch_axis)
