"""Filter Response Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._layers import CallOptions
from jaxnorm.frn import filter_response_norm
from jaxnorm.nnx._call import Function, zeros

ten_thousandth = initializers.constant(1e-4)


class FilterResponseNorm(Function):
    """Filter Response Normalization and its thresholded linear unit: `frn.filter_response_norm`.

        y = x / sqrt(mean_hw(x^2) + epsilon + |learned_epsilon|) * scale + bias
        output = max(y, threshold)

    Parameters are `scale`, `bias` and `threshold`, (C,), and where asked for `slope`, (C,), and
    `learned_epsilon`, a scalar. No activation need follow, and no relu should: the threshold, 0 at
    first, would get no gradient.

    Args:
        num_features: channels.
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
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = FilterResponseNorm(3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.threshold.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737; see `frn.filter_response_norm`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        use_threshold: bool = True,
        threshold_init: Initializer = zeros,
        use_slope: bool = False,
        slope_init: Initializer = zeros,
        use_learned_epsilon: bool = False,
        learned_epsilon_init: Initializer = ten_thousandth,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, epsilon=epsilon, rngs=rngs, **options)
        made = {
            "threshold": (use_threshold, threshold_init, (num_features,)),
            "slope": (use_slope, slope_init, (num_features,)),
            "learned_epsilon": (use_learned_epsilon, learned_epsilon_init, ()),
        }
        for name, (use, init, shape) in made.items():
            setattr(
                self,
                name,
                nnx.Param(init(rngs.params(), shape, self.param_dtype)) if use else nnx.data(None),
            )

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        parameters = {
            name: getattr(self, name) for name in ("threshold", "slope", "learned_epsilon")
        }
        values = {name: None if t is None else t[...] for name, t in parameters.items()}
        return self._run(x, partial(filter_response_norm, **values), options)
