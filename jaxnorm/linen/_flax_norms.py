"""Layer and root mean square normalization as Flax has them; the call of all its norms."""

from collections.abc import Callable
from typing import ClassVar, Literal, Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import Sets
from jaxnorm._layers import CallOptions
from jaxnorm.linen._variables import call


class FlaxNorm(nn.Module):
    """The call that Flax's norms without state have in common; their fields are Flax's."""

    _sets: ClassVar[Callable[..., Sets]]
    _mean: ClassVar[Literal[0] | None] = None

    unit_offset: bool = False

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        *,
        mask: ArrayLike | None = None,
        **options: Unpack[CallOptions],
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        x = as_array(x)
        shape, feature_axes = self._sets(x)
        row = _layers.flax_row(shape, self, mean=self._mean)
        return call(self, row, x, feature_axes, mask=mask, **options)


class LayerNorm(FlaxNorm, nn.LayerNorm):
    """Layer normalization, a drop-in replacement for `flax.linen.LayerNorm`.

    The method is `methods.token_layer_norm` by default:

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
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> LayerNorm().init_with_output(jax.random.key(0), jnp.ones((4, 16, 32)))[0].shape
        (4, 16, 32)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450.
    """

    _sets = _flax_rules.layer_sets


class RMSNorm(FlaxNorm, nn.RMSNorm):
    """Root mean square normalization, a drop-in replacement for `flax.linen.RMSNorm`.

    The method is `methods.rms_norm`:

        y = x / sqrt(mean(x^2) + epsilon) * scale

    Args:
        epsilon: added to the mean square, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_scale: multiply by a learned scale.
        scale_init: initializer of the scale.
        reduction_axes: axes that are pooled.
        feature_axes: axes of the scale.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: accepted for Flax; the mean square needs one pass.
        force_float32_reductions: accepted for Flax; statistics are float32 or wider always.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> RMSNorm().init_with_output(jax.random.key(0), jnp.ones((4, 16, 32)))[0].shape
        (4, 16, 32)

    Reference:
        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """

    _sets, _mean = _flax_rules.layer_sets, 0
