"""Batch Group Normalization with any number of groups, also where groups are no product over axes.

`_pieces` says which features such a group holds.
"""

from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_count
from jaxnorm._core.groups import Groups
from jaxnorm._core.moments import Moments
from jaxnorm.methods._fields import Count, as_value
from jaxnorm.methods._frame import (
    applied,
    axes_in,
    first_running,
    measured,
    per_device,
    pooled,
    running_in,
    updated,
)
from jaxnorm.methods._method import (
    Axes,
    InitOptions,
    Method,
    Options,
    Result,
    State,
    channels_of,
)
from jaxnorm.methods._options import Sets, sets_of_pooled
from jaxnorm.methods._pieces import at_features, grid_of, in_pieces, positions_of
from jaxnorm.methods._row import Row

BATCH_ENOUGH = 16
"""Number of examples from which `batch_group_count` keeps every channel apart, so that batch group
norm is batch norm."""


@as_value
class batch_group_norm(Method):
    """Standardize each of G equal pieces of the flattened features over the whole batch.

    With d = ((c H + h) W + w) the place of a feature in the order channel, row, column, S_g = {(n,
    h, w, c): all n, floor(d G / (C H W)) = g}, and

        y = (x - mean_S) / sqrt(var_S + epsilon) * scale_c + bias_c.

    For G that divides C these are groups of channels, and the method is a row of the table, which
    `norm` and `moments` take. It equals `batch_norm()` for G = C, and for a batch of one
    `layer_norm()` (G = 1), `group_norm(G)` and `instance_norm()` (G = C). For other G the method
    has a rule of its own, for real x: its result depends on the position, and its state belongs to
    one image size. G = C k splits the positions of each channel into k parts, rows first;
    G = C H W pools the examples alone. `batch_group_count` chooses G by the size of the batch.

    Args:
        num_groups: G, a divisor of C H W.
        momentum: weight of the old running statistics per update, 0 to 1; None remembers none and
            always uses the batch's.
        epsilon: added to the variance, in the unit of x squared.
        correction: 1 stores the unbiased variance, as PyTorch does.
        debias: divide the initial 0 and 1 out of the running statistics; adds `count` to the state.

    State: `mean` and `var`, (G,); and where G does not divide C `positions`, zeros of the image
    size, (H, W): its shape says to which resolution the state belongs.

    Options of apply:
        momentum: in place of the field.
        example_weight: as for rows of the table, where G divides C.

    Raises:
        ValueError: G does not divide C H W; state of another number of groups or of another image
            size.

    Example:
        >>> batch_group_norm(32).shape((64, 8, 8, 256))
        (1, 1, 1, 32)
        >>> # two positions, three channels; flattened 0, 3, 1, 4, 2, 5
        >>> x = jnp.arange(6.0).reshape(1, 2, 3)
        >>> method = batch_group_norm(2, momentum=0.0)
        >>> _, state = method.apply(x, method.init(x.shape), train=True)
        >>> (3 * state["mean"]).tolist()
        [4.0, 11.0]

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782. The definition was read in the abstract
        and in two independent implementations; running statistics are as in one of them.
    """

    also_in_state = Row.also_in_state

    num_groups: Count
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    correction: int = 0
    debias: bool = False

    def for_channels(self, num_channels: int) -> Method:
        return self if self.keeps_positions(num_channels) else self._row

    def row(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> Row:
        """The row of the table, for x whose channels G divides."""
        channels = channels_of(x_shape, axes)
        if self.keeps_positions(channels):
            raise ValueError(
                f"{self} is no row of the table for x of shape {tuple(x_shape)}: expected a "
                f"number of groups that divides the {channels} channels. Call its apply, which "
                "takes every divisor of all features; whole parts of every channel are "
                "Groups(batch=1, spatial=(parts, 1), channel=EACH)."
            )
        return self._row

    @property
    def _row(self) -> Row:
        return Row(
            Groups(batch=1, spatial=1, channel=self.num_groups),
            epsilon=self.epsilon,
            momentum=self.momentum,
            correction=self.correction,
            debias=self.debias,
        )

    def shape(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> Shape:
        """The shape of the statistic for x whose channels G divides: `Groups.shape`."""
        return self.row(x_shape, **axes).shape(x_shape, **axes)

    def _repr_html_(self) -> str | None:
        return self._row._repr_html_()

    def keeps_positions(self, num_channels: int) -> bool:
        return num_channels % self.num_groups != 0

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        if self.keeps_positions(channels_of(x_shape, axes)):
            return (sets_of_pooled((self.num_groups,)),)
        return self._row.sets(x_shape, **axes)

    def _init(self, x_shape: Shape, options: InitOptions) -> State:
        positions = positions_of(self.num_groups, x_shape, **axes_in(options))
        if self.momentum is None:
            return {}
        state = first_running((self.num_groups,), counted=self.debias)
        return state | {"positions": jnp.zeros(positions, jnp.float32)}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        momentum: ArrayLike | None = None,
        example_weight: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> Result:
        if example_weight is not None:
            raise ValueError(
                f"example_weight={example_weight} with groups that are not groups of channels. "
                "Expected a number of groups that divides the channels; inference.weigh_example "
                "takes any row of the table of methods."
            )
        channel = options["channel_axis"]
        grid = grid_of(self.num_groups, x.shape, **axes_in(options))
        if train or not state:
            features = jax.tree.map(
                lambda t: in_pieces(t, self.num_groups, channel),
                measured(x, grid, **per_device(options)),
            )
            m = pooled(features, (self.num_groups, 1), **options)
            if state:
                flat = jax.tree.map(lambda t: t.reshape(-1), lax.stop_gradient(m))
                state = updated(state, flat, momentum=momentum, correction=self.correction)
        else:
            m = jax.tree.map(lambda t: t.reshape(-1, 1), running_in(state))
        used = jax.tree.map(lambda t: at_features(t, grid, channel), m)
        return applied(x, used, self.epsilon, **options), state

    def inference_moments(
        self, state: State, x_shape: Sequence[int], **axes: Unpack[Axes]
    ) -> Moments | None:
        if self.keeps_positions(channels_of(x_shape, axes)):
            return None
        return self._row.inference_moments(state, x_shape, **axes)


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
