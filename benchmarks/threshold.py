"""The size from which on a loss is below a level, and how sure that is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression


class Threshold(NamedTuple):
    """A size with its 95 % interval: 0 where the loss is below the level at all sizes, infinity
    where it is above it at all.

    Attributes:
        size: interpolated between sizes that were measured.
        low: end of the interval, which knows of the seeds and not of the gap between the sizes.
        high: its other end.
        below: the largest size that was measured at most at `size`, 0 without one.
        above: the smallest one from `size` on, infinity without one.
    """

    size: float
    low: float
    high: float
    below: float = 0.0
    above: float = math.inf

    def __str__(self) -> str:
        text = f"{self.size:.3g} ({self.low:.3g} to {self.high:.3g})"
        inside = 0 < self.below < self.above < math.inf
        return text + f", between {self.below:g} and {self.above:g}" * inside


def crossing(sizes: Sequence[float], losses: Sequence[float], level: float) -> float:
    """The size at which the loss falls to `level`, between sizes on a log axis.

    The losses are first made to fall with the size by isotonic regression, the least change that
    does it; several of one size are averaged.

    Args:
        sizes: above 0, in any order, also several times.
        losses: one for each of them.
        level: a loss.

    Returns:
        The size; 0 or infinity where all losses are below the level or above it.

    Example:
        >>> round(crossing([1, 4, 16], [30.0, 20.0, 0.0], level=10.0), 3)
        8.0
    """
    logs, inverse = np.unique(np.log(sizes), return_inverse=True)
    counts = np.bincount(inverse)
    means = np.bincount(inverse, weights=np.asarray(losses, float)) / counts
    falling = isotonic_regression(means, weights=counts, increasing=False).x
    above = int((falling >= level).sum())
    if above == 0 or above == len(falling):
        return float(above and np.inf)
    return float(np.exp(np.interp(-level, -falling[above - 1 : above + 1], logs[above - 1 :][:2])))


def threshold(
    points: Sequence[tuple[float, Sequence[float]]],
    level: float,
    *,
    resamples: int = 1000,
) -> Threshold:
    """`crossing` of the mean losses, with the interval of a bootstrap over seeds.

    A seed is drawn with its losses at all sizes, since these are paired.

    Args:
        points: sizes and the losses there, one for each seed, as many at every size.
        level: a loss.
        resamples: how often the seeds are drawn.
    """
    sizes = [size for size, _ in points]
    losses = np.array([by_seed for _, by_seed in points], float)  # (sizes, seeds)
    seeds = losses.shape[1]
    drawn = np.random.default_rng(0).integers(0, seeds, size=(resamples, seeds))
    found = [crossing(sizes, losses[:, chosen].mean(axis=1).tolist(), level) for chosen in drawn]
    # of values that occur, since some may be infinite
    low, high = np.quantile(found, (0.025, 0.975), method="inverted_cdf")
    size = crossing(sizes, losses.mean(axis=1).tolist(), level)
    return Threshold(
        size,
        float(low),
        float(high),
        max((one for one in sizes if one <= size), default=0.0),
        min((one for one in sizes if one >= size), default=math.inf),
    )
