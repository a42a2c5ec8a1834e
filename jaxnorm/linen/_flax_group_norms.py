"""Group and instance normalization as Flax has them."""

import jax
from flax import linen as nn

from jaxnorm import _flax_rules
from jaxnorm._flax_rules import Sets
from jaxnorm.linen._flax_norms import FlaxNorm


class GroupNorm(FlaxNorm, nn.GroupNorm):
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
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Raises:
        ValueError: both or neither of `num_groups` and `group_size`, or one that does not divide
            the channels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer, x = GroupNorm(num_groups=4), jnp.ones((2, 8, 8, 16))
        >>> layer.init_with_output(jax.random.key(0), x)[0].shape
        (2, 8, 8, 16)

    Reference:
        Group Normalization, 2018, arXiv:1803.08494.
    """

    def _sets(self, x: jax.Array) -> Sets:
        num_groups = _flax_rules.number_of_groups(x.shape[-1], self.num_groups, self.group_size)
        return _flax_rules.group_sets(x, num_groups, self.reduction_axes)


class InstanceNorm(FlaxNorm, nn.InstanceNorm):
    """Instance normalization, a drop-in replacement for `flax.linen.InstanceNorm`.

    The method is `methods.instance_norm`:

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
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Raises:
        ValueError: the first axis is among `feature_axes`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> InstanceNorm().init_with_output(jax.random.key(0), jnp.ones((2, 8, 8, 16)))[0].shape
        (2, 8, 8, 16)

    Reference:
        Instance Normalization: The Missing Ingredient for Fast Stylization, 2016, arXiv:1607.08022.
    """

    _sets = _flax_rules.instance_sets
