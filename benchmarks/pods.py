"""What collectives cost on a pod of TPUs, by a model: nothing here ran on one.

A chip is linked to its neighbours on a line or ring along each of two or three axes. An all-reduce
of b bytes over p chips scatters the sums and gathers them again; along an axis of d chips that
takes 2 ceil(d / 2) hops on a ring, 2 (d - 1) on a line:

    seconds = hops * LATENCY + 2 (p - 1) / p * b / bandwidth

with the bandwidth of all axes together. Left out are launching, the reduction itself, stragglers,
and whatever XLA hides behind other work; small collectives took longer than hops alone wherever
somebody published times.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.figures import name_ends, quiet, save
from benchmarks.hlo import Collective
from benchmarks.libraries import COLORS
from jaxnorm.drawing import plain_log

LATENCY = 1e-6
"""Seconds for a hop, "typically around 1us": How to Scale Your Model, part 3,
https://jax-ml.github.io/scaling-book/sharding."""


class Pod(NamedTuple):
    """A generation of TPUs.

    Attributes:
        name: of the generation.
        axis_bandwidth: bytes per second that a chip sends along one axis, both directions of a ring
            together.
        shapes: the slices, by their number of chips.
        ring: the multiple of chips an axis needs to be closed to a ring.
        cube: the length that every axis needs for that.
    """

    name: str
    axis_bandwidth: float
    shapes: dict[int, tuple[int, ...]]
    ring: int
    cube: int

    def hops(self, chips: int) -> int:
        """Links that a value crosses to the farthest of `chips` chips of a slice, and back."""
        if chips == 1:
            return 0
        shape = self.shapes[max(chips, min(self.shapes))]
        return sum(2 * -(-n // 2) if self._closed(n, shape) else 2 * (n - 1) for n in shape)

    def bandwidth(self, chips: int) -> float:
        """Bytes a second that a chip of such a slice sends along all axes."""
        shape = self.shapes[max(chips, min(self.shapes))]
        return sum(
            self.axis_bandwidth * (1 if self._closed(n, shape) else 0.5) for n in shape if n > 1
        )

    def _closed(self, length: int, shape: tuple[int, ...]) -> bool:
        return length % self.ring == 0 and min(shape) >= self.cube

    def all_reduce_seconds(self, chips: int, size: float) -> float:
        """Seconds of an all-reduce of `size` bytes among `chips` chips that form a slice."""
        return self._seconds(self.hops(chips), chips, chips, size)

    def across_seconds(self, chips: int, group: int, size: float) -> float:
        """The same among one chip of each group of `group`: they lie over the whole slice, but for
        the hops inside a group."""
        return self._seconds(self.hops(chips) - self.hops(group), chips // group, chips, size)

    def _seconds(self, hops: int, members: int, chips: int, size: float) -> float:
        return (
            hops * LATENCY + 2 * (members - 1) / members * size / self.bandwidth(chips)
            if members > 1
            else 0.0
        )


V5E = Pod(
    "v5e",
    # 400 GB/s for each chip, four links: https://docs.cloud.google.com/tpu/docs/v5e; an axis is
    # closed at 16 chips: https://jax-ml.github.io/scaling-book/tpus
    1e11,
    {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    ring=16,
    cube=1,
)

V5P = Pod(
    "v5p",
    # 1200 GB/s for each chip, six links; a torus from 4x4x4 on:
    # https://docs.cloud.google.com/tpu/docs/v5p
    2e11,
    {
        8: (2, 2, 2),
        16: (2, 2, 4),
        32: (2, 4, 4),
        64: (4, 4, 4),
        128: (4, 4, 8),
        256: (4, 8, 8),
        512: (8, 8, 8),
        1024: (8, 8, 16),
        2048: (8, 16, 16),
        4096: (16, 16, 16),
    },
    ring=4,
    cube=4,
)

PODS = (V5E, V5P)


class Cost(NamedTuple):
    """What a program costs: seconds of collectives one after the other, and bytes that a chip
    sends."""

    seconds: float
    sent: float


class Round(NamedTuple):
    """A collective whatever the size of the slice: its bytes, and in which part of the devices it
    is.

    Attributes:
        size: bytes on each device.
        over: `all` devices, `group`: those that share statistics, or `across`: one of each group.
    """

    size: int
    over: str


def rounds(found: Iterable[Collective], devices: int, group: int) -> list[Round]:
    """The all-reduces of a program compiled for `devices` that always run, without their number of
    devices.

    Raises:
        ValueError: it gathers or exchanges, or over other groups.
    """
    names = {devices // group: "across", group: "group", devices: "all"}
    always = [one for one in found if not one.conditional]
    if odd := [one for one in always if one.code != "all-reduce" or one.group_size not in names]:
        raise ValueError(
            f"The model knows all-reduces over all devices, groups of {group} or across them. Got "
            f"{odd[0]}."
        )
    return [Round(one.bytes, names[one.group_size]) for one in always]


def cost(pod: Pod, chips: int, group: int, found: Sequence[Round]) -> Cost:
    """The cost of these rounds on `chips` chips of which `group` share statistics."""
    group = min(group, chips)
    members = {"all": chips, "group": group, "across": chips // group}

    def seconds(one: Round) -> float:
        if one.over == "across":
            return pod.across_seconds(chips, group, one.size)
        return pod.all_reduce_seconds(members[one.over], one.size)

    sent = sum(2 * (members[one.over] - 1) / members[one.over] * one.size for one in found)
    return Cost(sum(map(seconds, found)), sent)


LINES = ("-", "--", ":", "-.")
"""Of a library's programs, one after the other; its color is that of `COLORS`."""


def draw(curves: Mapping[str, Mapping[str, Mapping[int, Cost]]], path: Path) -> None:
    """Milliseconds over chips: for each pod's name, for each program's title, costs by number of
    chips."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)
    for ax, (pod, lines) in zip(axes[0], curves.items(), strict=True):
        drawn: dict[str, int] = {}
        for title, costs in lines.items():
            library = title.split(",")[0]
            drawn[library] = drawn.get(library, -1) + 1
            ax.plot(
                list(costs),
                [1e3 * one.seconds for one in costs.values()],
                linestyle=LINES[drawn[library] % len(LINES)],
                # some lie on top of each other
                linewidth=1.5 if library == "jaxnorm" else 3,
                color=COLORS[library],
                label=title,
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks(
            [8, 64, 512, 4096]
            if max(max(costs) for costs in lines.values()) > 256
            else [8, 32, 128, 256]
        )
        plain_log(ax.yaxis, (0.1, 0.2, 0.5, 1, 2, 5, 10, 20))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_title(f"TPU {pod}: a model, nothing was run", fontsize=10)
        ax.set_xlabel("chips")
        quiet(ax)
    axes[0][0].set_ylabel("ms of collectives in a step of ResNet-50")
    last = list(curves.values())[-1]
    figure.draw_without_rendering()  # names stand where the layout puts the lines
    name_ends(
        axes[0][-1],
        (
            (title, 1e3 * list(costs.values())[-1].seconds, COLORS[title.split(",")[0]])
            for title, costs in last.items()
        ),
    )
    save(figure, path, dpi=120)
