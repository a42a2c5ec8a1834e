"""Batch normalization as Flax has it."""

from typing import Unpack

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import _flax_rules, _layers
from jaxnorm._core.checks import check_number
from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import Axes
from jaxnorm._layers import CallOptions
from jaxnorm.linen._variables import call, state_dtype
from jaxnorm.methods._frame import first_running


class BatchNorm(nn.BatchNorm):
    """Batch normalization, a drop-in replacement for `flax.linen.BatchNorm`: `methods.batch_norm`.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    with the mean and variance of each channel over all other axes, of the batch in training and
    running ones in inference.

    Args:
        use_running_average: normalize with the running statistics; here or at the call, not both.
        axis: the feature axis, or a tuple of axes, that are not pooled.
        momentum: weight of the old running statistics per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.
        dtype: of the output; None promotes input and parameters.
        param_dtype: of the parameters.
        use_bias: add a learned bias.
        use_scale: multiply by a learned scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: axis of pmap, shard_map or vmap over which statistics are synchronized.
        axis_index_groups: groups of indices of that axis that share statistics.
        use_fast_variance: False takes a second, centered pass always; True only where rounding
            would show.
        force_float32_reductions: False gives running statistics `param_dtype`; statistics are
            float32 or wider always. An average in half precision stops far from where it goes, and
            training warns: see `update_running`.
        unit_offset: store scale as its distance from 1; `scale_init` still gives the scale.
        correction: 1 stores the unbiased variance, as PyTorch does; see `update_running`.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another
            shape, a momentum outside 0 to 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchNorm()
        >>> variables = layer.init(
        ...     jax.random.key(0), jnp.ones((1, 8, 8, 3)), use_running_average=False
        ... )
        >>> y, updates = layer.apply(
        ...     variables, jnp.ones((4, 8, 8, 3)), use_running_average=False, mutable="batch_stats"
        ... )
        >>> y.shape, updates["batch_stats"]["mean"].shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, 2015, arXiv:1502.03167.
    """

    axis: Axes = -1  # type: ignore[assignment]  # for Flax an int, though it takes several
    unit_offset: bool = False
    correction: int = 0

    @nn.compact
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
        features = _flax_rules.feature_shape(x, self.axis)
        return call(
            self,
            row,
            x,
            self.axis,
            first=first_running(features, state_dtype(self, x)),
            mask=mask,
            use_running_average=use_running_average,
            update_running_average=update_running_average,
            momentum=self.momentum,
            example_weight=example_weight,
            **options,
        )
