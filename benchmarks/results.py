"""What a comparison of normalizations measured: accuracies per seed, their intervals, and the files
that keep them."""

import csv
import io
import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
from scipy import stats

from benchmarks.files import read_json, write

PACKAGES = ("jaxnorm", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison have in common."""

    network: str
    protocol: str
    seeds: int
    epochs: int
    train_images: int


@dataclass(frozen=True)
class Cell:
    """One method at one batch size, trained once per seed.

    Attributes:
        method: a key of `benchmarks.norms.METHODS`.
        batch_size: examples normalized together; None where it cannot matter.
        norms: the method at each width of the network.
        same_run_as: name of the cell whose training this one shares, since all their norms are the
            same.
        validation: accuracy in %, one per seed.
        test: accuracy in %, one per seed.
        compile_seconds: spent on tracing, compiling and initializing.
        train_seconds: spent on training and evaluating, all seeds together.
    """

    method: str
    batch_size: int | None
    norms: list[str]
    same_run_as: str | None
    validation: list[float]
    test: list[float]
    compile_seconds: float
    train_seconds: float

    @property
    def name(self) -> str:
        """The method, with its batch size where that matters."""
        return self.method if self.batch_size is None else f"{self.method}@{self.batch_size}"


class Interval(NamedTuple):
    """A mean and half the width of its 95 % t-interval, which a single value does not have."""

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f}"
            if self.half_width is None
            else f"{self.mean:.1f} ± {self.half_width:.1f}"
        )


class Difference(NamedTuple):
    """Accuracy of `cell` minus that of `baseline`, in points, paired by seed."""

    cell: Cell
    baseline: Cell
    interval: Interval


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


@dataclass
class Result:
    """A comparison, finished or not."""

    settings: Settings
    versions: dict[str, str]
    machine: dict[str, str | int | None]
    cells: list[Cell] = field(default_factory=list)

    @property
    def batch_sizes(self) -> list[int]:
        """All batch sizes that occur, from small to large."""
        return sorted({cell.batch_size for cell in self.cells if cell.batch_size is not None})

    @property
    def methods(self) -> list[str]:
        """All methods that occur, in the order of their first cell."""
        return list(dict.fromkeys(cell.method for cell in self.cells))

    def conflicts(self, other: "Result") -> list[tuple[str, object, object]]:
        """Settings and versions in which the two differ, as (name, ours, theirs): their cells
        cannot be compared."""
        ours, theirs = (asdict(result.settings) | result.versions for result in (self, other))
        return [(key, ours[key], theirs.get(key)) for key in ours if ours[key] != theirs.get(key)]

    def twin(self, batch_size: int | None, norms: list[str]) -> Cell | None:
        """A cell trained with these norms at this batch size, whatever its method is called."""
        return next(
            (cell for cell in self.cells if (cell.batch_size, cell.norms) == (batch_size, norms)),
            None,
        )

    def get(self, method: str, batch_size: int | None) -> Cell | None:
        """The cell of `method` at exactly this batch size."""
        return next(
            (cell for cell in self.cells if (cell.method, cell.batch_size) == (method, batch_size)),
            None,
        )

    def find(self, method: str, batch_size: int | None) -> Cell | None:
        """The cell of `method` at this batch size, which is its only cell where the batch size does
        not matter."""
        return self.get(method, batch_size) or self.get(method, None)

    def differences(self) -> list[Difference]:
        """BN's loss as the batch shrinks; every method at the smallest batch against BN; BGN
        against BN and GN everywhere."""
        if not self.batch_sizes:
            return []
        *others, largest = self.batch_sizes
        smallest = self.batch_sizes[0]
        rivals = [method for method in self.methods if method != "batch"]
        pairs = [(("batch", largest), ("batch", size)) for size in others]
        pairs += [((method, smallest), ("batch", smallest)) for method in rivals]
        pairs += [((method, smallest), ("batch", largest)) for method in rivals]
        pairs += [
            (("batch_group", size), (other, size))
            for size in self.batch_sizes
            for other in ("batch", "group")
        ]
        found = [
            (self.find(*cell), self.find(*baseline)) for cell, baseline in dict.fromkeys(pairs)
        ]
        return [
            _difference(cell, baseline)
            for cell, baseline in found
            if cell and baseline and not _same_run(cell, baseline)
        ]

    def save(self, folder: Path) -> None:
        """Writes results.json and results.csv, each replaced in one step: a kill leaves the old
        file or the new."""
        write(folder / "results.json", self._json())
        write(folder / "results.csv", self._csv())

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `folder` holds a result, finished or not."""
        return (folder / "results.json").exists()

    @classmethod
    def load(cls, folder: Path) -> "Result":
        """Reads back what `save` wrote; ValueError where it was cut or changed."""
        file = folder / "results.json"
        saved = read_json(file)
        try:
            cells = [
                Cell(**{key: cell[key] for key in Cell.__dataclass_fields__})
                for cell in saved["cells"]
            ]
            settings = Settings(**saved["settings"])
            if any({len(cell.validation), len(cell.test)} != {settings.seeds} for cell in cells):
                raise ValueError(f"expected {settings.seeds} accuracies in each cell")
            return cls(settings, saved["versions"], saved["machine"], cells)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is not a result of this program, and was left as it is: "
                f"{type(error).__name__}: {error}. Choose another --output."
            ) from error

    def _json(self) -> str:
        return json.dumps(
            {
                "settings": asdict(self.settings),
                "versions": self.versions,
                "machine": self.machine,
                "total_seconds": sum(
                    cell.compile_seconds + cell.train_seconds for cell in self.cells
                ),
                "cells": [
                    asdict(cell) | {"test_interval": interval(cell.test)._asdict()}
                    for cell in self.cells
                ],
                "differences": [
                    {"cell": cell.name, "baseline": baseline.name} | points._asdict()
                    for cell, baseline, points in self.differences()
                ],
            },
            indent=2,
        )

    def _csv(self) -> str:
        rows = [
            {
                "method": cell.method,
                "batch_size": cell.batch_size,
                "seed": seed,
                "validation": validation,
                "test": test,
                "compile_seconds": cell.compile_seconds,
                "train_seconds": cell.train_seconds,
                "same_run_as": cell.same_run_as,
                **asdict(self.settings),
                **self.versions,
                **self.machine,
            }
            for cell in self.cells
            for seed, (validation, test) in enumerate(zip(cell.validation, cell.test, strict=True))
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _difference(cell: Cell, baseline: Cell) -> Difference:
    by_seed = [a - b for a, b in zip(cell.test, baseline.test, strict=True)]
    return Difference(cell, baseline, interval(by_seed))


def _same_run(cell: Cell, baseline: Cell) -> bool:
    return (cell.same_run_as or cell.name) == (baseline.same_run_as or baseline.name)
