"""EvoNorm B0 and S0: normalization and activation as one formula, found by search. x is not
centered."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_count, check_epsilon, check_flag
from jaxnorm._core.devices import varying_like
from jaxnorm._core.moments import Moments
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import usable
from jaxnorm._core.shared import widened
from jaxnorm._frame import (
    Options,
    State,
    along_channels,
    applied,
    averaged,
    check_state,
    measured,
    output_dtype,
    parameter,
    per_device,
    real,
    select_options,
    zero_masked,
)


def init_evonorm_b0(num_channels: int) -> State:
    """State of `evonorm_b0` before the first step: variance 1 for each channel.

    Args:
        num_channels: C.

    Returns:
        `var`, (C,), float32.

    Example:
        >>> init_evonorm_b0(3)["var"].tolist()
        [1.0, 1.0, 1.0]
    """
    return {"var": jnp.ones(num_channels, jnp.float32)}


def evonorm_b0(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    v: ArrayLike,
    momentum: ArrayLike = 0.9,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Divide x by the larger of the batch's standard deviation and a line in x above the example's
    own.

        y = x / max(sqrt(var_nhw + epsilon), v x + sqrt(var_hw + epsilon)) * scale + bias

    In inference the running variance stands for var_nhw; var_hw is the example's own always. For v
    > 0 the output before scale and bias stays below 1 / v. x is read once for both variances.
    Nonlinear in x by itself, so no activation follows.

    Args:
        x: real floating array with examples and channels.
        state: see `init_evonorm_b0`.
        train: use the batch's variance and update the state, or use the state.
        v: (C,), 1 at first; without a unit.
        momentum: weight of the old state per update, 0 to 1.
        epsilon: added to the variances, in the unit of x squared.
        **options: as `norm`. The variance of the batch is synchronized over `axis_name`, that of
            each example is not.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        channels' state.

    Raises:
        TypeError: x is complex or integer.
        ValueError: state or v of another number of channels, state of another method, a momentum
            outside 0 to 1, an epsilon below 0.

    Example:
        >>> # the variance of the batch is 5, that of each example 1
        >>> x = jnp.array([[[1.0], [3.0]], [[-1.0], [-3.0]]])
        >>> y, state = evonorm_b0(
        ...     x, init_evonorm_b0(1), train=True, v=jnp.ones(1), momentum=0.5, epsilon=0.0
        ... )
        >>> y[0].tolist(), state["var"].tolist()  # 1 / sqrt(5) and 3 / 4
        ([[0.447...], [0.75]], [3.0])

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967. The definition was read in
        the authors' code.
    """
    check_flag(train, "train")
    check_epsilon(epsilon)
    x = real(x, "evonorm_b0")
    check_state(state, "evonorm_b0", var=1)
    own = measured(x, methods.instance_norm(), **per_device(options))
    var = along_channels(state["var"], x, options.get("channel_axis", -1))
    if train:
        axes = select_options(
            options, "axis_name", "axis_index_groups", "batch_axis", "channel_axis"
        )
        m = pool(own, methods.batch_norm(), **axes)
        var, state = m.var, {"var": averaged(state["var"], m.var, momentum, usable(m))}

    @jax.checkpoint
    def divided(x: jax.Array, var: jax.Array, own_var: jax.Array) -> jax.Array:
        dtype = output_dtype(x, options)
        x = zero_masked(widened(x), options.get("weights"))
        line = parameter(v, "v", x, options) * x + jnp.sqrt(own_var + epsilon)
        x = x / jnp.maximum(varying_like(jnp.sqrt(var + epsilon), x), line)
        out: Options = options | {"dtype": dtype}  # type: ignore[assignment]
        return applied(x, _unit(x), 0.0, **out)

    return divided(x, var, own.var), state


def evonorm_s0(
    x: ArrayLike,
    *,
    v: ArrayLike,
    num_groups: int = 32,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> jax.Array:
    """Divide x sigmoid(v x) by the standard deviation of x over positions and a group of channels.

        y = x sigmoid(v x) / sqrt(var_hwg + epsilon) * scale + bias

    With v = 0 it is half of x over its standard deviation, with large v relu(x) over it. Nothing
    depends on other examples.

    Args:
        x: real floating array with examples and channels.
        v: (C,), 1 at first; in the unit of 1 / x.
        num_groups: G, a divisor of C. The authors' code lowers it until it divides.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`.

    Returns:
        y, of x's shape.

    Raises:
        TypeError: x is complex or integer.
        ValueError: G does not divide C; v of another number of channels; an epsilon below 0.

    Example:
        >>> x = jnp.array([[[1.0], [3.0]]])
        >>> evonorm_s0(x, v=jnp.zeros(1), num_groups=1, epsilon=0.0).tolist()
        [[[0.5], [1.5]]]

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967. The definition was read in
        the authors' code.
    """
    x = real(x, "evonorm_s0")
    channels = x.shape[single_axis(options.get("channel_axis", -1), x.shape)]
    if channels % check_count(num_groups, "num_groups") != 0:
        lower = max(n for n in range(1, num_groups) if channels % n == 0)
        raise ValueError(
            f"num_groups={num_groups} does not divide the {channels} channels of x, which has "
            f"shape {x.shape}. Expected a divisor: pass num_groups={lower}, to which the authors' "
            "code would lower it."
        )
    m = measured(x, methods.group_norm(num_groups), **options)

    @jax.checkpoint
    def gated(x: jax.Array, m: Moments) -> jax.Array:
        dtype = output_dtype(x, options)
        x = zero_masked(widened(x), options.get("weights"))
        x = x * jax.nn.sigmoid(parameter(v, "v", x, options) * x)
        out: Options = options | {"dtype": dtype}  # type: ignore[assignment]
        return applied(x, Moments(m.count, jnp.zeros_like(m.mean), m.var), epsilon, **out)

    return gated(x, m)


def _unit(x: jax.Array) -> Moments:
    """Moments that leave x as it is."""
    one = jnp.ones((1,) * x.ndim, x.dtype)
    return Moments(one, jnp.zeros_like(one), one)
