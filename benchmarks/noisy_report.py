"""What training on corrupted labels gave, in Markdown, from the cells that are there."""

import statistics
from collections.abc import Callable, Iterable
from itertools import product

from benchmarks.cells import Cell, How, Key, Map
from benchmarks.claims.verdicts import Difference, Finding, Term, below, holm, judge
from benchmarks.datasets import SOURCES
from benchmarks.plan import ROWS
from benchmarks.results import interval, markdown_table

WEIGHINGS = tuple(product(("self_paced", "learned"), ("loss", "norm", "both")))

NONE = "–"


def markdown(result: Map) -> str:
    """Test errors, paired differences and mean weights, for each data set."""
    machine = ", ".join(map(str, result.machine.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    found = _findings(result)
    held = dict(zip(found, holm([one.p or 0.0 for one in found.values()]), strict=True))
    parts = [
        "# Corrupted labels",
        f"Measured on {machine}; {versions}.",
        "Each entry is a mean over seeds with its 95 % t-interval. Curricula are told the share of "
        "wrong labels, and learned ones the labels of a tenth of the training images. Group norm's "
        "statistics are those of one example, in which its weight cancels, so that norm is as no "
        "weights and both as loss. The networks are small and trained for a short time.",
    ]
    for data in result.data:
        cells = {key: cell for key, cell in result.cells.items() if key.data == data}
        head = ["wrong labels", "method", "no weights", *(_title(*w) for w in WEIGHINGS)]
        bases = [key for key in cells if key.how.curriculum == "none"]
        settings = cells[bases[0]].settings if bases else next(iter(cells.values())).settings
        parts += [
            f"## {SOURCES[data].title}",
            f"{settings.train_images} training images, {settings.epochs} epochs. Test error in %:",
            markdown_table(head, (_row(key, result, _error) for key in bases)),
            "Points of test error more than without weights, paired by seed, so that below 0 "
            f"weights help. \\* marks those of the {len(found)} differences that are other than 0 "
            "in all tests together, by Holm's correction:",
            markdown_table(
                [*head[:2], *head[3:]],
                (_differences(key, found, held) for key in bases),
            ),
            "Mean weight in % of right / wrong labels in the last tenth of the training:",
            markdown_table(
                [*head[:2], *head[3:]],
                ([*r[:2], *r[3:]] for r in (_row(key, result, _weights) for key in bases)),
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _weighed(base: Key) -> Iterable[Key]:
    for curriculum, enters in WEIGHINGS:
        how = How(corrupted=base.how.corrupted, curriculum=curriculum, enters=enters)
        yield base._replace(how=how)


def _findings(result: Map) -> dict[Key, Finding]:
    """By the cell with weights, of those that can be compared."""
    found = {}
    for base in result.cells:
        for key in _weighed(base) if base.how.curriculum == "none" else ():
            one = judge(below(0, Difference([Term(1, key), Term(-1, base)])), result.cells)
            if one.p is not None:
                found[key] = one
    return found


def _title(curriculum: str, enters: str) -> str:
    return f"{curriculum.replace('_', '-')}, {enters}"


def _row(base: Key, result: Map, entry: Callable[[Cell], str]) -> list[str]:
    cells = (result.cells.get(key) for key in (base, *_weighed(base)))
    return [*_names(base), *(entry(cell) if cell else NONE for cell in cells)]


def _names(key: Key) -> list[str]:
    size = "" if key.batch_size is None else f"@{key.batch_size}"
    return [f"{key.how.corrupted:.0%}", ROWS[key.method].label + size]


def _error(cell: Cell) -> str:
    return str(interval(cell.errors))


def _weights(cell: Cell) -> str:
    sides = cell.more["weights"]
    means = (f"{statistics.fmean(v):.0f}" if v else NONE for v in (sides["right"], sides["wrong"]))
    return " / ".join(means)


def _differences(base: Key, found: dict[Key, Finding], held: dict[Key, bool]) -> list[str]:
    entries = []
    for key in _weighed(base):
        one = found[key].interval if key in found else None
        if one is None or one.half_width is None:
            entries.append(NONE)
        else:
            mark = r" \*" if held[key] else ""
            entries.append(f"{one.mean:+.1f} ± {one.half_width:.1f}{mark}")
    return [*_names(base), *entries]
