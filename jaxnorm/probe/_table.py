"""The normalizations of a model as a table: what shares statistics, and how many elements do."""

import dataclasses
import html
from collections.abc import Iterator
from typing import Any

from jaxnorm._core.axes import Shape
from jaxnorm._core.groups import EACH, Groups, Size
from jaxnorm.methods import Method, Row

FEW = 16
"""Below so many elements to a statistic, those of batches fail."""

HEADS = ("path", "layer", "method", "groups", "statistic", "elements", "state", "sent")
NUMBERS = ("elements", "state", "sent")
WARNING = (
    f"! fewer than {FEW} elements to a statistic, which is where statistics of batches fail: "
    "normalize more examples or positions together, or pool channels as batch_group_norm and "
    "group_norm do"
)


@dataclasses.dataclass(frozen=True)
class NormRow:
    """A normalization of a model: one call of a layer.

    Args:
        path: of the layer; "path#1" is its second call.
        layer: the name of its class.
        method: what it does, also where it is Flax's own layer.
        x_shape: what it normalizes.
        statistics: the shape of each of its statistics in training, () where that is not known.
        elements: how many elements share one, the fewest of all its statistics; None where that is
            not known.
        state_bytes: what it remembers from step to step.
        sent_bytes: what a device adds up with others in a step of training where it is
            synchronized, forward and backward; None where that is not known.
        copies: how many layers it stands for, where a scan runs over several.

    Reference:
        A tool of this library; no paper is followed.
    """

    path: str
    layer: str
    method: Method
    x_shape: Shape
    statistics: tuple[Shape, ...]
    elements: int | None
    state_bytes: int
    sent_bytes: int | None
    copies: int = 1

    @property
    def has_few(self) -> bool:
        """Whether fewer than 16 elements share a statistic."""
        return self.elements is not None and self.elements < FEW

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table says, by `HEADS`; groups are those of batch, spatial and channel axes."""
        groups = self.method.groups if isinstance(self.method, Row) else None
        sets = str(groups)[len("Groups(") : -1] if isinstance(groups, Groups) else ""
        for kind in ("batch", "spatial", "channel"):
            sets = sets.replace(f"{kind}=", "")
        return (
            f"{self.path or '(model)'}{f' x {self.copies}' if self.copies > 1 else ''}",
            self.layer,
            name_of(self.method),
            sets,
            " ".join(str(shape).replace(" ", "") for shape in self.statistics),
            _known(self.elements, f"{self.elements}{' !' if self.has_few else ''}"),
            f"{self.state_bytes:,} B",
            _known(self.sent_bytes, f"{self.sent_bytes or 0:,} B"),
        )


@dataclasses.dataclass(frozen=True)
class NormTable:
    """The normalizations of a model, a `NormRow` each; printed as text, and in notebooks as HTML.

    Args:
        rows: in the order of calls.

    Reference:
        A tool of this library; no paper is followed.
    """

    rows: tuple[NormRow, ...]

    def __iter__(self) -> Iterator[NormRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, path: str) -> NormRow:
        """The row of a path."""
        found = [row for row in self.rows if row.path == path]
        if not found:
            paths = ", ".join(repr(row.path) for row in self.rows)
            raise KeyError(f"there is no normalization at {path!r}; expected one of {paths}")
        return found[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What stands below the table: the totals, and a warning where there is reason for one."""
        state = sum(row.state_bytes for row in self.rows)
        sent = sum(row.sent_bytes or 0 for row in self.rows)
        calls = len(self.rows)
        total = (
            f"{calls} normalization{'s' * (calls != 1)}; {state:,} B of state; {sent:,} B sent by "
            "a device in a step, where they are synchronized"
        )
        return (total, WARNING) if any(row.has_few for row in self.rows) else (total,)

    def __str__(self) -> str:
        return text_table(HEADS, [row.cells for row in self.rows], NUMBERS, self.notes)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        few = [row.has_few for row in self.rows]
        return html_table(HEADS, [row.cells for row in self.rows], NUMBERS, self.notes, few)


def name_of(method: Method) -> str:
    """The constructor of a row of the table by which people know it; others as they print."""
    if not isinstance(method, Row) or not isinstance(method.groups, Groups):
        return str(method)
    batch, spatial, channel = vars(method.groups).values()
    ghosts, groups = _argument(batch, "ghost_size"), _argument(channel, "group_size")
    kind: Any = tuple(t if t in (1, EACH) else "k" for t in (batch, spatial, channel))
    names: dict[Any, str] = {
        (1, 1, EACH): "batch_norm",
        ("k", 1, EACH): f"ghost_batch_norm({ghosts})",
        (1, 1, 1): "batch_group_norm(1)",
        (1, 1, "k"): f"batch_group_norm({groups})",
        (EACH, 1, EACH): "instance_norm",
        (EACH, 1, "k"): f"group_norm({groups})",
        (EACH, 1, 1): "layer_norm",
        (EACH, EACH, 1): "token_layer_norm",
        ("k", 1, 1): f"batch_and_group_norm({ghosts}, {groups})",
        ("k", 1, "k"): f"batch_and_group_norm({ghosts}, {groups})",
    }
    if method.mean == 0:
        names = {(EACH, EACH, 1): "rms_norm", (EACH, 1, EACH): "instance_rms_norm"}
    return names.get(kind, str(method))


def _argument(split: object, size: str) -> str:
    return f"{size}={split.n}" if isinstance(split, Size) else str(split)


def _known(value: int | None, text: str) -> str:
    return "unknown" if value is None else text


def text_table(
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    numbers: tuple[str, ...],
    notes: tuple[str, ...],
) -> str:
    """Columns of text, of which numbers stand on the right, and notes below."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, tuple("-" * width for width in widths), *rows]
    aligned = [
        "  ".join(
            cell.rjust(width) if head in numbers else cell.ljust(width)
            for cell, head, width in zip(line, heads, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*aligned, *notes])


def html_table(
    heads: tuple[str, ...],
    rows: list[tuple[str, ...]],
    numbers: tuple[str, ...],
    notes: tuple[str, ...],
    marked: list[bool],
) -> str:
    """The same for notebooks; rows that are marked stand out."""

    def line(tag: str, cells: tuple[str, ...], style: str = "") -> str:
        parts = (
            f'<{tag} style="text-align: {"right" if head in numbers else "left"}">'
            f"{html.escape(cell)}</{tag}>"
            for cell, head in zip(cells, heads, strict=True)
        )
        return f"<tr{style}>{''.join(parts)}</tr>"

    bold = ' style="font-weight: bold; color: #d55e00"'
    body = "".join(line("td", cells, bold * mark) for cells, mark in zip(rows, marked, strict=True))
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>{below}"
