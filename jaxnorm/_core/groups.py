"""How axes are split: one number per axis.

Elements of x that fall into the same block share a mean and a variance. The blocks are a product
over axes, so a method is one number per axis: into how many equal, contiguous groups the axis is
split. 1 pools the axis, EACH keeps every index apart, k makes k groups. Multiplied out for a given
x, the numbers are the shape of the statistic.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, Protocol, SupportsIndex

from jax.export import is_symbolic_dim

from jaxnorm._core.axes import Shape, axes_of, single_axis
from jaxnorm._core.checks import as_index, check_count
from jaxnorm._core.picture import picture

EACH = -1
"""Every index of the axis keeps its own statistic."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Groups of `n` elements, where a plain number means `n` groups.

    Args:
        n: elements of the axis in one group, at least 1.

    Example:
        >>> Groups(batch=Size(16), spatial=1, channel=EACH).shape((64, 8, 8, 256))
        (4, 1, 1, 256)
    """

    n: int

    def __post_init__(self):
        object.__setattr__(self, "n", check_count(self.n, "Size(n)"))

    def __repr__(self) -> str:
        return f"Size({self.n})"


Split = int | Size


@dataclasses.dataclass(frozen=True)
class Groups:
    """Into how many equal, contiguous groups each kind of axis is split.

    Elements whose indices fall into the same group on every axis share statistics.

    Args:
        batch: groups of examples: a number, `EACH` or `Size(examples in a group)`.
        spatial: groups of positions, one value for all spatial axes or a tuple with one per axis.
        channel: groups of channels.

    Raises:
        ValueError: a number that is neither positive nor `EACH`.

    Example:
        >>> Groups(batch=EACH, spatial=1, channel=32).shape((64, 8, 8, 256))  # group norm
        (64, 1, 1, 32)
        >>> batch_norm = Groups(batch=1, spatial=1, channel=EACH)
        >>> batch_norm.shape((64, 3, 32, 32), channel_axis=1)  # NCHW
        (1, 3, 1, 1)
    """

    batch: Split = EACH
    spatial: Split | tuple[Split, ...] = EACH
    channel: Split = EACH

    def __post_init__(self):
        for kind, split in vars(self).items():
            if kind == "spatial" and isinstance(split, tuple | list):
                split = tuple(_checked(kind, part) for part in split)
            else:
                split = _checked(kind, split)
            object.__setattr__(self, kind, split)

    def __repr__(self) -> str:
        """As it is typed, with EACH by its name: no other number is negative."""
        splits = ", ".join(f"{kind}={split!r}" for kind, split in vars(self).items())
        return f"Groups({splits})".replace(str(EACH), "EACH")

    def _repr_html_(self) -> str:
        """A picture of the sets, for notebooks."""
        return picture(self.batch, self.spatial, self.channel, repr(self))

    def shape(
        self, x_shape: Sequence[int], *, batch_axis: int = 0, channel_axis: int = -1
    ) -> Shape:
        """The shape of the statistic for an x of shape `x_shape`.

        Args:
            x_shape: shape of x, rank 2 or more.
            batch_axis: axis of the examples.
            channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.

        Returns:
            For each axis its number of groups.

        Raises:
            ValueError: an axis does not split as asked, or there is no such axis.

        Example:
            >>> Groups(batch=1, spatial=1, channel=32).shape((64, 8, 8, 256))  # batch group norm
            (1, 1, 1, 32)
        """
        x_shape = tuple(x_shape)
        batch, channel = (single_axis(axis, x_shape) for axis in (batch_axis, channel_axis))
        if batch == channel:
            raise ValueError(
                f"batch_axis and channel_axis are both axis {batch} of x, which has shape "
                f"{x_shape}. Expected two different axes; x needs a rank of 2 or more."
            )
        places = len(x_shape) - 2
        spatial = self.spatial if isinstance(self.spatial, tuple) else (self.spatial,) * places
        if len(spatial) != places:
            raise ValueError(
                f"spatial={self.spatial} names {len(spatial)} spatial axes. Got x of shape "
                f"{x_shape}, which has {places}; expected one value for each, or a single value "
                "for all."
            )
        named = {batch: ("batch", self.batch), channel: ("channel", self.channel)}
        others = (("spatial", split) for split in spatial)
        return tuple(
            _count(*(named.get(axis) or next(others)), axis, x_shape)
            for axis in range(len(x_shape))
        )


def _checked(kind: str, split: object) -> Split:
    """A number of groups, EACH or Size."""
    if isinstance(split, Size):
        return split
    index = as_index(split)
    if index is None or (index < 1 and index != EACH):
        raise ValueError(
            f"Groups({kind}={split!r}): expected a positive number of groups, EACH (one group for "
            "every index) or Size(n) (groups of n elements)."
        )
    return index


def _count(kind: str, split: Split, axis: int, x_shape: Shape) -> int:
    """Number of groups on one axis."""
    n = x_shape[axis]
    if split == EACH:
        return n
    sized = isinstance(split, Size)
    k = split.n if sized else split
    if n % k == 0:
        return n // k if sized else k
    what = f"groups of {k} elements" if sized else f"{k} equal groups"
    if is_symbolic_dim(n):
        hint = (
            ", to be exported with sizes that are not known yet. Expected a size that says it "
            f"divides, such as {k}*n in jax.export.symbolic_shape."
        )
    elif kind == "batch":
        hint = (
            ". If this is the short last batch of an epoch, drop it, or pad it to "
            f"{-(-n // k) * k} and give the padding weights=0."
        )
    else:
        divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
        hint = f" and {kind}={split}; expected a divisor of {n}: {divisors}."
    last = kind == "channel" and axis == len(x_shape) - 1
    raise ValueError(
        f"{kind} axis {-1 if last else axis} of x has size {n}, which does not split into {what}. "
        f"Got x of shape {x_shape}{hint}"
    )


class HasRow(Protocol):
    """What a method is to the core: it says which row of the table it is for x of a shape."""

    def row(self, x_shape: Shape, *, batch_axis: int = 0, channel_axis: int = -1) -> Any:
        """The row, with `groups`, `mean` and `epsilon`; a TypeError where there is none."""


Specification = Groups | HasRow | Sequence[int]


def row_of(
    groups: Specification, x_shape: Shape, batch_axis: int, channel_axis: int | Sequence[int]
) -> tuple[Groups | Sequence[int], Literal[0] | None]:
    """The sets and the fixed mean of a method; other specifications as they are, with no mean."""
    if isinstance(groups, type) or not hasattr(groups, "row"):
        return groups, None  # type: ignore[return-value]  # what else it is, its user says
    channel = axes_of(channel_axis, x_shape)[-1]
    row = groups.row(x_shape, batch_axis=batch_axis, channel_axis=channel)  # type: ignore[union-attr]
    return row.groups, row.mean


def check_mean(mean: object) -> None:
    """A fixed mean is 0 or there is none."""
    zero = isinstance(mean, int | float) and mean == 0 and mean is not False
    if mean is not None and not zero:
        raise ValueError(
            f"mean is None (the mean of each set) or 0 (root mean square). Got {mean!r}. To "
            "compute sums about a value near the mean, which changes only the rounding, pass it as "
            "center."
        )


def resolve(
    groups: Specification, x_shape: Shape, batch_axis: int, channel_axis: int | Sequence[int]
) -> tuple[Shape, Literal[0] | None]:
    """The statistic's shape and the fixed mean that `groups` asks for."""
    groups, mean = row_of(groups, x_shape, batch_axis, channel_axis)
    if isinstance(groups, Groups):
        axes = axes_of(channel_axis, x_shape)
        if len(axes) != 1:
            raise ValueError(
                f"Groups has one number for the channels, but channel_axis={channel_axis} names "
                f"{len(axes)} axes. Pass one channel axis, or the statistic's shape as a tuple."
            )
        return groups.shape(x_shape, batch_axis=batch_axis, channel_axis=axes[0]), mean
    if not isinstance(groups, Sequence) or not all(
        isinstance(g, SupportsIndex) or is_symbolic_dim(g) for g in groups
    ):
        raise TypeError(
            f"groups is a Groups, a row of the table or the statistic's shape. Got {groups!r}; "
            "expected for example Groups(batch=EACH, spatial=1, channel=32), "
            "methods.group_norm(32) or the integers (64, 1, 1, 32)."
        )
    shape = tuple(groups)
    check_divides(shape, x_shape, "groups")
    return shape, mean


def check_divides(shape: Shape, x_shape: Shape, what: str) -> None:
    """A statistic fits x when it has x's rank and each of its sizes divides x's."""
    fits = len(shape) == len(x_shape) and all(
        g == n or (g > 0 and n % g == 0) for g, n in zip(shape, x_shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{what} of shape {shape} does not fit x of shape {x_shape}. Expected the same rank, "
            "with each size a divisor of x's: 1 where the axis is pooled, x's own size where "
            "every index is apart."
        )
