"""Layers that are a row of the table of methods: any row, and the ones that Flax does not have."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import _layers, methods
from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.checks import check_count
from jaxnorm._core.ghosts import GhostUpdate
from jaxnorm._core.groups import Groups, Method, as_method
from jaxnorm._core.moments import as_array
from jaxnorm._core.state import running_shape
from jaxnorm._layers import Activation, StateOptions, with_batch
from jaxnorm.batch_group import batch_group_norm, init_batch_group_norm
from jaxnorm.linen._call import Layer, State, call, call_function, uses_running


class Row(Layer, kw_only=True):
    """Fields and call of the layers that are a row of the table; a final class adds which row."""

    momentum: float | None = 0.99
    debias: bool = False
    correction: int = 0

    def row(self, x_shape: Shape) -> Method:
        """The row of the table for x of this shape."""
        raise NotImplementedError

    def measured(self, row: Method) -> Method:
        """The sets of the running statistics."""
        return row

    def weight(self, given: ArrayLike | None, use: bool) -> ArrayLike | None:
        """Of an example at inference, from what the call was given."""
        return given

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_running_average: bool | None = None,
        example_weight: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much, and
        `example_weight` is `inference.weigh_example`'s, with running statistics."""
        x = as_array(x)
        row = self.row(x.shape)
        state = running = None
        if row.pools_batch and self.is_initializing():
            # any batch initializes, also one that ghosts do not divide
            row = _layers.whole_batch(row)
        if row.pools_batch and self.momentum is not None:
            use = uses_running(self, use_running_average)
            measured = self.measured(row)
            shapes = running_shape(
                measured, x.shape, batch_axis=self.batch_axis, channel_axis=self.channel_axis
            )
            state = State(self, x, *shapes)
            weight = self.weight(example_weight, use)
            running = state.running(
                use,
                update_running_average,
                measured=None if measured == row else measured,
                example_weight=weight,
            )
        else:
            _layers.needs_running(example_weight)
        return call(
            self,
            x,
            row,
            (scale, bias),
            self.channel_axis,
            mask,
            activation,
            state=state,
            running=running,
        )


class Norm(Row):
    """Any row of the table of methods as a layer.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of the sets that `method` describes. Methods that share statistics between
    examples keep running ones in the collection `batch_stats`, (C,) for batch norm, (G,) for batch
    group norm, and need `use_running_average`; others ignore it.

    Args:
        method: a `Method`, such as `methods.group_norm(32)`, or `Groups`.
        use_running_average: normalize with the running statistics; here or at the call, not both.
        momentum: weight of the old running statistics per update, 0 to 1; None keeps none and
            always uses the batch's.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        debias: divide the initial 0 and 1 out of the running statistics; adds `count` to the
            collection.
        correction: 1 stores the unbiased variance, as PyTorch does; real weights must then count
            elements, see `update_running`.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.

    Raises:
        ValueError: axes that do not split, `use_running_average` given nowhere or twice, running
            statistics of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = Norm(methods.batch_group_norm(4))
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 16)), use_running_average=True
        ... )
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'mean': (4,), 'var': (4,)}
    """

    method: Method | Groups

    def row(self, x_shape: Shape) -> Method:
        return as_method(self.method)


class GhostBatchNorm(Row):
    """Batch normalization inside consecutive parts of the batch: `methods.ghost_batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of each channel in each ghost batch. Running statistics are pooled over the
    ghosts, unless asked for otherwise, so they are those of `BatchNorm`; they serve any batch at
    inference.

    Args:
        num_ghosts: number of ghost batches, a divisor of the batch.
        ghost_size: or the examples in each.
        ghost_update: "pooled", "averaged", "sequential" or "sequential divided": see
            `update_running`.
        Others: as `Norm`.

    Raises:
        ValueError: both or neither are given, or the batch does not split.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = GhostBatchNorm(ghost_size=16)
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 3)), use_running_average=False
        ... )
        >>> layer.apply(variables, jnp.ones((5, 8, 8, 3)), use_running_average=True).shape
        (5, 8, 8, 3)

    Reference:
        Train longer, generalize better: closing the generalization gap in large batch training of
        neural networks, 2017, arXiv:1705.08741.
    """

    num_ghosts: int | None = None
    ghost_size: int | None = None
    ghost_update: GhostUpdate = "pooled"

    def row(self, x_shape: Shape) -> Method:
        return methods.ghost_batch_norm(self.num_ghosts, ghost_size=self.ghost_size)


