"""The table of methods: every normalization of the family in one line, with its paper.

In the docstrings N is the number of examples, H x W the positions, C the channels, and S a set that
shares statistics. For every method

    y = (x - mean_S) / sqrt(var_S + epsilon) * scale_c + bias_c.
"""

from typing import Unpack

from jaxnorm._core.groups import EACH, Groups, Size, Split
from jaxnorm.methods._row import Row, RowFields


def batch_norm(**fields: Unpack[RowFields]) -> Row:
    """Standardize each channel over the examples and positions.

    S_c = {(n, h, w, c): all n, h, w}. Equals `instance_norm()` for a batch of one,
    `batch_group_norm(C)` and `ghost_batch_norm(1)`. Under jit with the batch sharded, and with
    `axis_name`, it is cross-device batch normalization.

    Args:
        **fields: other fields of `Row`: epsilon, momentum, correction, debias, ghost_update,
            example_weight, two_pass.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (1, 1, 1, 256).

    Example:
        >>> batch_norm().shape((64, 8, 8, 256))
        (1, 1, 1, 256)

    Reference:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, 2015, arXiv:1502.03167. Inference with a biased running variance as in Flax, Keras
        and Haiku.
    """
    return Row(Groups(batch=1, spatial=1, channel=EACH), **fields)


def ghost_batch_norm(
    num_ghosts: int | None = None, *, ghost_size: int | None = None, **fields: Unpack[RowFields]
) -> Row:
    """Batch normalization inside consecutive parts of the batch, the ghost batches.

    S_(k, c) = {(n, h, w, c): n in ghost k, all h, w}. Equals `batch_norm()` of each part. One ghost
    is `batch_norm()`; N ghosts, or `ghost_size=1`, are `instance_norm()`. Running statistics are
    pooled over the ghosts.

    Args:
        num_ghosts: number of ghost batches, a divisor of N.
        ghost_size: or the examples in each, a divisor of N.
        **fields: other fields of `Row`: epsilon, momentum, correction, debias, ghost_update,
            example_weight, two_pass.

    Returns:
        The row; statistics of (64, 8, 8, 256) in 4 ghosts have shape (4, 1, 1, 256).

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
    batch = _one_of(num_ghosts, ghost_size, "num_ghosts", "ghost_size")
    return Row(Groups(batch=batch, spatial=1, channel=EACH), **fields)


def instance_norm(*, epsilon: float = 1e-5) -> Row:
    """Standardize each channel of each example over the positions.

    S_(n, c) = {(n, h, w, c): all h, w}. Equals `group_norm(C)`. With one position it is the bias.

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 256).

    Example:
        >>> instance_norm().shape((64, 8, 8, 256))
        (64, 1, 1, 256)

    Reference:
        Instance Normalization: The Missing Ingredient for Fast Stylization, 2016, arXiv:1607.08022.
    """
    return Row(Groups(batch=EACH, spatial=1, channel=EACH), epsilon=epsilon)


def group_norm(
    num_groups: int | None = None, *, group_size: int | None = None, epsilon: float = 1e-5
) -> Row:
    """Standardize each group of consecutive channels of each example.

    S_(n, g) = {(n, h, w, c): all h, w, floor(c / (C / G)) = g}. Equals `layer_norm()` for one group
    and `instance_norm()` for C groups. Scale and bias stay one per channel, not per group.

    Args:
        num_groups: G, a divisor of C. The paper's default is 32.
        group_size: or the channels in a group, C / G.
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) in 32 groups have shape (64, 1, 1, 32).

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
    channel = _one_of(num_groups, group_size, "num_groups", "group_size")
    return Row(Groups(batch=EACH, spatial=1, channel=channel), epsilon=epsilon)


def layer_norm(*, epsilon: float = 1e-5) -> Row:
    """Standardize each example over all its positions and channels.

    S_n = {(n, h, w, c): all h, w, c}. Equals `group_norm(1)`. For x of shape (N, C) it equals
    `token_layer_norm()`.

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 1).

    Example:
        >>> layer_norm().shape((64, 8, 8, 256))
        (64, 1, 1, 1)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450; on images as in Group Normalization, 2018,
        arXiv:1803.08494.
    """
    return Row(Groups(batch=EACH, spatial=1, channel=1), epsilon=epsilon)


