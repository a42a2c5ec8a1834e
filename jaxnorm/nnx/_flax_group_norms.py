"""Group and instance normalization as Flax has them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PromoteDtypeFn

from jaxnorm import _flax_rules
from jaxnorm._flax_rules import Axes, Sets
from jaxnorm.nnx._flax_norms import FlaxNorm
from jaxnorm.nnx._variables import NONE, Metadata, ones, promote_dtype, zeros


class GroupNorm(FlaxNorm):
    """Group normalization, a drop-in replacement for `flax.nnx.GroupNorm`: `methods.group_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        num_features: channels, the size of scale and bias.
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
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        promote_dtype: Flax's hook for casts; its default changes no statistics here.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Raises:
        ValueError: both or neither of `num_groups` and `group_size`, or one that does not divide
            the channels.

    Example:
        >>> GroupNorm(16, num_groups=4, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)

    Reference:
        Group Normalization, 2018, arXiv:1803.08494.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        unit_offset: bool = False,
    ):
        num_groups = _flax_rules.number_of_groups(num_features, num_groups, group_size, "features")
        group_size = num_features // num_groups
        self.feature_axis = -1
        self._construct(locals())

    def _sets(self, x: jax.Array) -> Sets:
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"the layer has {self.num_features} features. Got x of shape {x.shape}; expected "
                "as many channels, the last axis."
            )
        return _flax_rules.group_sets(x, self.num_groups, self.reduction_axes)


class InstanceNorm(FlaxNorm):
    """Instance normalization, a drop-in replacement for `flax.nnx.InstanceNorm`.

    The method is `methods.instance_norm`:

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        num_features: channels, the size of scale and bias.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        feature_axes: axes of scale and bias.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        promote_dtype: Flax's hook for casts; its default changes no statistics here.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Raises:
        ValueError: the first axis is among `feature_axes`.

    Example:
        >>> InstanceNorm(16, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 8, 16))).shape
        (2, 8, 8, 16)

    Reference:
        Instance Normalization: The Missing Ingredient for Fast Stylization, 2016, arXiv:1607.08022.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        unit_offset: bool = False,
    ):
        self._construct(locals())

    _sets = _flax_rules.instance_sets
