"""Normalization layers of Haiku."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxnorm.methods as methods
from jaxnorm.convert._arrays import Arrays, Layer, ours, renamed, split
from jaxnorm.convert._debiased import calls_of, check_decay, counted, held
from jaxnorm.convert._registry import Settings, made, over, refused, rms_over, settings_of

AVERAGES = {"mean": "mean_ema", "var": "var_ema"}
PARTS = ("hidden", "average", "counter")
NAMES = {"scale": "scale", "offset": "bias"} | {
    f"{ema}/{part}": f"{name} {part}" for name, ema in AVERAGES.items() for part in PARTS
}
TOGETHER = (tuple(name for name in NAMES if not name.endswith("hidden") and "/" in name),)
COUNTERS = tuple(f"{ema}/counter" for ema in AVERAGES.values())


def from_haiku(arrays: Mapping[str, Any], *, decay_rate: float | None = None) -> Layer:
    """A normalization layer of Haiku as parameters and state.

    The layers are `BatchNorm`, `GroupNorm`, `InstanceNorm`, `LayerNorm` and `RMSNorm`. Haiku's
    averages start at 0 and are debiased. The state is that of `batch_norm(debias=True)`, which
    `settings` sets: Haiku's `average` is the mean, and of its `counter` comes the weight `count`
    that the batches have so far. Axes of size 1 are dropped.

    Args:
        arrays: `scale` and `offset`, and of a batch norm the state of its averages beside them,
            nested or with slashes: `{**params["batch_norm"], "mean_ema":
            state["batch_norm/~/mean_ema"], "var_ema": state["batch_norm/~/var_ema"]}`.
        decay_rate: of the batch norm.

    Returns:
        `Layer(params, state)`; `calls` in the state is Haiku's counter.

    Raises:
        ValueError: unknown or missing names, arrays of different shapes, averages with different
            counters, no `decay_rate` for a batch norm.

    Example:
        >>> ema = {"hidden": np.full((1, 2), 0.1), "average": np.ones((1, 2)), "counter": 1}
        >>> _, state = from_haiku({"mean_ema": ema, "var_ema": ema}, decay_rate=0.9)
        >>> state["mean"].tolist(), state["count"].round(3).tolist()
        ([1.0, 1.0], [0.1..., 0.1...])

    Reference:
        Haiku's modules; no paper is followed. Its averages are debiased as in Adam: A Method for
        Stochastic Optimization, 2014, arXiv:1412.6980.
    """
    found = renamed(arrays, NAMES, "from_haiku", together=TOGETHER, scalars=COUNTERS)
    layer = split({name: _of_channels(found[name]) for name in ("scale", "bias") if name in found})
    if "mean average" not in found:
        return layer
    decay = check_decay(decay_rate, "decay_rate", "from_haiku")
    counters = [found[f"{name} counter"] for name in AVERAGES]
    if counters[0] != counters[1]:
        raise ValueError(
            f"from_haiku got averages after {counters[0]} and {counters[1]} calls. Expected those "
            "of one layer, which are updated together."
        )
    state = {name: _of_channels(found[f"{name} average"]) for name in AVERAGES}
    return Layer(layer.params, counted(state, decay, counters[0]))


def to_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    decay_rate: float | None = None,
    ndim: int = 4,
    channel_axis: int = -1,
) -> dict[str, np.ndarray]:
    """The inverse of `from_haiku`.

    `hidden`, which Haiku keeps beside its `average`, is computed from it, and so equal up to
    rounding; all else comes back as it was.

    Args:
        params: `scale` and `bias`, or what there is of them.
        state: `mean` and `var`, with `count` and `calls` of a debiased average. Without a count
            the average holds no share of its first values, and so many calls are written.
        decay_rate: of the batch norm.
        ndim: the rank of its x: where there is a state, arrays have the shape (1, ..., 1, C).
        channel_axis: axis of C in them, 1 for channels first.

    Returns:
        Arrays by Haiku's names, those of averages with slashes: `mean_ema/average`.

    Raises:
        ValueError: what Haiku has no place for, arrays of different shapes, no `decay_rate` for
            running statistics, a count that differs between channels.

    Example:
        >>> arrays = to_haiku(
        ...     {"scale": np.ones(2)}, {"mean": np.zeros(2), "var": np.ones(2)}, decay_rate=0.9
        ... )
        >>> arrays["scale"].shape, arrays["mean_ema/average"].shape
        ((1, 1, 1, 2), (1, 1, 1, 2))

    Reference:
        See `from_haiku`.
    """
    names = ("scale", "bias", "mean", "var", "count", "calls")
    found = ours(params, state, names, "to_haiku")
    remembers = "mean" in found
    shape = [1] * ndim
    shape[channel_axis] = -1
    found = {name: t.reshape(shape) if remembers and t.ndim else t for name, t in found.items()}
    theirs: Arrays = {
        name: found[own] for name, own in NAMES.items() if own in ("scale", "bias") and own in found
    }
    if not remembers:
        return theirs
    decay = check_decay(decay_rate, "decay_rate", "to_haiku")
    calls = calls_of(found, decay, "to_haiku")
    for name, ema in AVERAGES.items():
        hidden = (found[name] * held(decay, calls)).astype(found[name].dtype)
        values = {"hidden": hidden, "average": found[name], "counter": calls}
        theirs |= {f"{ema}/{part}": t for part, t in values.items()}
    return theirs


def _of_channels(t: np.ndarray) -> np.ndarray:
    """Without the axes that are pooled."""
    return t.reshape([n for n in t.shape if n != 1] or [1]) if t.ndim > 1 else t


@settings_of("haiku.BatchNorm")
def _batch_norm(
    create_scale: bool,
    create_offset: bool,
    decay_rate: float,
    eps: float = 1e-5,
    axis: Sequence[int] | None = None,
) -> Settings:
    if axis is not None:
        raise refused("axis", axis, "None, all axes but that of the channels")
    row = methods.batch_norm(epsilon=eps, momentum=decay_rate, debias=True)
    return made(row, create_scale, create_offset)


@settings_of("haiku.GroupNorm")
def _group_norm(
    groups: int,
    axis: Any = slice(1, None),
    create_scale: bool = True,
    create_offset: bool = True,
    eps: float = 1e-5,
) -> Settings:
    if axis != slice(1, None):
        raise refused("axis", axis, "slice(1, None), all axes but the first")
    return made(methods.group_norm(groups, epsilon=eps), create_scale, create_offset)


@settings_of("haiku.InstanceNorm")
def _instance_norm(create_scale: bool, create_offset: bool, eps: float = 1e-5) -> Settings:
    return made(methods.instance_norm(epsilon=eps), create_scale, create_offset)


@settings_of("haiku.LayerNorm")
def _layer_norm(axis: Any, create_scale: bool, create_offset: bool, eps: float = 1e-5) -> Settings:
    return made(over(axis, eps), create_scale, create_offset)


@settings_of("haiku.RMSNorm")
def _rms_norm(axis: Any, eps: float = 1e-5, create_scale: bool = True) -> Settings:
    return made(rms_over(axis, eps), create_scale, False)
