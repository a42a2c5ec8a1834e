"""The cells that claims need."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from benchmarks.cells import Key
from benchmarks.claims.record import Claim
from benchmarks.failure_plan import QUICK, SETTINGS
from benchmarks.plan import Plan, plan

SEEDS = {8: 12, 28: 5, 32: 5}
"""By the size of the image."""

QUICK_SEEDS = 4

LARGE_STEP = 128
"""Images of a step from which on there are as many steps, not as many epochs."""


def plans(
    claims: Iterable[Claim],
    shapes: Mapping[str, tuple[int, int, int]],
    *,
    quick: bool = False,
    seeds: int | None = None,
) -> list[Plan]:
    """The cells to measure, each once with all that any claim asks of it, in the order of claims.

    Args:
        claims: some or all.
        shapes: of an image, by the name of the data set.
        quick: for the first checks of each claim, each cell trained little.
        seeds: of each cell; None for `SEEDS`, or `QUICK_SEEDS`.
    """
    asked: dict[Key, set[str]] = {}
    for data, shape in shapes.items():
        for claim in claims:
            for check in claim.tried(data, quick=quick) if shape[0] in claim.sizes else ():
                for term in check.difference:
                    measures = asked.setdefault(term.key, set())
                    if term.measure is not None:
                        measures.add(term.measure)
    return [
        _plan(key, sorted(measures), shapes[key.data], quick, seeds)
        for key, measures in asked.items()
    ]


def _plan(
    key: Key, measures: list[str], shape: tuple[int, int, int], quick: bool, seeds: int | None
) -> Plan:
    settings = (QUICK if quick else SETTINGS)[shape[0]]
    settings = replace(settings, epochs=settings.epochs * max(1, key.how.step // LARGE_STEP))
    seeds = seeds or (QUICK_SEEDS if quick else SEEDS[shape[0]])
    return plan(key, seeds, settings, shape, tuple(measures), others=False)