def token_layer_norm(*, epsilon: float = 1e-5) -> Row:
    """Standardize each token over its channels: Flax's default kind of layer normalization.

    S_(n, h, w) = {(n, h, w, c): all c}. Equals `positional_norm()`, and `layer_norm()` of
    (N*H*W, C).

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (64, 8, 8, 1).

    Example:
        >>> token_layer_norm().shape((8, 196, 768))
        (8, 196, 1)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450.
    """
    return Row(Groups(batch=EACH, spatial=EACH, channel=1), epsilon=epsilon)


def positional_norm(*, epsilon: float = 1e-5) -> Row:
    """Standardize each position over its channels: `token_layer_norm()`'s name in image models.

    S_(n, h, w) = {(n, h, w, c): all c}. The paper uses it without scale and bias and hands mean and
    standard deviation to later layers; `moments` returns them. The variance is biased; the authors'
    torch code divides by C - 1.

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (64, 8, 8, 1).

    Example:
        >>> positional_norm() == token_layer_norm()
        True

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """
    return Row(Groups(batch=EACH, spatial=EACH, channel=1), epsilon=epsilon)


def rms_norm(*, epsilon: float = 1e-5) -> Row:
    """Divide each position of each example by the root mean square of its channels.

    S_(n, h, w) = {(n, h, w, c): all c} with the mean fixed at 0: y = x / sqrt(mean_S(x^2) +
    epsilon) * scale. Equals `token_layer_norm()` where the mean over channels is 0. Flax's epsilon
    is 1e-6.

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (8, 196, 768) have shape (8, 196, 1).

    Example:
        >>> rms_norm().mean
        0

    Reference:
        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467; epsilon inside the root as in
        Flax and Keras.
    """
    return Row(Groups(batch=EACH, spatial=EACH, channel=1), mean=0, epsilon=epsilon)


def instance_rms_norm(*, epsilon: float = 1e-5) -> Row:
    """Divide each channel of each example by the root mean square over the positions.

    S_(n, c) = {(n, h, w, c): all h, w} with the mean fixed at 0: y = x / sqrt(mean_S(x^2) +
    epsilon) * scale + bias. It is what `filter_response_norm` standardizes with before its
    threshold.

    Args:
        epsilon: added to the variance, in the unit of x squared.

    Returns:
        The row; statistics of (64, 8, 8, 256) have shape (64, 1, 1, 256).

    Example:
        >>> instance_rms_norm().shape((64, 8, 8, 256)), instance_rms_norm().mean
        ((64, 1, 1, 256), 0)

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737, read in implementations by others.
    """
    return Row(Groups(batch=EACH, spatial=1, channel=EACH), mean=0, epsilon=epsilon)


def batch_and_group_norm(
    num_ghosts: int | None = None,
    num_groups: int | None = None,
    *,
    ghost_size: int | None = None,
    group_size: int | None = None,
    **fields: Unpack[RowFields],
) -> Row:
    """Standardize the channels of a group in each ghost batch, both splits at once.

    S_(k, g) = {(n, h, w, c): n in ghost k, all h, w, c in group g}. With B examples in a ghost and
    G groups of channels, (B, G) = (N, C) is `batch_norm()`, (B, C) `ghost_batch_norm`, (1, C)
    `instance_norm()`, (1, G) `group_norm(G)`, (1, 1) `layer_norm()` and (N, G)
    `batch_group_norm(G)`.

    Running statistics are those of each channel over the whole batch. Inference pools them over
    each group and weighs the example's own in, by its share of a set in training, 1 / B: for B = 1
    inference is group normalization too. The authors' code leaves this weight at 0, to be chosen
    after training: see `inference.choose_example_weight`.

    Args:
        num_ghosts: number of ghost batches, a divisor of N.
        num_groups: number of channel groups, a divisor of C.
        ghost_size: or the examples in a ghost batch.
        group_size: or the channels in a group.
        **fields: other fields of `Row`; `example_weight` is "share" by default, 1 / ghost_size.

    Returns:
        The row; (64, 8, 8, 256) in 4 ghosts and 32 groups has statistics of (4, 1, 1, 32).

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
    channel = _one_of(num_groups, group_size, "num_groups", "group_size")
    fields.setdefault("example_weight", "share")
    running = Groups(batch=1, spatial=1, channel=EACH)
    return Row(Groups(batch=batch, spatial=1, channel=channel), running=running, **fields)


def _one_of(count: int | None, size: int | None, count_name: str, size_name: str) -> Split:
    """A number of groups or their size, whichever is given."""
    if (count is None) == (size is None):
        raise ValueError(
            f"Got {count_name}={count} and {size_name}={size}; expected exactly one of the two: "
            "the number of groups, or the size of each."
        )
    return Size(size) if size is not None else count  # type: ignore[return-value]  # not both None
