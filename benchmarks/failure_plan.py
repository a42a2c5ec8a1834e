"""What the map of failure trains, in which order, and how long that takes."""

from collections.abc import Mapping
from itertools import product

from benchmarks.cells import Key, Settings
from benchmarks.norms import METHODS
from benchmarks.plan import FIXED_GROUPS, Plan, plan
from benchmarks.residual import STRIDES, WIDTHS

BATCH_SIZES = (2, 4, 8, 32)

CURVES = ("batch", "group", "batch_group", "batch_renorm")
"""Methods that are trained at all batch sizes."""

EXTRAS = (
    "ghost_batch",
    *(f"batch_group_{groups}" for groups in FIXED_GROUPS),
    "layer",
    "instance",
    "cross_iteration",
    "moving_average",
    "momentum",
    "proxy",
    "evonorm_b0",
    "evonorm_s0",
    "frozen",
    "weighed",
)
"""Methods that are trained at two images alone."""

SETTINGS = {8: Settings(1024, None, 20), 28: Settings(4096, 2048, 8), 32: Settings(4096, 2048, 8)}
"""By the size of the image."""
QUICK = {8: Settings(1024, None, 20), 28: Settings(2048, 512, 4), 32: Settings(2048, 512, 4)}

LAST_MAPS = ("1x1", "2x2", "4x4", "7x7", "8x8")

STAGES = (
    (("1x1", "4x4"), ("batch", "group", "batch_group"), (2, 32)),
    (("2x2", "7x7", "8x8"), ("batch", "group", "batch_group"), (2, 32)),
    (None, ("batch",), (4, 8)),
    (None, ("batch_group", "batch_renorm"), BATCH_SIZES),
    (("1x1", "4x4"), EXTRAS, (2,)),
    (None, EXTRAS, (2,)),
)
"""Maps (None for all), methods and batch sizes, the most telling first."""


def plans(
    shapes: Mapping[str, tuple[int, int, int]],
    *,
    quick: bool,
    seeds: int,
    extra_seeds: int,
    gradients: bool = False,
) -> list[Plan]:
    """The cells to measure, the most telling first; one alone for a method that the batch does not
    touch, none where batch group norm is batch norm.

    Args:
        shapes: of an image, by the name of the data set.
        quick: few of the cells, each trained little.
        seeds: of the methods in `CURVES`.
        extra_seeds: of those in `EXTRAS`; 0 leaves them out.
        gradients: whether the agreement of gradients is measured in the cells of the first stage.
    """
    found = {}
    for maps, names, batch_sizes in STAGES[:1] if quick else STAGES:
        count = extra_seeds if names is EXTRAS else seeds
        measures = ("gradient_agreement",) if gradients and maps is STAGES[0][0] else ()
        for data, last, name, batch_size in product(
            shapes, LAST_MAPS if maps is None else maps, names, batch_sizes
        ):
            shape = shapes[data]
            if count and last in STRIDES[shape[0]]:
                settings = (QUICK if quick else SETTINGS)[shape[0]]
                key = Key(data, last, name, batch_size)
                cell = plan(key, count, settings, shape, measures)
                found.setdefault(cell.key, cell)
    return [cell for cell in found.values() if not _is_batch_norm(cell)]


def _is_batch_norm(cell: Plan) -> bool:
    batch = METHODS["batch"].at(BATCH_SIZES[0], WIDTHS[0])
    return cell.key.method != "batch" and set(cell.layers) == {batch}
