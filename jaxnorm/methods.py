"""The table of methods: every normalization of the family in one line, with its paper.

A `Method` says, for batch, spatial and channel axes, into how many groups each is split, and
whether the mean is fixed. It goes wherever statistics are asked for: `norm(x, group_norm(32))`,
`moments(x, batch_norm())`, `linen.Norm(instance_norm())`.

In the docstrings N is the number of examples, H x W the positions, C the channels, and S a set that
shares statistics. For every method

    y = (x - mean_S) / sqrt(var_S + epsilon) * scale_c + bias_c.
"""

import math
from collections.abc import Sequence

from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_count
from jaxnorm._core.groups import EACH, Groups, Method, Size, Split

BATCH_ENOUGH = 16


"""Number of examples from which `batch_group_count` keeps every channel apart, so that batch group
norm is batch norm."""


def batch_norm() -> Method:
    """Standardize each channel over the examples and positions.

    S_c = {(n, h, w, c): all n, h, w}. Equals `instance_norm()` for a batch of one,
    `batch_group_norm(C)` and `ghost_batch_norm(1)`. Under jit with the batch sharded, and with
    `axis_name`, it is cross-device batch normalization.

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (1, 1, 1, 256).

    Example:
        >>> batch_norm().shape((64, 8, 8, 256))
        (1, 1, 1, 256)

    Reference:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, 2015, arXiv:1502.03167. Inference with a biased running variance as in Flax, Keras
        and Haiku.
    """
    return Method(Groups(batch=1, spatial=1, channel=EACH))


def ghost_batch_norm(num_ghosts: int | None = None, *, ghost_size: int | None = None) -> Method:
    """Batch normalization inside consecutive parts of the batch, the ghost batches.

    S_(k, c) = {(n, h, w, c): n in ghost k, all h, w}. Equals `batch_norm()` of each part. One ghost
    is `batch_norm()`; N ghosts, or `ghost_size=1`, are `instance_norm()`. Running statistics are
    pooled over the ghosts.

    Args:
        num_ghosts: number of ghost batches, a divisor of N.
        ghost_size: or the examples in each, a divisor of N.

    Returns:
        The method; statistics of (64, 8, 8, 256) in 4 ghosts have shape (4, 1, 1, 256).

    Raises:
        ValueError: both or neither are given.

    Example:
        >>> ghost_batch_norm(ghost_size=16).shape((64, 8, 8, 256))
        (4, 1, 1, 256)

    Reference:
        Train longer, generalize better: closing the generalization gap in large batch training of
        neural networks, 2017, arXiv:1705.08741. Pooled running statistics as in the code of Four
        Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548.
    """
    return Method(
        Groups(
            batch=_one_of(num_ghosts, ghost_size, "num_ghosts", "ghost_size"),
            spatial=1,
            channel=EACH,
        )
    )


def instance_norm() -> Method:
    """Standardize each channel of each example over the positions.

    S_(n, c) = {(n, h, w, c): all h, w}. Equals `group_norm(C)`. With one position it returns the
    bias.

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 256).

    Example:
        >>> instance_norm().shape((64, 8, 8, 256))
        (64, 1, 1, 256)

    Reference:
        Instance Normalization: The Missing Ingredient for Fast Stylization, 2016, arXiv:1607.08022.
    """
    return Method(Groups(batch=EACH, spatial=1, channel=EACH))


def group_norm(num_groups: int | None = None, *, group_size: int | None = None) -> Method:
    """Standardize each group of consecutive channels of each example.

    S_(n, g) = {(n, h, w, c): all h, w, floor(c / (C / G)) = g}. Equals `layer_norm()` for one group
    and `instance_norm()` for C groups. Scale and bias stay one per channel, not per group.

    Args:
        num_groups: G, a divisor of C. The paper's default is 32.
        group_size: or the channels in a group, C / G.

    Returns:
        The method; statistics of (64, 8, 8, 256) in 32 groups have shape (64, 1, 1, 32).

    Raises:
        ValueError: both or neither are given.

    Example:
        >>> group_norm(32).shape((64, 8, 8, 256))
        (64, 1, 1, 32)
        >>> group_norm(group_size=16).shape((64, 8, 8, 256))
        (64, 1, 1, 16)

    Reference:
        Group Normalization, 2018, arXiv:1803.08494.
    """
    return Method(
        Groups(
            batch=EACH,
            spatial=1,
            channel=_one_of(num_groups, group_size, "num_groups", "group_size"),
        )
    )


def layer_norm() -> Method:
    """Standardize each example over all its positions and channels.

    S_n = {(n, h, w, c): all h, w, c}. Equals `group_norm(1)`. For x of shape (N, C) it equals
    `token_layer_norm()`.

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 1).

    Example:
        >>> layer_norm().shape((64, 8, 8, 256))
        (64, 1, 1, 1)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450; on images as in Group Normalization, 2018,
        arXiv:1803.08494.
    """
    return Method(Groups(batch=EACH, spatial=1, channel=1))


