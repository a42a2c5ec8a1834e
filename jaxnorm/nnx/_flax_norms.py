"""Layer and root mean square normalization as Flax has them; the call of all its norms."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import Axes, Sets
from jaxnorm._layers import CallOptions
from jaxnorm.nnx._variables import NONE, Layer, Metadata, ones, promote_dtype, zeros


class FlaxNorm(Layer):
    """The call that Flax's norms without state have in common."""

    _sets: ClassVar[Callable[..., Sets]]
    _mean: ClassVar[Literal[0] | None] = None

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
        return self._call(row, x, feature_axes, mask=mask, **options)


class LayerNorm(FlaxNorm):
    """Layer normalization, a drop-in replacement for `flax.nnx.LayerNorm`.

    The method is `methods.token_layer_norm` by default:

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
        reduction_axes: axes that are pooled.
        feature_axes: axes of scale and bias.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False always takes a second pass; True where rounding would show.
        promote_dtype: Flax's hook for casts; its default changes no statistics here.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Example:
        >>> LayerNorm(32, rngs=nnx.Rngs(0))(jnp.ones((4, 16, 32))).shape
        (4, 16, 32)

    Reference:
        Layer Normalization, 2016, arXiv:1607.06450.
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
        reduction_axes: Axes = -1,
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

    _sets = _flax_rules.layer_sets


class RMSNorm(FlaxNorm):
    """Root mean square normalization, a drop-in replacement for `flax.nnx.RMSNorm`.

    The method is `methods.rms_norm`:

        y = x / sqrt(mean(x^2) + epsilon) * scale

    Args:
        num_features: channels, the size of scale and bias.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_scale: multiply by a learned scale.
        scale_init: initializer of the scale.
        reduction_axes: axes that are pooled.
        feature_axes: axes of scale and bias.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: accepted for Flax; the mean square needs one pass.
        promote_dtype: Flax's hook for casts; its default changes no statistics here.
        rngs: random number streams for the initializers.
        scale_metadata: for the scale variable.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.

    Example:
        >>> RMSNorm(32, rngs=nnx.Rngs(0))(jnp.ones((4, 16, 32))).shape
        (4, 16, 32)

    Reference:
        Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
    """

    has_bias = False

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        scale_metadata: Metadata = NONE,
        unit_offset: bool = False,
    ):
        self._construct(locals())

    _sets, _mean = _flax_rules.layer_sets, 0

    def __call__(  # type: ignore[override]  # Flax takes this mask by position as well
        self,
        x: ArrayLike,
        mask: ArrayLike | None = None,
        **options: Unpack[CallOptions],
    ) -> jax.Array:
        """Normalize x; `mask` broadcasts against x and says what counts, or how much."""
        return super().__call__(x, mask=mask, **options)
