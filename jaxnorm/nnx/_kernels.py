"""Convolution and dense layers with standardized kernels."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxnorm import kernels


class _Standardized(nnx.Module):
    """What the layers add to Flax's."""

    kernel: nnx.Param[jax.Array]

    def _add(self, use_gain: bool, epsilon: float, correction: int, epsilon_outside: bool) -> None:
        self.epsilon, self.correction, self.epsilon_outside = epsilon, correction, epsilon_outside
        kernel = self.kernel[...]
        self.gain = (
            nnx.Param(jnp.ones(kernel.shape[-1:], kernel.dtype)) if use_gain else nnx.data(None)
        )
        jax.eval_shape(self._standardized)  # a kernel that cannot be standardized is refused here

    def _standardized(self) -> jax.Array:
        return kernels.standardize_kernel(
            self.kernel[...],
            gain=None if self.gain is None else self.gain[...],
            epsilon=self.epsilon,
            correction=self.correction,
            epsilon_outside=self.epsilon_outside,
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """What Flax's layer does, with a standardized kernel."""
        # Flax's layer has no hook for a kernel before its dtype is changed that could reach the
        # gain. So it reads its attributes from a view of this one.
        view = SimpleNamespace(**(vars(self) | {"kernel": self._standardized()}))
        of_flax: Any = super().__call__  # type: ignore[misc]  # of the class behind this one
        return of_flax.__func__(view, inputs, out_sharding)


class WSConv(_Standardized, nnx.Conv):
    """Convolution with Weight Standardization: `flax.nnx.Conv` with a standardized kernel.

        y = conv(x, (W - mean_o) / sqrt(var_o + epsilon)) + bias

    The parameter `kernel` is W itself. Let a normalization layer follow, or use the gain.

    Args:
        in_features, out_features, kernel_size: as `flax.nnx.Conv`.
        use_gain: multiply by a learned gain (`gain`, one for each output, 1 at first) over the root
            of the fan-in.
        epsilon: added to the variance of the kernel.
        correction: 1 divides that variance by n - 1.
        epsilon_outside: add epsilon to the standard deviation.
        rngs: random number streams for the initializers.
        Others: as `flax.nnx.Conv`, by keyword. A `mask` multiplies the standardized kernel.

    Raises:
        ValueError: one weight an output, as in a depthwise convolution with 1x1 kernels.

    Example:
        >>> from flax import nnx
        >>> layer = WSConv(4, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 8, 8, 4))).shape, layer.kernel.shape
        ((1, 8, 8, 8), (3, 3, 2, 8))

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520; see `kernels.standardize_kernel`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | tuple[int, ...],
        *,
        use_gain: bool = False,
        epsilon: float = 1e-6,
        correction: int = 0,
        epsilon_outside: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, out_features, kernel_size, rngs=rngs, **options)
        self._add(use_gain, epsilon, correction, epsilon_outside)


class WSDense(_Standardized, nnx.Linear):
    """Dense layer with Weight Standardization: `flax.nnx.Linear` with a standardized kernel.

        y = x (W - mean_o) / sqrt(var_o + epsilon) + bias

    Args:
        in_features, out_features: as `flax.nnx.Linear`.
        use_gain, epsilon, correction, epsilon_outside, rngs: as `WSConv`.
        Others: as `flax.nnx.Linear`, by keyword.

    Raises:
        ValueError: one input.

    Example:
        >>> from flax import nnx
        >>> layer = WSDense(4, 8, use_gain=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 4))).shape, layer.gain.shape
        ((1, 8), (8,))

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520; see `kernels.standardize_kernel`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_gain: bool = False,
        epsilon: float = 1e-6,
        correction: int = 0,
        epsilon_outside: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **options)
        self._add(use_gain, epsilon, correction, epsilon_outside)
