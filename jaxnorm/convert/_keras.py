"""Normalization layers of Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import jaxnorm.methods as methods
from jaxnorm._core.checks import check_epsilon
from jaxnorm.convert._arrays import Layer, ours, renamed, split
from jaxnorm.convert._registry import Settings, made, over, refused, rms_over, settings_of

NAMES = {
    "gamma": "scale", "beta": "bias", "scale": "scale",
    "moving_mean": "mean", "moving_variance": "var",
    "moving_stddev": "std", "renorm_mean": "renorm_mean", "renorm_stddev": "renorm_std",
}  # fmt: skip
TOGETHER = (
    ("moving_mean", "moving_variance"),
    ("moving_stddev", "renorm_mean", "renorm_stddev"),
)


def from_keras(arrays: Mapping[str, Any]) -> Layer:
    """A normalization layer of Keras as parameters and state.

    The layers are `BatchNormalization`, `GroupNormalization`, `LayerNormalization` and
    `RMSNormalization`. A batch norm with `renorm=True` becomes that of `batch_renorm`, which has
    one pair of averages; Keras has two, which are equal where `renorm_momentum` is `momentum`, as
    by default.

    Args:
        arrays: by the last part of the paths of Keras's variables: `gamma`, `beta`,
            `moving_mean`, `moving_variance`; with renorm also `moving_stddev`, `renorm_mean`,
            `renorm_stddev`; of an RMS norm `scale`.

    Returns:
        `Layer(params, state)`.

    Raises:
        ValueError: unknown or missing names, arrays of different shapes, averages for training
            that are not those for inference.

    Example:
        >>> params, state = from_keras({
        ...     "gamma": np.ones(2), "moving_mean": np.zeros(2), "moving_variance": np.ones(2),
        ... })
        >>> sorted(params), sorted(state)
        (['scale'], ['mean', 'var'])

    Reference:
        Keras's layers; no paper is followed.
    """
    found = renamed(arrays, NAMES, "from_keras", together=TOGETHER)
    if "std" in found:
        pairs = {"mean": found.pop("renorm_mean"), "std": found.pop("renorm_std")}
        if any(np.any(found[name] != t) for name, t in pairs.items()):
            raise ValueError(
                "from_keras got renorm_mean and renorm_stddev that are not moving_mean and "
                "moving_stddev. Expected equal ones, of a layer with one momentum for both: "
                "batch_renorm has one pair for training and inference."
            )
        del found["var"]  # Keras makes it of the standard deviation
    return split(found)


def to_keras(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    epsilon: float = 1e-3,
    rms: bool = False,
) -> dict[str, np.ndarray]:
    """The inverse of `from_keras`.

    Args:
        params: `scale` and `bias`, or what there is of them.
        state: `mean` and `var`, or `mean` and `std` of `batch_renorm`. A `count` of a debiased
            average has no place in Keras and is left out: Keras goes on with the average itself.
        epsilon: of the Keras layer, for the variance that it stores beside `std`: std^2 - epsilon.
        rms: the layer is an `RMSNormalization`, whose parameter is called `scale`.

    Returns:
        Arrays by Keras's names, for `variable.assign`.

    Raises:
        ValueError: what Keras has no place for, arrays of different shapes.

    Example:
        >>> arrays = to_keras({}, {"mean": np.zeros(2), "std": np.full(2, 2.0)}, epsilon=1.0)
        >>> sorted(arrays), arrays["moving_variance"].tolist()
        (['moving_mean', 'moving_stddev', 'moving_variance', 'renorm_mean', 'renorm_stddev'],
         [3.0, 3.0])

    Reference:
        See `from_keras`.
    """
    check_epsilon(epsilon)
    names = ("scale", "bias", "mean", "var", "std", "count", "calls")
    found = ours(params, state, names, "to_keras", together=())
    if "std" in found:
        var = np.maximum(np.square(found["std"]) - np.asarray(epsilon, found["std"].dtype), 0)
        found |= {"var": var, "renorm_mean": found["mean"], "renorm_std": found["std"]}
    names = {own: theirs for theirs, own in NAMES.items() if theirs != "scale"}
    names |= {"scale": "scale"} if rms else {}
    return {names[name]: t for name, t in found.items() if name in names}


@settings_of("keras.BatchNormalization")
def _batch_norm(
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    renorm: bool = False,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_momentum: float = 0.99,
) -> Settings:
    if not renorm:
        return made(methods.batch_norm(epsilon=epsilon, momentum=momentum), scale, center)
    if renorm_momentum != momentum:
        raise refused("renorm_momentum", renorm_momentum, f"the momentum, {momentum}")
    clipping = {"rmax": np.inf, "dmax": np.inf, **(renorm_clipping or {})}
    rmin = clipping.pop("rmin", 0.0)
    if abs(rmin * clipping["rmax"] - 1) > 1e-6 and not (rmin == 0 and np.isinf(clipping["rmax"])):
        raise refused("renorm_clipping", renorm_clipping, "rmin=1/rmax, or neither of them")
    method = methods.batch_renorm(**clipping, momentum=momentum, epsilon=epsilon)
    return made(method, scale, center)


@settings_of("keras.GroupNormalization")
def _group_norm(
    groups: int = 32,
    axis: int = -1,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
) -> Settings:
    row = (
        methods.instance_norm(epsilon=epsilon)
        if groups == -1
        else methods.group_norm(groups, epsilon=epsilon)
    )
    return made(row, scale, center)


@settings_of("keras.LayerNormalization")
def _layer_norm(
    axis: Any = -1, epsilon: float = 1e-3, center: bool = True, scale: bool = True
) -> Settings:
    return made(over(axis, epsilon), scale, center)


@settings_of("keras.RMSNormalization")
def _rms_norm(axis: Any = -1, epsilon: float = 1e-6) -> Settings:
    return made(rms_over(axis, epsilon), True, False)
