"""What the linen and the nnx layers share: one call of a method, with the state that a layer holds.

A layer holds parameters and state; everything it computes is the `apply` of its method.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm import folding, methods
from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, axes_of
from jaxnorm._core.checks import check_flag, known
from jaxnorm._core.moments import Moments, as_array, check_moments
from jaxnorm._core.state import serves_channels
from jaxnorm._flax_rules import wide_enough
from jaxnorm.methods import Method, Row
from jaxnorm.methods._fields import check_names
from jaxnorm.methods._method import State, options_of
from jaxnorm.methods._row import as_method
from jaxnorm.positional import scale_and_shift

Activation = Callable[[jax.Array], jax.Array]


class CallOptions(TypedDict, total=False):
    """What every layer takes at the call beside its mask.

    These are `scale` and `bias` in place of its own, also one for each example, and an activation
    that is applied to the output and recomputed in the backward pass.
    """

    scale: ArrayLike | None
    bias: ArrayLike | None
    activation: Activation | None


OF_LAYERS = ("mask", "update_running_average", *CallOptions.__annotations__)
"""What every layer takes at the call; the rest are options of its method."""
IN_FRONT = ("inputs", "kernel", "layer")
"""What a method that looks at the layer in front takes; its layer gives it."""


def check_call(method: Method, options: Mapping[str, Any], learned: Mapping[str, Any]) -> None:
    """What a layer was called with beside its own arguments are options of its method."""
    own = [name for name in method.options if name not in {*learned, *IN_FRONT}]
    check_names(options, [*OF_LAYERS, *own], f"a layer with {method}")


def initializers(
    method: Method, inits: Mapping[str, Any], num_channels: int
) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Name, first value and initializer of what a method learns.

    The initializer is None for what a training step replaces by its gradient.
    """
    first = method.parameters(num_channels)
    learned = [name for name in first if name not in method.overwritten_by_gradient]
    if unknown := sorted(set(inits) - set(learned)):
        raise ValueError(
            f"inits has {', '.join(unknown)}, which {method} does not learn. Expected some of "
            f"{', '.join(learned) or 'nothing'}; scale and bias have scale_init and bias_init."
        )
    for name, value in first.items():
        default = lambda _, shape, dtype, value=value: jnp.asarray(value, dtype)  # noqa: E731
        yield name, value, inits.get(name, default) if name in learned else None


def own_or_given(name: str, own: jax.Array | None, given: ArrayLike | None) -> jax.Array | None:
    """The layer's own scale or bias, or what was given in its place at the call."""
    if given is None:
        return own
    if own is not None:
        raise ValueError(
            f"{name} was given at the call, but the layer has its own. Expected one of the two: "
            f"construct it with use_{name}=False."
        )
    return jnp.asarray(given)


def check_works_on_layers(method: Method, layer: Any) -> None:
    """A layer in front is given for a method that works on it, and has its outputs last."""
    if getattr(layer, "transpose_kernel", False):
        raise ValueError(
            f"the kernel of {type(layer).__name__}(transpose_kernel=True) has its outputs not "
            "last. Expected a layer whose kernel has them there."
        )
    if method.in_front is None:
        raise ValueError(
            f"layer=... was given for {method}, which does nothing with the layer in front of it. "
            "Expected cross_iteration_norm or moving_average_norm; call the layer yourself."
        )


def whether_to_update(use: bool, given: bool | None) -> bool:
    """Whether this call updates the state: as it was asked, or where the state is not used."""
    return not use if given is None else check_flag(given, "update_running_average")


def run(
    layer: Any,
    method: Method,
    x: jax.Array,
    state: State,
    use: bool,
    update: bool,
    /,  # a method may have options of these names
    *,
    dtype: Any,
    mask: ArrayLike | None = None,
    **options: Any,
) -> tuple[jax.Array, State]:
    """One call of a layer's method: y, and the new state where it is to be updated."""
    options |= {"weights": mask, "dtype": dtype, "batch_axis": getattr(layer, "batch_axis", 0)}
    x = wide_enough(x, dtype)
    if not update:  # half precision matters where an average is stored, and warns
        y, _ = method.apply(x, jax.tree.map(_wide, state), train=not use, **options)
        return y, state
    y, new = method.apply(x, state, train=not use, **options)
    if use:
        options.pop("example_weight", None)
        new = method.apply(x, state, train=True, **options)[1]
    return y, new


def named_axes(layer: Any) -> dict[str, Any]:
    """Where a layer synchronizes its statistics."""
    return {name: getattr(layer, name) for name in ("axis_name", "axis_index_groups")}


def _wide(t: jax.Array) -> jax.Array:
    return t.astype(statistic_dtype(t.dtype)) if jnp.issubdtype(t.dtype, jnp.inexact) else t


def observations(
    layer: Any,
    method: Method,
    x: jax.Array,
    state: State,
    options: dict[str, Any],
    mask: ArrayLike | None,
) -> dict[str, jax.Array]:
    """What the method of a layer has to say about x beside y."""
    if method.observe is None:
        return {}
    own = {name: options[name] for name in options_of(type(method).observe) if name in options}
    axes = {"batch_axis": layer.batch_axis, "channel_axis": layer.channel_axis}
    return method.observe(wide_enough(x, jnp.float32), state, weights=mask, **axes, **own)


