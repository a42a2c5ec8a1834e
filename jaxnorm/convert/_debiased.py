"""Averages that start at 0: how much they hold after a number of steps, and the other way round."""

import numpy as np

from jaxnorm._core.checks import check_number
from jaxnorm.convert._arrays import Arrays


def held(momentum: float, calls: np.ndarray) -> np.ndarray:
    """1 - momentum^calls: the weight of all batches in an average after so many of them."""
    return 1 - np.power(np.float64(momentum), np.asarray(calls, np.float64))


def counted(arrays: Arrays, momentum: float, calls: np.ndarray) -> Arrays:
    """The state of a debiased average after so many calls; `arrays` are its mean and variance."""
    count = np.full(arrays["var"].shape, held(momentum, calls), np.float32)
    return arrays | {"count": count, "calls": np.asarray(calls, np.int32).reshape(())}


def calls_of(state: Arrays, momentum: float, function: str) -> np.ndarray:
    """The calls after which such an average is what the state says.

    Without a count the state holds no share of its first values: so many calls that more of them
    would not be seen in float32.
    """
    if "calls" in state:
        return np.asarray(state["calls"], np.int32)
    count = np.asarray(state.get("count", 1.0), np.float64)
    if count.size and count.min() != count.max():
        raise ValueError(
            f"{function} got a count that differs between channels, from {count.min()} to "
            f"{count.max()}: some batches were left out in some of them. Expected one number, as "
            "the other library counts its calls once for all channels."
        )
    # Where 1 - momentum^calls is rounded to 1.
    left = np.maximum(1 - count.max(initial=0.0), 2.0**-26)
    if left == 1 or momentum == 0:
        return np.asarray(left < 1, np.int32)
    return np.asarray(np.round(np.log(left) / np.log(momentum)), np.int32)


def check_decay(momentum: float | None, name: str, function: str) -> float:
    """The weight of the old value, which the debiased average cannot do without."""
    if momentum is None:
        raise ValueError(
            f"{function} got {name}=None for a layer with running statistics. Expected the "
            f"{name} of the layer, which says how much its average held after so many calls."
        )
    check_number(momentum, name, at_least=0, at_most=1)
    if momentum == 1:
        raise ValueError(f"{function} got {name}=1, with which an average never moves.")
    return float(momentum)
