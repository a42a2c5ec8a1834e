"""Multifractal detrended fluctuation analysis of a series by the package MFDFA, surrogates that say
how much of the result is chance, and series whose exponents are known.

Of the profile, the summed deviations from the mean, windows of s values are detrended each by a
polynomial. F_q(s) is the mean of order q of what is left, and h(q), the generalized Hurst exponent,
the slope of log F_q over log s: 0.5 for all q without memory, more where a value follows its
neighbours, less where it turns back. Where large and small fluctuations scale alike h is the same
for all q; the width h(-4) - h(4) says how far they do not.

Reference: Kantelhardt et al., Multifractal detrended fluctuation analysis of nonstationary time
series, 2002, arXiv:physics/0202070.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import MFDFA
import numpy as np

Q = (-4, -3, -2, -1, 1, 2, 3, 4)
"""Orders of the means; the package leaves out 0."""

ORDER = 2
"""Degree of the polynomials: those of the profile take a linear trend out of the series."""

SURROGATES = 39
"""Of each kind; a series like them is wider than all but one of them with a chance of 2 in 40."""

LEVEL = 0.05
"""A series is wider than its surrogates where so small a share of them, itself among them, is as
wide."""

WEIGHT = 0.7
"""Share of a half in the binomial cascade."""


def scales(length: int) -> np.ndarray:
    """The sizes of windows the slope is fitted to, even over their logarithm, from 16 values to an
    eighth of the series.

    >>> scales(2048)
    array([ 16,  20,  25,  32,  40,  51,  64,  81, 102, 128, 161, 203, 256])
    """
    if length < 256:
        raise ValueError(
            f"Got a series of {length} values; expected at least 256, so that windows of 16 to "
            "an eighth of it can be compared. Train for more steps."
        )
    low, high = 4.0, np.log2(length / 8)
    return np.round(np.logspace(low, high, round(3 * (high - low)) + 1, base=2)).astype(int)


def exponents(series: np.ndarray) -> np.ndarray:
    """The generalized Hurst exponents h(q) of a series, for the orders in `Q`.

    Raises:
        ValueError: the series is too short, has values that are not finite, or is constant
            somewhere for as long as a window, where means of negative order have no value.
    """
    series = np.asarray(series, np.float64)
    sizes = scales(len(series))
    if not np.isfinite(series).all():
        raise ValueError(
            f"Got a series with {(~np.isfinite(series)).sum()} values that are not finite; "
            "expected numbers. Leave this training out."
        )
    runs = np.convolve(np.diff(series) != 0, np.ones(sizes[0] - 1), "valid")
    if (runs == 0).any():
        raise ValueError(
            f"Got a series that is constant for {sizes[0]} values; expected one that fluctuates."
        )
    sizes, spread = MFDFA.MFDFA(series, lag=sizes, order=ORDER, q=np.asarray(Q, float))
    return np.polyfit(np.log(sizes), np.log(spread), 1)[0]


def width(h: np.ndarray) -> float:
    """The multifractal width, h at the smallest order less h at the largest."""
    return float(h[0] - h[-1])


def shuffled(series: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same values in another order: their distribution stays, what binds them goes."""
    return rng.permutation(series)


def phase_randomized(series: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A series of the same power spectrum with random phases: linear correlations stay, everything
    else goes, the distribution too."""
    spectrum = np.fft.rfft(series)
    phases = np.exp(2j * np.pi * rng.random(len(spectrum)))
    phases[0] = 1.0  # the mean
    if len(series) % 2 == 0:
        phases[-1] = 1.0  # real as well
    return np.fft.irfft(spectrum * phases, len(series))


KINDS: Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = MappingProxyType(
    {"shuffled": shuffled, "phases": phase_randomized}
)
"""Surrogates by name."""


class Excess(NamedTuple):
    """A series beside its surrogates.

    Attributes:
        width: of the series less the mean width of the surrogates.
        share: of the surrogates and the series together that are at least as wide as it.
    """

    width: float
    share: float

    @property
    def wider(self) -> bool:
        """Whether the series is wider than 95 % of its surrogates."""
        return self.share <= LEVEL


def excess(series: np.ndarray, h: np.ndarray, kind: str, seed: int) -> Excess:
    """How much wider a series with the exponents h is than `SURROGATES` surrogates of a kind."""
    rng = np.random.default_rng((seed, list(KINDS).index(kind)))
    widths = [width(exponents(KINDS[kind](series, rng))) for _ in range(SURROGATES)]
    wider = sum(other >= width(h) for other in widths)
    return Excess(width(h) - float(np.mean(widths)), (1 + wider) / (1 + SURROGATES))


class Known(NamedTuple):
    """A series with known exponents.

    Attributes:
        label: what tables call it.
        draw: (length, seed) -> a series.
        h: those of the orders in `Q`.
        tolerance: how far the mean of h(q) measured on `DRAWS` series of 1024 values or more may be
            from h(q), at any order. Short series have a bias, which grows with the width.
    """

    label: str
    draw: Callable[[int, int], np.ndarray]
    h: np.ndarray
    tolerance: float


DRAWS = 10
"""Series that are drawn of each known one."""


def _fractional(hurst: float) -> Callable[[int, int], np.ndarray]:
    def draw(length: int, seed: int) -> np.ndarray:
        """By the package's generator, which takes its numbers from NumPy's global state."""
        before = np.random.get_state()
        try:
            np.random.seed(seed)
            return MFDFA.fgn(length, hurst)
        finally:
            np.random.set_state(before)

    return draw


def cascade(length: int, seed: int) -> np.ndarray:
    """A binomial cascade: of a mass of 1 each half gets `WEIGHT` or the rest, the seed decides
    which, and so on down to single values; the first `length` of them."""
    rng = np.random.default_rng(seed)
    mass = np.ones(1)
    while len(mass) < length:
        first = np.where(rng.random(len(mass)) < 0.5, WEIGHT, 1 - WEIGHT)
        mass = np.stack([mass * first, mass * (1 - first)], axis=1).reshape(-1)
    return mass[:length]


def cascade_exponents() -> np.ndarray:
    """1 / q - log2(a^q + (1 - a)^q) / q, where a is `WEIGHT`."""
    q = np.asarray(Q, float)
    return 1 / q - np.log2(WEIGHT**q + (1 - WEIGHT) ** q) / q


KNOWN = (
    Known(
        "white noise",
        lambda length, seed: np.random.default_rng(seed).normal(size=length),
        np.full(len(Q), 0.5),
        0.05,
    ),
    Known("fractional noise, H = 0.3", _fractional(0.3), np.full(len(Q), 0.3), 0.07),
    Known("fractional noise, H = 0.7", _fractional(0.7), np.full(len(Q), 0.7), 0.07),
    Known("binomial cascade", cascade, cascade_exponents(), 0.15),
)
"""Series to try the analysis on."""


class Check(NamedTuple):
    """A known series, and h(q) and the excess beside each kind of surrogates of each draw."""

    known: Known
    h: np.ndarray
    excess: Mapping[str, list[Excess]]

    @property
    def holds(self) -> bool:
        """Whether the known exponents were found again."""
        return float(np.abs(self.h.mean(axis=0) - self.known.h).max()) <= self.known.tolerance


def check(known: Known, length: int) -> Check:
    """Analyses `DRAWS` series of a known one."""
    drawn = [known.draw(length, seed) for seed in range(DRAWS)]
    h = np.array([exponents(series) for series in drawn])
    beside = {
        kind: [excess(drawn[seed], h[seed], kind, seed) for seed in range(DRAWS)] for kind in KINDS
    }
    return Check(known, h, beside)
