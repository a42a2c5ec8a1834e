"""Flax linen layers: `Norm` for any row of the table of methods, and drop-in replacements for Flax's own layers.

`BatchNorm`, `GroupNorm`, `LayerNorm`, `InstanceNorm` and `RMSNorm` take Flax's arguments in Flax's order, create the same
parameters (`scale`, `bias`) and running statistics (collection `batch_stats`: `mean`, `var`) under the same names, and load
its checkpoints: changing where they are imported from is the whole migration. The README lists each deliberate difference.

Beyond Flax, every layer takes at the call a `scale` and `bias` given per example, (N, C), in place of its own, and an
`activation` that is applied to the output and recomputed in the backward pass; masks may be real weights. Layers with
running statistics take `update_running_average`: by default they are updated when they are not used. Both at once, or
neither, are possible. After Flax's fields comes `unit_offset`, which stores scale as its distance from 1.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import initializers
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxnorm import _layers, methods
from jaxnorm._groups import Groups, Method, Shape, Specification
from jaxnorm._layers import Activation, Axes, Running
from jaxnorm._moments import Moments
from jaxnorm._running import init_running, running_shape, serving

zeros, ones = initializers.zeros, initializers.ones


class BatchNorm(nn.Module):
    """Batch normalization, a drop-in replacement for `flax.linen.BatchNorm`: `methods.batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the mean and variance of each channel over all other axes, of the batch in training and running ones in inference.

    Args:
        use_running_average: normalize with the running statistics; here or at the call, not both.
        axis: the feature axis, or a tuple of axes, that are not pooled.
        momentum: weight of the old running statistics per update.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which the batch goes on.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding would show.
        force_float32_reductions: False gives running statistics `param_dtype`; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchNorm()
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), use_running_average=False)
        >>> y, updates = layer.apply(variables, jnp.ones((4, 8, 8, 3)), use_running_average=False, mutable="batch_stats")
        >>> y.shape, updates["batch_stats"]["mean"].shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift, 2015, arXiv:1502.03167.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_running_average: bool | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = _layers.as_input(x)
        shape = _layers.keep_axes(x, self.axis)
        state = _State(self, x, _layers.feature_shape(x, self.axis), shape)
        running = state.running(use, update_running_average)
        return _call(self, x, shape, (scale, bias), self.axis, mask, activation, state=state, running=running)


class LayerNorm(nn.Module):
    """Layer normalization, a drop-in replacement for `flax.linen.LayerNorm`: `methods.token_layer_norm` by default.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        reduction_axes: axes that are pooled.
        feature_axes: axes of scale and bias.
        axis_name: axis of pmap, shard_map or vmap over which the pooled axes go on.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> LayerNorm().init_with_output(jax.random.key(0), jnp.ones((4, 16, 32)))[0].shape
        (4, 16, 32)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = _layers.as_input(x)
        shape = _layers.pool_axes(x, self.reduction_axes)
        return _call(self, x, shape, (scale, bias), self.feature_axes, mask, activation)


class RMSNorm(nn.Module):
    """Root mean square normalization, a drop-in replacement for `flax.linen.RMSNorm`: `methods.rms_norm`.

        y = x / sqrt(mean(x^2) + epsilon) * scale

    Args:
        epsilon: added to the mean square, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_scale: multiply by a learned scale.
        scale_init: initializer of the scale.
        reduction_axes: axes that are pooled.
        feature_axes: axes of the scale.
        axis_name: axis of pmap, shard_map or vmap over which the pooled axes go on.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: accepted for Flax; the mean square needs one pass.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> RMSNorm().init_with_output(jax.random.key(0), jnp.ones((4, 16, 32)))[0].shape
        (4, 16, 32)

    Reference:
        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = _layers.as_input(x)
        shape = _layers.pool_axes(x, self.reduction_axes)
        return _call(self, x, shape, (scale, bias), self.feature_axes, mask, activation, mean=0)


class GroupNorm(nn.Module):
    """Group normalization, a drop-in replacement for `flax.linen.GroupNorm`: `methods.group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        num_groups: number of groups of channels, the last axis.
        group_size: or the channels in a group; then pass `num_groups=None`.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        reduction_axes: axes that are pooled, the last among them; None pools all but the first.
        axis_name: axis of pmap, shard_map or vmap over which the pooled axes go on.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1.

    Raises:
        ValueError: both or neither of `num_groups` and `group_size`, or one that does not divide the channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> GroupNorm(num_groups=4).init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 8, 8, 16)

    Reference:
        Group Normalization, 2018, arXiv:1803.08494.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    reduction_axes: Axes | None = None
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = _layers.as_input(x)
        num_groups = _layers.number_of_groups(x.shape[-1], self.num_groups, self.group_size)
        shape = _layers.group_shape(x, num_groups, self.reduction_axes)
        return _call(self, x, shape, (scale, bias), -1, mask, activation)


