"""What a task is: how it is trained, what is measured, and what the paper says of it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.cells import Settings
from benchmarks.datasets import Data
from benchmarks.measures import Values
from benchmarks.plan import Plan


class Found(NamedTuple):
    """What a training of several seeds gave.

    Attributes:
        errors: test error in % with the running statistics, for each seed.
        more: other errors in % by their name, for each seed.
        compile_seconds: spent on tracing, compiling and initializing.
        train_seconds: spent on training.
    """

    errors: list[float]
    more: Values
    compile_seconds: float
    train_seconds: float


class Value(NamedTuple):
    """An error that the report shows.

    Attributes:
        name: "error" for the test error, else a name in `Found.more`.
        head: of its column.
        claimed: whether the claim is tried by it.
    """

    name: str
    head: str
    claimed: bool = False


class Task(NamedTuple):
    """A task of the batch group normalization paper.

    Attributes:
        name: on the command line.
        title: of its section.
        text: what is trained and measured, in sentences.
        measure: trains and evaluates a planned cell.
        values: what the report shows.
        settings: by the size of the image.
        quick: likewise, of --quick.
        compile_seconds: about what all compilations of a cell take.
        work: about how many times the training of an ordinary cell it is.
        limits: what this trial leaves out, beside what is said of all tasks.
    """

    name: str
    title: str
    text: str
    measure: Callable[[Plan, Data, Callable[[int], None]], Found]
    values: tuple[Value, ...]
    settings: Mapping[int, Settings]
    quick: Mapping[int, Settings]
    compile_seconds: float
    work: float
    limits: str


PAPER = "Batch Group Normalization, Zhou et al., 2020, arXiv:2012.02782"

CLAIM = (
    "Batch group norm consistently does better than batch, instance, layer, group and positional "
    "norm, in neural architecture search, adversarial learning, few-shot learning and unsupervised "
    "domain adaptation, too."
)
"""From the abstract; its tables were not read."""