def token_layer_norm() -> Method:
    """Standardize each token over its channels: Flax's default kind of layer normalization.

    S_(n, h, w) = {(n, h, w, c): all c}. Equals `positional_norm()`, and `layer_norm()` of (N*H*W,
    C).

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (64, 8, 8, 1).

    Example:
        >>> token_layer_norm().shape((8, 196, 768))
        (8, 196, 1)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450.
    """
    return Method(Groups(batch=EACH, spatial=EACH, channel=1))


def positional_norm() -> Method:
    """Standardize each position over its channels: `token_layer_norm()`'s name in image models.

    S_(n, h, w) = {(n, h, w, c): all c}. The paper uses it without scale and bias and hands mean and
    standard deviation to later layers; `moments` returns them. The variance is biased; the authors'
    torch code divides by C - 1.

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (64, 8, 8, 1).

    Example:
        >>> positional_norm() == token_layer_norm()
        True

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """
    return Method(Groups(batch=EACH, spatial=EACH, channel=1))


def rms_norm() -> Method:
    """Divide each position of each example by the root mean square of its channels.

    S_(n, h, w) = {(n, h, w, c): all c} with the mean fixed at 0: y = x / sqrt(mean_S(x^2) +
    epsilon) * scale. Equals `token_layer_norm()` where the mean over channels is 0. Flax's epsilon
    is 1e-6.

    Returns:
        The method; statistics of (8, 196, 768) have shape (8, 196, 1).

    Example:
        >>> rms_norm().mean
        0

    Reference:
        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467; epsilon inside the root as in
        Flax and Keras.
    """
    return Method(Groups(batch=EACH, spatial=EACH, channel=1), mean=0)


def filter_response_norm() -> Method:
    """Divide each channel of each example by the root mean square over the positions.

    S_(n, c) = {(n, h, w, c): all h, w} with the mean fixed at 0: y = x / sqrt(mean_S(x^2) +
    epsilon) * scale + bias. The paper lets a thresholded linear unit follow, and may learn epsilon:
    `frn.filter_response_norm`.

    Returns:
        The method; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 256).

    Example:
        >>> filter_response_norm().shape((64, 8, 8, 256)), filter_response_norm().mean
        ((64, 1, 1, 256), 0)

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737. The definition was read in implementations by
        others.
    """
    return Method(Groups(batch=EACH, spatial=1, channel=EACH), mean=0)


