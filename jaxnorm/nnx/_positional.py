"""The dynamic moment shortcut as a layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.typing import Dtype
from jax.typing import ArrayLike

from jaxnorm._moments import as_array
from jaxnorm.positional import moment_shortcut


class DynamicMomentShortcut(nnx.Module):
    """The moment shortcut with scale and shift that a small network makes of the moments:
    `positional.moment_shortcut`.

        y = x * (std + f) + mean + g,    (f, g) = conv(relu(conv([mean, std])))

    with f and g of x's shape. The second convolution is 0 at first, so the layer starts as the
    plain shortcut; that, and f and g being added to the moments, are ours.

    Args:
        num_features: channels of x.
        hidden_features: channels between the two convolutions.
        kernel_size: of both convolutions, one number for each spatial axis.
        dtype: of the convolutions; None promotes their input and parameters.
        param_dtype: of the parameters.
        channel_axis: axis of the channels: -1 for NHWC, 1 for NCHW.
        rngs: random number streams for the initializers.

    Raises:
        ValueError: mean or std do not fit x.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from jaxnorm.positional import positional_norm
        >>> x = jax.random.normal(jax.random.key(0), (4, 8, 8, 6))
        >>> moments = positional_norm(x)[1:]  # of a layer in the encoder
        >>> DynamicMomentShortcut(6, rngs=nnx.Rngs(0))(x, *moments).shape
        (4, 8, 8, 6)

    Reference:
        Positional Normalization, 2019, arXiv:1907.04312. That a convolutional network makes scale
        and shift of mean and standard deviation stands in the authors' README; two convolutions
        with 64 channels between them are what applications use.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden_features: int = 64,
        kernel_size: tuple[int, ...] = (3, 3),
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        channel_axis: int = -1,
        rngs: nnx.Rngs,
    ):
        self.channel_axis = channel_axis
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        zeros = initializers.zeros_init()
        self.first = nnx.Conv(2, hidden_features, kernel_size, rngs=rngs, **dtypes)
        self.second = nnx.Conv(
            hidden_features, 2 * num_features, kernel_size, kernel_init=zeros, rngs=rngs, **dtypes
        )

    def __call__(self, x: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
        """Scale and shift x; mean and std are those of `positional_norm`, with one channel."""
        t = jnp.concatenate(
            [jnp.moveaxis(jnp.asarray(m), self.channel_axis, -1) for m in (mean, std)], axis=-1
        )
        t = self.second(nnx.relu(self.first(t)))
        scale, shift = (jnp.moveaxis(m, -1, self.channel_axis) for m in jnp.split(t, 2, axis=-1))
        mean, std = (
            jnp.asarray(m) + more.astype(jnp.result_type(m))
            for m, more in ((mean, shift), (std, scale))
        )
        return moment_shortcut(as_array(x), mean, std, channel_axis=self.channel_axis)
