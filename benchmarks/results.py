"""What every result is published with: intervals, tables, versions and the machine."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import NamedTuple

import jax
from scipy import stats

PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


class Interval(NamedTuple):
    """A mean and half the width of its 95 % t-interval, which a single value does not have."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return self.text(1)

    def text(self, decimals: int) -> str:
        """With so many decimals.

        >>> Interval(0.25, 0.125).text(2)
        '0.25 ± 0.12'
        """
        mean = f"{self.mean:.{decimals}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{decimals}f}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str | int | None]:
    """What a result was measured on."""
    return {
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
    }


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of independent values.

    >>> print(interval([1.0, 2.0, 3.0]))
    2.0 ± 2.5
    """
    count = len(values)
    if count == 1:
        return Interval(values[0], None)
    half_width = stats.t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5
    return Interval(statistics.fmean(values), float(half_width))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of the values as they are printed; "" without rows."""
    lines = [list(map(str, row)) for row in rows]
    if not lines:
        return ""
    lines = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
