"""Kernels of convolutions and dense layers: functions of a kernel, not methods."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.divisor import with_divisor
from jaxnorm._core.meshes import in_explicit_meshes
from jaxnorm._core.moments import inexact, moments
from jaxnorm._core.normalize import normalize


@in_explicit_meshes
def standardize_kernel(
    kernel: ArrayLike,
    *,
    gain: ArrayLike | None = None,
    epsilon: float = 1e-6,
    correction: int = 0,
    epsilon_outside: bool = False,
) -> jax.Array:
    """The standardized kernel: (W - mean_o) / sqrt(var_o + epsilon) for each output channel o.

    Differentiable through both moments. Use it in front of a normalization layer. The variance is
    biased, with epsilon in the root and smaller than elsewhere because a kernel's variance is about
    2 / fan-in. With a gain the kernel is

        gain_o / sqrt(fan_in) * (W - mean_o) / sqrt(var_o + epsilon),

    which keeps the variance of its input where no normalization follows. The kernel of a grouped
    convolution, whose inputs are those of a group, needs nothing else.

    Args:
        kernel: (..., inputs, outputs), floating.
        gain: (outputs,), divided by the root of the weights an output has. None multiplies by
            nothing.
        epsilon: added to the variance, in the unit of the kernel squared.
        correction: 1 divides the variance by n - 1, as the authors' torch code does.
        epsilon_outside: add epsilon to the standard deviation, as that code does with 1e-5.

    Returns:
        The kernel, each output channel of mean 0 and variance 1 up to epsilon; a constant one is 0.

    Raises:
        TypeError: the kernel is not floating or complex.
        ValueError: one weight an output channel, which would standardize to 0; a gain of another
            shape; an epsilon below 0.

    Example:
        >>> import jax.numpy as jnp
        >>> standardize_kernel(jnp.array([[1.0], [3.0]]), epsilon=0.0).tolist()
        [[-1.0], [1.0]]

    Reference:
        Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520. The gain is that of timm's ScaledStdConv2d, after Characterizing signal
        propagation to close the performance gap in unnormalized ResNets, 2021, arXiv:2101.08692.
    """
    kernel = inexact(kernel)
    fan_in = kernel.size // max(kernel.shape[-1], 1)
    if kernel.ndim < 2 or fan_in < 2:
        raise ValueError(
            f"a kernel of shape {kernel.shape} has {fan_in if kernel.ndim > 1 else 1} weight for "
            "each output channel, which standardizes to 0. Expected (..., inputs, outputs) with "
            "two or more weights an output; leave this layer out."
        )
    m = moments(kernel, (*(1,) * (kernel.ndim - 1), kernel.shape[-1]))
    m = with_divisor(m, epsilon, correction=correction, epsilon_outside=epsilon_outside)
    return normalize(
        kernel, m, scale=None if gain is None else jnp.asarray(gain) * fan_in**-0.5, epsilon=0.0
    )


def centralize_kernel(kernel: ArrayLike) -> jax.Array:
    """The kernel less its mean for each output channel.

    A constant input then gives 0 where there is no padding.

    Args:
        kernel: (..., inputs, outputs), floating or complex.

    Returns:
        The kernel, each output channel of mean 0.

    Raises:
        TypeError: the kernel is not floating or complex.
        ValueError: one weight an output channel, which would become 0.

    Example:
        >>> centralize_kernel(jnp.array([[1.0], [3.0]])).tolist()
        [[-1.0], [1.0]]

    Reference:
        Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020,
        arXiv:2001.06838, as in the authors' code.
    """
    kernel = inexact(kernel)
    if kernel.ndim < 2 or kernel.size <= kernel.shape[-1]:
        raise ValueError(
            f"a kernel of shape {kernel.shape} has one weight for each output channel, which would "
            "become 0. Expected (..., inputs, outputs) with two or more weights an output; leave "
            "this layer's kernel as it is."
        )
    return kernel - kernel.mean(tuple(range(kernel.ndim - 1)), keepdims=True)
