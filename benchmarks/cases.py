"""What was measured of a layer at one shape in one dtype, and what it is compared with."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from benchmarks.libraries import LIBRARIES

KINDS = ("forward", "step")
"""Of the layer alone, in training; a step is forward and backward."""

OURS = "jaxnorm"

FLAX = ("flax.linen", "flax.nnx")

TORCH = ("torch_last", "torch_first")
"""Torch on a tensor with channels last in memory, and first."""

OTHERS = {
    "Flax": FLAX,
    "best JAX": tuple(name for name in LIBRARIES if name != OURS),
    "torch": TORCH,
    "floor": ("floor",),
    "bytes floor": ("bytes floor",),
}
"""What our time is compared with: the fastest of these."""

GOALS = {"forward": 1.10, "step": 1.05}
"""Of our time over Flax's, at most."""


INTERVAL_COUNT = 6
"""The fewest ratios of which a 95 % interval of their median can be given."""


class Ratio(NamedTuple):
    """The median of ratios and its 95 % interval, which is nan below `INTERVAL_COUNT` of them."""

    median: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Our time over theirs, of times that belong together in pairs.

    The interval lies between two of the ratios, chosen by the binomial distribution of how many of
    them are below the median, whatever their own distribution is.

    >>> ratio([2, 4, 6, 8, 10, 12, 14, 16, 18], [2] * 9)
    Ratio(median=5.0, low=2.0, high=8.0)
    """
    ratios = np.divide(ours, theirs)
    interval = stats.quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return Ratio(float(np.median(ratios)), float(interval.low), float(interval.high))


class Case(NamedTuple):
    """What was measured at one method, shape and dtype.

    `seconds[name][kind]` has a time for each round; `compile_seconds[name]` has one for each sample
    under "cpu" and one under "wall". The others have a number for each JAX library: bytes of
    temporaries and of what is kept for the backward pass, both over the bytes of x.
    """

    method: str
    shape: str
    dims: tuple[int, ...]
    dtype: str
    seconds: dict[str, dict[str, list[float]]]
    temporary: dict[str, float]
    kept: dict[str, float]
    compile_seconds: dict[str, dict[str, list[float]]]

    def time(self, name: str, kind: str) -> float:
        """25th percentile over the rounds."""
        return float(np.percentile(self.seconds[name][kind], 25))

    def fastest(self, names: Iterable[str], kind: str) -> str | None:
        """The one of `names` with the least time, of those that were measured."""
        found = [name for name in names if name in self.seconds]
        return min(found, key=lambda name: self.time(name, kind), default=None)

    def ratio(self, name: str | None, kind: str) -> Ratio | None:
        """Our time over that of `name` in the same rounds."""
        if name not in self.seconds:
            return None
        return ratio(self.seconds[OURS][kind], self.seconds[name][kind])

    def over(self, other: str, kind: str) -> Ratio | None:
        """Our time over that of a key of `OTHERS`."""
        return self.ratio(self.fastest(OTHERS[other], kind), kind)

    def misses(self, kind: str) -> bool:
        """Whether our time over Flax's is above the goal, with its whole interval."""
        found = self.over("Flax", kind)
        return found is not None and found.low > GOALS[kind]

    def compiling(self) -> Ratio | None:
        """Our CPU seconds of compilation over those of flax.linen, sample by sample."""
        if not {OURS, FLAX[0]} <= self.compile_seconds.keys():
            return None
        return ratio(*(self.compile_seconds[name]["cpu"] for name in (OURS, FLAX[0])))


def grouped(cases: Sequence[Case]) -> Iterator[tuple[tuple[str, str], list[Case]]]:
    """The cases of each method and dtype."""
    for key in dict.fromkeys((case.method, case.dtype) for case in cases):
        yield key, [case for case in cases if (case.method, case.dtype) == key]


def mean(ratios: Iterable[Ratio | None]) -> float | None:
    """Geometric mean of the medians of the ratios that there are."""
    logs = [math.log(ratio.median) for ratio in ratios if ratio is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None
