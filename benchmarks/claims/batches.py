"""Claims about how many examples share statistics."""

from benchmarks.claims.record import (
    BATCH_GROUP,
    FOUR_THINGS,
    GHOSTS,
    GROUP,
    NOTES,
    README,
    Claim,
)
from benchmarks.claims.verdicts import Check, Difference, above, below, error, within

BATCH_32 = error("batch", 32)
BATCH_2 = error("batch", 2)
LARGE = {"last": "2x2", "step": 512}
BATCH_512 = error("batch", 512, **LARGE)


def small_batch_claim(
    name: str, method: str, title: str, source: str, paper: str = "", limits: str = ""
) -> Claim:
    """That a method keeps at 2 images what batch norm loses, also to within 2 points of batch norm
    at 32 images."""

    def at_2(last: str) -> Difference:
        return error(method, 2, last)

    checks: tuple[Check, ...] = (
        below(-1, at_2("1x1") - BATCH_2),
        below(2, at_2("1x1") - BATCH_32),
        below(0, at_2("4x4") - error("batch", 2, "4x4")),
    )
    text = f"{title} at 2 images keeps what batch norm loses."
    return Claim(name, text, source, checks, paper, limits)


CLAIMS = (
    Claim(
        "batch_norm_small",
        "Batch norm's error grows when few images share statistics.",
        GROUP,
        (
            above(1, BATCH_2 - BATCH_32),
            above(1, error("batch", 4) - BATCH_32),
            above(1, error("batch", 2, "2x2") - error("batch", 32, "2x2")),
            above(1, error("batch", 2, "4x4") - error("batch", 32, "4x4")),
        ),
        "ResNet-50, ImageNet: error 34.7 % at 2 images, 27.3 at 4, 23.6 at 32; " + NOTES,
        "Last maps of 1x1 are harsher than any network of the paper; benchmarks.failure has the "
        "whole map.",
    ),
    Claim(
        "group_norm_flat",
        "Group norm's error does not depend on the batch.",
        GROUP,
        (
            within(1, error("group", step=8) - error("group")),
            within(1, error("group", step=128) - error("group")),
            within(1, error("group", step=4) - error("group")),
        ),
        "ResNet-50, ImageNet: 24.1 % at 2 images and 24.1 at 32; " + NOTES,
        "Steps of 4 to 128 images on one device: with their size, the number of steps and the "
        "noise of the gradient differ as well.",
    ),
    Claim(
        "batch_group_small",
        "Batch group norm keeps at 2 images what batch norm loses.",
        BATCH_GROUP,
        (
            below(-1, error("batch_group", 2) - BATCH_2),
            below(0, error("batch_group", 2) - error("group")),
            within(2, error("batch_group", 2) - BATCH_32),
            below(0, error("batch_group", 2, "4x4") - error("batch", 2, "4x4")),
        ),
        "ResNet-50, ImageNet, 2 images: 76.1 % right, batch norm 66.5; from the abstract",
        "The number of groups follows a rule of this library, since the paper's was not read.",
    ),
    Claim(
        "batch_group_large",
        "At very large batches batch norm loses, and more groups than channels help.",
        BATCH_GROUP,
        (
            below(0, error("batch_group_halves", 512, **LARGE) - BATCH_512),
            above(0, BATCH_512 - error("batch", 32, "2x2")),
        ),
        "",
        "Twice as many groups as channels: upper and lower positions apart. Half of the images of "
        "digits are one step.",
        sizes=(8, 32),  # maps of 28x28 images have sizes that 2 does not divide
    ),
    Claim(
        "layer_norm_behind",
        "Layer norm does less well than group norm on images.",
        GROUP,
        (above(0, error("layer") - error("group")),),
        "ResNet-50, ImageNet, 32 images: 25.3 % and 24.1 %; " + NOTES,
    ),
    Claim(
        "instance_norm_behind",
        "Instance norm does less well than group norm on images.",
        GROUP,
        (
            above(0, error("instance", last="4x4") - error("group", last="4x4")),
            above(0, error("instance", last="2x2") - error("group", last="2x2")),
        ),
        "ResNet-50, ImageNet, 32 images: 28.4 % and 24.1 %; " + NOTES,
        "On maps of 1x1 it fails by its definition: its output is its bias.",
    ),
    Claim(
        "positional_norm_behind",
        "Positional norm does less well than batch group norm.",
        BATCH_GROUP,
        (above(0, error("positional") - error("batch_group", 2)),),
        "",
        "That the paper compares the two is known from its abstract alone.",
    ),
    Claim(
        "ghost_batches_medium",
        "Ghost batches of 16 images regularize medium batches.",
        FOUR_THINGS,
        (
            below(
                0, error("ghost_16", 128, "2x2", step=128) - error("batch", 128, "2x2", step=128)
            ),
            below(0, error("ghost_16", 32, "2x2") - error("batch", 32, "2x2")),
        ),
        "ResNet-50, ImageNet: -0.3 to +0.3 points; from the notes of the library composer, not the "
        "paper",
        "The size of 16 is that of the example in the authors' code.",
    ),
    Claim(
        "ghost_batches_large",
        "Ghost batches close a part of the gap of large batches.",
        GHOSTS,
        (
            below(0, error("ghost_16", 512, **LARGE) - BATCH_512),
            above(0, BATCH_512 - error("batch", 32, "2x2")),
        ),
        "",
        "The learning rate grows with the root of the batch, as in the paper, and there are as "
        "many steps as at 128 images.",
    ),
    Claim(
        "batch_and_group_tiny",
        "For tiny batches, statistics over images and groups of channels, with example weighing, "
        "do better than group norm.",
        FOUR_THINGS,
        (
            below(0, error("weighed", 2) - error("group")),
            below(-1, error("weighed", 2) - BATCH_2),
            below(0, error("weighed", 2, "4x4") - error("group", last="4x4")),
        ),
    ),
    small_batch_claim(
        "momentum_batch_norm",
        "momentum",
        "Momentum batch norm",
        "Momentum Batch Normalization for Deep Learning with Small Batch Size, ECCV 2020",
        limits="The definition was read in a reproduction.",
    ),
    small_batch_claim(
        "cross_iteration_norm",
        "cross_iteration",
        "Cross-iteration norm",
        "Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712",
        "Faster R-CNN on COCO, 4 images: box AP 37.6, synchronized batch norm 37.5; " + README,
    ),
    small_batch_claim(
        "memorized_batch_norm",
        "memorized",
        "Memorized batch norm",
        "Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947",
        limits="A reconstruction: how the paper weighs its memory is not known.",
    ),
    small_batch_claim(
        "batch_renorm",
        "batch_renorm",
        "Batch Renormalization",
        "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models, "
        "2017, arXiv:1702.03275",
        "ResNet-50, ImageNet, 2 images: 69.71 % right, batch norm 64.78; from the readme of the "
        "authors of moving average batch norm",
    ),
    small_batch_claim(
        "moving_average_norm",
        "moving_average",
        "Moving average batch norm",
        "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, "
        "2020, arXiv:2001.06838",
        "ResNet-50, ImageNet, 2 images: 76.33 % right, batch norm 64.78, and 76.59 at 32; "
        + README,
    ),
)
