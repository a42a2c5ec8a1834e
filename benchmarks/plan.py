"""What can be trained: methods by name, and a cell with all that its training needs to know."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.cells import Cell, Key, Settings
from benchmarks.norms import METHODS, MOMENTUM, NUM_GROUPS, Layer, Row, named
from benchmarks.residual import STRIDES, WIDTHS
from jaxnorm import EACH, Groups, methods

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


def _ghosts(batch_size: int, num_channels: int) -> Layer:
    return Layer(methods.ghost_batch_norm(ghost_size=min(16, batch_size), momentum=MOMENTUM))


def _halves(batch_size: int, num_channels: int) -> Layer:
    method = methods.batch_group_norm(2 * num_channels, momentum=MOMENTUM)
    return Layer(method, sets=methods.Row(Groups(batch=1, spatial=(2, 1), channel=EACH)))


_LAYER_PROXY = (
    METHODS["proxy"]
    .at(2, NUM_GROUPS)
    ._replace(method=methods.proxy_norm(methods.layer_norm()), sets=methods.layer_norm())
)

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        **METHODS,
        **{f"batch_group_{groups}": _fixed(groups) for groups in FIXED_GROUPS},
        "weighed": Row(f"BatchAndGroupNorm({NUM_GROUPS}), examples weighed", _weighed),
        "ghost_16": Row("GhostBatchNorm of 16 images", _ghosts),
        "layer_proxy": Row("ProxyNorm of LayerNorm", lambda *_: _LAYER_PROXY),
        "batch_group_halves": Row("BatchGroupNorm, G = 2 C", _halves),
        "frozen": Row("BatchNorm frozen at mean 0, variance 1", lambda *_: _FROZEN),
    }
)
"""Methods by name: those of every comparison, and some more. `weighed` pools the images of a batch
and groups of channels, and weighs an example's own statistics at inference by its share of the
batch. `batch_group_halves` splits the positions of each channel into upper and lower ones."""

COMPILE_SECONDS = 8.0
OTHERS_SECONDS = 9.0
NANOSECONDS = 7.0
"""What a cell takes, measured on two cores of a shared AMD EPYC: its compilations, those of the
evaluation with other statistics, and for each element that the convolutions and norms of an image
read or write, with evaluation."""


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
        measures: names in `benchmarks.measures.MEASURES`, measured beside the test error.
        others: whether the error with other statistics is measured as well, see `serve`.
    """

    key: Key
    seeds: int
    settings: Settings
    layers: tuple[Layer, ...]
    strides: tuple[int, ...]
    elements: int
    seconds: float
    measures: tuple[str, ...] = ()
    others: bool = True

    def is_done(self, cell: Cell | None) -> bool:
        """Whether a cell holds all that is to be measured."""
        return cell is not None and set(self.measures) <= set(cell.more)


def plan(
    key: Key,
    seeds: int,
    settings: Settings,
    shape: tuple[int, int, int],
    measures: tuple[str, ...] = (),
    *,
    others: bool = True,
) -> Plan:
    """The cell of a key, for images of a shape; without its batch size where that cannot matter."""
    batch_size = key.batch_size or key.how.step
    row = ROWS[key.method] if key.method in ROWS else named(key.method)
    layers = tuple(row.at(batch_size, width) for width in WIDTHS)
    strides = STRIDES[shape[0]][key.last]
    images = settings.train_images * settings.epochs * seeds
    return Plan(
        key if any(layer.pools_batch for layer in layers) else key._replace(batch_size=None),
        seeds,
        settings,
        layers,
        strides,
        layers[-1].elements((batch_size, *map(int, key.last.split("x")), WIDTHS[-1])),
        COMPILE_SECONDS
        + OTHERS_SECONDS * others
        + 1e-9 * NANOSECONDS * images * _touched(shape, strides),
        measures,
        others,
    )


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
