"""What the second moment of a channel is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import abs2
from jaxnorm._core.axes import axes_of, single_axis
from jaxnorm._core.boundary import moments
from jaxnorm._core.moments import inexact


class ChannelPower(NamedTuple):
    """What `channel_power` returns: the parts of each channel's mean square, (C,).

    They add up to it, `total`.

    Args:
        constant: (E mean)^2, the part that is the same for every element of the channel. Near the
            whole, the channel has collapsed to a constant.
        mean_variance: Var mean, over examples.
        within: (E std)^2, variation inside of examples.
        std_variance: Var std, over examples.

    Reference:
        See `channel_power`.
    """

    constant: jax.Array
    mean_variance: jax.Array
    within: jax.Array
    std_variance: jax.Array

    @property
    def total(self) -> jax.Array:
        """The mean square of each channel, (C,)."""
        return self.constant + self.mean_variance + self.within + self.std_variance

    @property
    def collapse(self) -> jax.Array:
        """The share of all channels' power that is constant, a scalar: 1 where all collapsed."""
        return self.constant.sum() / self.total.sum()

    @property
    def variability(self) -> jax.Array:
        """The share that statistics of examples vary by, a scalar: 0 behind instance norm."""
        return (self.mean_variance + self.std_variance).sum() / self.total.sum()


def channel_power(
    x: ArrayLike, *, batch_axis: int = 0, channel_axis: int | Sequence[int] = -1
) -> ChannelPower:
    """The mean square of each channel, split by what varies.

    With mean_nc and std_nc those of channel c in example n over positions, and E and Var over
    examples,

        E x^2 = (E mean)^2 + Var mean + (E std)^2 + Var std

    Behind batch norm, before scale and bias, the first part is 0. Behind layer norm it is not, and
    it may grow with depth until channels are constants: `collapse`. Behind instance norm the second
    and the fourth part are 0, so that examples no longer differ in contrast or level:
    `variability`.

    Args:
        x: what goes into a normalization or comes out of it, floating or complex, with examples and
            channels; all other axes are positions. Without positions std is 0.
        batch_axis: axis of the examples.
        channel_axis: axis or axes of the channels.

    Returns:
        `ChannelPower` of arrays (C,), or of the sizes of several channel axes, in float32 or wider.

    Raises:
        TypeError: x is not floating or complex.
        ValueError: axes that x does not have, or that are both examples and channels.

    Example:
        >>> x = jnp.array([[[1.0, 5.0], [3.0, 5.0]], [[1.0, 5.0], [7.0, 5.0]]])
        >>> power = channel_power(x)
        >>> [part.tolist() for part in power]
        [[9.0, 25.0], [1.0, 0.0], [4.0, 0.0], [1.0, 0.0]]
        >>> round(float(power.collapse), 4), round(float(power.variability), 4)
        (0.85, 0.05)

    Reference:
        Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence,
        2021, arXiv:2106.03743. The abstract was read, which names both failures; the four parts are
        from memory, and that they add up is tested.
    """
    x = inexact(x)
    batch, channels = single_axis(batch_axis, x.shape), axes_of(channel_axis, x.shape)
    if batch in channels:
        raise ValueError(
            f"batch_axis={batch_axis} and channel_axis={channel_axis} are one axis of x of shape "
            f"{x.shape}. Expected two."
        )
    kept = tuple(n if i in (batch, *channels) else 1 for i, n in enumerate(x.shape))
    m = moments(x, kept)
    mean, std = (
        t.reshape([n for i, n in enumerate(kept) if i in (batch, *channels)])
        for t in (m.mean, jnp.sqrt(m.var))
    )
    over = sum(i < batch for i in channels)  # the axis of the examples among those that are kept
    return ChannelPower(abs2(mean.mean(over)), mean.var(over), abs2(std.mean(over)), std.var(over))
