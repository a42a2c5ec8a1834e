"""Tries claims of the papers on normalization: each by paired differences over seeds.

    python -m benchmarks.claims --list                     # the claims, and how long they take
    python -m benchmarks.claims                            # all of them, on handwritten digits
    python -m benchmarks.claims --quick                    # all of them, a first look in 10 minutes
    python -m benchmarks.claims group_norm_flat proxy_norm_group       # some of them
    python -m benchmarks.claims --data digits fashion_mnist=FOLDER     # on Fashion-MNIST as well
    python -m benchmarks.claims --resume --budget 60       # go on, for an hour
    python -m benchmarks.claims --report                   # the report of the cells that are there

Prints each claim with its source, what was measured and the verdict, and writes the report of all
claims that have cells to claims.md. Each cell, a network trained with several seeds, is written to
cells.json as soon as it is measured; claims share cells, and `--resume` goes on from there.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console

from benchmarks.cells import Map
from benchmarks.claims import CLAIMS
from benchmarks.claims.plan import QUICK_SEEDS, SEEDS, plans
from benchmarks.claims.report import markdown, section, tried
from benchmarks.claims.verdicts import MISSING
from benchmarks.options import positive
from benchmarks.sweep import Report, add_options, loaded, measured, print_plan, run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with the options `argv`, by default those of the command line, and returns
    its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    args.resume |= args.report
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        parser.error(f"no claim {unknown[0]!r}: expected some of {', '.join(CLAIMS)}")
    claims = [CLAIMS[name] for name in args.claims or CLAIMS]
    data = loaded(parser, args.data)
    shapes = {name: images.shape for name, images in data.items()}
    if args.list:
        for claim in claims:
            needed = plans([claim], shapes, quick=args.quick, seeds=args.seeds)
            minutes = sum(plan.seconds for plan in needed) / 60
            console.print(
                f"{claim.name}: {claim.text}\n    {claim.source}\n    {len(needed)} cells, about "
                f"{minutes:.0f} minutes if no other claim has them",
                markup=False,
            )
    planned = plans(claims, shapes, quick=args.quick, seeds=args.seeds)
    if args.list:
        print_plan(console, planned, len(planned), False)
        return 0

    def report(result: Map) -> Report:
        shown = [
            section(one, result) + "\n\n"
            for one in tried(result, CLAIMS.values())
            if one.claim in claims and one.verdict != MISSING
        ]
        return Report("claims.md", markdown(result, CLAIMS.values()), "".join(shown))

    measure = None if args.report else measured
    return run(parser, args, console, data, planned, measure, report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description="Tries claims of the papers on normalization.",
    )
    add = parser.add_argument
    add("claims", nargs="*", metavar="CLAIM", help="names of --list (default: all)")
    add("--list", action="store_true", help="print the claims and how long they take, and end")
    add("--quick", action="store_true", help="the first checks of each claim, trained little")
    usual = ", ".join(f"{seeds} on {size}x{size}" for size, seeds in SEEDS.items())
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"0 to N - 1 (default: {usual} images; with --quick: {QUICK_SEEDS})",
    )
    add(
        "--report",
        action="store_true",
        help="measure nothing: the report of the cells that are there",
    )
    add_options(parser, "results/claims")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
