"""A method is a value: hyperparameters, and pure functions of x and of what the method remembers.

state = method.init(x.shape)
y, state = method.apply(x, state, train=True, scale=scale, bias=bias)
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape, axes_of, single_axis
from jaxnorm._core.checks import check_flag
from jaxnorm._core.meshes import in_explicit_meshes
from jaxnorm._core.moments import Moments, inexact
from jaxnorm._core.shared import shared
from jaxnorm.methods._fields import check_fields, check_names, check_value, typed
from jaxnorm.methods._options import (
    AXES,
    Axes,
    InitOptions,
    Options,
    Sets,
    channels_of,
    options_of,
)
from jaxnorm.methods._state import check_state

State = dict[str, jax.Array]
Result = tuple[jax.Array, State]
"""y, and the new state."""
Parameters = dict[str, np.ndarray]
InFront = tuple[jax.Array, dict[str, Any]]
"""x, as the layer in front makes it, and the options of `apply` that describe this layer."""


class Method(abc.ABC):
    """A normalization with its hyperparameters: `init` makes what it remembers, `apply` normalizes.

    Methods are frozen dataclasses of numbers, strings and other methods. They compare and hash by
    their fields, print as they are typed, and are static under `jax.jit`. What a step changes or
    traces, such as a schedule's value, is an option of `apply` and takes precedence there over the
    field of the same name.

    A method of your own is a frozen dataclass that subclasses this one and defines `rule`; if it
    remembers or learns something it also defines `first_state` or `parameters`. Of the options that
    every method takes, `methods.measured` and `methods.applied` pick those of theirs.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import Moments, methods
        >>> @dataclasses.dataclass(frozen=True)
        ... class Floored(Method):
        ...     epsilon: float = 1e-5
        ...
        ...     def rule(self, x, state, *, train, floor=1.0, **options):
        ...         m = methods.measured(x, methods.layer_norm(), **options)
        ...         m = Moments(m.count, m.mean, jnp.maximum(m.var, floor))
        ...         return methods.applied(x, m, self.epsilon, **options), state
        >>> x = jnp.array([[1.0, 3.0]])
        >>> y, _ = Floored(epsilon=0.0).apply(x, {}, train=True, floor=4.0, bias=jnp.ones(2))
        >>> y.tolist()
        [[0.5, 1.5]]
    """

    takes_complex: ClassVar[bool] = False
    """Whether x may be complex."""

    also_in_state: ClassVar[tuple[str, ...]] = ()
    """Names that state may have besides those that `init` gives it."""

    overwritten_by_gradient: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that a training step replaces by their gradient."""

    reads_shared: ClassVar[bool] = False
    """Whether `rule` takes x of half precision as `Shared`, which `as_value` says."""

    in_front: ClassVar[Callable[..., InFront] | None] = None
    """Where a method works on the layer in front of it, `in_front(inputs, kernel, layer)`: x, and
    the options of `apply` that describe the layer. `layer(inputs, kernel)` applies it."""

    observe: ClassVar[Callable[..., State] | None] = None
    """Where a method has more to say about x, `observe(x, state, ...)`: arrays by name, which
    layers offer to store."""

    statistics: ClassVar[tuple["Method", ...]] = ()
    """The rows of the table whose statistics a rule takes in training."""

    def __post_init__(self):
        check_fields(self, options_of(type(self).rule))

    def __repr__(self) -> str:
        """As it is typed; fields with their default are left out."""
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) != field.default:
                name = "" if field.default is dataclasses.MISSING else f"{field.name}="
                parts.append(name + typed(value))
        return f"{type(self).__name__}({', '.join(parts)})"

    @abc.abstractmethod
    def rule(self, x: jax.Array, state: State, *, train: bool, **options: Any) -> Result:
        """What `apply` does once its arguments are checked.

        Its keyword arguments beside `train` are the options of this method. Options that are not
        given are the fields of the same names, or the initial values of the parameters. `state` has
        the names and shapes that `init` gives it for x.
        """

    def apply(self, x: ArrayLike, state: State, *, train: bool, **options: Any) -> Result:
        """Normalize x.

        Args:
            x: floating array with examples and channels; complex for rows of the table alone.
            state: as `init` makes it, or as the step before returned it.
            train: use the batch and update the state, or use the state.
            **options: as `norm`: scale, bias, weights, activation, dtype, axis_name,
                axis_index_groups, batch_axis, channel_axis; and those of the method, which its
                docstring lists, with what it learns by the names of `parameters`.

        Returns:
            y, of x's shape, and the new state. A batch with empty or non-finite sets leaves the
            state of these sets unchanged.

        Raises:
            TypeError: an option of another name or one that is missing, x of another dtype.
            ValueError: state of another method or size, parameters of another shape.
        """
        return _apply(self, x, state, train=train, **options)

    def init(self, x_shape: Sequence[int], **options: Unpack[InitOptions]) -> State:
        """State before the first step.

        Args:
            x_shape: shape of x; any number of examples.
            **options: `batch_axis` and `channel_axis`, 0 and -1 by default; `dtype` of the mean,
                for rows of the table: complex for complex x; `kernel_shape` and
                `feature_group_count` of the layer in front, for methods that need to know it.

        Returns:
            Arrays by name, float32; {} where nothing is remembered.
        """
        check_names(options, InitOptions.__annotations__, "init")
        if hasattr(x_shape, "shape"):
            raise TypeError("init takes the shape of x. Got an array; expected x.shape.")
        x_shape = tuple(x_shape)
        return self.for_channels(channels_of(x_shape, options))._init(x_shape, options)

    def _init(self, x_shape: Shape, options: InitOptions) -> State:
        return self.first_state(channels_of(x_shape, options))

    def first_state(self, num_channels: int) -> State:
        """State before the first step, where it depends on the number of channels alone."""
        return {}

    def parameters(self, num_channels: int) -> Parameters:
        """What the method learns beside scale and bias: initial values by name, float32."""
        return {}

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of `apply` that not every method has."""
        return tuple(options_of(type(self).rule))

    def for_channels(self, num_channels: int) -> "Method":
        """The method that it is for so many channels: itself, or a row of the table."""
        return self

    def describe_front(self, x_shape: Shape, options: Mapping[str, Any]) -> dict[str, Any]:
        """The layer in front, where options of `apply` say it, as `init` takes it."""
        return {}

    def row(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> Any:
        """The row of the table that the method is for x of this shape.

        Raises:
            TypeError: the method has a rule of its own.
        """
        raise TypeError(
            f"{self} has a rule of its own: it is more than statistics of x and their use. Got it "
            "where a row of the table is expected, such as methods.group_norm(32); call its apply."
        )

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        """What shares statistics in training, for x of this shape; () where that is not known."""
        return tuple(sets for row in self.statistics for sets in row.sets(x_shape, **axes))

    @property
    def activates(self) -> bool:
        """Whether it is the activation as well, or has to be given the one that follows."""
        return False

    def any_batch(self) -> "Method":
        """The method for batches of any size, as a layer is initialized with."""
        return self

    @property
    def any_arrangement(self) -> bool:
        """Whether state may hold its numbers in arrays of other shapes than `init` makes."""
        return False

    def keeps_positions(self, num_channels: int) -> bool:
        """Whether state belongs to one image size, so that `init` needs to know it."""
        return False

    def inference_moments(
        self, state: State, x_shape: Sequence[int], **axes: Unpack[Axes]
    ) -> Moments | None:
        """The moments with which inference normalizes every x of this shape alike, or None."""
        return None


@in_explicit_meshes
def _apply(method: Method, x: Any, state: State, *, train: bool, **options: Any) -> Result:
    x, options = inexact(x), AXES | options
    features = axes_of(options["channel_axis"], x.shape)
    num_channels = math.prod(x.shape[i] for i in features)
    method = method.for_channels(num_channels)
    name, own = type(method).__name__, options_of(type(method).rule)
    check_flag(train, "train")
    check_names(options, [*own, *Options.__annotations__], name)
    if options.get("momentum") is not None and not state:
        raise ValueError(
            f"momentum={options['momentum']} was given, and there is no state to average. Got "
            f"{method}; expected no momentum, or the state that its init makes."
        )
    if options.get("example_weight") is not None and (train or not state):
        raise ValueError(
            f"example_weight={options['example_weight']} weighs an example against running "
            f"statistics. Got train={train} for {method}; expected train=False, and a method that "
            "shares statistics between examples, with a momentum."
        )
    if not method.takes_complex and jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} is defined for real x. Got {x.dtype}, shape {x.shape}; rows of the table take "
            "complex x."
        )
    batch = single_axis(options["batch_axis"], x.shape)
    channel = features[0] if len(features) == 1 else features
    if features == (batch,) and not method.takes_complex:
        raise ValueError(
            f"batch_axis and channel_axis are both axis {batch} of x, which has shape {x.shape}. "
            "Expected two different axes; x needs a rank of 2 or more."
        )
    learned = method.parameters(num_channels)
    defaults = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    defaults |= {n: t for n, t in learned.items() if n not in method.overwritten_by_gradient}
    defaults["dtype"] = x.dtype
    absent = (n for n in (*own, "dtype") if n in defaults and options.get(n) is None)
    options |= {n: defaults[n] for n in absent}
    options |= {"batch_axis": batch, "channel_axis": channel}
    if missing := [n for n, o in own.items() if o.default is o.empty and n not in options]:
        raise TypeError(f"{name} needs {', '.join(missing)}; got {', '.join(sorted(options))}.")
    for option, parameter in own.items():
        check_value(options.get(option), parameter.annotation, option)
    front = method.describe_front(x.shape, options)
    check_state(method, state, x.shape, batch_axis=batch, channel_axis=features[-1], **front)
    state = state if isinstance(state, dict) else dict(state)
    x = shared(x) if method.reads_shared else x
    return method.rule(x, state, train=train, **options)
