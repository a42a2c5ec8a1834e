"""What a claim is, and the sources of claims."""

from typing import NamedTuple

from benchmarks.claims.verdicts import Check
from benchmarks.residual import STRIDES


class Claim(NamedTuple):
    """What a paper says, and how it is tried.

    Attributes:
        name: on the command line.
        text: the claim, in one sentence.
        source: title, year and arXiv id.
        checks: all of them have to hold; the most telling first.
        paper: the paper's own figure, and from where it is known; "" where none could be read.
        limits: what this trial leaves out, beside what is said of all claims.
        quick: how many of the checks --quick makes.
        sizes: of the images that its methods can be tried on.
    """

    name: str
    text: str
    source: str
    checks: tuple[Check, ...]
    paper: str = ""
    limits: str = ""
    quick: int = 1
    sizes: tuple[int, ...] = tuple(STRIDES)

    def tried(self, data: str, *, quick: bool = False) -> list[Check]:
        """Its checks on a data set, or those that --quick makes."""
        checks = self.checks[: self.quick] if quick else self.checks
        return [check.on(data) for check in checks]


GROUP = "Group Normalization, 2018, arXiv:1803.08494"
BATCH_GROUP = "Batch Group Normalization, 2020, arXiv:2012.02782"
FOUR_THINGS = (
    "Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548"
)
GHOSTS = (
    "Train longer, generalize better: closing the generalization gap in large batch training of "
    "neural networks, 2017, arXiv:1705.08741"
)
GROUP_PLUS = "Understanding and Improving Group Normalization, 2022, arXiv:2207.01972"
PROXY = (
    "Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence, "
    "2021, arXiv:2106.03743"
)
EMBEDDINGS = "Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672"
NOTES = "from public notes that agree with each other; the paper's tables were not read"
README = "from the authors' readme"
NOTEBOOKS = "from the authors' notebooks, one seed; the paper's tables were not read"
