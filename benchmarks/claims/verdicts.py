"""What cells say about a claim: differences of errors, paired by seed, with an interval and a
verdict.

A check is a difference in points of test error and the region where the claim has it, such as above
1. With the 95 % t-interval of the difference over seeds it is

    seen       the interval lies wholly inside of the region,
    not seen   it lies wholly outside,
    mixed      else.

The verdict of a claim is that of its checks where they agree, and else mixed.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from scipy import stats

from benchmarks.cells import Cell, How, Key
from benchmarks.results import Interval, interval

SEEN, NOT_SEEN, MIXED = "seen", "not seen", "mixed"
TOO_FEW, MISSING = "not enough seeds", "not measured"

MIN_SEEDS = 3
"""With fewer nothing is decided."""

LEVEL = 0.05
"""Of two-sided tests: 1 minus the confidence of the intervals."""


class Term(NamedTuple):
    """A sign times an error of a cell: the test error, or a value "measure.name" of its `more`."""

    sign: int
    key: Key
    value: str = "error"

    @property
    def measure(self) -> str | None:
        """What has to be measured beside the test error."""
        name, dot, _ = self.value.partition(".")
        return name if dot else None

    def of(self, cell: Cell) -> list[float] | None:
        """One value for each seed, in points; None where it was not measured."""
        measure, _, name = self.value.rpartition(".")
        values = cell.more.get(measure, {}).get(name) if measure else cell.errors
        return None if values is None else [self.sign * value for value in values]


class Difference(tuple[Term, ...]):
    """A sum of terms, made by `error(...) - error(...)`."""

    def __sub__(self, other: "Difference") -> "Difference":
        return Difference((*self, *(term._replace(sign=-term.sign) for term in other)))

    def on(self, data: str) -> "Difference":
        """With the cells on a data set."""
        return Difference(t._replace(key=t.key._replace(data=data)) for t in self)

    def by_seed(self, cells: Mapping[Key, Cell]) -> list[float] | None:
        """Its value for the seeds that all of its cells have; None where one is missing."""
        found = [term.of(cells[term.key]) if term.key in cells else None for term in self]
        if any(values is None for values in found):
            return None
        return [math.fsum(values) for values in zip(*found, strict=False)]  # type: ignore[arg-type]


def error(
    method: str, batch: int | None = None, last: str = "1x1", value: str = "error", **how: object
) -> Difference:
    """The error of a method, as a difference of one term.

    Args:
        method: a key of `benchmarks.plan.ROWS`.
        batch: images normalized together; None for a method that does not pool them.
        last: size of the last map.
        value: "error", or "measure.name" of what `benchmarks.measures` returns.
        **how: attributes of `benchmarks.cells.How`.
    """
    return Difference([Term(1, Key("", last, method, batch, How(**how)), value)])  # type: ignore[arg-type]


class Check(NamedTuple):
    """A difference in points, and the open interval where the claim has it."""

    difference: Difference
    low: float
    high: float

    def on(self, data: str) -> "Check":
        """With the cells on a data set."""
        return self._replace(difference=self.difference.on(data))

    @property
    def region(self) -> str:
        """In words."""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        if math.isinf(self.low):
            return f"below {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


def above(points: float, difference: Difference) -> Check:
    """That the difference is larger than so many points."""
    return Check(difference, points, math.inf)


def below(points: float, difference: Difference) -> Check:
    """That it is smaller."""
    return Check(difference, -math.inf, points)


def within(points: float, difference: Difference) -> Check:
    """That it is smaller in size."""
    return Check(difference, -points, points)


class Finding(NamedTuple):
    """What the cells say about a check.

    Attributes:
        check: which one, on a data set.
        verdict: see the module; "not enough seeds" or "not measured".
        interval: of the difference.
        seeds: how many were paired.
        p: two-sided, of the t-test against the nearest end of the region; None without a test.
    """

    check: Check
    verdict: str
    interval: Interval | None = None
    seeds: int = 0
    p: float | None = None

    @property
    def decided(self) -> bool:
        """Whether it is seen or not seen."""
        return self.verdict in (SEEN, NOT_SEEN)


def judge(check: Check, cells: Mapping[Key, Cell]) -> Finding:
    """What the cells say about a check whose terms name a data set."""
    values = check.difference.by_seed(cells)
    if not values:
        return Finding(check, MISSING)
    found, seeds = interval(values), len(values)
    if seeds < MIN_SEEDS or found.half_width is None:
        return Finding(check, TOO_FEW, found, seeds)
    low, high = found.mean - found.half_width, found.mean + found.half_width
    inside = check.low < low and high < check.high
    outside = high < check.low or check.high < low
    verdict = SEEN if inside else NOT_SEEN if outside else MIXED
    return Finding(check, verdict, found, seeds, _p(values, check))


def _p(values: Sequence[float], check: Check) -> float:
    """Of the t-test against the end of the region that is nearest to the mean."""
    mean = statistics.fmean(values)
    distance = min(abs(mean - end) for end in (check.low, check.high))
    spread = statistics.stdev(values) / len(values) ** 0.5
    if spread == 0:
        return float(distance == 0)
    return float(2 * stats.t.sf(distance / spread, len(values) - 1))


def together(verdicts: Iterable[str]) -> str:
    """The verdict of a claim from those of its checks; checks that nothing was measured for do not
    count.

    >>> together(["seen", "not measured"]), together(["seen", "not seen"])
    ('seen', 'mixed')
    """
    found = set(verdicts) - {MISSING}
    if len(found - {TOO_FEW}) == 0:
        return TOO_FEW if found else MISSING
    found -= {TOO_FEW}
    return found.pop() if len(found) == 1 else MIXED


def holm(ps: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several tests hold together at a level, by Holm's step-down correction: the smallest
    p is compared to level / m, the next to level / (m - 1), until one does not hold.

    >>> holm([0.01, 0.04, 0.03])
    [True, False, False]
    """
    held = [False] * len(ps)
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[index] > level / (len(ps) - rank):
            break
        held[index] = True
    return held
