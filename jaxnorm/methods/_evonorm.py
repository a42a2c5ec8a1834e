"""EvoNorm B0 and S0: normalization and activation as one formula, found by search.

x is not centered.
"""

from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.moments import Moments
from jaxnorm._core.platforms import spread_to_channels
from jaxnorm.methods._fields import Count, as_value
from jaxnorm.methods._frame import (
    along_channels,
    applied,
    averages,
    measured,
    parameter,
    per_device,
    pooled,
)
from jaxnorm.methods._method import Method, Options, Parameters, Result, State
from jaxnorm.methods._options import Axes, Sets, sets_of_pooled
from jaxnorm.methods._table import batch_norm, group_norm, instance_norm


@as_value
class evonorm_b0(Method):
    """Divide x by the batch's standard deviation, or by a line in x where that is larger.

    The line is v x plus the example's own standard deviation:

        y = x / max(sqrt(var_nhw + epsilon), v x + sqrt(var_hw + epsilon)) * scale + bias

    In inference the running variance stands for var_nhw; var_hw is the example's own always. For v
    > 0 the output before scale and bias stays below 1 / v. x is read once for both variances.
    Nonlinear in x by itself, so no activation follows. The variance of the batch is synchronized
    over `axis_name`, that of each example is not.

    Args:
        momentum: weight of the old state per update, 0 to 1.
        epsilon: added to the variances, in the unit of x squared.

    State: `var`, (C,).

    Options of apply:
        v: learned, (C,), 1 at first; without a unit.
        momentum: in place of the field.

    Raises:
        ValueError: v of another number of channels, a momentum outside 0 to 1.

    Example:
        >>> # the variance of the batch is 5, that of each example 1
        >>> x = jnp.array([[[1.0], [3.0]], [[-1.0], [-3.0]]])
        >>> method = evonorm_b0(momentum=0.5, epsilon=0.0)
        >>> y, state = method.apply(x, method.init(x.shape), train=True, v=jnp.ones(1))
        >>> y[0].tolist(), state["var"].tolist()  # 1 / sqrt(5) and 3 / 4
        ([[0.447...], [0.75]], [3.0])

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967. The definition was read in
        the authors' code.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        batch = sets_of_pooled(batch_norm().shape(x_shape, **axes))
        return (*instance_norm().sets(x_shape, **axes), batch)

    @property
    def activates(self) -> bool:
        return True

    def first_state(self, num_channels: int) -> State:
        return {"var": jnp.ones(num_channels, jnp.float32)}

    def parameters(self, num_channels: int) -> Parameters:
        return {"v": np.ones(num_channels, np.float32)}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        v: ArrayLike,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        own = measured(x, instance_norm(), **per_device(options))
        var = along_channels(state["var"], x, options)
        if train:
            m = pooled(own, batch_norm(), **options)
            var, state = m.var, averages(state, m, momentum, var=m.var)

        std, own_std = (jnp.sqrt(t + self.epsilon) for t in (var, own.var))
        return _instead(_divided, x, (std, own_std, parameter(v, "v", x, options)), options), state


def _divided(x, std, own_std, v, scale, bias):
    return x / jnp.maximum(std, v * x + own_std) * scale + bias


@as_value
class evonorm_s0(Method):
    """Divide x sigmoid(v x) by the standard deviation of x over positions and a group of channels.

        y = x sigmoid(v x) / sqrt(var_hwg + epsilon) * scale + bias

    With v = 0 it is half of x over its standard deviation, with large v relu(x) over it. Nothing
    depends on other examples.

    Args:
        num_groups: G, a divisor of C. The authors' code lowers it until it divides.
        epsilon: added to the variance, in the unit of x squared.

    State: {}.

    Options of apply:
        v: learned, (C,), 1 at first; in the unit of 1 / x.

    Raises:
        ValueError: G does not divide C; v of another number of channels.

    Example:
        >>> x = jnp.array([[[1.0], [3.0]]])
        >>> y, _ = evonorm_s0(1, epsilon=0.0).apply(x, {}, train=True, v=jnp.zeros(1))
        >>> y.tolist()
        [[[0.5], [1.5]]]

    Reference:
        Evolving Normalization-Activation Layers, 2020, arXiv:2004.02967. The definition was read in
        the authors' code.
    """

    num_groups: Count = 32
    epsilon: float = 1e-5

    @property
    def statistics(self) -> tuple[Method, ...]:  # type: ignore[override]
        return (group_norm(self.num_groups),)

    @property
    def activates(self) -> bool:
        return True

    def parameters(self, num_channels: int) -> Parameters:
        return {"v": np.ones(num_channels, np.float32)}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        v: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        m = measured(x, group_norm(self.num_groups), **options)

        a = spread_to_channels(jax.lax.rsqrt(m.var + self.epsilon), x.shape)
        return _instead(_gated, x, (a, parameter(v, "v", x, options)), options), state


def _gated(x, a, v, scale, bias):
    return x * jax.nn.sigmoid(v * x) * a * scale + bias


def _instead(f, x: jax.Array, arrays: Sequence[jax.Array], options: Options) -> jax.Array:
    """f(x, *arrays, scale, bias), after a normalization that leaves x as it is."""
    one = jnp.ones((1,) * x.ndim, statistic_dtype(x.dtype))
    affine = [
        first if t is None else parameter(t, name, x, options)
        for name, t, first in (
            ("scale", options.get("scale"), one),
            ("bias", options.get("bias"), jnp.zeros_like(one)),
        )
    ]
    plain: Options = options | {"scale": None, "bias": None}  # type: ignore[assignment]
    m = Moments(one, jnp.zeros_like(one), one)
    return applied(x, m, 0.0, centered=False, after=f, arrays=[*arrays, *affine], **plain)
