"""The cells of the tasks: what is trained, in which order, and how one is measured."""

import time
from collections.abc import Callable, Collection, Mapping
from itertools import product

from benchmarks.cells import Cell, How, Key
from benchmarks.datasets import Data
from benchmarks.plan import COMPILE_SECONDS, Plan, plan
from benchmarks.serving import Serving
from benchmarks.tasks import TASKS
from benchmarks.tasks.record import Task

LAST = "2x2"
"""Size of the last map: with two images a statistic of batch norm has 8 elements there."""

FIRST = (("batch", 2), ("batch_group", 2), ("group", None), ("batch", 32))
"""Methods and images that share statistics, of --quick. With 32 images batch group norm is batch
norm, by the rule of this library for the number of groups."""

ALL = (*FIRST, ("batch", 8), ("batch_group", 8), ("layer", None), ("instance", None))
ALL = (*ALL, ("positional", None))

SEEDS = {8: 12, 28: 5, 32: 5}
"""By the size of the image."""

QUICK_SEEDS = 4


def plans(
    tasks: Collection[Task],
    shapes: Mapping[str, tuple[int, int, int]],
    *,
    quick: bool = False,
    seeds: int | None = None,
) -> list[Plan]:
    """The cells to measure, the most telling methods first.

    Args:
        tasks: some or all.
        shapes: of an image, by the name of the data set.
        quick: few methods, each trained little.
        seeds: of each cell; None for `SEEDS`, or `QUICK_SEEDS`.
    """
    found = []
    for data, shape in shapes.items():
        count = seeds or (QUICK_SEEDS if quick else SEEDS[shape[0]])
        for (method, size), task in product(FIRST if quick else ALL, tasks):
            settings = (task.quick if quick else task.settings)[shape[0]]
            key = Key(data, LAST, method, size, How(task=task.name))
            one = plan(key, count, settings, shape, (task.name,), others=False)
            training = one.seconds - COMPILE_SECONDS
            found.append(one._replace(seconds=task.compile_seconds + task.work * training))
    return found


def measured(plan: Plan, data: Data, on_epoch: Callable[[int], None]) -> Cell:
    """Trains and evaluates what `plan` says."""
    task = TASKS[plan.key.how.task]
    start = time.perf_counter()
    found = task.measure(plan, data, on_epoch)
    spent = time.perf_counter() - start
    return Cell(
        plan.key,
        plan.settings,
        str(plan.layers[-1]),
        plan.elements,
        Serving([100 - error for error in found.errors]),
        found.compile_seconds,
        found.train_seconds,
        spent - found.compile_seconds - found.train_seconds,
        {task.name: found.more},
    )
