"""Fluctuations of a training: how loss and gradient norm vary from step to step, by normalization.

    python -m benchmarks.fluctuations --quick  # four cells, three seeds
    python -m benchmarks.fluctuations          # all methods of the table, five seeds, longer
    python -m benchmarks.fluctuations --plan   # what would run, and how long

Multifractal detrended fluctuation analysis of the curves after the warm-up; see
`benchmarks.fractals`. Before anything is trained, series with known exponents and of the length of
the curves are analysed, and the program ends where their exponents are not found again.

Training curves are not stationary: they fall and calm down. The analysis is of their logarithms, of
which the detrending takes a linear trend out of each window. A change of the mean or the variance
over the training is still there and looks like a wide spectrum; halves of the curve, analysed
alone, tell it from fluctuations of many kinds at all times.

Each cell is written to cells.json as soon as it is measured; a run that ends early, by --budget or
Ctrl-C, goes on with --resume.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
from rich.console import Console

from benchmarks import fluctuations_report, fractals
from benchmarks.cells import Key, Map, Settings
from benchmarks.fluctuations_report import CURVES, NAMES, PARTS
from benchmarks.measures import Values
from benchmarks.norms import TABLE
from benchmarks.options import positive
from benchmarks.plan import Plan, plan
from benchmarks.sweep import Report, add_options, loaded, measured, run
from benchmarks.training import IMAGES_PER_STEP, Trained

IMAGES = 1024
"""Training images of an epoch."""

FIRST = (("batch", 32), ("batch", 2), ("batch_group", 2), ("group", 32))
"""Methods and batch sizes of --quick."""

ALL = (*FIRST, ("batch", 8), *((name, 2) for name in TABLE))

ANALYSIS_SECONDS = 0.0015
"""What the exponents of a series take, for each 1000 of its values."""


def length(settings: Settings) -> int:
    """How many steps come after the warm-up, which is the first epoch."""
    return (settings.epochs - 1) * settings.train_images // IMAGES_PER_STEP


def analysed(trained: Trained, key: Key, *, curve: str, part: str) -> Values:
    """h(q) of a part of a curve after its warm-up, for each seed, its width and how that compares
    with surrogates."""
    if trained.curves is None:
        raise ValueError("Got a training without its curves; expected fit(..., curves=True).")
    values = np.asarray(getattr(trained.curves, curve), np.float64)
    steps = len(trained.splits[0].train.labels) // IMAGES_PER_STEP
    found: Values = {}
    for seed, series in enumerate(np.log(values[:, steps:])):
        series = PARTS[part](series)
        h = fractals.exponents(series)
        row = {f"h({q})": value for q, value in zip(fractals.Q, h.tolist(), strict=True)}
        row["width"] = fractals.width(h)
        for kind in fractals.KINDS:
            beside = fractals.excess(series, h, kind, seed)
            row |= {f"excess {kind}": beside.width, f"share {kind}": beside.share}
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


MEASURES: Mapping[str, partial[Values]] = MappingProxyType(
    {
        NAMES[curve, part]: partial(analysed, curve=curve, part=part)
        for curve in CURVES
        for part in PARTS
    }
)
"""What a cell holds beside its accuracy, by name."""


def plans(
    shapes: Mapping[str, tuple[int, int, int]], *, quick: bool, seeds: int, steps: int
) -> list[Plan]:
    """The cells to measure, the most telling first, on 1x1 maps.

    Args:
        shapes: of an image, by the name of the data set.
        quick: those of `FIRST` alone.
        seeds: of each cell.
        steps: after the warm-up, rounded up to whole epochs.
    """
    settings = Settings(IMAGES, 2048, 1 - -steps * IMAGES_PER_STEP // IMAGES)
    tried = 1 + len(fractals.KINDS) * fractals.SURROGATES
    series = 2 * length(settings) * len(CURVES)  # the whole and its halves
    seconds = ANALYSIS_SECONDS * seeds * tried * series / 1000
    found = {}
    for data, shape in shapes.items():
        for method, size in FIRST if quick else ALL:
            key = Key(data, "1x1", method, size)
            cell = plan(key, seeds, settings, shape, tuple(MEASURES), others=False)
            found.setdefault(cell.key, cell._replace(seconds=cell.seconds + seconds))
    return list(found.values())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    data = loaded(parser, args.data)
    planned = plans(
        {name: images.shape for name, images in data.items()},
        quick=args.quick,
        seeds=args.seeds or (3 if args.quick else 5),
        steps=args.steps or (2048 if args.quick else 8192),
    )
    steps = length(planned[0].settings)
    try:
        fractals.scales(steps // 2)
    except ValueError as error:
        parser.error(f"argument --steps: a half of {steps} steps is too short. {error}")
    text = ""
    if not args.plan:
        checked = [fractals.check(known, steps // 2) for known in fractals.KNOWN]
        text = fluctuations_report.known(checked, steps // 2)
        console.print(text, markup=False)
        if not all(check.holds for check in checked):
            console.print("Known exponents were not found again. Try more --steps.")
            return 1

    def report(result: Map) -> Report:
        pictures = fluctuations_report.draw(result, args.output)
        tables = fluctuations_report.markdown(result)
        return Report("fluctuations.md", text + tables, tables, pictures)

    measure = partial(measured, measures=MEASURES, curves=True)
    return run(parser, args, console, data, planned, measure, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fluctuations",
        description="Multifractal analysis of loss and gradient norm over the steps of a training.",
    )
    add = parser.add_argument
    add_options(parser, "results/fluctuations")
    add("--quick", action="store_true", help="the most telling cells alone, trained less long")
    add("--seeds", type=positive, metavar="N", help="0 to N - 1 (default: 5; with --quick: 3)")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="after the warm-up (default: 8192; with --quick: 2048)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
