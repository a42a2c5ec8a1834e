"""What the map of failure says, in tables."""

from collections.abc import Iterable, Sequence

from benchmarks.cells import Cell, Map, paired, positions
from benchmarks.datasets import SOURCES
from benchmarks.failure_plan import CURVES, EXTRAS
from benchmarks.measures import AGREEMENT_STEPS
from benchmarks.plan import ROWS
from benchmarks.results import interval, markdown_table
from benchmarks.threshold import Threshold, threshold
from benchmarks.training import IMAGES_PER_STEP

POINTS = 1.0
"""Loss in points of test error that counts as failure."""


def markdown(result: Map, points: float = POINTS) -> str:
    """All tables of the cells that are there."""
    machine = ", ".join(map(str, result.machine.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [
        f"Measured on {machine}; {versions}.",
        f"{IMAGES_PER_STEP} images per step over {IMAGES_PER_STEP}/b simulated devices, each with "
        "statistics of b images. n: elements that share a statistic in the last stage. Test error "
        "in %, mean over seeds ± 95 % t-interval.",
    ]
    for data in result.data:
        parts += [f"## {SOURCES[data].title}", *_sections(result, data, points)]
    return "\n\n".join(parts) + "\n"


def _sections(result: Map, data: str, points: float) -> Iterable[str]:
    settings = next(cell.settings for key, cell in result.cells.items() if key.data == data)
    yield f"{settings.train_images} training images, {settings.epochs} epochs."
    yield _errors(result, data)
    for title, rows in (
        ("### One curve?", _same_n(result, data)),
        ("### Threshold", _thresholds(result, data, points)),
        ("### Why", _why(result, data)),
        ("### Gradient noise", _gradients(result, data)),
        ("### Other methods at two images", _extras(result, data)),
    ):
        if rows:
            yield title
            yield rows


def _errors(result: Map, data: str) -> str:
    """Rows are maps and batches."""
    shown = [method for method in CURVES if result.of(data, method)]
    sizes = sorted({key.batch_size for key in result.cells if key.batch_size is not None})
    rows = []
    for last in result.maps(data):
        for size in sizes:
            found = {method: result.find(data, last, method, size) for method in shown}
            if size >= 16 and "batch_group" in found:  # it is batch norm there
                found["batch_group"] = found["batch_group"] or found.get("batch")
            if any(cell and cell.key.batch_size for cell in found.values()):
                n = size * positions(last)
                rows.append([last, size, n, *(_error(found[method]) for method in shown)])
    return markdown_table(
        ["last map", "b", "b x positions", *(ROWS[name].label for name in shown)], rows
    )


def _error(cell: Cell | None) -> str:
    return str(interval(cell.errors)) if cell else "–"


def excess(result: Map, cell: Cell) -> list[float] | None:
    """Error above group norm's on the same maps in points, by seed; None without that cell."""
    group = result.find(cell.key.data, cell.key.last, "group", None)
    return paired(cell, group) if group else None


def _same_n(result: Map, data: str) -> str:
    """Batch norm's errors on different maps at the same n, and its losses to group norm there."""
    cells = [(cell, loss) for cell in result.of(data, "batch") if (loss := excess(result, cell))]
    rows = []
    for index, (one, loss) in enumerate(cells):
        for other, other_loss in cells[index + 1 :]:
            if one.elements == other.elements:
                losses = [a - b for a, b in zip(loss, other_loss, strict=True)]
                rows.append(
                    [one.elements]
                    + [f"{c.key.last}, b = {c.key.batch_size}" for c in (one, other)]
                    + [interval(values) for values in (one.errors, other.errors)]
                    + [interval(values) for values in (paired(one, other), losses)]
                )
    head = ["n", "batch norm on", "and on", "error", "and", "difference"]
    return markdown_table([*head, "difference of losses to group norm"], rows)


def batch_norm_threshold(result: Map, data: str, points: float) -> Threshold | None:
    """The n below which batch norm's error is `points` above group norm's, over all maps."""
    return _threshold([(c, excess(result, c)) for c in result.of(data, "batch")], points)


def _threshold(
    losses: Sequence[tuple[Cell, list[float] | None]], points: float
) -> Threshold | None:
    found = [(cell.elements, loss) for cell, loss in losses if loss]
    return threshold(found, points) if len({n for n, _ in found}) > 1 else None


def _thresholds(result: Map, data: str, points: float) -> str:
    rows = []
    for method in ("batch", "batch_renorm"):
        cells = result.of(data, method)
        for last in (None, *result.maps(data)):
            chosen = [cell for cell in cells if last in (None, cell.key.last)]
            against_group = _threshold([(c, excess(result, c)) for c in chosen], points)
            itself = [(c, result.find(data, c.key.last, method, IMAGES_PER_STEP)) for c in chosen]
            against_itself = _threshold(
                [(c, paired(c, base)) for c, base in itself if base], points
            )
            if against_group or against_itself:
                name = last or "all"
                found = (against_group or "–", against_itself or "–")
                rows.append([ROWS[method].label, name, *found])
    table = markdown_table(
        ["method", "maps", "against group norm", f"against itself at {IMAGES_PER_STEP} images"],
        rows,
    )
    explained = (
        f"The n at which the error is {points:g} point{'s' * (points != 1)} above, interpolated "
        "on a log axis between the sizes that were measured next to it; below it the method loses "
        "more. The interval is 95 % of a bootstrap over seeds: it does not know what lies between "
        "the sizes. 0: less than that everywhere; inf: more than that everywhere."
    )
    return table and f"{explained}\n\n{table}"


def _why(result: Map, data: str) -> str:
    """Errors with other statistics at test time, for what remembers those of batches."""
    rows = []
    for method in ("batch", "batch_group"):
        for cell in result.of(data, method):
            others, size = cell.accuracy.others, cell.key.batch_size
            if others and size:
                population, batch = (
                    [100 - value for value in values]
                    for values in (others.population, others.batch)
                )
                mismatch = [a - b for a, b in zip(cell.errors, population, strict=True)]
                effective = size * interval(others.effective_positions).mean
                rows.append(
                    [ROWS[method].label, cell.key.last, size, size * positions(cell.key.last)]
                    + [f"{effective:.3g}", f"{interval(others.variance_ratio).mean:.2f}"]
                    + [interval(values) for values in (cell.errors, population, batch, mismatch)]
                )
    head = ["method", "last map", "b", "n", "effective n", "running / population variance"]
    head += ["running statistics", "population's", "each test batch's", "running - population"]
    return markdown_table(head, rows)


def _gradients(result: Map, data: str) -> str:
    """How alike the gradients of two steps are, where that was measured."""
    rows = []
    for method in CURVES:
        for cell in result.of(data, method):
            found = cell.more.get("gradient_agreement")
            if found:
                start, end = (interval(found[name]).text(2) for name in ("start", "end"))
                rows.append(
                    [ROWS[method].label, cell.key.last, cell.key.batch_size or "any", start, end]
                )
    table = markdown_table(["method", "last map", "b", "at the start", "at the end"], rows)
    explained = (
        f"The mean cosine between the gradients of steps with other images ({AGREEMENT_STEPS} "
        "steps): 1 without gradient noise, 0 where noise is all there is."
    )
    return table and f"{explained}\n\n{table}"


def _extras(result: Map, data: str) -> str:
    """Rows are methods, columns maps."""
    maps = result.maps(data)
    rows = []
    for method in (*CURVES, *EXTRAS):
        cells = [result.find(data, last, method, 2) for last in maps]
        if any(cells) and (method in EXTRAS or any(result.of(data, name) for name in EXTRAS)):
            rows.append([ROWS[method].label, *map(_error, cells)])
    return markdown_table(["at two images", *maps], rows)
