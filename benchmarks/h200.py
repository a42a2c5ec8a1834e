"""Compiles for an H200 that is not there, and counts the bytes that the program moves through its
memory.

Normalization does so little arithmetic that its time is that of its memory traffic, as long as its
kernels fill the device. XLA says which kernels it launches, on what operands and with how many
thread blocks; running them needs the device, counting does not. Left out are the L2 cache, which
serves part of the traffic of tensors below some 50 MB, the share of the bandwidth that a kernel
gets, the gaps between kernels, and what autotuning on the device would choose.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from benchmarks.hlo import Operation, arrays, parse

MULTIPROCESSORS = 132
"""A grid of fewer thread blocks leaves some of them idle."""

REQUIRED = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
"""What compiles for NVIDIA devices, on machines that have none as well."""


class Kernel(NamedTuple):
    """One launch.

    Attributes:
        name: of its operation in the compiled program.
        reads: bytes of its operands, each counted once, or of the slices that it takes of one.
        writes: bytes of its results.
        largest: the most bytes it reads of one operand.
        blocks: thread blocks; None for copies and the like, which launch none of XLA's.
        conditional: whether it is in a branch, which runs or does not by the data.
    """

    name: str
    reads: int
    writes: int
    largest: int
    blocks: int | None
    conditional: bool


@dataclass(frozen=True)
class Traffic:
    """Kernels of a program, and the bytes of the tensor that it normalizes."""

    kernels: tuple[Kernel, ...]
    tensor: int

    @property
    def launches(self) -> int:
        """Kernels that always run."""
        return sum(not kernel.conditional for kernel in self.kernels)

    @property
    def moved(self) -> float:
        """Tensors read and written by the kernels that always run."""
        return self._moved(conditional=False)

    @property
    def moved_by_branches(self) -> float:
        """Tensors read and written by those that run or do not by the data: all branches of all
        conditionals."""
        return self._moved(conditional=True)

    @property
    def smallest_grid(self) -> int | None:
        """Fewest thread blocks of a kernel, in branches too, that reads a whole tensor. None if
        there is none."""
        grids = [
            k.blocks for k in self.kernels if k.largest >= self.tensor and k.blocks is not None
        ]
        return min(grids, default=None)

    def _moved(self, conditional: bool) -> float:
        return (
            sum(k.reads + k.writes for k in self.kernels if k.conditional == conditional)
            / self.tensor
        )


class Unavailable(RuntimeError):
    """Programs cannot be compiled for the device here."""


def unavailable() -> str | None:
    """Why programs cannot be compiled for the device here, if they cannot."""
    missing = [name for name in REQUIRED if not _is_installed(name)]
    if not missing:
        return None
    return f"compiling for an H200 needs {', '.join(missing)}: pip install 'jaxnorm[traffic]'"


def _is_installed(distribution: str) -> bool:
    try:
        return bool(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return False


@cache
def _device() -> jax.sharding.Sharding:
    """One H200 that is not there."""
    reason = unavailable()
    if reason:
        raise Unavailable(reason)
    config = Path(__file__).with_name("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def count(f: Callable[..., Any], *arguments: Any, tensor: jax.ShapeDtypeStruct) -> Traffic:
    """Compiles f for an H200 and counts what it moves, in multiples of `tensor`.

    Args:
        f: a function of `arguments`.
        *arguments: arrays or their shapes, or trees of them.
        tensor: the unit.

    Returns:
        The traffic.

    Raises:
        Unavailable: what compiles for the device is not installed.
    """
    device = _device()
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        compiled = jax.jit(f).lower(*arguments).compile(compiler_options={"xla_dump_to": folder})
        grids = _grids(Path(folder))
    size = math.prod(tensor.shape) * tensor.dtype.itemsize
    return Traffic(tuple(_kernels(parse(compiled.as_text() or ""), grids)), size)


def _grids(folder: Path) -> dict[str, int]:
    """Thread blocks of each operation, from the list of launches in XLA's dump.

    The list names the kernel, which equal operations share; a second file has the operation of each
    number in the list.
    """
    names, grids = {}, {}
    for path in folder.glob("*.thunk_metadata.txt"):
        for name, number in re.findall(
            r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)', path.read_text()
        ):
            names[int(number)] = name
    for path in folder.glob("*.thunk_sequence.txt"):
        for number, grid in re.findall(
            r"^\s*(\d+): k\w+.* grid: \[([\d, ]+)\]", path.read_text(), re.M
        ):
            grids[names[int(number)]] = math.prod(int(n) for n in grid.split(","))
    return grids


_NO_KERNEL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "optimization-barrier",
    "after-all",
}


def _bytes(kind: str) -> int:
    """Size of an array type, or of all in a tuple."""
    return int(sum(array.bytes for array in arrays(kind)))


def _kernels(
    computations: dict[str, list[Operation]],
    grids: dict[str, int],
    run: str = "ENTRY",
    conditional: bool = False,
) -> Iterator[Kernel]:
    """The launches of computation `run`, those of its conditionals' branches included."""
    types = {operation.name: operation.type for operation in computations[run]}
    for operation in computations[run]:
        called = [
            name
            for name in re.findall(r"%([\w.\-]+)", operation.attributes)
            if name in computations
        ]
        if operation.code in _NO_KERNEL:
            continue
        if operation.code in ("conditional", "call"):
            for name in called:
                yield from _kernels(
                    computations, grids, name, conditional or operation.code == "conditional"
                )
            continue
        if operation.code == "while":
            raise NotImplementedError(
                "a loop's traffic is not counted: how often it runs is not in the program's text"
            )
        reads: dict[str, int] = {}
        for place, name in enumerate(operation.operands):
            whole = _bytes(types[name])
            read = (
                _read(computations[called[0]], place, whole)
                if operation.code == "fusion"
                else whole
            )
            reads[name] = min(whole, max(read, reads.get(name, 0)))
        yield Kernel(
            operation.name,
            sum(reads.values()),
            _bytes(operation.type),
            max(reads.values(), default=0),
            grids.get(operation.name),
            conditional,
        )


def _read(fused: Sequence[Operation], place: int, whole: int) -> int:
    """Bytes that a fusion reads of its operand number `place`: all, unless it only takes slices."""
    names = {
        operation.name
        for operation in fused
        if operation.code == "parameter" and operation.argument == str(place)
    }
    taken = 0
    for operation in fused:
        if names & set(operation.operands):
            if operation.code == "bitcast":
                names.add(operation.name)
            elif operation.code in ("slice", "dynamic-slice", "gather"):
                taken += _bytes(operation.type)
            else:
                return whole
    return taken
