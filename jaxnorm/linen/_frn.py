"""Filter Response Normalization as a layer."""

from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from flax.linen import initializers
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._layers import CallOptions
from jaxnorm.frn import filter_response_norm
from jaxnorm.linen._call import Layer, call_function, channel_parameter, zeros


class FilterResponseNorm(Layer, kw_only=True):
    """Filter Response Normalization and its thresholded linear unit: `frn.filter_response_norm`.

        y = x / sqrt(mean_hw(x^2) + epsilon + |learned_epsilon|) * scale + bias
        output = max(y, threshold)

    Parameters are `scale`, `bias` and `threshold`, (C,), and where asked for `slope`, (C,), and
    `learned_epsilon`, a scalar. No activation need follow, and no relu should: the threshold, 0 at
    first, would get no gradient.

    Args:
        use_threshold: threshold the output; False is for a layer that another activation follows.
        threshold_init: initializer of the threshold.
        use_slope: the affine unit, max(y, slope * y + threshold).
        slope_init: initializer of the slope; at 0, the default, the unit starts as the plain one,
            which is our choice.
        use_learned_epsilon: add the absolute value of a learned scalar to epsilon; needed where x
            has one position.
        learned_epsilon_init: initializer of that scalar.
        Others: as `Norm`.

    Raises:
        ValueError: a slope without threshold.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> variables = FilterResponseNorm().init(jax.random.key(0), jnp.ones((4, 8, 8, 3)))
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bias': (3,), 'scale': (3,), 'threshold': (3,)}

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737; see `frn.filter_response_norm`.
    """

    epsilon: float = 1e-6
    use_threshold: bool = True
    threshold_init: Initializer = zeros
    use_slope: bool = False
    slope_init: Initializer = zeros
    use_learned_epsilon: bool = False
    learned_epsilon_init: Initializer = initializers.constant(1e-4)

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        threshold = slope = learned_epsilon = None
        if self.use_threshold:
            threshold = channel_parameter(self, "threshold", self.threshold_init, x)
        if self.use_slope:
            slope = channel_parameter(self, "slope", self.slope_init, x)
        if self.use_learned_epsilon:
            learned_epsilon = self.param(
                "learned_epsilon", self.learned_epsilon_init, (), self.param_dtype
            )
        function = partial(
            filter_response_norm, threshold=threshold, slope=slope, learned_epsilon=learned_epsilon
        )
        return call_function(self, x, function, options)
