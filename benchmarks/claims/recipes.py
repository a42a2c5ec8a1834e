"""Claims about what is done beside and after training: example weighing, weight decay, noise,
activations and recalibration."""

from benchmarks.claims.record import FOUR_THINGS, GROUP_PLUS, NOTEBOOKS, PROXY, Claim
from benchmarks.claims.verdicts import Difference, above, below, error
from benchmarks.training import WEIGHT_DECAY

BY_CLASS = {"last": "2x2", "order": "by_class"}


def gain_of_decay(method: str, batch: int | None, *, residual: bool) -> Difference:
    """Error with weight decay of scales and biases minus that without."""
    decayed = error(method, batch, residual=residual, norm_decay=WEIGHT_DECAY)
    return decayed - error(method, batch, residual=residual)


def cost_of_noise(method: str, batch: int | None) -> Difference:
    """Error with noise behind every norm in training minus that without."""
    return error(method, batch, noise=1.0) - error(method, batch)


def cost_of_shift(method: str, batch: int | None, shift: str) -> Difference:
    """Error on shifted test images minus that on the others."""
    return error(method, batch, value=f"shifted.{shift}") - error(method, batch)


CLAIMS = (
    Claim(
        "example_weighing",
        "At inference an example's own statistics, weighed in, help batch norm.",
        FOUR_THINGS,
        (
            below(0, error("batch", 4, "2x2", "weighed.error") - error("batch", 4, "2x2")),
            below(0, error("batch", 2, "2x2", "weighed.error") - error("batch", 2, "2x2")),
            below(0, error("batch", 32, "2x2", "weighed.error") - error("batch", 32, "2x2")),
        ),
        limits="The weight is chosen on validation images; 0 is one of those tried.",
    ),
    Claim(
        "example_weighing_non_iid",
        "Example weighing helps batch norm where each device is trained with few classes.",
        FOUR_THINGS,
        (
            below(
                0,
                error("batch", 4, value="weighed.error", **BY_CLASS)
                - error("batch", 4, **BY_CLASS),
            ),
        ),
        limits="The images of a step are sorted by label before they are spread over 8 devices.",
    ),
    Claim(
        "norm_decay_residual",
        "Weight decay of scales and biases helps networks with residual paths.",
        FOUR_THINGS,
        (
            below(0, gain_of_decay("batch", 32, residual=True)),
            below(0, gain_of_decay("group", None, residual=True)),
        ),
        limits=f"With the coefficient of the weights, {WEIGHT_DECAY:g}, toward 1 and 0. That the "
        "paper tells networks by their residual paths is remembered, not read.",
    ),
    Claim(
        "norm_decay_plain",
        "Weight decay of scales and biases does not help networks without residual paths.",
        FOUR_THINGS,
        (
            above(-0.5, gain_of_decay("batch", 32, residual=False)),
            above(-0.5, gain_of_decay("group", None, residual=False)),
        ),
        limits="Seen where it gains less than half a point.",
    ),
    Claim(
        "group_norm_sensitive",
        "Group norm is more sensitive than batch norm to noise behind its layers, and to distorted "
        "images.",
        GROUP_PLUS,
        (
            above(0, cost_of_noise("group", None) - cost_of_noise("batch", 32)),
            above(0, cost_of_shift("group", None, "noisy") - cost_of_shift("batch", 32, "noisy")),
            above(0, cost_of_shift("group", None, "faint") - cost_of_shift("batch", 32, "faint")),
        ),
        "VGG-11, CIFAR-10: from 80.8 % right to 10.0 with noise, batch norm from 84.5 to 82.1; "
        + NOTEBOOKS,
        "Noise is one normal number for each image and group of channels.",
    ),
    Claim(
        "group_norm_plus",
        "GN+ does better than group norm at all batch sizes.",
        GROUP_PLUS,
        (
            below(0, error("group_plus", 32) - error("group")),
            below(0, error("group_plus", 2) - error("group")),
            below(0, error("group_plus", 32, "4x4") - error("group", last="4x4")),
        ),
        "SVHN, VGG-11: 93.0 % right, group norm 94.2; CIFAR-10, VGG-11: 81.6 and 79.7; "
        + NOTEBOOKS,
        "With running statistics, which the authors' code does not have.",
    ),
    Claim(
        "group_norm_plus_noise",
        "GN+ is less sensitive than group norm to noise behind its layers.",
        GROUP_PLUS,
        (below(0, cost_of_noise("group_plus", 32) - cost_of_noise("group", None)),),
        "VGG-11, CIFAR-10, with noise: 83.1 % right, group norm 10.0; " + NOTEBOOKS,
    ),
    Claim(
        "proxy_norm_group",
        "Proxy norm takes group norm closer to batch norm.",
        PROXY,
        (
            below(0, error("proxy") - error("group")),
            below(0, error("proxy", last="4x4") - error("group", last="4x4")),
        ),
    ),
    Claim(
        "proxy_norm_layer",
        "Proxy norm takes layer norm closer to batch norm.",
        PROXY,
        (
            below(0, error("layer_proxy") - error("layer")),
            below(0, error("layer_proxy", last="4x4") - error("layer", last="4x4")),
        ),
    ),
    Claim(
        "recalibration",
        "Statistics of the population, measured after training, are better than running averages.",
        'Rethinking "Batch" in BatchNorm, 2021, arXiv:2105.07576',
        (
            below(0, error("batch", 2, value="recalibrated.error") - error("batch", 2)),
            below(0, error("batch", 2, "4x4", "recalibrated.error") - error("batch", 2, "4x4")),
            below(0, error("batch", 32, value="recalibrated.error") - error("batch", 32)),
        ),
        limits="With the same batches as in training.",
    ),
)
