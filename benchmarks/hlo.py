"""Reads compiled programs as XLA prints them: their operations, and the collectives among them.

    collectives(jax.jit(f).lower(x).compile().as_text() or "")

What a device waits for is the chain of collectives that depend on each other, more than their
number: those that do not are sent together. Programs of any platform are read, also those whose
collectives start and end apart.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Operation(NamedTuple):
    """A line of a compiled program: `name = type code(operands), attributes`."""

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    argument: str  # between the parentheses
    attributes: str
    root: bool


class Array(NamedTuple):
    """The type of an array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        """Its size; narrow types take a part of a byte for each element."""
        width = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return math.prod(self.shape) * width / 8


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        code: `all-reduce`, `all-gather`, ...; one that starts and ends apart goes by the same name.
        arrays: what one device hands in, several arrays where XLA sends them together.
        group_size: devices that take part with each other.
        conditional: whether it is in a branch, which runs or does not by the data.
        depth: collectives in the longest chain, each depending on the one before, that ends in this
            one. Those in branches count for what follows in the same branch, and not for what
            follows after it.
    """

    code: str
    arrays: tuple[Array, ...]
    group_size: int
    conditional: bool
    depth: int

    @property
    def bytes(self) -> int:
        """Size of the whole: what is reduced or exchanged on each device, or what a gather makes of
        all parts."""
        parts = self.group_size if self.code == "all-gather" else 1
        return parts * math.ceil(sum(array.bytes for array in self.arrays))

    @property
    def predicate(self) -> bool:
        """Whether devices agree on one bit: a single boolean, which some platforms widen to an
        integer."""
        return (
            len(self.arrays) == 1
            and math.prod(self.arrays[0].shape) == 1
            and self.arrays[0].dtype[0] in "psu"
        )


class Total(NamedTuple):
    """The collectives of a program together.

    Attributes:
        number: those that always run, without `predicates`.
        bytes: of these.
        depth: the longest chain among all that always run, `predicates` included.
        predicates: those that always run and agree on one bit.
        branches: those in branches, of whichever size.
        branch_bytes: of these.
    """

    number: int
    bytes: int
    depth: int
    predicates: int
    branches: int
    branch_bytes: int


CODES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")

Depth = int | tuple["Depth", ...]
"""How many collectives a value waits for; a tuple's elements may differ, a number holds for all of
them."""


def total(found: Iterable[Collective]) -> Total:
    """Adds collectives up."""
    found = list(found)
    always = [one for one in found if not one.conditional]
    vectors = [one for one in always if not one.predicate]
    branches = [one for one in found if one.conditional]
    return Total(
        len(vectors),
        sum(one.bytes for one in vectors),
        max((one.depth for one in always), default=0),
        len(always) - len(vectors),
        len(branches),
        sum(one.bytes for one in branches),
    )


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text; a loop's body counts once,
    groups of one device not.

    Args:
        text: optimized HLO, what `as_text()` of a compiled function returns.

    Returns:
        Each collective, those in branches too; as often as its computation is called.

    Raises:
        ValueError: the text is no compiled program, or names groups of devices in an unknown way.
    """
    computations = parse(text)
    if "ENTRY" not in computations:
        raise ValueError(
            f"Expected the text of a compiled HLO module, which has an ENTRY. Got {text[:80]!r}."
        )
    sizes = [
        int(n)
        for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.partition("\n")[0])
    ]
    found: list[Collective] = []
    _walk(computations, "ENTRY", [], math.prod(sizes), False, 1, found)
    return found


def parse(text: str) -> dict[str, list[Operation]]:
    """The operations of each computation of a compiled program; the one that is run is called
    `ENTRY`."""
    computations: dict[str, list[Operation]] = {}
    current: list[Operation] = []
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault("ENTRY" if header[1] else header[2], [])
        elif found := _OPERATION.match(line):
            root, name, kind, code, argument, attributes = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", argument))
            current.append(
                Operation(name, kind, code, operands, argument, attributes or "", bool(root))
            )
    return computations


def arrays(kind: str) -> list[Array]:
    """The array that a type is, or all of a tuple."""
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(kind)
    ]


