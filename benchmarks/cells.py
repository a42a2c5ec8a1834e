"""The cells of the map of failure and of the claims: what each trained, what it measured, and the
file that keeps them."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.files import read_json, write
from benchmarks.serving import Others, Serving
from benchmarks.training import IMAGES_PER_STEP, RATE_PER_IMAGE


class How(NamedTuple):
    """What is unlike the map of failure in a training.

    Attributes:
        step: images per step.
        order: "mixed"; "by_class", where the images of a step are sorted by label before they are
            spread over devices; "domains", where each image of a device is shifted in its own way;
            "domains_apart", where all images of a device are shifted in the same way.
        residual: whether each block has its residual path.
        norm_decay: weight decay of scales toward 1 and of biases toward 0.
        noise: standard deviation of a normal number that is added after every norm in training, one
            for each image and group of channels.
        corrupted: share of the training labels that are wrong, see `benchmarks.curricula`.
        curriculum: what weighs examples: "none", "self_paced" or "learned".
        enters: what the weights enter: "loss", "norm" (statistics) or "both".
        task: what it is trained for: "classes", or a task of `benchmarks.tasks`.
    """

    step: int = IMAGES_PER_STEP
    order: str = "mixed"
    residual: bool = True
    norm_decay: float = 0.0
    noise: float = 0.0
    corrupted: float = 0.0
    curriculum: str = "none"
    enters: str = "loss"
    task: str = "classes"

    @property
    def rate(self) -> float | None:
        """The peak learning rate: it grows with the images of a step up to 32 of them, and beyond
        with their root, as for large batches in Train longer, generalize better, 2017,
        arXiv:1705.08741. None for the rate of the map of failure."""
        if self.step <= IMAGES_PER_STEP:
            return None
        return RATE_PER_IMAGE * (IMAGES_PER_STEP * self.step) ** 0.5

    def changes(self) -> dict[str, Any]:
        """The attributes that are not as in the map of failure."""
        default = How()._asdict()
        return {name: value for name, value in self._asdict().items() if value != default[name]}


class Key(NamedTuple):
    """Which cell it is.

    Attributes:
        data: name of the data set.
        last: size of the last feature map, such as "4x4".
        method: a key of `benchmarks.plan.ROWS`, or the configuration of any method.
        batch_size: images normalized together; None where it cannot matter.
        how: what else is unlike the map of failure.
    """

    data: str
    last: str
    method: str
    batch_size: int | None
    how: How = How()

    def __str__(self) -> str:
        name = f"{self.data} {self.last} {self.method}"
        name = name if self.batch_size is None else f"{name}@{self.batch_size}"
        return " ".join([name, *(f"{name}={value}" for name, value in self.how.changes().items())])


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
        more: other values for each seed, by the measure in `benchmarks.measures` and their name.
    """

    key: Key
    settings: Settings
    layer: str
    elements: int
    accuracy: Serving
    compile_seconds: float
    train_seconds: float
    serve_seconds: float
    more: dict[str, dict[str, list[float]]] = field(default_factory=dict)

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
            cell
            for key, cell in self.cells.items()
            if (key.data, key.method, key.how) == (data, method, How())
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
        """Writes cells.json and cells.csv, each replaced in one step: a kill leaves the old file or
        the new."""
        saved = {
            "versions": self.versions,
            "machine": self.machine,
            "cells": [_saved(cell) for cell in self.cells.values()],
        }
        write(folder / "cells.json", json.dumps(saved, indent=1))
        write(folder / "cells.csv", self._csv())

    def _csv(self) -> str:
        """A row for each seed of each cell."""
        rows = [
            {
                **cell.key._asdict(),
                "how": json.dumps(cell.key.how.changes()),
                "seed": seed,
                "test_accuracy": accuracy,
                **asdict(cell.settings),
                "compile_seconds": cell.compile_seconds,
                "train_seconds": cell.train_seconds,
                "serve_seconds": cell.serve_seconds,
                **self.versions,
                **self.machine,
            }
            for cell in self.cells.values()
            for seed, accuracy in enumerate(cell.accuracy.running)
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

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
                    "key": _key(**cell["key"]),
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


def _saved(cell: Cell) -> dict[str, Any]:
    """Without what is as in the map of failure."""
    key = cell.key._asdict() | {"how": cell.key.how.changes()}
    saved = asdict(cell) | {"key": key}
    for part, name in ((key, "how"), (saved, "more")):
        if not part[name]:
            del part[name]
    return saved


def _key(how: Mapping[str, Any] = MappingProxyType({}), **rest: Any) -> Key:
    return Key(**rest, how=How(**how))


def positions(last: str) -> int:
    """How many positions a map has: 16 of "4x4"."""
    height, width = map(int, last.split("x"))
    return height * width


def paired(cell: Cell, baseline: Cell) -> list[float]:
    """Error of `cell` minus that of `baseline` in points, for the seeds that both have."""
    return [ours - theirs for ours, theirs in zip(cell.errors, baseline.errors, strict=False)]
