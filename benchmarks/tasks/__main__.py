"""The tasks of the batch group normalization paper, small but real, trained with each norm.

    python -m benchmarks.tasks                                  # all four, on handwritten digits
    python -m benchmarks.tasks --quick                          # a first look, in minutes
    python -m benchmarks.tasks --task adversarial few_shot      # some of them
    python -m benchmarks.tasks --data fashion_mnist=FOLDER --plan  # what would run, and how long
    python -m benchmarks.tasks --resume --budget 60             # go on, for an hour

The tasks are adversarial training, measured with projected gradient ascent (`adversarial`),
few-shot classification by prototypes (`few_shot`), unsupervised domain adaptation (`adaptation`),
and the search for a cell of mixed operations (`search`). Each file here is one of them. All train
the residual network of the other programs with batch, batch group, group, layer, instance and
positional norm, where 2, 8 or 32 images of a step share statistics.

Prints the errors, and how batch group norm's differ from those of the others, paired by seed, with
a verdict on what the paper claims, and writes them to tasks.md. Each cell is written to cells.json
as soon as it is measured, and `--resume` goes on from there.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from benchmarks.cells import Map
from benchmarks.options import positive
from benchmarks.sweep import Report, add_options, loaded, run
from benchmarks.tasks import TASKS
from benchmarks.tasks.plan import QUICK_SEEDS, SEEDS, measured, plans
from benchmarks.tasks.report import markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    data = loaded(parser, args.data)
    shapes = {name: images.shape for name, images in data.items()}
    tasks = [task for task in TASKS.values() if task.name in (args.task or TASKS)]
    planned = plans(tasks, shapes, quick=args.quick, seeds=args.seeds)

    def report(result: Map) -> Report:
        return Report("tasks.md", markdown(result))

    return run(parser, args, console, data, planned, measured, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks",
        description="The tasks of the batch group normalization paper, trained with each norm.",
    )
    add = parser.add_argument
    add_options(parser, "results/tasks")
    add("--task", nargs="+", choices=TASKS, metavar="TASK", help=f"some of {', '.join(TASKS)}")
    add("--quick", action="store_true", help="the most telling cells alone, trained little")
    usual = ", ".join(f"{seeds} on {size}x{size}" for size, seeds in SEEDS.items())
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"0 to N - 1 (default: {usual} images; with --quick: {QUICK_SEEDS})",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
