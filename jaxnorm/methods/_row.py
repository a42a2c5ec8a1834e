"""A row of the table: the method whose rule is empty."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape
from jaxnorm._core.checks import check_number
from jaxnorm._core.ghosts import GhostUpdate, check_ghost_update
from jaxnorm._core.groups import EACH, Groups, Size, Split, check_mean, resolve
from jaxnorm._core.moments import Moments
from jaxnorm._core.state import pooled_to, running_moments, running_shape, serving
from jaxnorm._population import POPULATION
from jaxnorm.inference import weigh_example
from jaxnorm.methods._fields import as_value
from jaxnorm.methods._frame import (
    applied,
    axes_in,
    first_running,
    measured,
    per_device,
    pooled,
    running_in,
    taken_by,
    updated,
)
from jaxnorm.methods._method import Axes, InitOptions, Method, Options, Result, State
from jaxnorm.methods._options import Sets


class RowFields(TypedDict, total=False):
    """Fields of a row beside its sets, see `Row`."""

    epsilon: float
    momentum: float | None
    correction: int
    ghost_update: GhostUpdate
    debias: bool
    example_weight: float | Literal["share"]
    two_pass: bool


@as_value
class Row(Method):
    """A row of the table of methods: how axes are split, and what is remembered for inference.

        y = (x - mean_S) / sqrt(var_S + epsilon) * scale + bias

    with S the sets that `groups` describes. Where examples share statistics, training normalizes
    with those of the batch and inference with running ones.

    Args:
        groups: the split of each axis; or the statistic's shape, for x of one shape.
        mean: None standardizes with the mean of the set; 0 fixes the mean at zero (root mean
            square).
        epsilon: added to the variance, in the unit of x squared.
        momentum: weight of the old running statistics per update, 0 to 1; None remembers none and
            always uses the batch's.
        correction: 1 stores the unbiased variance, as PyTorch does; real weights must then count
            elements, see `update_running`.
        ghost_update: how several ghost batches enter the running statistics, see `update_running`.
        debias: divide the initial 0 and 1 out of the running statistics; adds `count` to the state.
        running: the sets of the running statistics, where they are finer than `groups`.
        example_weight: of each example's own statistics at inference, see
            `inference.weigh_example`; 0 uses the running ones alone. "share" is what an example has
            of its set in training, 1 / n where the batch is split into groups of n examples.
        two_pass: sum about the mean of a pass of its own always, and not only where rounding would
            show.

    State: `mean` and `var`, (C,) for batch norm and (G,) for batch group norm; {} where examples do
    not share statistics. The new state has a derivative, as that of Flax's layers.

    Options of apply:
        momentum: in place of the field; a number or traced scalar.
        example_weight: in place of the field, at inference; a number or traced scalar.

    Raises:
        TypeError, ValueError: fields of another kind or beyond their bounds.

    Example:
        >>> rms_norm = Row(Groups(batch=EACH, spatial=EACH, channel=1), mean=0)
        >>> rms_norm.shape((8, 196, 768))
        (8, 196, 1)
        >>> rms_norm
        Row(Groups(batch=EACH, spatial=EACH, channel=1), mean=0)
    """

    takes_complex = True
    also_in_state = (*POPULATION, "calls")

    groups: Groups | Shape
    mean: Literal[0] | None = None
    epsilon: float = 1e-5
    momentum: float | None = 0.99
    correction: int = 0
    ghost_update: GhostUpdate = "pooled"
    debias: bool = False
    running: Groups | None = None
    example_weight: float | Literal["share"] = 0.0
    two_pass: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.groups, Groups | tuple):
            raise TypeError(
                f"Row(groups) takes a Groups. Got {self.groups!r}; expected Groups(batch, spatial, "
                "channel)."
            )
        check_mean(self.mean)
        check_ghost_update(self.ghost_update)
        if self.example_weight != "share":
            check_number(self.example_weight, "example_weight", at_least=0, at_most=1)

    def shape(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> Shape:
        """The shape of the statistic for an x of shape `x_shape`: `Groups.shape`."""
        return resolve(self.groups, tuple(x_shape), **axes_in(axes))[0]

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        sums = math.prod(self._measured.shape(x_shape, **axes)) * (1 if self.mean == 0 else 2)
        shape, batch = self.shape(x_shape, **axes), axes_in(axes)["batch_axis"]
        alone = shape[batch] == x_shape[batch] if self._batch is None else not self.pools_batch
        return (Sets(shape, 0 if alone else 2 * sums),)  # forward and backward

    @property
    def _measured(self) -> "Row":
        """The row whose statistics are taken from x, in each ghost batch; its own are coarser."""
        if self.running is None:
            return self
        return Row(dataclasses.replace(self.running, batch=self._batch), self.mean)

    def row(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> "Row":
        """This row."""
        return self

    @property
    def _batch(self) -> Split | None:
        """The split of the batch; None where the statistic's shape is given."""
        return self.groups.batch if isinstance(self.groups, Groups) else None

    @property
    def pools_batch(self) -> bool:
        """Whether examples share statistics, so that inference needs running ones."""
        return self._batch != EACH

    @property
    def remembers(self) -> bool:
        """Whether there are running statistics."""
        return self.pools_batch and self.momentum is not None

    @property
    def any_arrangement(self) -> bool:
        return self._batch is None

    def _repr_html_(self) -> str | None:
        return self.groups._repr_html_() if isinstance(self.groups, Groups) else None

    def any_batch(self) -> "Row":
        if not isinstance(self.groups, Groups) or not self.pools_batch:
            return self
        groups, weight = dataclasses.replace(self.groups, batch=1), self.example_weight
        if weight == "share":
            weight = self._share() if isinstance(self._batch, Size) else 0.0
        return dataclasses.replace(self, groups=groups, example_weight=weight)

    def keeps_positions(self, num_channels: int) -> bool:
        kept = self.running or self.groups
        if not self.remembers or not isinstance(kept, Groups):
            return False
        return not set(kept.spatial if isinstance(kept.spatial, tuple) else (kept.spatial,)) <= {1}

    def _init(self, x_shape: Shape, options: InitOptions) -> State:
        if not self.remembers:
            return {}
        shape: Any = self.running or self.groups
        if isinstance(shape, Groups):
            shape, _ = running_shape(shape, x_shape, **axes_in(options))
        return first_running(shape, options.get("dtype", jnp.float32), counted=self.debias)

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        momentum: ArrayLike | None = None,
        example_weight: ArrayLike | Literal["share"] = 0.0,
        **options: Unpack[Options],
    ) -> Result:
        axes = axes_in(options)
        if not self.remembers:
            m = measured(x, self, two_pass=self.two_pass, **options)
            return applied(x, m, self.epsilon, centered=self.mean is None, **options), state
        if not train:
            used, weight = self._of_inference(state, x.shape, axes), example_weight
            if isinstance(weight, str) and weight == "share":
                weight = self._share()
            if not isinstance(weight, int | float) or weight != 0:
                more: Any = {"example_weight": weight, **taken_by(weigh_example, options)}
                used = weigh_example(x, used, self, **more)
            return applied(x, used, self.epsilon, centered=self.mean is None, **options), state
        center = self._serving(state, x.shape, axes).mean
        batch = measured(x, self._measured, center=center, two_pass=self.two_pass, **options)
        used = batch
        if self.running is not None:  # synchronized already
            used = pooled(batch, self.shape(x.shape, **axes), **per_device(options))
        return applied(x, used, self.epsilon, centered=self.mean is None, **options), updated(
            state,
            batch,
            momentum=momentum,
            correction=self.correction,
            ghost_update=self.ghost_update,
            batch_axis=options["batch_axis"],
        )

    def inference_moments(
        self, state: State, x_shape: Sequence[int], **axes: Unpack[Axes]
    ) -> Moments | None:
        if not self.remembers or self.example_weight != 0:
            return None
        return self._of_inference(state, tuple(x_shape), axes_in(axes))

    def _serving(self, state: State, x_shape: Shape, axes: dict[str, Any]) -> Moments:
        """The running statistics in the shape that serves x, the batch pooled."""
        old = running_in(state)
        if not isinstance(self.groups, Groups):
            return serving(old, jnp.shape(old.mean), self.groups, x_shape)
        return running_moments(old, self.running or self.groups, x_shape, **axes)

    def _of_inference(self, state: State, x_shape: Shape, axes: dict[str, Any]) -> Moments:
        """The running statistics of the row's own sets, which may be coarser."""
        running = self._serving(state, x_shape, axes)
        if self.running is None:
            return running
        return pooled_to(running, self.any_batch().shape(x_shape, **axes), axes["batch_axis"])

    def _share(self) -> float:
        """What an example has of its set in training."""
        if not isinstance(self._batch, Size):
            raise ValueError(
                "an example's weight at inference is 1 / ghost_size by default. Got "
                f"{self}, which does not tell the size; expected ghost_size, or an example_weight."
            )
        return 1 / self._batch.n


def as_method(method: object) -> Method:
    """The method that an argument `method` is; `Groups` stand for their row."""
    if isinstance(method, Groups):
        return Row(method)
    if isinstance(method, Method):
        return method
    raise TypeError(
        f"method is a value of jaxnorm.methods or a Groups. Got {method!r}; expected for example "
        "methods.layer_norm() or methods.group_norm(4)."
    )