def batch_group_norm(
    num_groups: int, x_shape: Sequence[int] | None = None, *, channel_axis: int = -1
) -> Method:
    """Standardize each group of features over the whole batch.

    Each example, flattened in the order channel, row, column, is cut into G equal pieces; S_g is
    piece g of all examples. For G that divides C these are groups of channels: equals
    `batch_norm()` for G = C, and for a batch of one `layer_norm()` (G = 1), `group_norm(G)` and
    `instance_norm()` (G = C). For G = C k the positions of each channel are split into k parts as
    well, rows first; the method then depends on the position and is tied to the image size. Pieces
    of any other G are not a row of the table: `batch_group.batch_group_norm` and the layers
    `BatchGroupNorm` take every G that divides C H W. `batch_group_count` chooses G by the size of
    the batch.

    Args:
        num_groups: G.
        x_shape: shape of x, needed for G > C.
        channel_axis: axis of the channels in x_shape. The batch is the first axis.

    Returns:
        The method; statistics of (64, 8, 8, 256) in 32 groups have shape (1, 1, 1, 32), in 1024
        groups (1, 4, 1, 256).

    Raises:
        ValueError: G pieces are not groups of channels nor whole parts of every channel.

    Example:
        >>> batch_group_norm(32).shape((64, 8, 8, 256))
        (1, 1, 1, 32)
        >>> batch_group_norm(1024, (64, 8, 8, 256)).shape((64, 8, 8, 256))
        (1, 4, 1, 256)

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782. The definition was read in the abstract
        and in two independent implementations.
    """
    if x_shape is None:
        return Method(Groups(batch=1, spatial=1, channel=num_groups))
    channel = single_axis(channel_axis, x_shape)
    if num_groups <= x_shape[channel]:
        return Method(Groups(batch=1, spatial=1, channel=num_groups))
    parts, rest = divmod(num_groups, x_shape[channel])
    spatial: list[int] = []
    for size in (n for i, n in enumerate(x_shape) if i not in (0, channel)):
        spatial.append(parts if size % parts == 0 else size)
        rest += parts % spatial[-1]
        parts = max(parts // spatial[-1], 1)
    if rest or math.prod(spatial) * x_shape[channel] != num_groups:
        raise ValueError(
            f"{num_groups} groups of x of shape {tuple(x_shape)} are not whole parts of every "
            f"channel. Expected a divisor of the {x_shape[channel]} channels, or "
            f"{x_shape[channel]} times a divisor of the rows, or {x_shape[channel]} times the "
            "rows times a divisor of the columns; batch_group.batch_group_norm and the layers "
            "BatchGroupNorm take any divisor of all features."
        )
    return Method(Groups(batch=1, spatial=tuple(spatial), channel=EACH))


def batch_group_count(batch_size: int, num_channels: int) -> int:
    """A number of groups for `batch_group_norm`: the largest divisor of C up to C batch_size / 16.

    A group then pools batch_size * C / G >= 16 pairs of an example and a channel, as many as batch
    normalization pools from 16 examples. From 16 examples on, G = C and the method is batch
    normalization. (Fewer than 16 pairs where C < 16 / batch_size: there G = 1.)

    The rule is ours. The paper chooses G by the size of the batch too, by a rule that could not be
    read.

    Args:
        batch_size: examples that are normalized together.
        num_channels: C.

    Returns:
        G, a divisor of C.

    Raises:
        ValueError: less than one example or channel.

    Example:
        >>> [batch_group_count(batch_size, 48) for batch_size in (2, 4, 8, 16, 32)]
        [6, 12, 24, 48, 48]

    Reference:
        For the method: Batch Group Normalization, 2020, arXiv:2012.02782.
    """
    check_count(batch_size, "batch_size")
    check_count(num_channels, "num_channels")
    limit = max(1, num_channels * min(batch_size, BATCH_ENOUGH) // BATCH_ENOUGH)
    return max(count for count in range(1, limit + 1) if num_channels % count == 0)


def batch_and_group_norm(
    num_ghosts: int | None = None,
    num_groups: int | None = None,
    *,
    ghost_size: int | None = None,
    group_size: int | None = None,
) -> Method:
    """Standardize the channels of a group in each ghost batch, both splits at once.

    S_(k, g) = {(n, h, w, c): n in ghost k, all h, w, c in group g}. With B examples in a ghost and
    G groups of channels, (B, G) = (N, C) is `batch_norm()`, (B, C) `ghost_batch_norm`, (1, C)
    `instance_norm()`, (1, G) `group_norm(G)`, (1, 1) `layer_norm()` and (N, G)
    `batch_group_norm(G)`.

    In inference the authors weigh the running statistics of each group with the example's own,
    which gets the weight alpha; alpha = 1 / B is the share that an example has of its set in
    training, and makes B = 1 group normalization in inference too. The authors' code leaves alpha
    at 0, running statistics alone. By default the layer `Norm` of this row uses 0, the layer
    `BatchAndGroupNorm` 1 / ghost_size.

    Args:
        num_ghosts: number of ghost batches, a divisor of N.
        num_groups: number of channel groups, a divisor of C.
        ghost_size: or the examples in a ghost batch.
        group_size: or the channels in a group.

    Returns:
        The method; statistics of (64, 8, 8, 256) in 4 ghosts and 32 groups have shape (4, 1, 1,
        32).

    Raises:
        ValueError: both or neither are given, of ghosts or of groups.

    Example:
        >>> batch_and_group_norm(ghost_size=2, num_groups=32).shape((64, 8, 8, 256))
        (32, 1, 1, 32)

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548. The
        definition was read in the authors' code.
    """
    batch = _one_of(num_ghosts, ghost_size, "num_ghosts", "ghost_size")
    return Method(
        Groups(
            batch=batch,
            spatial=1,
            channel=_one_of(num_groups, group_size, "num_groups", "group_size"),
        )
    )


def weight_standardization() -> Method:
    """Standardize a layer's kernel over everything but its output channels.

    S_o = {(h, w, i, o): all h, w, i} of a kernel in Flax's order, outputs last.
    `standardize_kernel` applies it.

    Returns:
        The method; statistics of a (3, 3, 64, 128) kernel have shape (1, 1, 1, 128).

    Example:
        >>> weight_standardization().shape((3, 3, 64, 128))
        (1, 1, 1, 128)

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520. The definition was read in the authors' code.
    """
    return Method(Groups(batch=1, spatial=1, channel=EACH))


def _one_of(count: int | None, size: int | None, count_name: str, size_name: str) -> Split:
    """A number of groups or their size, whichever is given."""
    if (count is None) == (size is None):
        raise ValueError(
            f"Got {count_name}={count} and {size_name}={size}; expected exactly one of the two: "
            "the number of groups, or the size of each."
        )
    # one of them is not None
    return Size(size) if size is not None else count  # type: ignore[return-value]