def flax_row(
    shape: Shape,
    layer: Any,
    *,
    mean: Any = None,
    momentum: float | None = None,
) -> Row:
    """The row of one of Flax's own norms, for x whose statistic has this shape."""
    epsilon = known(layer.epsilon)  # Flax takes an array of one number as well
    return Row(
        shape,
        mean=mean,
        epsilon=layer.epsilon if epsilon is None or epsilon.ndim else epsilon.item(),
        momentum=momentum,
        correction=getattr(layer, "correction", 0),
        two_pass=mean is None and not layer.use_fast_variance,
    )


def check_weighs_examples(method: Method, example_weight: ArrayLike | None) -> None:
    """An example is weighed against moments, which rows of the table have.

    A state of another kind has no rule for it.
    """
    if example_weight is not None and "example_weight" not in method.options:
        raise ValueError(
            f"example_weight={example_weight} for {method}, which is no row of the table of "
            "methods. Expected BatchNorm, Norm of a row, or a model in which other layers do not "
            "use running statistics."
        )


def in_front(
    method: Method, inputs: jax.Array, kernel: jax.Array, layer: Callable[..., Any], axis: int
) -> tuple[jax.Array, dict[str, Any]]:
    """What a method makes of a layer, of (inputs, kernel): its x, and the options of `apply`.

    The outputs of the layer, the last axis, are the channels of the normalization.
    """
    x, options = method.in_front(inputs, kernel, layer)  # type: ignore[misc]
    if axes_of(axis, x.shape) != (x.ndim - 1,) or x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"the layer in front, with a kernel of shape {kernel.shape}, makes x of shape "
            f"{x.shape}, and channel_axis is {axis}. Expected its outputs, the last axis, to be "
            "the channels."
        )
    return x, options


def _moments_to_fold(norm: Any, values: State, x_shape: Shape) -> Moments | None:
    """The moments with which inference normalizes each channel, (C,) or (G,).

    Channels are last. None where the moments depend on x or on the position.
    """
    m = _method(norm).inference_moments(values, x_shape)
    if (
        m is None
        or m.mean.size != m.mean.shape[-1]
        or not serves_channels(m.mean.shape[-1:], x_shape[-1])
    ):
        return None
    return jax.tree.map(lambda t: jnp.reshape(t, -1), Moments(None, m.mean, m.var))  # type: ignore[arg-type]


def _method(norm: Any) -> Method:
    """The method of a norm, Flax's own among them."""
    if hasattr(norm, "method"):
        return as_method(norm.method)
    return methods.batch_norm(epsilon=norm.epsilon)


def is_constant(
    norm: Any,
    values: State,
    x: jax.Array,
    use_running_average: bool | None = None,
    **options: Any,
) -> bool:
    """Whether a norm, called so, multiplies and shifts each channel, the last axis, by constants.

    Args:
        norm: of Flax or ours, with running statistics.
        values: its variables.
        x: what it is called with, as the others.
    """
    use = norm.use_running_average if use_running_average is None else use_running_average
    for name in ("update_running_average", "example_weight"):  # nnx.view sets them in the layer
        if options.get(name) is None:
            options[name] = getattr(norm, name, None)
    given = {name for name, value in options.items() if value is not None and value is not False}
    axis = norm.channel_axis if hasattr(norm, "channel_axis") else norm.axis
    return (
        bool(use)
        and given <= {"activation"}
        and axes_of(axis, x.shape) == (x.ndim - 1,)
        and getattr(norm, "batch_axis", 0) == 0  # as of the layer in front
        and _moments_to_fold(norm, values, x.shape) is not None
    )


def of_outputs(names: Iterable[Any], layer: Any, kernel: jax.Array) -> tuple[Any]:
    """Of names of a kernel's axes, which may be fewer, that of the outputs."""
    return (dict(enumerate(names)).get(_output_axis(layer) % kernel.ndim),)


def _output_axis(layer: Any) -> int:
    return -2 if getattr(layer, "transpose_kernel", False) else -1


def fold(
    layer: Any, norm: Any, of_layer: State, of_norm: State, x_shape: Shape
) -> tuple[jax.Array, jax.Array]:
    """Kernel and bias of a layer that does what it and a norm do, from the variables of both."""
    scale = of_norm.get("scale")
    return folding.fold(
        of_layer["kernel"],
        of_layer.get("bias"),
        _moments_to_fold(norm, of_norm, x_shape),  # type: ignore[arg-type]  # as is_constant said
        scale=scale if scale is None or not getattr(norm, "unit_offset", False) else scale + 1,
        shift=of_norm.get("bias"),
        epsilon=getattr(_method(norm), "epsilon", 0.0),
        output_axis=_output_axis(layer),
    )


def dynamic_shortcut(
    layer: Any, x: ArrayLike, m: Moments, network: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`scale_and_shift` by the two halves of the channels that a network makes of moments.

    It reads mean and standard deviation as two channels. Its channels are last. Where the layer is
    `residual`, they are added to the moments.
    """
    check_moments(m, "m")
    axis, std = layer.channel_axis, jnp.sqrt(m.var + layer.epsilon)
    read = jnp.concatenate([jnp.moveaxis(t, axis, -1) for t in (m.mean, std)], axis=-1)
    scale, shift = (jnp.moveaxis(t, -1, axis) for t in jnp.split(network(read), 2, axis=-1))
    if layer.residual:
        scale, shift = std + scale.astype(std.dtype), m.mean + shift.astype(m.mean.dtype)
    return scale_and_shift(as_array(x), scale, shift, channel_axis=axis)
