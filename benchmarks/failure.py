"""The map of failure: where batch normalization fails, by how many elements share a statistic.

    python -m benchmarks.failure                                     # handwritten digits
    python -m benchmarks.failure --data digits fashion_mnist=FOLDER  # and Fashion-MNIST
    python -m benchmarks.failure --quick                             # a first look, in minutes
    python -m benchmarks.failure --plan                              # what would run, and how long

The same small network is trained with statistics of 2, 4, 8 and 32 images, and with strides that
leave from 1 to 64 positions in its last maps. There a statistic of batch normalization has n =
images x positions elements. If n decides, the errors of a method lie on one curve over n, whatever
the images and the positions.

Each cell is written to cells.json as soon as it is measured, the most telling first: a run that
ends early, by --budget or Ctrl-C, has its figure too, and goes on with --resume.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from benchmarks import failure_report
from benchmarks.cells import Map
from benchmarks.failure_figure import draw
from benchmarks.failure_plan import plans
from benchmarks.options import count, number, positive
from benchmarks.sweep import Report, add_options, loaded, measured, run


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
        extra_seeds=0 if args.quick else args.extra_seeds,
        gradients=args.gradients,
    )

    def report(result: Map) -> Report:
        draw(result, args.points, args.output / "failure.png")
        text = failure_report.markdown(result, args.points)
        return Report("failure.md", text, pictures=["failure.png"])

    return run(parser, args, console, data, planned, measured, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.failure",
        description="Test error by how many elements share a statistic in the last stage.",
    )
    add = parser.add_argument
    add_options(parser, "results/failure")
    add("--quick", action="store_true", help="the most telling cells alone, trained little")
    add(
        "--gradients",
        action="store_true",
        help="measure as well how gradients of two steps agree, of BN, GN and BGN at 2 and 32 "
        "images on 1x1 and 4x4 maps; cells without it are trained anew",
    )
    add("--seeds", type=positive, metavar="N", help="0 to N - 1 (default: 5; with --quick: 3)")
    add(
        "--extra-seeds",
        type=count,
        default=3,
        metavar="N",
        help="of methods at two images alone; 0 leaves them out (default: %(default)s)",
    )
    add(
        "--points",
        type=number(above=0),
        default=failure_report.POINTS,
        metavar="P",
        help="the threshold is where the error is P points above group norm's (default: "
        "%(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
