"""Tables of what `benchmarks.speed` measured: on the terminal, in Markdown and as CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.cases import GOALS, KINDS, OTHERS, OURS, Case, Ratio, grouped, mean
from benchmarks.libraries import METHODS

Rows = list[list[str]]
"""A table: the column heads, then a row of texts each."""

NONE = "–"

MISSED = "▲ "
"""Before a ratio to Flax that misses the goal of `GOALS` with its whole interval."""

CAPTION = (
    "Ratios are our time over theirs, below 1 where we are faster, with a 95 % interval in "
    "brackets; a / b is forward / step. / Flax: the faster of linen and nnx, which is named; "
    f"{MISSED}the whole interval is above {GOALS['forward']:.2f} forward or {GOALS['step']:.2f} in "
    "a step. Temporaries and kept, over the bytes of x: ours / least of the other JAX libraries. "
    "Compile: CPU seconds, ours / flax.linen. Summary: geometric means over shapes; worst ratio to "
    f"the best JAX library; how many shapes have {MISSED.strip()}; most temporaries and kept of "
    "ours."
)


def tables(cases: Sequence[Case]) -> dict[str, Rows]:
    """Titles and tables: one for each method and dtype, and the summary. Columns of what was not
    measured are left out."""
    others = [other for other in OTHERS if other != "Flax"]
    heads = ["shape", "ms", *(f"/ Flax, {kind}" for kind in KINDS)]
    heads += [
        *(f"/ {other}" for other in others),
        "temporaries",
        "kept",
        "compile CPU s",
        "compile / Flax",
    ]
    found = {}
    for (method, dtype), group in grouped(cases):
        found[f"{METHODS[method]}, {dtype}"] = [heads, *(_row(case, others) for case in group)]
    found["Summary"] = _summary(cases)
    return {title: _measured(rows) for title, rows in found.items()}


def _measured(rows: Rows) -> Rows:
    """Without the columns that have no cell."""
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {NONE}]
    return [list(row) for row in zip(*columns, strict=True)]


def _row(case: Case, others: Sequence[str]) -> list[str]:
    cells = [case.shape, _pair(case.time(OURS, kind) * 1e3 for kind in KINDS)]
    cells += [_over_flax(case, kind) for kind in KINDS]
    for other in others:
        ratios = [case.over(other, kind) for kind in KINDS]
        cells.append(_pair(ratio and ratio.median for ratio in ratios))
    for numbers in (case.temporary, case.kept):
        least = (number for name, number in numbers.items() if name != OURS)
        cells.append(_pair([numbers[OURS], min(least, default=None)]))
    compiling = case.compiling()
    cells.append(_pair(np.median(times["cpu"]) for times in case.compile_seconds.values()))
    return [*cells, _with_interval(compiling) if compiling else NONE]


def _over_flax(case: Case, kind: str) -> str:
    ratio, rival = case.over("Flax", kind), case.fastest(OTHERS["Flax"], kind)
    if ratio is None or rival is None:
        return NONE
    mark = MISSED if case.misses(kind) else ""
    return f"{mark}{_with_interval(ratio)} {rival.removeprefix('flax.')}"


def _with_interval(ratio: Ratio) -> str:
    interval = "" if math.isnan(ratio.low) else f" [{ratio.low:.2f}, {ratio.high:.2f}]"
    return f"{ratio.median:.2f}{interval}"


def _pair(numbers: Iterable[float | None]) -> str:
    texts = [NONE if number is None else f"{number:.2f}" for number in numbers]
    return " / ".join(texts) if set(texts) - {NONE} else NONE


def _summary(cases: Sequence[Case]) -> Rows:
    heads = ["method", "dtype", "shapes", *(f"/ {other}" for other in OTHERS)]
    heads += [f"worst {kind}" for kind in KINDS]
    rows = [[*heads, MISSED.strip(), "temporaries", "kept", "compile / Flax"]]
    for (method, dtype), group in grouped(cases):
        cells = [method, dtype, str(len(group))]
        for other in OTHERS:
            cells.append(_pair(mean(case.over(other, kind) for case in group) for kind in KINDS))
        for kind in KINDS:
            ratios = [(case.over("best JAX", kind), case.shape) for case in group]
            worst = max(
                ((ratio.median, shape) for ratio, shape in ratios if ratio), default=(None, None)
            )
            cells.append("{:.2f} {}".format(*worst) if worst[0] else NONE)
        cells.append(" / ".join(str(sum(case.misses(kind) for case in group)) for kind in KINDS))
        for field in ("temporary", "kept"):
            cells.append(f"{max(getattr(case, field)[OURS] for case in group):.2f}")
        rows.append([*cells, _pair([mean(case.compiling() for case in group)])])
    return rows


def print_tables(console: Console, all_rows: Mapping[str, Rows]) -> None:
    """Prints the tables."""
    for title, (heads, *rows) in all_rows.items():
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head in heads:
            table.add_column(head, no_wrap=True)
        for row in rows:
            # Brackets are those of intervals, not rich's.
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        console.print(table, highlight=False)


def markdown(all_rows: Mapping[str, Rows]) -> str:
    """The tables in Markdown."""
    parts = []
    for title, (heads, *rows) in all_rows.items():
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def as_csv(cases: Sequence[Case]) -> str:
    """A line for each library at each case."""
    text = io.StringIO()
    heads = ["method", "shape", "dims", "dtype", "library", *(f"{kind}_ms" for kind in KINDS)]
    heads += [f"{kind}_{part}" for kind in KINDS for part in ("ratio", "low", "high")]
    heads += ["temporary", "kept", "compile_cpu_s", "compile_wall_s"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for case in cases:
        for name in case.seconds:
            line = [case.method, case.shape, "x".join(map(str, case.dims)), case.dtype, name]
            line += [f"{case.time(name, kind) * 1e3:.5g}" for kind in KINDS]
            numbers = [number for kind in KINDS for number in case.ratio(name, kind) or ()]
            numbers += [case.temporary.get(name), case.kept.get(name)]
            samples = case.compile_seconds.get(name, {})
            numbers += [np.median(samples[clock]) if samples else None for clock in ("cpu", "wall")]
            line += [
                "" if number is None or math.isnan(number) else f"{number:.4g}"
                for number in numbers
            ]
            writer.writerow(line)
    return text.getvalue()