def _walk(
    computations: Mapping[str, Sequence[Operation]],
    name: str,
    arguments: Sequence[Depth],
    devices: int,
    conditional: bool,
    weight: int,
    found: list[Collective],
) -> Depth:
    """Adds the collectives of a computation to `found`; returns the depth of its result.

    `weight` is what a collective adds to a chain: 1, or 0 to follow what depends on what through a
    branch.
    """
    types = {operation.name: operation.type for operation in computations[name]}
    depths: dict[str, Depth] = {}
    result: Depth = 0

    def call(
        called: str,
        arguments: Sequence[Depth],
        conditional: bool = conditional,
        weight: int = weight,
    ) -> Depth:
        return _walk(
            computations, called, arguments, devices, conditional, weight, found if weight else []
        )

    for operation in computations[name]:
        operands = [depths[operand] for operand in operation.operands]
        code = operation.code.removesuffix("-start")
        depth: Depth
        if operation.code == "parameter":
            depth = arguments[int(operation.argument)] if arguments else 0
        elif operation.code == "tuple":
            depth = tuple(operands)
        elif operation.code == "get-tuple-element":
            index = int(re.findall(r"\bindex=(\d+)", operation.attributes)[0])
            depth = operands[0][index] if isinstance(operands[0], tuple) else operands[0]
        elif code in CODES:
            size = _group_size(operation.attributes, devices)
            depth = max(map(_deepest, operands)) + (weight if size > 1 else 0)
            if size > 1:
                given = tuple(
                    array for operand in operation.operands for array in arrays(types[operand])
                )
                found.append(Collective(code, given, size, conditional, depth))
        elif operation.code == "conditional":
            chosen, *values = operands
            branches = _branches(operation.attributes)
            for branch, value in zip(branches, values, strict=True):
                call(branch, [_later(value, _deepest(chosen))], True)
            outcomes = [
                call(branch, [value], True, 0)
                for branch, value in zip(branches, values, strict=True)
            ]
            depth = _later(_join(outcomes), _deepest(chosen))
        elif operation.code == "while":
            condition, body = (
                re.findall(rf"\b{key}=%([\w.\-]+)", operation.attributes)[0]
                for key in ("condition", "body")
            )
            call(condition, operands)
            depth = _join([operands[0], call(body, operands)])
        elif operation.code in ("fusion", "call", "async-start"):
            called = re.findall(r"\b(?:calls|to_apply)=%([\w.\-]+)", operation.attributes)[0]
            depth = call(called, operands)
            # of (operands, results, context)
            depth = _deepest(depth) if operation.code == "async-start" else depth
        else:
            depth = max(map(_deepest, operands), default=0)
        depths[operation.name] = depth
        result = depth if operation.root else result
    return result


def _branches(attributes: str) -> list[str]:
    """Computations of a conditional, in the order of their operands."""
    listed = re.findall(r"\bbranch_computations=\{([^}]*)\}", attributes)
    text = (
        listed[0]
        if listed
        else " ".join(re.findall(r"\b(?:true|false)_computation=(%[\w.\-]+)", attributes))
    )
    return re.findall(r"%([\w.\-]+)", text)


def _deepest(depth: Depth) -> int:
    return depth if isinstance(depth, int) else max(map(_deepest, depth), default=0)


def _later(depth: Depth, least: int) -> Depth:
    return (
        max(depth, least)
        if isinstance(depth, int)
        else tuple(_later(element, least) for element in depth)
    )


def _join(depths: Sequence[Depth]) -> Depth:
    """The larger depth, element by element where all are tuples."""
    tuples = [depth for depth in depths if isinstance(depth, tuple)]
    if len(tuples) == len(depths):
        return tuple(_join(elements) for elements in zip(*tuples, strict=True))
    return max(map(_deepest, depths))


def _group_size(attributes: str, devices: int) -> int:
    """Devices in a group, or all that a permutation names.

    Groups are written `{{0,1},{2,3}}`, `{}` for one of all, `[groups,size]<=[devices]`, or
    `mesh['i'=2,'j'=4] {'j'}`: axes of a mesh, of which `'j':(2)2` is the part of size 2 behind one
    of size 2.
    """
    if pairs := re.findall(r"\bsource_target_pairs=\{(.*?)\}\}", attributes):
        return len(set(re.findall(r"\d+", pairs[0])))
    if iota := re.findall(r"\breplica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[0][1])
    if axes := re.findall(r"\breplica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[0][0]))
        return math.prod(
            int(part or sizes[axis])
            for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[0][1])
        )
    if listed := re.findall(r"\breplica_groups=\{(?:\{([\d,]*)\}|\})", attributes):
        return len(listed[0].split(",")) if listed[0] else devices
    raise ValueError(f"Unknown groups of devices: {attributes[:200]}")
