"""Filter Response Normalization with its thresholded linear unit."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import check_number
from jaxnorm._core.moments import inexact
from jaxnorm._core.shared import shared, widened
from jaxnorm.methods._fields import as_value
from jaxnorm.methods._frame import (
    applied,
    measured,
    parameter,
)
from jaxnorm.methods._method import Method, Options, Parameters, Result, State
from jaxnorm.methods._table import instance_rms_norm


@as_value
class filter_response_norm(Method):
    """Divide each channel of each example by its root mean square, then threshold it.

        y = x / sqrt(mean_hw(x^2) + epsilon + |learned_epsilon|) * scale + bias
        output = max(y, threshold)

    Threshold and normalization together keep x and small arrays for the backward pass. Nothing
    depends on other examples, in training or inference. No activation need follow, and no relu
    should: the threshold, 0 at first, would get no gradient. Without threshold and learned epsilon
    it is the row `instance_rms_norm`. An activation given to `apply` is applied after the
    threshold.

    Args:
        use_threshold: threshold the output; False is for a layer that another activation follows.
        use_slope: the affine unit, max(y, slope * y + threshold).
        use_learned_epsilon: add the absolute value of a learned scalar to epsilon. It is needed
            where there is one position, since x / |x| knows only the sign of x.
        epsilon: added to the mean square, in the unit of x squared.

    State: {}.

    Options of apply:
        threshold: tau, learned, (C,), 0 at first; see `thresholded_linear_unit`.
        slope: learned, (C,). At 0, its initial value, the unit is the plain one, which is our
            choice.
        learned_epsilon: a scalar, 1e-4 at first, in the unit of x squared.

    Raises:
        ValueError: a slope without threshold, a parameter that the method does not have.

    Example:
        >>> x = jnp.array([[[3.0], [-4.0]]])
        >>> y, _ = filter_response_norm(epsilon=0.0).apply(x, {}, train=True)
        >>> (y * 12.5**0.5).tolist()  # the mean square of 3 and -4 is 12.5
        [[[3.0], [0.0]]]

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737. The definition was read in implementations by
        others; epsilon is that of TensorFlow Addons.
    """

    statistics = (instance_rms_norm(),)

    use_threshold: bool = True
    use_slope: bool = False
    use_learned_epsilon: bool = False
    epsilon: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.use_slope and not self.use_threshold:
            raise ValueError(
                "slope is that of the affine thresholded linear unit. Got use_threshold=False and "
                "use_slope=True; expected both, or no slope."
            )

    @property
    def activates(self) -> bool:
        return self.use_threshold

    def parameters(self, num_channels: int) -> Parameters:
        zeros = np.zeros(num_channels, np.float32)
        first = {
            "threshold": zeros,
            "slope": zeros,
            "learned_epsilon": np.asarray(1e-4, np.float32),
        }
        return {name: t for name, t in first.items() if getattr(self, f"use_{name}")}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        threshold: ArrayLike | None = None,
        slope: ArrayLike | None = None,
        learned_epsilon: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> Result:
        given = {"threshold": threshold, "slope": slope, "learned_epsilon": learned_epsilon}
        for name, t in given.items():
            if t is not None and not getattr(self, f"use_{name}"):
                raise ValueError(
                    f"{name} was given to {self}, which has none. Expected use_{name}=True."
                )
        wide = statistic_dtype(x.dtype)
        epsilon: Any = self.epsilon
        if learned_epsilon is not None:
            check_number(learned_epsilon, "learned_epsilon")
            learned = jnp.abs(jnp.asarray(learned_epsilon, wide))
            epsilon = learned + jnp.asarray(epsilon, wide)
        after = None if threshold is None else _thresholded if slope is None else _sloped
        units = {"threshold": threshold, "slope": slope}
        arrays = [parameter(t, name, x, options) for name, t in units.items() if t is not None]
        m = measured(x, instance_rms_norm(), **options)
        y = applied(x, m, epsilon, centered=False, after=after, arrays=arrays, **options)
        return y, state


def _thresholded(y: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.maximum(y, threshold)


def _sloped(y: jax.Array, threshold: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.maximum(y, threshold + slope * y)


def thresholded_linear_unit(
    x: ArrayLike,
    threshold: ArrayLike,
    *,
    slope: ArrayLike | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """The larger of x and a learned threshold; in the affine form of x and a line.

        max(x, threshold)    or    max(x, slope * x + threshold)

    A threshold of 0 is relu, of minus infinity the identity.

    Args:
        x: real floating array.
        threshold: tau, of a shape that `normalize` takes for a scale.
        slope: alpha of the affine form, likewise. 0 is the plain form.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        Array of x's shape and dtype.

    Raises:
        TypeError: x is complex or integer.
        ValueError: a threshold or slope of another shape.

    Example:
        >>> thresholded_linear_unit(jnp.array([[-2.0, 3.0]]), jnp.array([-1.0, 4.0])).tolist()
        [[-1.0, 4.0]]

    Reference:
        Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of Deep
        Neural Networks, 2019, arXiv:1911.09737, read in implementations by others.
    """
    x = inexact(x)
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"complex numbers have no order. Got x of {x.dtype}, shape {x.shape}; expected real x."
        )
    x = shared(x)
    options: Any = {"batch_axis": batch_axis, "channel_axis": channel_axis}
    wide = widened(x)
    floor = parameter(threshold, "threshold", x, options).astype(wide.dtype)
    if slope is not None:
        floor = floor + parameter(slope, "slope", x, options).astype(wide.dtype) * wide
    return jnp.maximum(wide, floor).astype(x.dtype)
