"""The table of methods under test, and rows of one's own: for each the call, and the label of the
index that the paper gives, or that the row should have."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

import jaxnorm
from jaxnorm import EACH, Groups, methods

PLACES = {2: (), 3: (4,), 4: (4, 6), 5: (2, 4, 3)}
N, C = 4, 6


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: `call(x_shape, channel_axis)` and `label(n, p, c, N, P, C)`."""

    name: str
    call: Callable[[Sequence[int], int], jaxnorm.Row | methods.batch_group_norm]
    label: Callable[..., tuple]
    mean: int | None = None
    ranks: tuple[int, ...] = (2, 3, 4, 5)
    function: str = ""

    def __str__(self):
        return self.name

    @property
    def method_name(self) -> str:
        """The name in `methods` that the row stands for."""
        return self.function or self.name


def parts_of_channels(parts: int, x_shape: Sequence[int], channel_axis: int) -> Groups:
    """The positions of each channel in equal parts, rows first."""
    places, spatial = list(x_shape[1:]), []
    del places[channel_axis - 1 if channel_axis > 0 else channel_axis]
    for size in places:
        spatial.append(math.gcd(parts, size))
        parts //= spatial[-1]
    return Groups(batch=1, spatial=tuple(spatial), channel=EACH)


def pieces(parts: int):
    """Batch group norm with C * parts groups: the example flattened channel, row, column, and cut
    into equal pieces."""

    def label(n, p, c, N, P, C):
        flat = np.ravel_multi_index((c, *p), (C, *P))
        return (flat * C * parts // (C * math.prod(P)),)

    return label


ROWS = (
    Row("batch_norm", lambda s, a: methods.batch_norm(), lambda n, p, c, N, P, C: (c,)),
    Row(
        "ghost_batch_norm",
        lambda s, a: methods.ghost_batch_norm(2),
        lambda n, p, c, N, P, C: (n * 2 // N, c),
    ),
    Row(
        "ghost_batch_norm_size",
        lambda s, a: methods.ghost_batch_norm(ghost_size=1),
        lambda n, p, c, N, P, C: (n, c),
        function="ghost_batch_norm",
    ),
    Row("instance_norm", lambda s, a: methods.instance_norm(), lambda n, p, c, N, P, C: (n, c)),
    Row("group_norm", lambda s, a: methods.group_norm(3), lambda n, p, c, N, P, C: (n, c * 3 // C)),
    Row(
        "group_norm_size",
        lambda s, a: methods.group_norm(group_size=3),
        lambda n, p, c, N, P, C: (n, c // 3),
        function="group_norm",
    ),
    Row("layer_norm", lambda s, a: methods.layer_norm(), lambda n, p, c, N, P, C: (n,)),
    Row(
        "token_layer_norm",
        lambda s, a: methods.token_layer_norm(),
        lambda n, p, c, N, P, C: (n, *p),
    ),
    Row(
        "positional_norm", lambda s, a: methods.positional_norm(), lambda n, p, c, N, P, C: (n, *p)
    ),
    Row("rms_norm", lambda s, a: methods.rms_norm(), lambda n, p, c, N, P, C: (n, *p), mean=0),
    Row(
        "instance_rms_norm",
        lambda s, a: methods.instance_rms_norm(),
        lambda n, p, c, N, P, C: (n, c),
        mean=0,
    ),
    Row(
        "batch_group_norm",
        lambda s, a: methods.batch_group_norm(3),
        lambda n, p, c, N, P, C: (c * 3 // C,),
    ),
    Row(
        "parts_of_channels_rows",
        lambda s, a: methods.Row(parts_of_channels(2, s, a)),
        pieces(2),
        ranks=(3, 4, 5),
        function="Row",
    ),
    Row(
        "parts_of_channels_columns",
        lambda s, a: methods.Row(parts_of_channels(8, s, a)),
        pieces(8),
        ranks=(4, 5),
        function="Row",
    ),
    Row(
        "batch_and_group_norm",
        lambda s, a: methods.batch_and_group_norm(2, 3),
        lambda n, p, c, N, P, C: (n * 2 // N, c * 3 // C),
    ),
    Row(
        "batch_and_group_norm_size",
        lambda s, a: methods.batch_and_group_norm(ghost_size=1, group_size=3),
        lambda n, p, c, N, P, C: (n, c // 3),
        function="batch_and_group_norm",
    ),
)


def shape_of(rank: int, channel_axis: int, batch: int = N, channels: int = C) -> tuple[int, ...]:
    """A small x with channels last (-1) or first (1)."""
    shape = [batch, *PLACES[rank]]
    shape.insert(channel_axis if channel_axis >= 0 else len(shape), channels)
    return tuple(shape)


LAYOUTS = (-1, 1)
CASES = [
    (row, rank, axis)
    for row in ROWS
    for rank in row.ranks
    for axis in LAYOUTS
    if rank > 2 or axis == -1
]
# Every row at every rank, in alternating layouts: between them each layout meets each rank and most
# rows.
SOME = [
    case
    for i, case in enumerate(CASES)
    if case[1] == 2 or (ROWS.index(case[0]) + case[1]) % 2 == (case[2] == 1)
]
