"""What methods take at `init` and at `apply`, and the sets of which training takes statistics."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Required, TypedDict

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.devices import AxisName, DeviceGroups

signature = functools.cache(inspect.signature)
AXES = {"batch_axis": 0, "channel_axis": -1}


class Axes(TypedDict, total=False):
    """The axis of the examples, 0 by default, and that of the channels, -1."""

    batch_axis: int
    channel_axis: int


class Options(TypedDict, total=False):
    """What every method takes at `apply`, as `norm` does; see there.

    Rules always get the dtype of y, and the axes, counted from the front.
    """

    scale: ArrayLike | None
    bias: ArrayLike | None
    weights: ArrayLike | None
    activation: Callable[[jax.Array], jax.Array] | None
    dtype: Required[DTypeLike]
    axis_name: AxisName
    axis_index_groups: DeviceGroups
    batch_axis: Required[int]
    channel_axis: Required[int]


class InitOptions(Axes, total=False):
    """What every method takes at `init`."""

    dtype: DTypeLike
    kernel_shape: Sequence[int]
    feature_group_count: int


def channels_of(x_shape: Sequence[int], options: Mapping[str, Any]) -> int:
    """The number of channels of an x of this shape."""
    return x_shape[single_axis(options.get("channel_axis", -1), x_shape)]


class Sets(NamedTuple):
    """The sets of elements that share a statistic in training.

    Attributes:
        shape: of the statistic.
        sent: how many numbers devices add up for it in a step, forward and backward, where it is
            synchronized; 0 where examples share none, None where it depends on more than x.
    """

    shape: Shape
    sent: int | None


def sets_of_pooled(shape: Shape) -> Sets:
    """Sets that devices pool: counts, means and variances forward, the last two backward."""
    return Sets(shape, 5 * math.prod(shape))


@functools.cache
def options_of(function: Any) -> dict[str, inspect.Parameter]:
    """The options of a rule beside those of every method."""
    return {
        name: p
        for name, p in signature(function).parameters.items()
        if p.kind is p.KEYWORD_ONLY and name not in {"train", *Options.__annotations__}
    }
