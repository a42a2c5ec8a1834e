"""The dynamic moment shortcut as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype
from jax.typing import ArrayLike

from jaxnorm import _layers
from jaxnorm._core.moments import Moments


class DynamicMomentShortcut(nnx.Module):
    """The moment shortcut with scale and shift that a small network makes of the moments.

        y = x * (std + f) + mean + g,    (f, g) = conv(relu(conv([mean, std])))

    with f and g of x's shape; without them it is `positional.moment_shortcut`. The second
    convolution is 0 at first, so the layer starts as the plain shortcut; that, and f and g being
    added to the moments, are ours. The authors' code makes scale and shift of the two convolutions
    alone, as does `residual=False`:

        y = x * f + g

    Args:
        num_features: channels of x.
        hidden_features: channels between the two convolutions.
        kernel_size: of both convolutions, one number for each spatial axis.
        residual: add f and g to the moments, from 0 on; False takes f and g alone, and the second
            convolution starts as the first does.
        dtype: of the convolutions; None promotes their input and parameters.
        param_dtype: of the parameters.
        epsilon: of the normalization that the moments come from, in the unit of its input squared.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.
        rngs: random number streams for the initializers.

    Raises:
        ValueError: mean or std do not fit x.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxnorm import methods, norm
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
        >>> y, m = norm(x, methods.positional_norm())  # of a layer in the encoder
        >>> DynamicMomentShortcut(6, rngs=nnx.Rngs(0))(x, m).shape
        (4, 8, 8, 6)

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312. The authors' code for CycleGAN has two
        convolutions of the concatenated mean and standard deviation, with as many channels between
        them as x has, and y = x * f + g. Its first convolution is a transposed one of stride 2 with
        a normalization behind it, its second ends in a ReLU, and shift comes before scale. For
        these, or any other network, hand what it makes to `positional.scale_and_shift`. 64 channels
        between the convolutions are what applications use.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden_features: int = 64,
        kernel_size: tuple[int, ...] = (3, 3),
        residual: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        epsilon: float = 1e-5,
        channel_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        self.channel_axis, self.residual, self.epsilon = channel_axis, residual, epsilon
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        init = initializers.zeros_init() if residual else initializers.lecun_normal()
        self.first = nnx.Conv(2, hidden_features, kernel_size, rngs=rngs, **dtypes)
        self.second = nnx.Conv(
            hidden_features, 2 * num_features, kernel_size, kernel_init=init, rngs=rngs, **dtypes
        )

    def __call__(self, x: ArrayLike, m: Moments) -> jax.Array:
        """Scale and shift x; m has one channel, as `norm` returns it for `positional_norm`."""
        return _layers.dynamic_shortcut(self, x, m, lambda t: self.second(nnx.relu(self.first(t))))
