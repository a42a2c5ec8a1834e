"""How accuracy depends on the batch size: the same small network with different normalizations on
real images.

    python -m benchmarks.batch_size          # BN, BGN and GN at 2 to 32 images per device
    python -m benchmarks.batch_size --full   # seven methods, 8 seeds
    python -m benchmarks.batch_size --methods evonorm_s0 cross_iteration   # other methods by name
    python -m benchmarks.batch_size --data fashion_mnist=FOLDER            # other images

The first takes five minutes on 2 cores, the second twenty by estimate. Both train networks whose
last feature map is 1x1 and others where it is 4x4, because that decides what a small batch does.

Prints test accuracies and their paired differences, and writes them to batch_size.md, with
batch_size.png, cells.json and cells.csv. Each cell (a method at a batch size) is written as soon as
all its seeds are trained, so an interrupted run resumes with --resume.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from rich.console import Console

from benchmarks import batch_size_report
from benchmarks.batch_size_figure import draw
from benchmarks.batch_size_report import Comparison, Point
from benchmarks.cells import How, Key, Map, Settings
from benchmarks.datasets import Data
from benchmarks.failure_plan import SETTINGS
from benchmarks.norms import METHODS, TABLE
from benchmarks.options import method_among, positive
from benchmarks.plan import Plan, plan
from benchmarks.residual import STRIDES
from benchmarks.sweep import Report, add_options, loaded, measured, run
from benchmarks.training import IMAGES_PER_STEP


class Preset(NamedTuple):
    """Values of the options that are not given."""

    methods: tuple[str, ...]
    seeds: int


QUICK = Preset(methods=("batch", "batch_group", "group"), seeds=4)
FULL = Preset(methods=TABLE, seeds=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = make_parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    data = loaded(parser, args.data)
    points = compared(parser, args, data)
    planned = list({plan.key: plan for plan in points.values()}.values())

    def report(result: Map) -> Report:
        comparison = Comparison(points, result)
        draw(comparison, args.output / "batch_size.png")
        text = batch_size_report.markdown(comparison)
        return Report("batch_size.md", text, pictures=["batch_size.png"])

    return run(parser, args, console, data, planned, measured, report)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batch_size",
        description=(
            "Trains the same small network with different normalizations at different batch sizes."
        ),
    )
    add = parser.add_argument
    add_options(parser, "results/batch_size")
    add("--full", action="store_true", help="seven methods, 8 seeds: about twenty minutes")
    add(
        "--methods",
        nargs="+",
        type=method_among(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)}, or others as evonorm_s0:8",
    )
    add(
        "--batch-sizes",
        nargs="+",
        type=positive,
        default=[2, 4, 8, 16, 32],
        metavar="B",
        help="images normalized together (default: 2 4 8 16 32)",
    )
    add(
        "--maps",
        nargs="+",
        choices=list(dict.fromkeys(last for strides in STRIDES.values() for last in strides)),
        default=["1x1", "4x4"],
        metavar="MAP",
        help="sizes of the last feature map (default: 1x1 4x4)",
    )
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="train with seeds 0 to N - 1 (default: 4; with --full: 8)",
    )
    add("--epochs", type=positive, metavar="N", help="at least 2 (default: 20; 8 of large images)")
    add(
        "--train-images",
        type=positive,
        metavar="N",
        help="of digits the rest tests (default: 1024; 4096 of large images)",
    )
    add(
        "--protocol",
        choices=("devices", "batch"),
        default="devices",
        help=(
            f"devices: {IMAGES_PER_STEP} images per step on {IMAGES_PER_STEP}/B simulated devices; "
            "batch: B images per step on one device (default: %(default)s)"
        ),
    )
    return parser


def compared(
    parser: argparse.ArgumentParser, args: argparse.Namespace, data: Mapping[str, Data]
) -> dict[Point, Plan]:
    """What is compared, and the cell that measures it: one alone where the batch size cannot
    matter, and where two methods are the same there. Options that do not fit together are
    refused."""
    preset = FULL if args.full else QUICK
    if args.epochs == 1:
        parser.error(
            "argument --epochs: expected at least 2, because the first epoch only warms the "
            "learning rate up"
        )
    points: dict[Point, Plan] = {}
    trained: dict[tuple[object, ...], Plan] = {}
    for name, images in data.items():
        settings = _settings(args, images)
        available = len(images.train.labels)
        spare = 1 if images.test else 2
        if settings.train_images > available - spare:
            parser.error(
                f"argument --train-images: {name} has {available} images to train and validate on, "
                f"and {spare} or more are needed for evaluation"
            )
        for last, method, size in product(
            dict.fromkeys(args.maps),
            dict.fromkeys(args.methods or preset.methods),
            sorted(set(args.batch_sizes)),
        ):
            if last not in STRIDES[images.shape[0]]:
                parser.error(f"argument --maps: no network for {name} ends in maps of {last}")
            step = IMAGES_PER_STEP if args.protocol == "devices" else size
            if step % size:
                parser.error(
                    f"argument --batch-sizes: {size} does not divide the {step} images of a step"
                )
            if settings.train_images % step:
                parser.error(
                    f"argument --train-images: {settings.train_images} is not a multiple of {step} "
                    "images per step"
                )
            key = Key(name, last, method, size, How(step=step))
            seeds = args.seeds or preset.seeds
            try:
                cell = plan(key, seeds, settings, images.shape, others=False)
            except ValueError as error:  # the method does not split the channels or the batch
                parser.error(f"argument --methods: {method}: {error}")
            same = (cell.key._replace(method=""), cell.layers)
            points[Point(name, last, method, size)] = trained.setdefault(same, cell)
    return points


def _settings(args: argparse.Namespace, images: Data) -> Settings:
    default = SETTINGS[images.shape[0]]
    return Settings(
        args.train_images or default.train_images,
        default.test_images,
        args.epochs or default.epochs,
    )


if __name__ == "__main__":
    raise SystemExit(main())
