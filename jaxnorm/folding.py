"""A norm with running statistics folded into the convolution or dense layer before it.

At inference such a norm multiplies and shifts each channel by constants, which the linear layer
before it can do itself. What follows what is read from the traced program: a layer's output and a
norm's input carry marks, and a pair is a marked output whose one and only use is a marked input.
The layer's parameters must have no other use either.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.blocks import spread
from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.moments import Moments, check_moments


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
    if not fits(running.mean.shape, channels):
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


def fits(shape: Shape, channels: int) -> bool:
    """Whether running statistics of this shape are those of channels or of groups of channels:
    others depend on the position, which a kernel cannot."""
    return len(shape) == 1 and channels % max(shape[0], 1) == 0


LAYER, NORM = "jaxnorm.folding layer ", "jaxnorm.folding norm "


def mark(t: jax.Array, kind: str, name: str) -> jax.Array:
    """t, recognizable in a traced program."""
    return checkpoint_name(t, kind + name)


def pairs(program: Any) -> dict[str, str]:
    """Norm -> layer, where the norm's input is the layer's output and nothing else uses that
    output.

    A layer or norm that is called more than once has no pair.
    """
    found, marks = [], Counter()
    for jaxpr in _programs(program.jaxpr):
        uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val"))
        uses.update(v for v in jaxpr.outvars if not hasattr(v, "val"))
        made = {}
        for eqn in jaxpr.eqns:
            name = _marked(eqn)
            marks[name] += 1
            if name.startswith(LAYER):
                made[eqn.outvars[0]] = name
            elif name.startswith(NORM) and eqn.invars[0] in made and uses[eqn.invars[0]] == 1:
                found.append((name, made[eqn.invars[0]]))
    return {n[len(NORM) :]: k[len(LAYER) :] for n, k in found if marks[n] == marks[k] == 1}


def uses(program: Any) -> list[int]:
    """How many operations and outputs take each input of a program, nested ones included."""
    return [_uses(program.jaxpr, v) for v in program.jaxpr.invars]


def _uses(jaxpr: Any, variable: Any) -> int:
    count = sum(v is variable for v in jaxpr.outvars)
    for eqn in jaxpr.eqns:
        inner = [p for p in _inner(eqn) if len(p.invars) == len(eqn.invars)]
        for i in (i for i, v in enumerate(eqn.invars) if v is variable):
            # Which argument becomes which is only sure where there is one inner program with as
            # many: jit, checkpoint, scan.
            count += (
                _uses(inner[0], inner[0].invars[i])
                if len(inner) == 1 == len(_inner(eqn))
                else 1 + len(_inner(eqn))
            )
    return count


def _marked(eqn: Any) -> str:
    return str(eqn.params["name"]) if eqn.primitive.name == "name" else ""


def _programs(jaxpr: Any) -> Iterator[Any]:
    """A program and those inside of its operations, once for every time they run."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            yield from _programs(inner)


def _inner(eqn: Any) -> list[Any]:
    """The programs inside of an operation."""
    values = [
        t
        for value in eqn.params.values()
        for t in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [t for t in (getattr(value, "jaxpr", value) for value in values) if hasattr(t, "eqns")]
