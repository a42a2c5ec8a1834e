"""The cells of the map of failure: what each trained, what it measured, and the file that keeps
them."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.files import read_json, write
from benchmarks.serving import Others, Serving


class Key(NamedTuple):
    """Which cell it is.

    Attributes:
        data: name of the data set.
        last: size of the last feature map, such as "4x4".
        method: a key of `benchmarks.failure_plan.ROWS`.
        batch_size: images normalized together; None where it cannot matter.
    """

    data: str
    last: str
    method: str
    batch_size: int | None

    def __str__(self) -> str:
        name = f"{self.data} {self.last} {self.method}"
        return name if self.batch_size is None else f"{name}@{self.batch_size}"


@dataclass(frozen=True)
class Settings:
    """How a data set is trained on; `test_images` is None for all there are."""

    train_images: int
    test_images: int | None
    epochs: int


@dataclass(frozen=True)
class Cell:
    """One method at one batch size and map, trained once per seed.

    Attributes:
        key: which cell it is.
        settings: how it was trained.
        layer: the method in the last stage, printed.
        elements: how many share a statistic in training in the last stage.
        accuracy: measured on test images, for each seed from 0 on.
        compile_seconds: spent on tracing, compiling and initializing the training.
        train_seconds: spent on training, all seeds together.
        serve_seconds: spent on evaluating, with its compilation.
    """

    key: Key
    settings: Settings
    layer: str
    elements: int
    accuracy: Serving
    compile_seconds: float
    train_seconds: float
    serve_seconds: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return self.compile_seconds + self.train_seconds + self.serve_seconds

    @property
    def errors(self) -> list[float]:
        """Test error in % with the running statistics, for each seed."""
        return [100 - value for value in self.accuracy.running]


@dataclass
class Map:
    """All cells that are there.

    Attributes:
        versions: of the packages.
        machine: that measured.
        cells: in the order in which they were measured.
    """

    versions: dict[str, str]
    machine: dict[str, str | int | None]
    cells: dict[Key, Cell] = field(default_factory=dict)

    def add(self, cell: Cell) -> None:
        """Adds a cell, or replaces the one of its key."""
        self.cells[cell.key] = cell

    def of(self, data: str, method: str) -> list[Cell]:
        """Cells of a method on a data set, from few elements to many."""
        found = (
            cell for key, cell in self.cells.items() if (key.data, key.method) == (data, method)
        )
        return sorted(found, key=lambda cell: (cell.elements, cell.key.last))

    def find(self, data: str, last: str, method: str, batch_size: int | None) -> Cell | None:
        """The cell of a method at a batch size, which is its only one where that does not
        matter."""
        keys = (Key(data, last, method, size) for size in (batch_size, None))
        return next((self.cells[key] for key in keys if key in self.cells), None)

    @property
    def data(self) -> list[str]:
        """The data sets that occur."""
        return list(dict.fromkeys(key.data for key in self.cells))

    def maps(self, data: str) -> list[str]:
        """Sizes of the last map that occur on a data set, from small to large."""
        return sorted({key.last for key in self.cells if key.data == data}, key=positions)

    def save(self, folder: Path) -> None:
        """Writes cells.json, replaced in one step: a kill leaves the old file or the new."""
        saved = {
            "versions": self.versions,
            "machine": self.machine,
            "cells": [asdict(cell) | {"key": cell.key._asdict()} for cell in self.cells.values()],
        }
        write(folder / "cells.json", json.dumps(saved, indent=1))

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether `folder` holds cells."""
        return (folder / "cells.json").exists()

    @classmethod
    def load(cls, folder: Path) -> "Map":
        """Reads back what `save` wrote; ValueError where it was cut or changed."""
        file = folder / "cells.json"
        saved = read_json(file)
        try:
            found = cls(saved["versions"], saved["machine"])
            for cell in saved["cells"]:
                running, others = (cell["accuracy"][name] for name in ("running", "others"))
                parts = {
                    "key": Key(**cell["key"]),
                    "settings": Settings(**cell["settings"]),
                    "accuracy": Serving(running, Others(**others) if others else None),
                }
                found.add(Cell(**{**cell, **parts}))
            return found
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file} holds no cells of this program, and was left as it is: "
                f"{type(error).__name__}: {error}. Choose another --output."
            ) from error


def positions(last: str) -> int:
    """How many positions a map has: 16 of "4x4"."""
    height, width = map(int, last.split("x"))
    return height * width


def paired(cell: Cell, baseline: Cell) -> list[float]:
    """Error of `cell` minus that of `baseline` in points, for the seeds that both have."""
    return [ours - theirs for ours, theirs in zip(cell.errors, baseline.errors, strict=False)]
