"""A norm with running statistics folded into the convolution or dense layer before it.

At inference such a norm multiplies and shifts each channel by constants, which the linear layer
before it can do itself. `fold_norms` in linen and nnx does it for whole models, where the layer's
parameters have no other use.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import single_axis
from jaxnorm._core.blocks import spread
from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.moments import Moments, check_moments
from jaxnorm._core.state import serves_channels


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    running: Moments,
    *,
    scale: ArrayLike | None = None,
    shift: ArrayLike | None = None,
    epsilon: float = 1e-5,
    output_axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of one linear layer that does what a layer and the norm after it do.

        a = scale / sqrt(var + epsilon),    kernel <- kernel a,    bias <- (bias - mean) a + shift

    Exact to rounding for everything that is linear in its kernel: dense layers, convolutions with
    groups, strides, dilation and any padding, transposed convolutions.

    Args:
        kernel: of the layer, with the output channels on one axis.
        bias: of the layer, (C,), or None.
        running: running statistics of the norm, (C,), or (G,) for G groups of channels.
        scale: gamma of the norm, (C,). None is 1.
        shift: beta of the norm, (C,). None is 0.
        epsilon: of the norm, in the unit of x squared.
        output_axis: axis of the output channels in the kernel: -1 in Flax, -2 for
            `ConvTranspose(transpose_kernel=True)`.

    Returns:
        The new kernel, of its dtype, and the new bias, (C,), of the kernel's dtype.

    Raises:
        TypeError: running is not `Moments`.
        ValueError: running statistics that do not divide the channels, a scale, shift or bias of
            another shape, an epsilon below 0.

    Example:
        >>> import jax.numpy as jnp
        >>> running = Moments(None, jnp.array([1.0]), jnp.array([4.0]))
        >>> kernel, bias = fold(
        ...     jnp.array([[2.0]]), None, running, scale=jnp.array([3.0]), epsilon=0.0
        ... )
        >>> kernel.tolist(), bias.tolist()
        ([[3.0]], [-1.5])

    Reference:
        Common practice, such as PyTorch's `fuse_conv_bn_eval`; no paper is followed.
    """
    check_moments(running, "running")
    check_epsilon(epsilon)
    kernel = jnp.asarray(kernel)
    axis = single_axis(output_axis, kernel.shape)
    channels, wide = kernel.shape[axis], statistic_dtype(kernel.dtype)
    if not serves_channels(running.mean.shape, channels):
        raise ValueError(
            f"running statistics of shape {running.mean.shape} do not fit {channels} output "
            f"channels of a kernel of shape {kernel.shape}. Expected one for each channel or "
            "group of channels."
        )

    def of_channels(t: ArrayLike | None, default: float, name: str) -> jax.Array:
        if t is None:
            return jnp.full(channels, default, wide)
        if jnp.shape(t) != (channels,):
            raise ValueError(
                f"{name} has shape {jnp.shape(t)}. Expected ({channels},), one number for each "
                f"output channel of a kernel of shape {kernel.shape}."
            )
        return jnp.asarray(t).astype(wide)

    mean, var = (spread(t, (channels,)).astype(wide) for t in (running.mean, running.var))
    a = of_channels(scale, 1, "scale") * jax.lax.rsqrt(var + jnp.asarray(epsilon, wide))
    new_bias = (of_channels(bias, 0, "bias") - mean) * a + of_channels(shift, 0, "shift")
    new_kernel = kernel.astype(wide) * jnp.expand_dims(
        a, [i for i in range(kernel.ndim) if i != axis]
    )
    return new_kernel.astype(kernel.dtype), new_bias.astype(kernel.dtype)