class InstanceNorm(nn.Module):
    """Instance normalization, a drop-in replacement for `flax.linen.InstanceNorm`: `methods.instance_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        feature_axes: axes of scale and bias; they and the first are not pooled.
        axis_name: axis of pmap, shard_map or vmap over which the pooled axes go on.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1.

    Raises:
        ValueError: the first axis is among `feature_axes`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> InstanceNorm().init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 8, 8, 16)

    Reference:
        Instance Normalization: The Missing Ingredient for Fast Stylization, 2016, arXiv:1607.08022.
    """

    epsilon: float = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    feature_axes: Axes = -1
    axis_name: str | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = _layers.as_input(x)
        shape = _layers.instance_shape(x, self.feature_axes)
        return _call(self, x, shape, (scale, bias), self.feature_axes, mask, activation)


class _Method(nn.Module, kw_only=True):
    """Fields and call of the layers that are a row of the table; a final class adds which row."""

    use_running_average: bool | None = None
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: str | None = None
    axis_index_groups: Any = None
    unit_offset: bool = False
    debias: bool = False
    correction: int = 0
    batch_axis: int = 0
    channel_axis: int = -1

    def row(self, x_shape: Shape) -> Method:
        """The row of the table for x of this shape."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_running_average: bool | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        activation: Activation | None = None,
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = _layers.as_input(x)
        row = self.row(x.shape)
        state = running = None
        if row.pools_batch and self.is_initializing():
            row = _layers.whole_batch(row)  # any batch initializes, also one that ghosts do not divide
        if row.pools_batch and self.momentum is not None:
            use = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
            shapes = running_shape(row, x.shape, batch_axis=self.batch_axis, channel_axis=self.channel_axis)
            state = _State(self, x, *shapes)
            running = state.running(use, update_running_average)
        return _call(self, x, row, (scale, bias), self.channel_axis, mask, activation, state=state, running=running)


class Norm(_Method):
    """Any row of the table of methods as a layer.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of the sets that `method` describes. Methods that share statistics between examples keep running ones
    in the collection `batch_stats`, (C,) for batch norm, (G,) for batch group norm, and need `use_running_average`; others
    ignore it.

    Args:
        method: a `Method`, such as `methods.group_norm(32)`, or `Groups`.
        use_running_average: normalize with the running statistics; here or at the call, not both.
        momentum: weight of the old running statistics per update; None keeps none and always uses the batch's.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which sets go on.
        axis_index_groups: groups of indices of that axis that share statistics.
        unit_offset: store scale as its distance from 1.
        debias: divide the initial 0 and 1 out of the running statistics; adds `count` to the collection.
        correction: 1 stores the unbiased variance, as PyTorch does.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.

    Raises:
        ValueError: axes that do not split, `use_running_average` given nowhere or twice, running statistics of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = Norm(methods.batch_group_norm(4))
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 16)), use_running_average=True)
        >>> jax.tree.map(jnp.shape, variables["batch_stats"])
        {'mean': (4,), 'var': (4,)}
    """

    method: Method | Groups

    def row(self, x_shape: Shape) -> Method:
        return self.method if isinstance(self.method, Method) else Method(self.method)


class GhostBatchNorm(_Method):
    """Batch normalization inside consecutive parts of the batch: `methods.ghost_batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the moments of each channel in each ghost batch. Running statistics are pooled over the ghosts, so they are those of
    `BatchNorm` and serve any batch at inference.

    Args:
        num_ghosts: number of ghost batches, a divisor of the batch.
        ghost_size: or the examples in each.
        Others: as `Norm`.

    Raises:
        ValueError: both or neither are given, or the batch does not split.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = GhostBatchNorm(ghost_size=16)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 3)), use_running_average=False)
        >>> layer.apply(variables, jnp.ones((5, 8, 8, 3)), use_running_average=True).shape
        (5, 8, 8, 3)

    Reference:
        Train longer, generalize better: closing the generalization gap in large batch training of neural networks, 2017,
        arXiv:1705.08741.
    """

    num_ghosts: int | None = None
    ghost_size: int | None = None

    def row(self, x_shape: Shape) -> Method:
        return methods.ghost_batch_norm(self.num_ghosts, ghost_size=self.ghost_size)


class BatchGroupNorm(_Method):
    """Normalization of groups of features over the whole batch: `methods.batch_group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        num_groups: G. Up to the number of channels these are groups of channels, beyond also of positions.
        Others: as `Norm`.

    Raises:
        ValueError: G does not divide, or x of another image size than the running statistics of G > C.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchGroupNorm(32)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 64)), use_running_average=False)
        >>> variables["batch_stats"]["mean"].shape, variables["params"]["scale"].shape
        ((32,), (64,))

    Reference:
        Batch Group Normalization, 2020, arXiv:2012.02782; see `methods.batch_group_norm`.
    """

    num_groups: int

    def row(self, x_shape: Shape) -> Method:
        if self.batch_axis % len(x_shape) != 0:
            raise ValueError(f"BatchGroupNorm takes the batch on axis 0. Got batch_axis={self.batch_axis}; move that axis.")
        return methods.batch_group_norm(self.num_groups, x_shape, channel_axis=self.channel_axis)


class PositionalNorm(_Method):
    """Normalization of each position over its channels: `methods.positional_norm`, without scale and bias by default.

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


