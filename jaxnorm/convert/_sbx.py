"""Batch renormalization of SBX, whose layer for CrossQ is Flax's batch norm with corrections."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import jaxnorm.methods as methods
from jaxnorm._core.checks import check_epsilon
from jaxnorm.convert._arrays import Layer, ours, renamed, split
from jaxnorm.convert._registry import Settings, made, settings_of

NAMES = {
    name: name for name in ("scale", "bias", "mean", "var", "r_max", "d_max", "steps")
}  # fmt: skip
SCHEDULE = ("r_max", "d_max", "steps")


def from_sbx(arrays: Mapping[str, Any], *, epsilon: float = 1e-3) -> Layer:
    """A `BatchRenorm` of SBX as parameters and state of `batch_renorm`.

        std = sqrt(var + epsilon)

    with which inference is equal. Training is not quite: SBX averages variances and not standard
    deviations, and adds epsilon again to the variance that it has corrected. It is batch norm for
    the first `warm_up_steps`, which here are a schedule, `apply(..., rmax=, dmax=)`: 1 and 0, then
    `r_max` and `d_max`.

    Args:
        arrays: `scale` and `bias` of `params`, and `mean`, `var`, `r_max`, `d_max`, `steps` of
            `batch_stats`; the last three, which belong to the schedule, are left out.
        epsilon: of the layer, in the unit of x squared.

    Returns:
        `Layer(params, state)`.

    Raises:
        ValueError: unknown or missing names, arrays of different shapes.

    Example:
        >>> _, state = from_sbx({"mean": np.zeros(2), "var": np.full(2, 3.0)}, epsilon=1.0)
        >>> state["std"].tolist()
        [2.0, 2.0]

    Reference:
        SBX's layer; no paper is followed. See `methods.batch_renorm`.
    """
    check_epsilon(epsilon)
    found = renamed(arrays, NAMES, "from_sbx", together=(("mean", "var"),), scalars=SCHEDULE)
    found = {name: t for name, t in found.items() if name not in SCHEDULE}
    if "var" in found:
        var = found.pop("var")
        found["std"] = np.sqrt(var.astype(np.float64) + epsilon).astype(var.dtype)
    return split(found)


def to_sbx(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    epsilon: float = 1e-3,
    r_max: float = 3,
    d_max: float = 5,
    steps: int = 0,
) -> dict[str, np.ndarray]:
    """The inverse of `from_sbx`, up to the rounding of var = std^2 - epsilon.

    Args:
        params: `scale` and `bias`, or what there is of them.
        state: `mean` and `std`.
        epsilon: of SBX's layer, in the unit of x squared; a smaller std^2 becomes the variance 0.
        r_max: its bound of the correction of the scale.
        d_max: its bound of the correction of the mean.
        steps: how many it has seen; before `warm_up_steps` SBX corrects nothing.

    Returns:
        Arrays by SBX's names.

    Raises:
        ValueError: what SBX has no place for, arrays of different shapes.

    Example:
        >>> arrays = to_sbx({}, {"mean": np.zeros(2), "std": np.full(2, 2.0)}, epsilon=1.0)
        >>> arrays["var"].tolist(), int(arrays["r_max"])
        ([3.0, 3.0], 3)

    Reference:
        See `from_sbx`.
    """
    check_epsilon(epsilon)
    names = ("scale", "bias", "mean", "std")
    found = ours(params, state, names, "to_sbx", together=(("mean", "std"),))
    if "std" in found:
        std = found.pop("std")
        var = np.maximum(np.square(std.astype(np.float64)) - epsilon, 0).astype(std.dtype)
        schedule = {"r_max": r_max, "d_max": d_max, "steps": steps}
        found |= {"var": var} | {name: np.asarray(value) for name, value in schedule.items()}
    return found


@settings_of("sbx.BatchRenorm")
def _batch_renorm(
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    use_bias: bool = True,
    use_scale: bool = True,
) -> Settings:
    return made(methods.batch_renorm(momentum=momentum, epsilon=epsilon), use_scale, use_bias)
