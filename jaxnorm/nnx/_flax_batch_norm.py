"""Batch normalization as Flax has it."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.checks import check_number
from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import Axes
from jaxnorm._layers import CallOptions
from jaxnorm.methods._frame import first_running
from jaxnorm.nnx._variables import (
    NONE,
    Metadata,
    StatefulLayer,
    ones,
    promote_dtype,
    state_dtype,
    zeros,
)


class BatchNorm(StatefulLayer):
    """Batch normalization, a drop-in replacement for `flax.nnx.BatchNorm`: `methods.batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Args:
        num_features: channels, the size of scale and bias.
        use_running_average: normalize with the running statistics; the call takes precedence.
        axis: the feature axis, or a tuple of axes, that are not pooled.
        momentum: weight of the old running statistics per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input, statistics and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding
            would show.
        promote_dtype: Flax's hook to cast input, statistics and parameters; its default changes no
            statistics here.
        rngs: random number streams for the initializers.
        bias_metadata: for the bias variable.
        scale_metadata: for the scale variable.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        correction: 1 stores the unbiased variance, as PyTorch does; see `update_running`.

    Raises:
        ValueError: `use_running_average` given nowhere, running statistics of another shape, a
            momentum outside 0 to 1.

    Example:
        >>> layer = BatchNorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.mean.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, 2015, arXiv:1502.03167.
    """

    _names = ("mean", "var")

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Metadata = NONE,
        scale_metadata: Metadata = NONE,
        unit_offset: bool = False,
        correction: int = 0,
    ):
        self._construct(locals())
        for name, value in first_running((num_features,), state_dtype(dtype)).items():
            setattr(self, name, nnx.BatchStat(value))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        update_running_average: bool | None = None,
        example_weight: ArrayLike | None = None,
        **options: Unpack[CallOptions],
    ) -> jax.Array:
        """Normalize x.

        `mask` broadcasts against x and says what counts, or how much. `example_weight` is that of
        `inference.weigh_example`, with running statistics.
        """
        check_number(self.momentum, "momentum", at_least=0, at_most=1)
        x = as_array(x)
        row = _layers.flax_row(_flax_rules.keep_axes(x, self.axis), self, momentum=0.99)
        return self._call_with_state(
            row,
            x,
            self.axis,
            use_running_average=use_running_average,
            update_running_average=update_running_average,
            example_weight=example_weight,
            momentum=self.momentum,
            mask=mask,
            **options,
        )