class _State:
    """The variables of collection batch_stats: in their own shape, and in the statistic's shape that serves x."""

    def __init__(self, module: Any, x: jax.Array, shape: Shape, statistic: Shape):
        complex_input = jnp.iscomplexobj(x) or jnp.issubdtype(jnp.dtype(module.dtype or x.dtype), jnp.complexfloating)
        real = jnp.float32 if getattr(module, "force_float32_reductions", True) else module.param_dtype
        dtype = jnp.complex64 if complex_input else real
        first = init_running(shape, dtype=dtype, counted=getattr(module, "debias", False))
        self.variables = {
            name: module.variable("batch_stats", name, lambda value=value: value)
            for name, value in (("count", first.count), ("mean", first.mean), ("var", first.var))
            if value is not None
        }
        self.module, self.shape = module, shape
        values = Moments(*(v.value if (v := self.variables.get(name)) else None for name in ("count", "mean", "var")))
        self.moments = serving(values, shape, statistic, x.shape)

    def running(self, use: bool, update: bool | None) -> Running:
        update = (not use if update is None else update) and not self.module.is_initializing()
        return Running(self.moments, use, update, self.module.momentum, getattr(self.module, "correction", 0))

    def store(self, new: Moments) -> None:
        for name, variable in self.variables.items():
            variable.value = getattr(new, name).reshape(self.shape)


def _parameter(module: Any, name: str, given: ArrayLike | None, shape: Shape) -> jax.Array | None:
    """Scale or bias: the layer's own, or what was given in its place at the call."""
    own = getattr(module, f"use_{name}", False)
    if given is not None:
        if own:
            raise ValueError(
                f"{name} was given at the call, but the layer has its own. Expected one of the two: construct it with "
                f"use_{name}=False."
            )
        return jnp.asarray(given)
    if not own:
        return None
    init, offset = getattr(module, f"{name}_init"), name == "scale" and module.unit_offset
    value = module.param(name, zeros if offset and init is ones else init, shape, module.param_dtype)
    return value + 1 if offset else value


def _call(
    module: Any,
    x: jax.Array,
    groups: Specification,
    given: tuple[ArrayLike | None, ArrayLike | None],
    feature_axes: Axes,
    mask: ArrayLike | None,
    activation: Activation | None,
    *,
    mean: Literal[0] | None = None,
    state: _State | None = None,
    running: Running | None = None,
) -> jax.Array:
    """What every layer does once it knows its sets: parameters, dtype, the core, and the new running statistics."""
    features = _layers.feature_shape(x, feature_axes)
    scale, bias = (_parameter(module, name, t, features) for name, t in zip(("scale", "bias"), given, strict=True))
    dtype = _layers.output_dtype(x, scale, bias, dtype=module.dtype)
    initializing = module.is_initializing()  # outside the map in which a named axis exists
    y, new = _layers.apply(
        _layers.wide_enough(x, dtype),
        groups,
        mean=mean,
        scale=scale,
        bias=bias,
        epsilon=module.epsilon,
        dtype=dtype,
        running=running,
        mask=mask,
        axis_name=None if initializing else module.axis_name,
        axis_index_groups=None if initializing else module.axis_index_groups,
        use_fast_variance=getattr(module, "use_fast_variance", True),
        activation=activation,
        batch_axis=getattr(module, "batch_axis", 0),
        channel_axis=feature_axes,
    )
    if state is not None and new is not None:
        state.store(new)
    return y
