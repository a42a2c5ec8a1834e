"""Normalization layers of Equinox."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import jaxnorm.methods as methods
from jaxnorm.convert._arrays import Layer, ours, renamed, split
from jaxnorm.convert._debiased import calls_of, check_decay, counted, held
from jaxnorm.convert._registry import (
    Settings,
    Shape,
    last_axes,
    made,
    over,
    refused,
    rms_over,
    settings_of,
)
from jaxnorm.methods import Method

NAMES = {
    "weight": "scale", "bias": "bias",
    "counter": "calls", "hidden_mean": "hidden_mean", "hidden_var": "hidden_var",
    "first_time": "first_time", "mean": "mean", "var": "var",
}  # fmt: skip
TOGETHER = (("counter", "hidden_mean", "hidden_var"), ("first_time", "mean", "var"))


def from_equinox(arrays: Mapping[str, Any], *, momentum: float | None = 0.99) -> Layer:
    """A normalization layer of Equinox as parameters and state.

    The layers are `BatchNorm`, `GroupNorm`, `LayerNorm` and `RMSNorm` with `use_bias=False`; our
    RMS norm takes a bias, too. A batch norm of mode "batch" becomes that of `batch_norm(debias=
    True)`, and one of mode "ema", which trains with its averages, that of `momentum_batch_norm`;
    `settings` sets both.

    Equinox starts the hidden variance of mode "batch" at 1 and divides by 1 - momentum^t after t
    steps, so that its variance at inference is too large by momentum^t / (1 - momentum^t). Here it
    is

        mean = hidden_mean / (1 - momentum^t),
        var = (hidden_var - momentum^t) / (1 - momentum^t)

    and the two agree once momentum^t is small.

    Args:
        arrays: `weight` and `bias`, and what a batch norm keeps in Equinox's state:
            `counter`, `hidden_mean`, `hidden_var` of `state.get(layer.batch_counter)` and
            `state.get(layer.batch_state_index)`; in mode "ema" `first_time`, `mean`, `var` of
            `layer.ema_first_time_index` and `layer.ema_state_index`.
        momentum: of the batch norm.

    Returns:
        `Layer(params, state)`.

    Raises:
        ValueError: unknown or missing names, arrays of different shapes.

    Example:
        >>> arrays = {"counter": 1, "hidden_mean": np.full(2, 0.5), "hidden_var": np.full(2, 2.5)}
        >>> _, state = from_equinox(arrays, momentum=0.5)
        >>> state["mean"].tolist(), state["var"].tolist()
        ([1.0, 1.0], [4.0, 4.0])

    Reference:
        Equinox's modules; no paper is followed.
    """
    found = renamed(
        arrays, NAMES, "from_equinox", together=TOGETHER, scalars=("counter", "first_time")
    )
    layer = split({name: found[name] for name in ("scale", "bias") if name in found})
    if "first_time" in found:
        first = bool(found["first_time"])  # the averages are not set yet
        mean, var = (np.full_like(found[n], v) if first else found[n] for n, v in FIRST.items())
        return Layer(layer.params, {"train_mean": mean, "train_var": var, "mean": mean, "var": var})
    if "calls" not in found:
        return layer
    decay = check_decay(momentum, "momentum", "from_equinox")
    share = held(decay, found["calls"])
    if share == 0:
        values = {name: np.full_like(found[f"hidden_{name}"], v) for name, v in FIRST.items()}
    else:
        mean, var = (found[f"hidden_{name}"].astype(np.float64) for name in FIRST)
        values = {"mean": mean / share, "var": np.maximum((var - (1 - share)) / share, 0)}
    values = {name: t.astype(found[f"hidden_{name}"].dtype) for name, t in values.items()}
    return Layer(layer.params, counted(values, decay, found["calls"]))


FIRST = {"mean": 0.0, "var": 1.0}
"""Running statistics before the first step."""


def to_equinox(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    momentum: float | None = 0.99,
) -> dict[str, np.ndarray]:
    """The inverse of `from_equinox`, up to the rounding of the hidden averages.

    `equinox.tree_at` puts weight and bias into a layer, and `state.set` the averages into its
    state.

    Args:
        params: `scale` and `bias`, or what there is of them.
        state: `mean` and `var`, with `count` and `calls` of a debiased average, for mode "batch";
            with `train_mean` and `train_var` for mode "ema". Without a count the average holds no
            share of its first values, and so many calls are written.
        momentum: of the batch norm.

    Returns:
        Arrays by the names of `from_equinox`.

    Raises:
        ValueError: what Equinox has no place for, arrays of different shapes, averages of training
            that are not those of inference, a count that differs between channels.

    Example:
        >>> arrays = to_equinox({}, {"mean": np.ones(2), "var": np.full(2, 4.0), "calls": 1,
        ...                          "count": np.full(2, 0.5)}, momentum=0.5)
        >>> arrays["hidden_mean"].tolist(), arrays["hidden_var"].tolist()
        ([0.5, 0.5], [2.5, 2.5])

    Reference:
        See `from_equinox`.
    """
    names = ("scale", "bias", "mean", "var", "count", "calls", "train_mean", "train_var")
    together = (("mean", "var"), ("train_mean", "train_var"))
    found = ours(params, state, names, "to_equinox", together=together)
    theirs = {"weight": "scale", "bias": "bias"}
    arrays = {name: found[own] for name, own in theirs.items() if own in found}
    if "train_mean" in found:
        if any(np.any(found[f"train_{name}"] != found[name]) for name in FIRST):
            raise ValueError(
                "to_equinox got averages for training that are not those for inference. Expected "
                "equal ones: Equinox's mode 'ema' has one pair."
            )
        first = all(np.all(found[name] == value) for name, value in FIRST.items())
        return arrays | {name: found[name] for name in FIRST} | {"first_time": np.asarray(first)}
    if "mean" not in found:
        return arrays
    decay = check_decay(momentum, "momentum", "to_equinox")
    calls = calls_of(found, decay, "to_equinox")
    share = held(decay, calls)
    hidden = {"mean": found["mean"] * share, "var": found["var"] * share + (1 - share)}
    arrays |= {f"hidden_{name}": t.astype(found[name].dtype) for name, t in hidden.items()}
    return arrays | {"counter": calls}


@settings_of("equinox.BatchNorm")
def _batch_norm(
    eps: float = 1e-5,
    channelwise_affine: bool = True,
    momentum: float = 0.99,
    mode: str = "legacy",
) -> Settings:
    if mode == "batch":
        method: Method = methods.batch_norm(epsilon=eps, momentum=momentum, debias=True)
    elif mode in ("ema", "legacy"):  # the average also in training
        method = methods.momentum_batch_norm(momentum, momentum, epsilon=eps)
    else:
        raise refused("mode", mode, "'batch' or 'ema'")
    return made(method, channelwise_affine, channelwise_affine)


@settings_of("equinox.GroupNorm")
def _group_norm(groups: int, eps: float = 1e-5, channelwise_affine: bool = True) -> Settings:
    row = methods.group_norm(groups, epsilon=eps)
    return made(row, channelwise_affine, channelwise_affine)


@settings_of("equinox.LayerNorm")
def _layer_norm(
    shape: Shape = 1, eps: float = 1e-5, use_weight: bool = True, use_bias: bool = True
) -> Settings:
    return made(over(last_axes(shape), eps, "shape"), use_weight, use_bias)


@settings_of("equinox.RMSNorm")
def _rms_norm(
    shape: Shape = 1, eps: float = 1e-5, use_weight: bool = True, use_bias: bool = True
) -> Settings:
    return made(rms_over(last_axes(shape), eps, "shape"), use_weight, use_bias)
