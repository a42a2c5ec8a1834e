"""What a comparison over batch sizes says, in tables."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from benchmarks.cells import Cell, Map, paired
from benchmarks.datasets import SOURCES
from benchmarks.norms import MOMENTUM, named
from benchmarks.plan import Plan
from benchmarks.residual import WIDTHS
from benchmarks.results import Interval, interval, markdown_table
from benchmarks.training import IMAGES_PER_STEP, WEIGHT_DECAY
from jaxnorm.methods import batch_group_count
from jaxnorm.methods._batch_group import BATCH_ENOUGH


class Point(NamedTuple):
    """A method at a batch size, on a data set, in a network that ends in maps of this size."""

    data: str
    last: str
    method: str
    batch_size: int


class Difference(NamedTuple):
    """Test accuracy at one point minus that at another, in points, paired by seed."""

    point: Point
    baseline: Point
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what is measured of it.

    Attributes:
        points: the cell of each; two points share one where they are the same training.
        result: the cells that are there.
    """

    points: Mapping[Point, Plan]
    result: Map

    @property
    def cells(self) -> dict[Point, Cell]:
        """Those that are measured."""
        found = ((point, self.result.cells.get(plan.key)) for point, plan in self.points.items())
        return {point: cell for point, cell in found if cell}

    @property
    def maps(self) -> list[tuple[str, str]]:
        """Data sets with their last maps."""
        return list(dict.fromkeys((point.data, point.last) for point in self.points))

    @property
    def methods(self) -> list[str]:
        """All methods, in the order in which they were asked for."""
        return list(dict.fromkeys(point.method for point in self.points))

    @property
    def sizes(self) -> list[int]:
        """All batch sizes, from small to large."""
        return sorted({point.batch_size for point in self.points})

    @property
    def size_name(self) -> str:
        """What a batch size counts."""
        steps = {plan.key.how.step for plan in self.points.values()}
        return "images per device" if steps == {IMAGES_PER_STEP} else "images per step"

    def trained_there(self, point: Point) -> bool:
        """Whether the cell of a point is named after it: not one of another method, nor one for
        all batch sizes."""
        key = self.points[point].key
        return (key.method, key.batch_size) == (point.method, point.batch_size)

    def differences(self) -> Iterator[Difference]:
        """BN's loss as the batch shrinks; every method at the smallest batch against BN; BGN
        against BN and GN everywhere."""
        *others, largest = self.sizes
        smallest = self.sizes[0]
        rivals = [method for method in self.methods if method != "batch"]
        pairs = [(("batch", largest), ("batch", size)) for size in others]
        pairs += [((method, smallest), ("batch", smallest)) for method in rivals]
        pairs += [((method, smallest), ("batch", largest)) for method in rivals]
        pairs += [
            (("batch_group", size), (other, size))
            for size, other in product(self.sizes, ("batch", "group"))
        ]
        cells = self.cells
        for place, (one, other) in product(self.maps, dict.fromkeys(pairs)):
            point, baseline = Point(*place, *one), Point(*place, *other)
            cell, against = cells.get(point), cells.get(baseline)
            if cell and against and cell.key != against.key:
                points = [-difference for difference in paired(cell, against)]
                yield Difference(point, baseline, interval(points))


