"""Convolution and dense layers with standardized kernels."""

from typing import Any

from flax import linen as nn
from flax.linen import initializers

from jaxnorm import kernels


class _Standardized(nn.Module):
    """What the layers add to Flax's: their kernel is standardized where it is read."""

    use_gain: bool = False
    epsilon: float = 1e-6
    correction: int = 0
    epsilon_outside: bool = False

    @nn.nowrap
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        if name != "kernel":
            return value
        gain = (
            super().param("gain", initializers.ones, value.shape[-1:], value.dtype)
            if self.use_gain
            else None
        )
        return kernels.standardize_kernel(
            value,
            gain=gain,
            epsilon=self.epsilon,
            correction=self.correction,
            epsilon_outside=self.epsilon_outside,
        )


class WSConv(_Standardized, nn.Conv, kw_only=True):
    """Convolution with Weight Standardization: `flax.linen.Conv` with a standardized kernel.

        y = conv(x, (W - mean_o) / sqrt(var_o + epsilon)) + bias

    The parameter `kernel` is W itself. Let a normalization layer follow, or use the gain.

    Args:
        use_gain: multiply by a learned gain (`gain`, one for each output, 1 at first) over the root
            of the fan-in.
        epsilon: added to the variance of the kernel.
        correction: 1 divides that variance by n - 1.
        epsilon_outside: add epsilon to the standard deviation.
        Others: as `flax.linen.Conv`, by keyword. A `mask` multiplies the standardized kernel.

    Raises:
        ValueError: one weight an output, as in a depthwise convolution with 1x1 kernels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = WSConv(features=8, kernel_size=(3, 3), feature_group_count=2)
        >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))["params"])
        {'bias': (8,), 'kernel': (3, 3, 2, 8)}

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520; see `kernels.standardize_kernel`.
    """


class WSDense(_Standardized, nn.Dense, kw_only=True):
    """Dense layer with Weight Standardization: `flax.linen.Dense` with a standardized kernel.

        y = x (W - mean_o) / sqrt(var_o + epsilon) + bias

    Args:
        use_gain, epsilon, correction, epsilon_outside: as `WSConv`.
        Others: as `flax.linen.Dense`, by keyword.

    Raises:
        ValueError: one input.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = WSDense(features=8, use_gain=True)
        >>> jax.tree.map(jnp.shape, layer.init(jax.random.key(0), jnp.ones((1, 4)))["params"])
        {'bias': (8,), 'gain': (8,), 'kernel': (4, 8)}

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520; see `kernels.standardize_kernel`.
    """
