"""Layers that are a row of the table of methods: any row, and the ones that Flax does not have."""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxnorm import _layers, methods
from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_count
from jaxnorm._core.ghosts import GhostUpdate
from jaxnorm._core.groups import Groups, Method, as_method
from jaxnorm._core.moments import as_array
from jaxnorm._core.state import running_shape
from jaxnorm._layers import Activation, StateOptions, with_batch
from jaxnorm.batch_group import batch_group_norm, init_batch_group_norm
from jaxnorm.nnx._call import NONE, Function, Metadata, StatefulLayer, ones, promote_dtype, zeros


class Row(StatefulLayer):
    """Running statistics and call of the layers that are a row of the table; a final class adds
    which row."""

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        unit_offset: bool = False,
        debias: bool = False,
        correction: int = 0,
        batch_axis: int = 0,
        channel_axis: int = -1,
        x_shape: Shape | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
    ):
        self._construct(locals())
        if momentum is None or not (row := self._row(x_shape)).pools_batch:
            return
        if x_shape is None:
            if row.groups.spatial != 1:
                raise ValueError(
                    f"running statistics of {row} keep positions apart. Got x_shape=None; expected "
                    "the shape of an input, any number of examples."
                )
            shape = running_shape(self._measured(row), (1, num_features))[0]
        else:
            shape = self._shapes(x_shape)[0]
        self._make_running(shape, self.debias)

    def _row(self, x_shape: Shape | None) -> Method:
        """The row of the table, for x of this shape where it is known."""
        raise NotImplementedError

    def _measured(self, row: Method) -> Method:
        """The sets of the running statistics."""
        return row

    def _shapes(self, x_shape: Shape) -> tuple[Shape, Shape]:
        row = self._measured(self._row(x_shape))
        return running_shape(
            row, x_shape, batch_axis=self.batch_axis, channel_axis=self.channel_axis
        )

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
        running = None
        row = self._row(x.shape)
        if hasattr(self, "mean"):
            measured = self._measured(row)
            running = self._running(
                x,
                *self._shapes(x.shape),
                use_running_average,
                update_running_average,
                measured=None if measured == row else measured,
                example_weight=self._weight(
                    example_weight, self._uses_running(use_running_average)
                ),
            )
        else:
            _layers.needs_running(example_weight)
        return self._apply(
            x, row, (scale, bias), self.channel_axis, mask, activation, running=running
        )


class Norm(Row):
    """Any row of the table of methods as a layer.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of the sets that `method` describes. Methods that share statistics between
    examples keep running ones in `mean` and `var`, (C,) for batch norm, (G,) for batch group norm;
    others ignore `use_running_average`.

    Args:
        num_features: channels, the size of scale and bias.
        method: a `Method`, such as `methods.group_norm(32)`, or `Groups`.
        use_running_average: normalize with the running statistics; the call takes precedence.
        momentum: weight of the old running statistics per update, 0 to 1; None keeps none and
            always uses the batch's.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input, statistics and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        promote_dtype: Flax's hook to cast input, statistics and parameters; its default changes no
            statistics here.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        debias: divide the initial 0 and 1 out of the running statistics; adds the variable `count`.
        correction: 1 stores the unbiased variance, as PyTorch does; real weights must then count
            elements, see `update_running`.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.
        x_shape: shape of an input, where running statistics keep positions apart; any number of
            examples.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.

    Raises:
        ValueError: axes that do not split, running statistics of another shape, `x_shape` missing.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = Norm(16, methods.batch_group_norm(4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 16))).shape, layer.mean.shape
        ((2, 8, 8, 16), (4,))
    """

    def __init__(self, num_features: int, method: Method | Groups, **options: Any):
        self.method = method
        super().__init__(num_features, **options)

    def _row(self, x_shape: Shape | None) -> Method:
        return as_method(self.method)


class GhostBatchNorm(Row):
    """Batch normalization inside consecutive parts of the batch: `methods.ghost_batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Running statistics are pooled over the ghosts, unless asked for otherwise, so they are those of
    `BatchNorm`; they serve any batch at inference.

    Args:
        num_features: channels.
        num_ghosts: number of ghost batches, a divisor of the batch.
        ghost_size: or the examples in each.
        ghost_update: "pooled", "averaged", "sequential" or "sequential divided": see
            `update_running`.
        Others: as `Norm`.

    Raises:
        ValueError: both or neither are given, or the batch does not split.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> GhostBatchNorm(3, ghost_size=2, rngs=nnx.Rngs(0))(jnp.ones((4, 8, 8, 3))).shape
        (4, 8, 8, 3)

    Reference:
        Train longer, generalize better: closing the generalization gap in large batch training of
        neural networks, 2017, arXiv:1705.08741.
    """

    def __init__(
        self,
        num_features: int,
        num_ghosts: int | None = None,
        ghost_size: int | None = None,
        ghost_update: GhostUpdate = "pooled",
        **options: Any,
    ):
        self.num_ghosts, self.ghost_size, self.ghost_update = num_ghosts, ghost_size, ghost_update
        super().__init__(num_features, **options)

    def _row(self, x_shape: Shape | None) -> Method:
        return methods.ghost_batch_norm(self.num_ghosts, ghost_size=self.ghost_size)