def markdown(comparison: Comparison) -> str:
    """How the cells were trained, their accuracies, the paired differences, and what they do not
    show."""
    result = comparison.result
    machine = ", ".join(map(str, result.machine.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    minutes = sum(cell.seconds for cell in set_of(comparison.cells.values())) / 60
    parts = [
        "# Test accuracy when batches get small",
        f"Measured in {minutes:.0f} minutes on {machine}; {versions}.",
        _list(_protocol(comparison)),
        f"## Test accuracy in % by {comparison.size_name}",
        "Mean over seeds ± 95 % t-interval; in brackets what is no training of its own.",
        _accuracies(comparison),
    ]
    differences = _differences(comparison)
    if differences:
        parts += [
            "## Paired differences in points of test accuracy",
            "Mean over seeds ± 95 % t-interval; bold: without 0.",
            differences,
        ]
    return "\n\n".join([*parts, "## Read with care", _list(_cautions(comparison))]) + "\n"


def set_of(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once."""
    return list({cell.key: cell for cell in cells}.values())


def _list(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- **{name}**: {text}" for name, text in lines.items())


def _protocol(comparison: Comparison) -> dict[str, str]:
    lines = {}
    for name in dict.fromkeys(point.data for point in comparison.points):
        plan = next(plan for point, plan in comparison.points.items() if point.data == name)
        lines[SOURCES[name].title] = (
            f"shifted by up to a pixel; {plan.settings.train_images} images to train, "
            f"{plan.settings.epochs} epochs, {plan.seeds} seeds, each of which draws split, "
            "initial parameters, order and shifts, the same for all methods"
        )
    lines["network"] = f"residual, widths {'/'.join(map(str, WIDTHS))}"
    lines["training"] = (
        f"SGD, momentum 0.9, weight decay {WEIGHT_DECAY:g} on kernels; learning rate 0.1 per 32 "
        "images, one warm-up epoch, then cosine"
    )
    if comparison.size_name == "images per device":
        lines["protocol"] = (
            f"{IMAGES_PER_STEP} images per step over {IMAGES_PER_STEP}/b devices, simulated by "
            "jax.vmap: statistics and running averages per device, gradients averaged over "
            f"devices; evaluation uses the running averages (weight of the old value {MOMENTUM}), "
            "averaged over devices"
        )
    else:
        lines["protocol"] = (
            "b images per step on one device, so small b means more and smaller steps; evaluation "
            f"uses the running averages (weight of the old value {MOMENTUM} per step)"
        )
    if "batch_group" in comparison.methods:
        counts = ", ".join(f"b = {size}: {_group_counts(size)}" for size in comparison.sizes)
        lines["BGN groups"] = (
            f"largest divisor of C up to C b / {BATCH_ENOUGH}, so C, which is BN, from b = "
            f"{BATCH_ENOUGH} on ({counts}); our rule, as the paper's could not be read"
        )
    return lines


def _group_counts(batch_size: int) -> str:
    return "/".join(str(batch_group_count(batch_size, width)) for width in WIDTHS)


def _accuracies(comparison: Comparison) -> str:
    cells = comparison.cells
    rows = []
    for (data, last), method in product(comparison.maps, comparison.methods):
        row = [data, last, named(method).label]
        for size in comparison.sizes:
            point = Point(data, last, method, size)
            cell = cells.get(point)
            text = str(interval(cell.accuracy.running)) if cell else "–"
            row.append(text if not cell or comparison.trained_there(point) else f"({text})")
        rows.append(row)
    return markdown_table(["data", "last map", "method", *map(str, comparison.sizes)], rows)


def _differences(comparison: Comparison) -> str:
    rows = []
    for point, baseline, points in comparison.differences():
        text = f"+{points}" if points.mean >= 0 else str(points)
        excludes_zero = points.half_width is not None and abs(points.mean) > points.half_width
        names = (f"{named(p.method).label} at {p.batch_size}" for p in (point, baseline))
        rows.append([*point[:2], *names, f"**{text}**" if excludes_zero else text])
    return markdown_table(["data", "last map", "", "minus", "difference"], rows)


def _cautions(comparison: Comparison) -> dict[str, str]:
    lines = {
        "collapse": (
            "BatchNorm's collapse at 2 is seen in networks whose last map is 1x1, where its sets "
            "hold two values. With larger maps it loses little: `python -m benchmarks.failure` "
            "measures what decides."
        ),
        "failed cells": (
            "That a cell fails is reproducible, its accuracy is not, to better than tens of "
            "points: it moves with versions and compiler flags."
        ),
        "seeds": "Four settle batch size 2 of 1x1 maps; batch size 4 needs about eight.",
        "tuning": "None: learning rate and schedule are the same for all methods.",
        "intervals": (
            "They cover what a seed draws, not other data or networks; each stands alone, whatever "
            "their number."
        ),
    }
    if "instance" in comparison.methods:
        lines["InstanceNorm"] = (
            "It fails trivially on 1x1 maps, where its sets hold one value and its output is its "
            "bias."
        )
    return lines