class BatchGroupNorm(Row):
    """Normalization of groups of features over the whole batch: `batch_group.batch_group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    The collection `batch_stats` holds `mean` and `var`, (G,). Where G does not divide the channels,
    groups are of positions too: the layer then depends on the position, takes real x, and is tied
    to the image size with which it was initialized; the collection's `positions` has that shape,
    (H, W).

    Args:
        num_groups: G, a divisor of channels times positions; `methods.batch_group_count` chooses
            one by the batch's size.
        Others: as `Norm`.

    Raises:
        ValueError: G does not divide, x of another image size than the running statistics.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchGroupNorm(32)
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 64)), use_running_average=False
        ... )
        >>> variables["batch_stats"]["mean"].shape, variables["params"]["scale"].shape
        ((32,), (64,))

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782; see `batch_group.batch_group_norm`.
    """

    num_groups: int

    def row(self, x_shape: Shape) -> Method:
        return methods.batch_group_norm(self.num_groups)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        example_weight: ArrayLike | None = None,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        x = as_array(x)
        channels = x.shape[single_axis(self.channel_axis, x.shape)]
        if channels % check_count(self.num_groups, "num_groups") == 0:
            return super().__call__(
                x, use_running_average, example_weight=example_weight, **options
            )
        _layers.only_channel_groups(example_weight)
        axes = {"batch_axis": self.batch_axis, "channel_axis": self.channel_axis}
        first = partial(
            init_batch_group_norm, self.num_groups, x.shape, counted=self.debias, **axes
        )
        static = {"num_groups": self.num_groups, "correction": self.correction}
        if self.momentum is None:
            return call_function(
                self, x, partial(with_batch, batch_group_norm, first(), **static), options
            )
        function = partial(batch_group_norm, momentum=self.momentum, **static)
        return call_function(
            self,
            x,
            function,
            options,
            state=lambda _: first(),
            use_running_average=use_running_average,
        )


class BatchAndGroupNorm(Row):
    """Groups of channels over ghost batches, for small batches: `methods.batch_and_group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of each group of channels in each ghost batch. Running statistics are those of
    each channel over the whole batch, as `BatchNorm`'s. Inference pools them over each group and
    weighs the example's own in: `inference.weigh_example`, by default with the weight that an
    example has in training. A ghost of one example is group normalization, in both.

    Args:
        num_ghosts: number of ghost batches, a divisor of the batch.
        num_groups: number of channel groups, a divisor of the channels.
        ghost_size: or the examples in each ghost.
        group_size: or the channels in each group.
        example_weight: of an example at inference, where the call gives none. None is 1 /
            ghost_size. The authors' code has 0, to be chosen after training: see
            `inference.choose_example_weight`.
        Others: as `Norm`.

    Raises:
        ValueError: both or neither are given, of ghosts or of groups, axes that do not split, or no
            `example_weight` at inference with ghosts given by number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchAndGroupNorm(ghost_size=2, num_groups=4)
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 16)), use_running_average=False
        ... )
        >>> variables["batch_stats"]["mean"].shape
        (16,)
        >>> layer.apply(
        ...     variables, jnp.ones((5, 8, 8, 16)), use_running_average=True, example_weight=0.25
        ... ).shape
        (5, 8, 8, 16)

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548; see
        `inference.weigh_example`.
    """

    num_ghosts: int | None = None
    num_groups: int | None = None
    ghost_size: int | None = None
    group_size: int | None = None
    example_weight: float | None = None

    def row(self, x_shape: Shape) -> Method:
        return methods.batch_and_group_norm(
            self.num_ghosts, self.num_groups, ghost_size=self.ghost_size, group_size=self.group_size
        )

    def measured(self, row: Method) -> Method:
        return _layers.per_channel(row)

    def weight(self, given: ArrayLike | None, use: bool) -> ArrayLike | None:
        return _layers.trained_weight(given, use, self.example_weight, self.ghost_size)


class PositionalNorm(Row):
    """Normalization of each position over its channels: `methods.positional_norm`, without scale
    and bias by default.

        y = (x - mean) / sqrt(var + epsilon)

    Args:
        Others: as `Norm`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> PositionalNorm().init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 8, 8, 16)

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """

    use_bias: bool = False
    use_scale: bool = False

    def row(self, x_shape: Shape) -> Method:
        return methods.positional_norm()
