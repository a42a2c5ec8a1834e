"""What the tasks gave, in Markdown, from the cells that are there."""

import textwrap
from collections.abc import Iterable

from benchmarks.cells import Cell, Map
from benchmarks.claims.verdicts import (
    MISSING,
    MIXED,
    Finding,
    below,
    error,
    holm,
    judge,
    together,
)
from benchmarks.datasets import SOURCES
from benchmarks.plan import ROWS
from benchmarks.results import interval, markdown_table
from benchmarks.tasks import TASKS
from benchmarks.tasks.plan import ALL, LAST
from benchmarks.tasks.record import CLAIM, PAPER, Task, Value
from benchmarks.training import IMAGES_PER_STEP

OURS = "batch_group"

LIMITS = (
    "Small networks on small images, trained for a short time without tuning any method; a few "
    "seeds. What is not seen here may well hold at the scale of the paper, and what is seen need "
    "not. The paper chooses the number of groups for each batch; this library has a rule, by which "
    "batch group norm is batch norm from 16 images on, so that the claim is tried below."
)


def markdown(result: Map) -> str:
    """A section for each task and data set."""
    machine = ", ".join(map(str, result.machine.values()))
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    found = {
        (task.name, data): _findings(result, task, data)
        for data in result.data
        for task in TASKS.values()
    }
    tested = [one for findings in found.values() for _, one in findings if one.p is not None]
    held = dict(zip(map(id, tested), holm([one.p or 0.0 for one in tested]), strict=True))
    parts = [
        "# The tasks of the batch group normalization paper",
        f"Measured by `python -m benchmarks.tasks` on {machine}; {versions}.",
        f"**{CLAIM}** {PAPER}, from its abstract. Its tables could not be read, so that no figure "
        "of it stands beside ours: that of the abstract is of classification (ResNet-50, ImageNet, "
        "2 images: 76.096 % right, batch norm 66.512).",
        f"Steps of {IMAGES_PER_STEP} images are spread over simulated devices, of which each has "
        "the named number of images that share statistics; the network, but for that of the "
        f"search, is that of the map of failure with last maps of {LAST}. Entries are errors in %, "
        "means over seeds with their 95 % t-interval.",
        "Differences are those of batch group norm's error to another's in points, paired by "
        "seed: below 0 it does better, as claimed. A difference is *seen* where its interval lies "
        "wholly below 0, *not seen* where it lies wholly above, and else *mixed*; so is a claim "
        f"whose differences differ. {len(tested)} differences were tested, of which "
        f"{sum(one.decided for one in tested)} are decided alone and {sum(held.values())} in all "
        'tests together, by Holm\'s correction; the others are marked "(alone)".',
        LIMITS,
        _summary(result, found, held),
    ]
    for data in result.data:
        for task in TASKS.values():
            parts += _section(result, task, data, found[task.name, data], held)
    return "\n\n".join(_wrapped(part) for part in parts if part) + "\n"


Findings = list[tuple[Value, Finding]]


def _findings(result: Map, task: Task, data: str) -> Findings:
    """Of batch group norm against every other method at the same number of images."""
    found = []
    for value in task.values:
        for size in sorted({size for name, size in ALL if name == OURS and size}):
            for name, other in ALL if value.claimed else ():
                if name == OURS or other not in (size, None):
                    continue
                terms = (
                    error(method, images, LAST, _measure(task, value), task=task.name)
                    for method, images in ((OURS, size), (name, other))
                )
                ours, theirs = terms
                one = judge(below(0, ours - theirs).on(data), result.cells)
                if one.verdict != MISSING:
                    found.append((value, one))
    return found


def _measure(task: Task, value: Value) -> str:
    return "error" if value.name == "error" else f"{task.name}.{value.name}"


def _summary(result: Map, found: dict[tuple[str, str], Findings], held: dict[int, bool]) -> str:
    rows = []
    for (name, data), findings in found.items():
        if findings:
            alone = together(one.verdict for _, one in findings)
            strict = together(
                MIXED if one.decided and not held.get(id(one)) else one.verdict
                for _, one in findings
            )
            rows.append([TASKS[name].title, SOURCES[data].title, len(findings), alone, strict])
    return markdown_table(["task", "data", "differences", "verdict", "all tests together"], rows)


def _section(
    result: Map, task: Task, data: str, findings: Findings, held: dict[int, bool]
) -> Iterable[str]:
    cells = [
        cell for key, cell in result.cells.items() if (key.data, key.how.task) == (data, task.name)
    ]
    if not cells:
        return
    settings = cells[0].settings
    yield f"## {task.title}: {SOURCES[data].title}"
    yield task.text
    yield f"{settings.train_images} training images, {settings.epochs} epochs."
    yield markdown_table(
        ["method", "images", *(value.head for value in task.values), "seeds"],
        [
            [
                ROWS[cell.key.method].label,
                cell.key.batch_size or "any",
                *(interval(_of(cell, task, value)) for value in task.values),
                len(cell.errors),
            ]
            for cell in cells
        ],
    )
    yield markdown_table(
        ["batch group norm at", "minus", "of", "difference", "p", "verdict"],
        [_difference(value, one, held.get(id(one), False)) for value, one in findings],
    )
    verdict = together(one.verdict for _, one in findings)
    yield f"The claim that batch group norm does better: **{verdict}**. Limits: {task.limits}"


def _of(cell: Cell, task: Task, value: Value) -> list[float]:
    return cell.errors if value.name == "error" else cell.more[task.name][value.name]


def _difference(value: Value, one: Finding, held: bool) -> list[object]:
    ours, theirs = (term.key for term in one.check.difference)
    size = "" if theirs.batch_size is None else f" at {theirs.batch_size}"
    found = one.interval
    return [
        ours.batch_size,
        ROWS[theirs.method].label + size,
        value.head,
        f"{found.mean:+.1f} ± {found.half_width:.1f}" if found and found.half_width else "–",
        "–" if one.p is None else f"{one.p:.2g}",
        f"{one.verdict} (alone)" if one.decided and not held else one.verdict,
    ]


def _wrapped(part: str) -> str:
    """A paragraph in lines of at most 100 characters; tables and headings as they are."""
    return part if part.startswith(("#", "|")) else textwrap.fill(part, 100)
