"""What the map of failure trains, in which order, and how long that takes."""

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.cells import Key, Settings, positions
from benchmarks.norms import METHODS, MOMENTUM, NUM_GROUPS, Layer, Row
from benchmarks.residual import STRIDES, WIDTHS
from jaxnorm import Groups, methods

BATCH_SIZES = (2, 4, 8, 32)

FIXED_GROUPS = (1, 2, 4, 12)
"""Numbers of groups of batch group normalization beside those of the rule."""


def _fixed(num_groups: int) -> Row:
    layer = Layer(methods.batch_group_norm(num_groups, momentum=MOMENTUM))
    return Row(f"BatchGroupNorm, G = {num_groups}", lambda batch_size, num_channels: layer)


def _weighed(batch_size: int, num_channels: int) -> Layer:
    row = methods.batch_and_group_norm(
        ghost_size=batch_size, num_groups=NUM_GROUPS, momentum=MOMENTUM
    )
    return Layer(row)


_FROZEN = Layer(
    methods.batch_norm(),
    pools_batch=False,
    schedule=lambda done: {"use_running_average": True},
    sets=methods.Row(Groups()),
)

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        **METHODS,
        **{f"batch_group_{groups}": _fixed(groups) for groups in FIXED_GROUPS},
        "weighed": Row(f"BatchAndGroupNorm({NUM_GROUPS}), examples weighed", _weighed),
        "frozen": Row("BatchNorm frozen at mean 0, variance 1", lambda *_: _FROZEN),
    }
)
"""Methods by name: those of every comparison, and some for two images. `weighed` pools both images
and weighs an example's own statistics by 1/2 at inference."""

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

COMPILE_SECONDS = 25.0
NANOSECONDS = 7.0
"""What a cell takes, measured on two cores of a shared AMD EPYC: its compilations, and for each
element that the convolutions and norms of an image read or write, with evaluation."""


class Plan(NamedTuple):
    """A cell to measure.

    Attributes:
        key: which it is.
        seeds: it is trained with seeds 0 to seeds - 1.
        settings: how.
        layers: the normalization at each width.
        strides: of the stages.
        elements: how many share a statistic in the last stage.
        seconds: about what it takes.
    """

    key: Key
    seeds: int
    settings: Settings
    layers: tuple[Layer, ...]
    strides: tuple[int, ...]
    elements: int
    seconds: float


def plans(
    shapes: Mapping[str, tuple[int, int, int]], *, quick: bool, seeds: int, extra_seeds: int
) -> list[Plan]:
    """The cells to measure, the most telling first; one alone for a method that the batch does not
    touch, none where batch group norm is batch norm.

    Args:
        shapes: of an image, by the name of the data set.
        quick: few of the cells, each trained little.
        seeds: of the methods in `CURVES`.
        extra_seeds: of those in `EXTRAS`; 0 leaves them out.
    """
    found = {}
    for maps, names, batch_sizes in STAGES[:1] if quick else STAGES:
        count = extra_seeds if names is EXTRAS else seeds
        for data, last, name, batch_size in product(
            shapes, LAST_MAPS if maps is None else maps, names, batch_sizes
        ):
            shape = shapes[data]
            if count and last in STRIDES[shape[0]]:
                settings = (QUICK if quick else SETTINGS)[shape[0]]
                plan = _plan(Key(data, last, name, batch_size), count, settings, shape)
                found.setdefault(plan.key, plan)
    return [plan for plan in found.values() if not _is_batch_norm(plan)]


def _plan(key: Key, seeds: int, settings: Settings, shape: tuple[int, int, int]) -> Plan:
    batch_size: int = key.batch_size  # type: ignore[assignment]  # given here
    layers = tuple(ROWS[key.method].at(batch_size, width) for width in WIDTHS)
    strides = STRIDES[shape[0]][key.last]
    images = settings.train_images * settings.epochs * seeds
    return Plan(
        key if any(layer.pools_batch for layer in layers) else key._replace(batch_size=None),
        seeds,
        settings,
        layers,
        strides,
        layers[-1].elements((batch_size, positions(key.last), WIDTHS[-1])),
        COMPILE_SECONDS + 1e-9 * NANOSECONDS * images * _touched(shape, strides),
    )


def _is_batch_norm(plan: Plan) -> bool:
    batch = METHODS["batch"].at(BATCH_SIZES[0], WIDTHS[0])
    return plan.key.method != "batch" and set(plan.layers) == {batch}


def _touched(shape: tuple[int, int, int], strides: tuple[int, ...]) -> int:
    """How many elements the convolutions and norms of an image read or write."""
    height, width, channels = shape
    touched = height * width * (9 * channels + 3 * WIDTHS[0])
    channels = WIDTHS[0]
    for stride, features in zip(strides, WIDTHS, strict=True):
        height, width = -(-height // stride), -(-width // stride)
        touched += height * width * (9 * channels + 9 * features + channels + 9 * features)
        channels = features
    return touched
