"""Training on corrupted labels, with weights of examples in the loss, in the normalization or in
both.

    python -m benchmarks.noisy_labels                                     # handwritten digits
    python -m benchmarks.noisy_labels --quick                             # a first look, in minutes
    python -m benchmarks.noisy_labels --data fashion_mnist=FOLDER --plan  # what would run
    python -m benchmarks.noisy_labels --resume --budget 60                # go on, for an hour

A share of 0, 20, 40 or 80 % of the training labels is another class than the true one, each with
the same probability; test labels are right. Weights come from self-paced learning or from a small
learned curriculum, see `benchmarks.curricula`, and enter the loss, the statistics of the
normalization, or both, see `benchmarks.noisy_training`. The network is that of the map of failure
with last maps of 2x2, and 8 images share statistics, of the 32 of a step.

Group norm's statistics are those of a single example, in which its weight cancels: there weights in
the normalization are no weights, and are not trained.

Prints the test errors, their differences to the run without weights, paired by seed, and the mean
weights of right and wrong labels, and writes them to noisy_labels.md. Each cell is written to
cells.json as soon as it is measured, and `--resume` goes on from there.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from rich.console import Console

from benchmarks import noisy_training
from benchmarks.cells import Cell, How, Key, Map, Settings
from benchmarks.datasets import Data
from benchmarks.failure_plan import QUICK, SETTINGS
from benchmarks.noisy_report import markdown
from benchmarks.noisy_training import ENTERS, Noisy, Weighing
from benchmarks.options import positive
from benchmarks.plan import Plan, plan
from benchmarks.residual import ResidualNet
from benchmarks.serving import Serving, running
from benchmarks.sweep import Report, add_options, loaded, run
from benchmarks.training import IMAGES_PER_STEP

METHODS = ("batch", "batch_group", "group")

LAST, IMAGES = "2x2", 8
"""Size of the last map, and images that share statistics."""

SHARES = (0.0, 0.2, 0.4, 0.8)
"""Of corrupted labels."""

SEEDS = {8: 12, 28: 5, 32: 5}
"""By the size of the image."""


def plans(
    shapes: Mapping[str, tuple[int, int, int]], *, quick: bool = False, seeds: int | None = None
) -> list[Plan]:
    """The cells to measure, those without weights first among those of a share.

    Args:
        shapes: of an image, by the name of the data set.
        quick: one share, and weights in the loss or in both.
        seeds: of each cell; None for `SEEDS`, or 4 where it is quick.
    """
    shares, enters = ((0.4,), ("loss", "both")) if quick else (SHARES, tuple(ENTERS))
    weighings = [("none", "loss"), *product(("self_paced", "learned"), enters)]
    found = []
    for data, share, method in product(shapes, shares, METHODS):
        for curriculum, into in weighings:
            size = shapes[data][0]
            how = How(corrupted=share, curriculum=curriculum, enters=into)
            one = plan(
                Key(data, LAST, method, IMAGES, how),
                seeds or (4 if quick else SEEDS[size]),
                (QUICK if quick else SETTINGS)[size],
                shapes[data],
                ("weights",),
                others=False,
            )
            if one.key.batch_size is not None or into == "loss":
                found.append(one)
    return found


def measured(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Cell:
    """Trains and evaluates what `plan` says."""
    how = plan.key.how
    net: Any = ResidualNet(plan.layers, plan.strides, data.num_classes)
    same = net, data, plan.key.batch_size, how.corrupted, plan.settings, plan.seeds
    begin = time.perf_counter()
    mentors = _mentors(*same) if how.curriculum == "learned" else None
    learning = time.perf_counter() - begin
    weighing = Weighing(how.curriculum, how.enters, data.num_classes)
    noisy = _fit(*same, weighing, mentors, on_epoch)
    begin = time.perf_counter()
    accuracy = Serving(running(noisy.trained))
    return Cell(
        plan.key,
        plan.settings,
        str(plan.layers[-1]),
        plan.elements,
        accuracy,
        noisy.trained.compile_seconds,
        learning + noisy.trained.train_seconds,
        time.perf_counter() - begin,
        {"weights": noisy_training.mean_weights(noisy)},
    )


@cache
def _mentors(
    net: ResidualNet, data: Data, size: int | None, share: float, settings: Settings, seeds: int
) -> Any:
    """Those of all cells that differ in what weights enter, learned in a training without."""
    weighing = Weighing(num_classes=data.num_classes)
    noisy = _fit(net, data, size, share, settings, seeds, weighing, None, lambda _: None)
    return noisy_training.learned(noisy, range(seeds), data.num_classes)


def _fit(
    net: ResidualNet,
    data: Data,
    size: int | None,
    share: float,
    settings: Settings,
    seeds: int,
    weighing: Weighing,
    mentors: Any,
    on_epoch: Callable[[int], None],
) -> Noisy:
    size = size or IMAGES_PER_STEP
    return noisy_training.fit(
        net,
        range(seeds),
        weighing,
        share=share,
        data=data,
        num_train=settings.train_images,
        devices=IMAGES_PER_STEP // size,
        images_per_device=size,
        epochs=settings.epochs,
        on_epoch=on_epoch,
        num_held_out=settings.test_images,
        mentors=mentors,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    data = loaded(parser, args.data)
    shapes = {name: images.shape for name, images in data.items()}
    planned = plans(shapes, quick=args.quick, seeds=args.seeds)

    def report(result: Map) -> Report:
        return Report("noisy_labels.md", markdown(result))

    return run(parser, args, console, data, planned, measured, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noisy_labels",
        description="Training on corrupted labels, with weights of examples in the loss and in the "
        "statistics of the normalization.",
    )
    add = parser.add_argument
    add_options(parser, "results/noisy_labels")
    add("--quick", action="store_true", help="40 %% of wrong labels, trained little")
    usual = ", ".join(f"{seeds} on {size}x{size}" for size, seeds in SEEDS.items())
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"0 to N - 1 (default: {usual} images; with --quick: 4)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
