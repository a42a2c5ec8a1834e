"""Full-size passes of a compiled program: what it reads and writes that is as large as x."""

import math

from benchmarks.hlo import arrays, parse

FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "conditional", "while")
"""What moves nothing by itself. Branches of a conditional, such as sums taken again where the first
lost digits, and loops are not counted."""


def passes(text: str, elements: int, itemsize: int) -> float:
    """Bytes that the program's operations read and write of arrays that have at least half of so
    many elements, each operand once, over the bytes of one whose elements have `itemsize`."""

    def nbytes(kind: str) -> float:
        return sum(t.bytes for t in arrays(kind) if 2 * math.prod(t.shape) >= elements)

    operations = parse(text)["ENTRY"]
    types = {operation.name: operation.type for operation in operations}
    moved = sum(
        nbytes(operation.type)
        + sum(nbytes(types.get(name, "")) for name in dict.fromkeys(operation.operands))
        for operation in operations
        if operation.code not in FREE
    )
    return moved / (elements * itemsize)
