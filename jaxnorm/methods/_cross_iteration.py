"""Cross-Iteration Batch Normalization: statistics of a window of batches.

Those of past batches are carried over to the present weights.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape
from jaxnorm._core.moments import as_weights, inexact
from jaxnorm._core.pooling import pool
from jaxnorm._core.running import usable
from jaxnorm._core.shared import own_and_wide
from jaxnorm.methods._carried_over import Linear, carried_over, derivatives
from jaxnorm.methods._fields import Count, NotNegative, Share, as_value
from jaxnorm.methods._frame import (
    applied,
    averages,
    first_running,
    measured,
    pushed,
    recalled,
)
from jaxnorm.methods._method import (
    InFront,
    InitOptions,
    Method,
    Options,
    Result,
    State,
    channels_of,
)
from jaxnorm.methods._options import Axes, Sets
from jaxnorm.methods._table import batch_norm


@as_value
class cross_iteration_norm(Method):
    """Batch normalization of y = layer(inputs, kernel) over this batch and the last ones.

    The last batches count as if their y had been made with the present kernel.

    With m and v the mean and variance of batch t in the window, W_t its kernel and W the present
    one, the first-order change of m and of the mean square m^2 + v along rho (W - W_t) makes

        d = <dm/dW, W - W_t>,    e = <dv/dW, W - W_t>
        m' = m + rho d,    v' = max(v + rho e - (rho d)^2, 0)

    These are pooled with those of the present batch, weighted by count:

        mean = sum n m' / sum n,    var = sum n (v' + (m' - mean)^2) / sum n

    Gradients flow through the present batch alone. No old kernel is kept: y is linear in W, so that
    <dm/dW, W_t> = m and <dv/dW, W_t> = 2 v. d is exact for fixed inputs; v' is never more than what
    the old inputs give under W.

    With rho = 0 the old statistics are pooled as they are; with window = 0, which is how training
    begins, this is batch normalization. While the kernel does not change, as in gradient
    accumulation, both are exactly the statistics of the concatenated batches for any rho: window =
    the number of the micro-batch within its step, from 0, is then Cross mini-Batch Normalization
    (CmBN). Inference uses running statistics of the batches, each by itself, as batch
    normalization.

    Args:
        window: most batches before the present one that are pooled with it.
        rho: how far statistics are carried over, 0 to 1.
        momentum: weight of the old running statistics per update.
        epsilon: added to the variance, in the unit of y squared.

    State: `mean` and `var`, (C,), of inference; and for each batch of the window, newest first,
    `past_count` (window,), its elements or 0; `past_mean` and `past_var`, (window, C);
    `past_patch`, (window, *kernel_shape[:-1], feature_group_count), the mean input patch; and
    `past_slope`, (window, *kernel_shape), the derivative of its variance by the kernel. `init`
    needs the `kernel_shape` of the layer in front, (*spatial, inputs, C), with outputs last and the
    inputs of one group of features, as in Flax, and the `feature_group_count` of a grouped
    convolution.

    Options of apply, whose x is y, the output of the layer in front:
        inputs: input of the layer in front, real, with y's batch and channel axes. With `weights`,
            which may not differ between channels, inputs must be finite also where they do not
            count, as for the kernel's gradient.
        kernel: its weights, outputs last; no bias.
        layer: the layer in front, `y = layer(inputs, kernel)`: linear in each, for any number of
            examples, and of output channels that is a multiple of the groups. For example
            `functools.partial(lax.conv_general_dilated, ...)`; a dense layer without one.
            `axis_name` also sums one array of the kernel's size.
        window: batches before this one to pool with, at most the field: a number or traced scalar,
            see `schedules.cross_iteration_window`.
        rho, momentum: in place of the fields.

    Raises:
        ValueError: a window below 1, state of another kernel, weights that differ between channels,
            rho outside of 0 to 1.

    Example:
        >>> kernel, method = jnp.ones((1, 1)), cross_iteration_norm(epsilon=0.0)
        >>> state = method.init((2, 1), kernel_shape=kernel.shape)
        >>> for inputs in (jnp.array([[0.0], [2.0]]), jnp.array([[4.0], [6.0]])):
        ...     z, state = method.apply(
        ...         inputs @ kernel, state, train=True, inputs=inputs, kernel=kernel
        ...     )
        >>> (z * jnp.sqrt(5.0)).round(5).tolist()  # mean 3 and variance 5 of both batches
        [[1.0], [3.0]]

    Reference:
        Cross-Iteration Batch Normalization, 2020, arXiv:2002.05712. The definition follows the
        authors' code, except for these: the maximum in v', which is the paper's as cited by others,
        where the code drops the entry; epsilon inside the root, which is a switch there; weights by
        count, where every batch weighs the same there; biased variances, where the running ones and
        those that normalize during burn-in are divided by n - 1 there. Their scale starts uniform
        in [0, 1), ours at 1: `scale_init=jax.nn.initializers.uniform(1.0)` in the layers is theirs.
        CmBN: AlexeyAB's darknet.
    """

    window: Count = 3
    rho: float = 1.0
    momentum: float = 0.9
    epsilon: float = 1e-5

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        # Devices also add up derivatives by the kernel in front, as many as it has numbers.
        return (Sets(batch_norm().shape(x_shape, **axes), None),)

    def _init(self, x_shape: Shape, options: InitOptions) -> State:
        shape = tuple(options.get("kernel_shape", ()))
        groups, channels = options.get("feature_group_count", 1), channels_of(x_shape, options)
        if len(shape) < 2 or groups < 1 or shape[-1] != channels or channels % groups:
            raise ValueError(
                f"Got a kernel_shape of {shape} and a feature_group_count of {groups} for x of "
                f"shape {x_shape}. Expected the shape of the kernel in front, (..., inputs of a "
                "group, C), and the number of groups of its inputs, which are groups that divide "
                "C; a layer knows them by Norm(method, layer=...)."
            )
        past = {
            "count": (),
            "mean": shape[-1:],
            "var": shape[-1:],
            "patch": (*shape[:-1], groups),
            "slope": shape,
        }
        return first_running(shape[-1:]) | {
            f"past_{name}": jnp.zeros((self.window, *t), jnp.float32) for name, t in past.items()
        }

    def describe_front(self, x_shape: Shape, options: Mapping[str, Any]) -> dict[str, Any]:
        inputs, kernel = (jnp.shape(options[name]) for name in ("inputs", "kernel"))
        channels = inputs[options["channel_axis"]]
        groups, rest = divmod(channels, math.prod(kernel[-2:-1]))
        # There are no groups of such inputs, which init refuses.
        return {"kernel_shape": kernel, "feature_group_count": 0 if rest else groups}

    def in_front(  # type: ignore[override]  # the hook that layers call
        self, inputs: jax.Array, kernel: jax.Array, layer: Linear
    ) -> InFront:
        """The output of the layer in front, and what `apply` takes of it."""
        return layer(inputs, kernel), {"inputs": inputs, "kernel": kernel, "layer": layer}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        inputs: ArrayLike,
        kernel: ArrayLike,
        window: NotNegative,
        rho: Share,
        momentum: ArrayLike,
        layer: Linear = jnp.matmul,
        **options: Unpack[Options],
    ) -> Result:
        inputs, kernel = inexact(inputs), inexact(kernel)
        channel, weights = options["channel_axis"], options.get("weights")
        if weights is not None and as_weights(weights, x).shape[channel] != 1:
            raise ValueError(
                f"weights of shape {jnp.shape(weights)} differ between the channels of y, shape "
                f"{x.shape}. Expected size 1 on axis {channel}: all channels of cross-iteration "
                "statistics have the same input patches."
            )
        if not train:
            return applied(x, recalled(state, x, options), self.epsilon, **options), state
        present = measured(x, batch_norm(), **options)
        past = carried_over(state, lax.stop_gradient(kernel), window, rho, x, options)
        union = pool(
            jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), present, past),
            (1, *present.mean.shape),
        )
        z = applied(x, jax.tree.map(lambda t: t[0], union), self.epsilon, **options)

        patch, slope = derivatives(
            *lax.stop_gradient((own_and_wide(x)[0], inputs, kernel, present)),
            layer,
            state["past_patch"].shape[-1],
            options,
        )
        entry = {
            "count": present.count.reshape(-1)[0],
            "mean": present.mean,
            "var": present.var,
            "patch": patch,
            "slope": slope,
        }
        finite = usable(present).all() & jnp.isfinite(patch).all() & jnp.isfinite(slope).all()
        new = averages(state, present, momentum)
        for name, value in entry.items():
            new[f"past_{name}"] = pushed(state[f"past_{name}"], value, finite)
        return z, new
