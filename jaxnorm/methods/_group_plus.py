"""GN+: group normalization mixed with its own output standardized over the batch."""

from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape
from jaxnorm._core.divisor import with_divisor
from jaxnorm._core.groups import EACH, Groups
from jaxnorm._core.moments import Moments
from jaxnorm._core.shared import own_and_wide
from jaxnorm._core.state import running_moments, running_shape
from jaxnorm.methods._fields import Count, as_value
from jaxnorm.methods._frame import (
    applied,
    axes_in,
    first_running,
    measured,
    parameter,
    per_device,
    running_in,
    updated,
)
from jaxnorm.methods._method import InitOptions, Method, Options, Parameters, Result, State
from jaxnorm.methods._row import Row
from jaxnorm.methods._table import group_norm


@as_value
class group_norm_plus(Method):
    """Group normalization, mixed with its own output standardized over the batch.

    The second part standardizes z over the examples, each position and channel apart:

        z = (x - mean_(n,g)) / sqrt(var_(n,g) + epsilon)
        u = (z - mean_(h,w,c)(z)) / sqrt(var_(h,w,c)(z) + epsilon)
        y = (w z + (1 - w) u) * scale + bias,    w = sigmoid(mixture)

    In inference running statistics of z stand for those of the second line, which is ours: the
    authors' code has no state and takes those of the test batch (call it with train=True and drop
    the state). For a large mixture y is group normalization; for a very negative one z standardized
    over the batch, and with per_position=False Continual Normalization. Where one example alone is
    standardized, without weights or under a mask, u is 0 and y = w z * scale + bias, exactly. Where
    the z of few examples nearly agree, and where real weights leave one, u is a difference of
    rounded z over a small number: its error is that of z, some 1e-7, times 1 / (std + epsilon), or
    1 / sqrt(var + epsilon), as in the authors' code. The backward pass keeps x and z. The
    statistics of the second branch are synchronized over `axis_name`, those of the first are not.

    Args:
        num_groups: G, a divisor of C.
        per_position: batch statistics of each position apart, which ties the state to the image
            size; False pools the positions in the second branch, which is our variant.
        momentum: weight of the old state per update.
        epsilon: added to both variances, in the unit of x squared and of 1.
        correction: 1 divides both variances by n - 1, as the authors' code does.
        epsilon_outside: add epsilon to both standard deviations instead, as that code does.

    State: `mean` and `var` of the second branch: x's shape without its examples and without axes of
    one position, or (C,).

    Options of apply:
        mixture: lambda, learned, the logit of the first branch's weight: a scalar, 1 at first.
        momentum: in place of the field.

    Raises:
        ValueError: G does not divide C; state of another number of channels or image size.

    Example:
        >>> x = jnp.array([[0.0, 2.0], [6.0, 4.0]])
        >>> method = group_norm_plus(1, momentum=0.5, epsilon=0.0)
        >>> y, state = method.apply(x, method.init(x.shape), train=True)
        >>> y.tolist(), state["var"].tolist()  # z is -1 and 1, then 1 and -1, and so is u
        ([[-1.0, 1.0], [1.0, -1.0]], [1.0, 1.0])

    Reference:
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972. The definition was
        read in the authors' code. Continual Normalization: Rethinking Batch Normalization for
        Online Continual Learning, 2022, arXiv:2203.16102.
    """

    num_groups: Count = 32
    per_position: bool = True
    momentum: float = 0.99
    epsilon: float = 1e-5
    correction: int = 0
    epsilon_outside: bool = False

    @property
    def _second_branch(self) -> Groups:
        return Groups(batch=1, spatial=EACH if self.per_position else 1, channel=EACH)

    @property
    def statistics(self) -> tuple[Method, ...]:  # type: ignore[override]
        return (group_norm(self.num_groups), Row(self._second_branch))

    def keeps_positions(self, num_channels: int) -> bool:
        return self.per_position

    def _init(self, x_shape: Shape, options: InitOptions) -> State:
        shape, _ = running_shape(self._second_branch, tuple(x_shape), **axes_in(options))
        return first_running(shape)

    def parameters(self, num_channels: int) -> Parameters:
        return {"mixture": np.ones((), np.float32)}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        mixture: ArrayLike,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        wide = statistic_dtype(x.dtype)

        def divided(m: Moments, correction: int) -> Moments:
            outside = self.epsilon_outside
            return with_divisor(m, self.epsilon, correction=correction, epsilon_outside=outside)

        m = measured(x, group_norm(self.num_groups), **per_device(options))
        plain = {"scale": None, "bias": None, "activation": None, "dtype": wide}
        bare: Options = options | plain  # type: ignore[assignment]
        z = applied(x, divided(m, self.correction), 0.0, **bare)
        weights = options.get("weights")
        if weights is not None:  # what does not count must not come back as a number
            z = jnp.where(jnp.isfinite(own_and_wide(x)[0]), z, jnp.nan)
        several: jax.Array | bool = True
        if train:
            m = measured(z, self._second_branch, **options)
            state = updated(
                state,
                jax.lax.stop_gradient(m),
                momentum=momentum,
                correction=self.correction,
                batch_axis=options["batch_axis"],
            )
            # u of one example is 0 whatever it is divided by. Divided by epsilon, the difference of
            # two roundings of z would be seen, in y and in its gradient.
            if weights is None or jnp.issubdtype(jnp.result_type(weights), jnp.bool_):
                several = m.count > 1
            m = divided(m, self.correction)
        else:  # its variance is corrected already, if at all
            m = running_moments(running_in(state), self._second_branch, x.shape, **axes_in(options))
            m = divided(jax.tree.map(lambda t: t.astype(wide), m), 0)
        w = jax.nn.sigmoid(jnp.asarray(mixture, wide))
        r = jnp.where(several, jax.lax.rsqrt(jnp.where(several, m.var, 1)), 0)
        # For one example a is w alone, and a^-2 and its derivative have to stay finite.
        a = jnp.maximum(w + (1 - w) * r, 1e-12)
        # y = (z - mean) a scale + shift, which takes the difference first
        scale, bias = (
            None
            if (t := options.get(name)) is None
            else parameter(t, name, x, options).astype(wide)
            for name in ("scale", "bias")
        )
        shift = w * m.mean if scale is None else w * m.mean * scale
        if bias is not None:
            shift = shift + bias
        if weights is not None:
            shift = jnp.where(jnp.isfinite(z), shift, 0 if bias is None else bias)
        m = Moments(m.count, m.mean, a**-2)
        # Both lie as x does.
        out = {"scale": scale, "bias": shift, "channel_axis": tuple(range(x.ndim))}
        return applied(z, m, 0.0, **(options | out)), state  # type: ignore[arg-type]
