"""Claims about images from several distributions."""

from benchmarks.claims.record import EMBEDDINGS, Claim
from benchmarks.claims.verdicts import Difference, below, error


def of_domains(order: str, value: str, last: str) -> Difference:
    """The error of batch norm with 8 images of one domain on a device, or of all of them."""
    return error("batch", 8, last, f"domains.{value}", order=order)


def apart_from_shared(value: str, last: str = "1x1") -> Difference:
    """Error with statistics of each domain minus that with shared ones."""
    return of_domains("domains_apart", value, last) - of_domains("domains", value, last)


CLAIMS = (
    Claim(
        "domain_batch_norm",
        "Statistics of each domain do better than shared ones on the domains of the training.",
        "Domain-Specific Batch Normalization for Unsupervised Domain Adaptation, 2019, "
        "arXiv:1906.03950",
        (
            below(0, apart_from_shared("known")),
            below(0, apart_from_shared("known", "2x2")),
        ),
        limits="Domains are the images as they are, rotated, inverted and noisy; scale and bias "
        "are shared, and labels are known in all domains.",
    ),
    Claim(
        "batch_norm_embeddings",
        "On an unknown domain, networks with each domain's statistics, weighed by how near it is, "
        "do better than shared ones.",
        EMBEDDINGS,
        (
            below(0, apart_from_shared("faint")),
            below(0, apart_from_shared("mnist")),
            below(0, apart_from_shared("faint", "2x2")),
            below(0, apart_from_shared("mnist", "2x2")),
        ),
        "PACS, ResNet-18: 83.1 % right on average; from summaries of the paper",
        "Unknown are images of half the contrast and, for digits, those of MNIST at 8x8.",
        quick=2,
    ),
    Claim(
        "adaptation_to_shift",
        "On shifted test images, their own statistics are better than the running ones.",
        "Improving robustness against common corruptions by covariate shift adaptation, 2020, "
        "arXiv:2006.16971",
        (
            below(
                0,
                error("batch", 32, value="shifted.faint_adapted")
                - error("batch", 32, value="shifted.faint"),
            ),
            below(
                0,
                error("batch", 32, value="shifted.noisy_adapted")
                - error("batch", 32, value="shifted.noisy"),
            ),
        ),
        limits="Of up to 1024 test images at once, without any running statistics.",
        quick=2,
    ),
)
