"""The claims of the papers on normalization that are tried here, each as data: see `record`."""

from benchmarks.claims import batches, domains, recipes
from benchmarks.claims.record import Claim

CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (*batches.CLAIMS, *recipes.CLAIMS, *domains.CLAIMS)
}
"""By name, in the order in which they are tried and reported."""
