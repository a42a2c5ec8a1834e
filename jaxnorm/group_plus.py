"""GN+: group normalization mixed with its own output standardized over the batch."""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm import methods
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_flag
from jaxnorm._core.devices import varying_like
from jaxnorm._core.divisor import with_divisor
from jaxnorm._core.groups import EACH, Groups, Method
from jaxnorm._core.moments import Moments
from jaxnorm._core.shared import own_and_wide
from jaxnorm._core.state import init_running, running_shape, serving
from jaxnorm._frame import (
    Options,
    State,
    applied,
    check_state,
    measured,
    output_dtype,
    parameter,
    per_device,
    real,
    select_options,
    updated,
)


def _second_branch(per_position: bool) -> Method:
    return Method(Groups(batch=1, spatial=EACH if per_position else 1, channel=EACH))


def init_group_norm_plus(
    x_shape: tuple[int, ...],
    *,
    per_position: bool = True,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> State:
    """State of `group_norm_plus` before the first step: mean 0 and variance 1 of the second branch.

    Args:
        x_shape: shape of x; any number of examples.
        per_position: as in `group_norm_plus`.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        `mean` and `var`, float32: x's shape without its examples and without axes of one position,
        or (C,).

    Example:
        >>> init_group_norm_plus((1, 8, 8, 64))["mean"].shape
        (8, 8, 64)
    """
    shape, _ = running_shape(
        _second_branch(per_position), x_shape, batch_axis=batch_axis, channel_axis=channel_axis
    )
    first = init_running(shape)
    return {"mean": first.mean, "var": first.var}


def group_norm_plus(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    mixture: ArrayLike = 1.0,
    num_groups: int = 32,
    per_position: bool = True,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    correction: int = 0,
    epsilon_outside: bool = False,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Group normalization z, mixed with z standardized over the examples, each position and channel
    apart.

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
    1 / sqrt(var + epsilon), as in the authors' code. The backward pass keeps x and z.

    Args:
        x: real floating array with examples and channels.
        state: see `init_group_norm_plus`. With per_position it is tied to the image size.
        train: use the batch's statistics in the second branch and update the state, or use the
            state.
        mixture: lambda, the logit of the first branch's weight: a scalar, 1 at first.
        num_groups: G, a divisor of C.
        per_position: False pools the positions in the second branch, which is our variant; the
            state is then (C,).
        momentum: weight of the old state per update.
        epsilon: added to both variances, in the unit of x squared and of 1.
        correction: 1 divides both variances by n - 1, as the authors' code does.
        epsilon_outside: add epsilon to both standard deviations instead, as that code does.
        **options: as `norm`. The statistics of the second branch are synchronized over
            `axis_name`, those of the first are not.

    Returns:
        y, of x's shape, and the new state. A batch with empty or non-finite sets leaves those
        places of the state.

    Raises:
        TypeError: x is complex or integer.
        ValueError: G does not divide C; state of another number of channels or image size.

    Example:
        >>> x = jnp.array([[0.0, 2.0], [6.0, 4.0]])
        >>> state = init_group_norm_plus(x.shape)
        >>> y, state = group_norm_plus(
        ...     x, state, train=True, num_groups=1, momentum=0.5, epsilon=0.0
        ... )
        >>> y.tolist(), state["var"].tolist()  # z is -1 and 1, then 1 and -1, and so is u
        ([[-1.0, 1.0], [1.0, -1.0]], [1.0, 1.0])

    Reference:
        Understanding and Improving Group Normalization, 2022, arXiv:2207.01972. The definition was
        read in the authors' code. Continual Normalization: Rethinking Batch Normalization for
        Online Continual Learning, 2022, arXiv:2203.16102.
    """
    check_flag(train, "train")
    x = real(x, "group_norm_plus")
    second = _second_branch(per_position)
    axes = select_options(options, "batch_axis", "channel_axis")
    wide = statistic_dtype(x.dtype)
    shape, _ = shapes = running_shape(second, x.shape, **axes)
    check_state(state, "group_norm_plus", mean=len(shape), var=len(shape))
    running = serving(
        Moments(state["mean"], state["mean"], state["var"]),
        *shapes,
        x.shape,
    )

    def divisors(m: Moments) -> Moments:
        return with_divisor(m, epsilon, correction=correction, epsilon_outside=epsilon_outside)

    m = divisors(measured(x, methods.group_norm(num_groups), **per_device(options)))
    plain = {"scale": None, "bias": None, "activation": None, "dtype": wide}
    bare: Options = options | plain  # type: ignore[assignment]
    z = applied(x, m, 0.0, **bare)
    weights = options.get("weights")
    if weights is not None:  # what does not count must not come back as a number
        z = jnp.where(jnp.isfinite(own_and_wide(x)[0]), z, jnp.nan)
    several: jax.Array | bool = True
    if train:
        m = measured(z, second, **options)
        state = updated(state, m, momentum, correction)
        # u of one example is 0 whatever it is divided by. Divided by epsilon, the difference of
        # two roundings of z would be seen, in y and in its gradient.
        if weights is None or jnp.issubdtype(jnp.result_type(weights), jnp.bool_):
            several = m.count > 1
        m = divisors(m)
    else:
        running = Moments(
            jnp.ones_like(running.mean, wide), running.mean.astype(wide), running.var.astype(wide)
        )
        m = with_divisor(running, epsilon, epsilon_outside=epsilon_outside)
    w = jax.nn.sigmoid(jnp.asarray(mixture, wide))
    r = jnp.where(several, jax.lax.rsqrt(jnp.where(several, m.var, 1)), 0)
    # For one example a is w alone, and a^-2 and its derivative have to stay finite.
    a = jnp.maximum(w + (1 - w) * r, 1e-12)
    # y = (z - mean) a scale + shift, which takes the difference first
    scale, bias = (
        None if t is None else parameter(t, name, x, options)
        for name, t in (("scale", options.get("scale")), ("bias", options.get("bias")))
    )
    shift = w * m.mean if scale is None else w * m.mean * scale
    if bias is not None:
        shift = shift + bias
    if weights is not None:
        shift = jnp.where(jnp.isfinite(z), shift, 0 if bias is None else bias)
    m = jax.tree.map(lambda t: varying_like(t, z), Moments(m.count, m.mean, a**-2))
    batch, channel = (
        single_axis(options.get(name, default), x.shape)
        for name, default in (("batch_axis", 0), ("channel_axis", -1))
    )
    features = [i for i in range(x.ndim) if i == channel or (i != batch and m.mean.shape[i] > 1)]
    if weights is not None:  # per element
        features = [i for i in range(x.ndim) if i != batch]

    def along(t: jax.Array) -> jax.Array:
        """t, of x's rank, over the features, and before them the examples if it has them."""
        examples = [batch] if t.shape[batch] > 1 else []
        t = jnp.broadcast_to(
            t, [n if i in features + examples else 1 for i, n in enumerate(x.shape)]
        )
        return jnp.moveaxis(t, batch, 0).reshape([x.shape[i] for i in examples + features])

    out = {
        "scale": None if scale is None else along(scale),
        "bias": along(shift),
        "channel_axis": features,
        "dtype": output_dtype(x, options),
    }
    return applied(z, m, 0.0, **(options | out)), state  # type: ignore[arg-type]