class BatchGroupNorm(Row, Function):
    """Normalization of groups of features over the whole batch: `batch_group.batch_group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Running statistics are `mean` and `var`, (G,). Where G does not divide the channels, groups are
    of positions too: the layer then depends on the position, takes real x, and is tied to the image
    size of `x_shape`.

    Args:
        num_features: channels.
        num_groups: G, a divisor of channels times positions; `methods.batch_group_count` chooses
            one by the batch's size.
        x_shape: shape of an input, needed where G does not divide the channels; any number of
            examples.
        Others: as `Norm`.

    Raises:
        ValueError: G does not divide, x of another image size than the running statistics; a
            `promote_dtype` or an `example_weight` with groups of positions.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = BatchGroupNorm(64, 32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 8, 8, 64))).shape, layer.mean.shape
        ((2, 8, 8, 64), (32,))

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782; see `batch_group.batch_group_norm`.
    """

    def __init__(
        self, num_features: int, num_groups: int, *, momentum: float | None = 0.99, **options: Any
    ):
        self.num_groups = check_count(num_groups, "num_groups")
        self._tied = num_features % num_groups != 0
        Row.__init__(self, num_features, momentum=None if self._tied else momentum, **options)
        if not self._tied:
            return
        if self.x_shape is None:
            raise ValueError(
                f"groups that are not groups of channels split positions. Got {num_groups} groups "
                f"of {num_features} channels and x_shape=None; expected the shape of an input, "
                "any number of examples."
            )
        if self.promote_dtype is not promote_dtype:
            raise ValueError(
                f"promote_dtype={self.promote_dtype} with groups that are not groups of channels. "
                "Expected Flax's default, or a number of groups that divides the channels."
            )
        self.momentum = momentum
        axes = {"batch_axis": self.batch_axis, "channel_axis": self.channel_axis}
        first = init_batch_group_norm(num_groups, self.x_shape, counted=self.debias, **axes)
        self._state = () if momentum is None else tuple(first)
        for name in self._state:
            setattr(self, name, nnx.BatchStat(first[name]))

    def _row(self, x_shape: Shape | None) -> Method:
        return methods.batch_group_norm(self.num_groups)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        example_weight: ArrayLike | None = None,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        if not self._tied:
            return super().__call__(
                x, use_running_average, example_weight=example_weight, **options
            )
        if self.momentum is not None:
            example_weight = self._weight(example_weight, self._uses_running(use_running_average))
        _layers.only_channel_groups(example_weight)
        static = {"num_groups": self.num_groups, "correction": self.correction}
        if self.momentum is None:
            first = init_batch_group_norm(
                self.num_groups,
                self.x_shape,
                channel_axis=self.channel_axis,
                batch_axis=self.batch_axis,
            )
            return self._run(x, partial(with_batch, batch_group_norm, first, **static), options)
        function = partial(batch_group_norm, momentum=self.momentum, **static)
        return self._run(x, function, options, use_running_average=use_running_average)


class BatchAndGroupNorm(Row):
    """Groups of channels over ghost batches, for small batches: `methods.batch_and_group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Running statistics are those of each channel over the whole batch, as `BatchNorm`'s. Inference
    pools them over each group and weighs the example's own in: `inference.weigh_example`, by
    default with the weight that an example has in training.

    Args:
        num_features: channels.
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
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = BatchAndGroupNorm(16, ghost_size=2, num_groups=4, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 16))).shape, layer.mean.shape
        ((4, 8, 8, 16), (16,))

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548; see
        `inference.weigh_example`.
    """

    def __init__(
        self,
        num_features: int,
        num_ghosts: int | None = None,
        num_groups: int | None = None,
        *,
        ghost_size: int | None = None,
        group_size: int | None = None,
        example_weight: float | None = None,
        **options: Any,
    ):
        self.num_ghosts, self.num_groups, self.ghost_size, self.group_size = (
            num_ghosts,
            num_groups,
            ghost_size,
            group_size,
        )
        self.example_weight = example_weight
        super().__init__(num_features, **options)

    def _row(self, x_shape: Shape | None) -> Method:
        return methods.batch_and_group_norm(
            self.num_ghosts, self.num_groups, ghost_size=self.ghost_size, group_size=self.group_size
        )

    def _measured(self, row: Method) -> Method:
        return _layers.per_channel(row)

    def _weight(self, given: ArrayLike | None, use: bool) -> ArrayLike | None:
        return _layers.trained_weight(given, use, self.example_weight, self.ghost_size)


class PositionalNorm(Row):
    """Normalization of each position over its channels: `methods.positional_norm`, without scale
    and bias by default.

        y = (x - mean) / sqrt(var + epsilon)

    Args:
        num_features: channels.
        Others: as `Norm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> PositionalNorm(16, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312.
    """

    def __init__(self, num_features: int, **options: Any):
        defaults: dict[str, Any] = {"use_scale": False, "use_bias": False}
        super().__init__(num_features, **(defaults | options))

    def _row(self, x_shape: Shape | None) -> Method:
        return methods.positional_norm()
