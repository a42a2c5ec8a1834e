"""Moving Average Batch Normalization: the statistic and its gradient, averaged over steps.

No mean is subtracted.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxnorm._core.devices import AxisName, device_count, device_groups_of, names_of, varying_like
from jaxnorm._core.moments import Moments
from jaxnorm._core.running import usable
from jaxnorm._core.shared import own_and_wide
from jaxnorm.kernels import centralize_kernel
from jaxnorm.methods._fields import Count, NotNegative, OneOrMore, as_value
from jaxnorm.methods._frame import along_channels, applied, averages, measured, pushed
from jaxnorm.methods._method import InFront, Method, Options, Parameters, Result, State
from jaxnorm.methods._row import Row
from jaxnorm.methods._table import batch_norm


@as_value
class moving_average_norm(Method):
    """Division by the root of a mean square that is averaged over the last K batches.

    It is averaged forward and backward:

        v = mean over K of mean(x^2),    z = x / sqrt(v + epsilon),    y = r z * scale + bias
        r = clip(sqrt((v + epsilon) / (running + epsilon)), 1 / rmax, rmax)
        running <- momentum running + (1 - momentum) v
        g = dL/dz,    psi = mean(g z),    Psi = mean over K of psi
        dL/dx = (g - z Psi) / sqrt(v + epsilon)

    with r of the running mean square before this step, and constant. In inference

        y = x / sqrt(running + epsilon) * scale + bias

    The first steps, in which the batches before count little, use v = mean(x^2), Psi = psi, and r =
    1. With K = 1 and r = 1 gradients are the derivative of y; else they are not, on purpose: the
    past batches' psi enter also where the cotangent is 0. Nothing subtracts the mean: the
    convolution in front takes `kernels.centralize_kernel` of its kernel.

    The backward pass cannot write state. It returns psi as the gradient by `tap`, and the next step
    takes that as its tap:

        (loss, state), (gradient, tap) = jax.value_and_grad(f, (0, 1), has_aux=True)(parameters,
        tap, state)

    So a tap is replaced by its gradient, not optimized. It must have the scale of the gradients in
    the backward pass: keep it out of clipping, multiply it by the ratio of the scales when loss
    scaling changes, and give each call a tap of its own.

    Devices: with `axis_name` the gradient by x is that of the whole batch wherever `jax.grad`
    stands, and that by the tap is psi once it is summed over the devices. It is the sum already
    under jit with sharded arrays, where `jax.grad` stands outside of the map and all devices share
    the tap, and inside of a shard_map with check_vma=True that takes a tap equal on all devices.
    Else, inside of pmap, vmap or shard_map with check_vma=False and where each device has a tap of
    its own, it is one device's part: take its sum (also where other gradients are averaged).
    Without `axis_name` state and tap are a device's own.

    Args:
        window: K, batches over which to average: the batch size that one would like over the one
            that there is.
        average_from: number of the first step, from 1, that averages over the K batches, if K have
            been seen before it.
        correct_from: number of the first step that is corrected by r.
        rmax: bound of r, 1 or more.
        momentum: weight of the old running mean square per update.
        epsilon: added to the mean square, in the unit of x squared.

    State: `mean_square`, (C,), of inference; `past_mean_square` and `past_gradient`, (K, C), newest
    first; `step`, batches that some channel could use. A batch with empty or non-finite sets leaves
    those channels' statistics. A channel with fewer than K of its own by the time of averaging has
    zeros in its window, which are averaged in, so that its mean square is too small until they are
    pushed out.

    Options of apply:
        tap: in training, (C,): the gradient by it in the step before; zeros at first.
        average_from, correct_from, rmax, momentum: in place of the fields.

    Raises:
        TypeError: forward-mode derivatives: JAX's error that a custom_vjp function has none.
        ValueError: a window below 1, training without a tap, an rmax below 1 or a negative step.

    Example: three steps of a dense layer's training.
        >>> from jaxnorm.kernels import centralize_kernel
        >>> method = moving_average_norm(window=2)
        >>> def loss(kernel, tap, state, x):
        ...     y, state = method.apply(x @ centralize_kernel(kernel), state, train=True, tap=tap)
        ...     return jnp.square(y - 1).mean(), state
        >>> step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        >>> kernel, tap, state = jnp.array([[1.0], [0.0]]), jnp.zeros(1), method.init((2, 1))
        >>> for x in (jnp.array([[2.0, 1.0], [1.0, 0.0]]),) * 3:
        ...     (_, state), (gradient, tap) = step(kernel, tap, state, x)
        ...     kernel = kernel - 0.1 * gradient
        >>> int(state["step"]), tap.shape
        (3, (1,))

    Reference:
        Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization, 2020,
        arXiv:2001.06838. The definition and the defaults were read in the authors' code, in the
        layer that they release for use and train detection with. Their ImageNet recipe has another
        layer, which simulates small batches in a large one: it cuts that into K pairs of examples,
        and each pair averages over itself and the K - 1 pairs before it. In step 1, which fills the
        window, each pair stands alone, and the running mean square becomes theirs; it averages from
        step 2 on and corrects from step 100 on. `average_from=1` and `correct_from=100` come
        closest: averages as soon as the window is full, of batches.
    """

    statistics = (Row(batch_norm().groups, mean=0),)

    overwritten_by_gradient = ("tap",)

    window: Count = 16
    average_from: int = 100
    correct_from: int = 1001
    rmax: float = 5.0
    momentum: float = 0.98
    epsilon: float = 1e-5

    def first_state(self, num_channels: int) -> State:
        past = jnp.zeros((self.window, num_channels), jnp.float32)
        return {
            "mean_square": jnp.ones(num_channels, jnp.float32),
            "past_mean_square": past,
            "past_gradient": past,
            "step": jnp.zeros((), jnp.float32),
        }

    def parameters(self, num_channels: int) -> Parameters:
        return {"tap": np.zeros(num_channels, np.float32)}

    def in_front(  # type: ignore[override]  # the hook that layers call
        self, inputs: jax.Array, kernel: jax.Array, layer: Any
    ) -> InFront:
        """The output of the layer in front with a kernel that leaves no mean."""
        return layer(inputs, centralize_kernel(kernel)), {}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        average_from: NotNegative,
        correct_from: NotNegative,
        rmax: OneOrMore,
        momentum: ArrayLike,
        tap: ArrayLike | None = None,
        **options: Unpack[Options],
    ) -> Result:
        running = along_channels(state["mean_square"], x, options)
        if not train:
            used = Moments(jnp.ones_like(running), jnp.zeros_like(running), running)
            return applied(x, used, self.epsilon, **options), state
        given, expected = None if tap is None else jnp.shape(tap), state["mean_square"].shape
        if given != expected:
            raise ValueError(
                f"tap has shape {given}. Expected {expected}, one number a channel: zeros in the "
                "first step, then the gradient by the tap in the step before."
            )
        tap = jnp.asarray(tap)
        m = measured(x, Row(batch_norm().groups, mean=0), **options)
        keep = usable(m)
        squares = pushed(state["past_mean_square"], m.var, keep.reshape(1, -1))
        gradients = pushed(state["past_gradient"], tap, jnp.isfinite(tap)[None])
        step = state["step"] + keep.any().astype(state["step"].dtype)
        average_from, correct_from = (
            jnp.asarray(t, step.dtype) for t in (average_from, correct_from)
        )
        averaging = (step > self.window) & (step >= average_from)

        square = jnp.where(
            averaging, along_channels(squares, x, options).mean(0), lax.stop_gradient(m.var)
        )
        var, rmax = square + self.epsilon, jnp.asarray(rmax, square.dtype)
        r = jnp.where(
            step < correct_from,
            1,
            jnp.clip(jnp.sqrt(var / (running + self.epsilon)), 1 / rmax, rmax),
        )
        past = jnp.where(averaging, along_channels(gradients[:-1].sum(0), x, options), 0)
        share = jnp.where(averaging, jnp.asarray(1 / self.window, var.dtype), 1)
        count = jnp.where(m.count > 0, m.count, 1)
        axis_name, groups = options.get("axis_name"), options.get("axis_index_groups")
        parts = device_count(axis_name, device_groups_of(axis_name, groups))
        tap = along_channels(tap, x, options)
        # In one array: their gradients are summed over devices, if at all, in one round.
        like, _ = own_and_wide(x)
        square_and_tap, var = (
            _own(varying_like(t, like), axis_name) for t in (jnp.stack([m.var, tap]), var)
        )
        divided: jax.Array = _corrected(
            square_and_tap, var / jnp.square(r), var, past / parts, share, count
        )
        y = applied(
            x, Moments(m.count, jnp.zeros_like(running), divided), 0.0, centered=False, **options
        )
        new = averages(state, m, momentum, mean_square=square)
        new |= {"past_mean_square": squares, "past_gradient": gradients}
        return y, new | {"step": lax.stop_gradient(step)}


def _own(t: jax.Array, axis_name: AxisName) -> jax.Array:
    """t, which is equal on all devices, as a value of each device's own.

    So the gradient by it is one device's part wherever `jax.grad` stands: outside of
    `vmap(axis_name=...)` that by a value which JAX knows to be equal has been summed already.
    """
    for name in names_of(axis_name):
        t = jnp.where(lax.axis_index(name) >= 0, t, 0)
    return t


@jax.custom_vjp
def _corrected(square_and_tap: jax.Array, divided: jax.Array, *kept: jax.Array) -> jax.Array:
    """What x is divided by, squared: `divided`, where kept are var, past, share and count.

    Backward, the gradient by the mean square is that of the window.

    All are a device's own, `past` its part of the sum of the past psi: on the way to x the gradient
    by the mean square is summed over devices.

    With y = x / sqrt(d) scale + bias and d = var / r^2, the gradient by d is -count psi / (2 d),
    from which psi comes. To subtract z Psi / sqrt(var) = x Psi / var from dL/dx, the gradient by
    mean(x^2) has to be -count Psi / (2 var).
    """
    return divided


def _corrected_backward(kept, gradient):
    divided, var, past, share, count = kept
    psi = -2 * divided * gradient / count
    by_square = -count * (past + psi) * share / (2 * var)
    return jnp.stack([by_square, psi]), None, None, None, None, None


_corrected.defvjp(lambda _, *kept: (kept[0], kept), _corrected_backward)
