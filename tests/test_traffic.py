"""What normalization moves through the memory of an H200, which is compiled for and not needed."""

import math

import pytest

from benchmarks.h200 import MULTIPROCESSORS, unavailable
from benchmarks.shapes import QUICK, SHAPES
from benchmarks.traffic import DTYPES, Cell, traffic

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

IMAGES = ("batch", "group", "instance", "batch_group")
"""Methods for every image; ghosts where they divide the batch."""

POOLED = (*IMAGES, "ghost_batch")
"""Methods whose sets spread over positions, so that x is read for its statistics and again to be
normalized."""

RUNNING = ("batch", "batch_group")

LARGE = 8 * 2**20
"""Bytes from which on a kernel that does not fill the device is slow; below it is over before that
shows."""


def cells(methods, what):
    """Images take every method that pools positions, tokens layer norm; `QUICK` shapes in bfloat16
    are not slow."""
    parameters = []
    for name, shape in SHAPES.items():
        for method in dict.fromkeys(
            (*shape.methods, *(() if "token_layer" in shape.methods else IMAGES))
        ):
            for dtype in DTYPES:
                quick = name in QUICK and dtype == "bfloat16" and method in shape.methods
                if method in methods:
                    marks = () if quick else pytest.mark.slow
                    cell = Cell(name, method, dtype, what, "jaxnorm")
                    parameters.append(
                        pytest.param(cell, id=f"{name}-{method}-{dtype}", marks=marks)
                    )
    return parameters


def channel_vectors(cell):
    """A float32 for each example and channel, written and read, in multiples of the tensor."""
    n, *positions, _ = SHAPES[cell.shape].on("gpu")
    return 8 / (math.prod(positions) * (2 if cell.dtype == "bfloat16" else 4))


def found(cell):
    traffic_of_cell = traffic(cell)
    assert traffic_of_cell is not None
    return traffic_of_cell


def assert_fills_device(cell, traffic_of_cell):
    """Also while the second reduction for the variance runs."""
    assert traffic_of_cell.smallest_grid is not None, (
        "XLA no longer says how many thread blocks a kernel has"
    )
    if traffic_of_cell.tensor > LARGE:
        assert traffic_of_cell.smallest_grid >= MULTIPROCESSORS


@pytest.mark.parametrize("cell", cells((*POOLED, "token_layer"), "step"))
def test_step_moves_nine_tensors(cell):
    """Eight is the least without keeping sets on the chip: x twice and y; x and dy twice and dx."""
    step = found(cell)
    assert step.moved <= 9
    assert step.moved_by_branches <= 3.2  # rarely taken; XLA stores x - mean in some cases
    assert_fills_device(cell, step)


@pytest.mark.parametrize("cell", cells(POOLED, "forward"))
def test_forward_moves_three_tensors(cell):
    """x for the statistics, x and y; what is small counts where sets are, as in the last stage of a
    ResNet."""
    forward = found(cell)
    assert forward.moved <= 3.1 + 6 * channel_vectors(cell)
    assert_fills_device(cell, forward)


@pytest.mark.parametrize(
    "cell", [*cells(RUNNING, "inference"), *cells(("token_layer",), "forward")]
)
def test_forward_moves_two_tensors(cell):
    """Running statistics are there before x is read; rows of channels stay on the chip."""
    forward = found(cell)
    assert forward.moved <= 2.1
    assert forward.moved_by_branches == 0
    assert_fills_device(cell, forward)


@pytest.mark.parametrize(
    ("cell", "bound"),
    [
        (Cell("diffusion_32", "group", "bfloat16", "step", "flax.linen"), 9),
        (Cell("vit_b", "token_layer", "bfloat16", "forward", "flax.linen"), 2.1),
    ],
    ids=lambda value: value.shape if isinstance(value, Cell) else "",
)
def test_bounds_can_fail(cell, bound):
    assert found(cell).moved > bound


def test_starved_grids_show():
    """Flax sums the last stage of a ResNet, 13 MB, with one block for each 128 channels."""
    assert (
        found(Cell("resnet50_stage4", "batch", "bfloat16", "step", "flax.linen")).smallest_grid
        < MULTIPROCESSORS
    )
