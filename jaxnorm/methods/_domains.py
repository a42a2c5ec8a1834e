"""Batch normalization with statistics for each domain.

The statistics of a domain over all layers are its embedding; an example of an unknown domain is
placed among them by its own statistics: see `domains`.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.axes import Shape, single_axis
from jaxnorm._core.meshes import in_explicit_meshes
from jaxnorm._core.moments import Moments, inexact
from jaxnorm.methods._fields import Count, as_value
from jaxnorm.methods._frame import (
    applied,
    averages,
    first_running,
    measured,
    per_device,
    pooled,
    recalled,
)
from jaxnorm.methods._method import Method, Options, Result, State
from jaxnorm.methods._options import Axes, Sets
from jaxnorm.methods._state import check_state
from jaxnorm.methods._table import batch_norm, instance_norm


@as_value
class domain_batch_norm(Method):
    """Batch normalization of each domain's examples by themselves.

        y_n = (x_n - mean_d) / sqrt(var_d + epsilon) * scale + bias,    d the domain of example n

    with the moments of the batch's examples of domain d in training, and those of row d of the
    state in inference. Training updates the rows of the domains that are in the batch; those of
    absent domains stay. Scale and bias are shared by all domains; domain-specific ones are
    `scale=scales[domain]`, (C,) or (N, C). With one domain it is batch normalization.

    Args:
        num_domains: D, 1 or more.
        momentum: weight of the old row per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.

    State: `mean` and `var`, (D, C).

    Options of apply:
        domain: integer from 0 to D - 1, for the whole batch, or (N,), one for each example; data,
            not a static argument. Outside that range y is NaN and no row changes. Where devices
            hold different domains, (N,) on each; examples are then whole on each device.
        momentum: in place of the field.

    Raises:
        TypeError: domain is not integer.
        ValueError: domain of another shape, no domains.

    Example:
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> method = domain_batch_norm(3, momentum=0.5, epsilon=0.0)
        >>> domain = jnp.array([0, 0, 2, 2])
        >>> y, state = method.apply(x, method.init(x.shape), train=True, domain=domain)
        >>> y.ravel().tolist(), state["mean"].ravel().tolist()
        ([-1.0, 1.0, -1.0, 1.0], [0.5, 0.0, 6.0])

    Reference:
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672, by
        its summaries. With scale and bias for each domain as well: Domain-Specific Batch
        Normalization for Unsupervised Domain Adaptation, 2019, arXiv:1906.03950.
    """

    num_domains: Count
    momentum: float = 0.99
    epsilon: float = 1e-5

    def sets(self, x_shape: Sequence[int], **axes: Unpack[Axes]) -> tuple[Sets, ...]:
        # Of one domain. What is sent depends on whether examples have domains of their own.
        return (Sets(batch_norm().shape(x_shape, **axes), None),)

    def first_state(self, num_channels: int) -> State:
        return first_running((self.num_domains, num_channels))

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        domain: ArrayLike,
        momentum: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        batch = options["batch_axis"]
        domain = _labels(domain, x.shape, batch)
        if train:
            bank = _of_each_domain(x, domain, self.num_domains, batch, options)
            state = averages(state, bank, momentum)
        else:
            bank = recalled(state, x, options)
        return applied(x, _rows(bank, domain, batch), self.epsilon, **options), state

    @in_explicit_meshes
    def observe(  # type: ignore[override]  # the hook that layers call
        self,
        x: ArrayLike,
        state: State,
        *,
        domain: ArrayLike,
        weights: ArrayLike | None = None,
        batch_axis: int = 0,
        channel_axis: int = -1,
    ) -> State:
        """How far each example's own statistics are from a domain's.

        The distance is the squared 2-Wasserstein distance of normal distributions:

            distance_n = sum_c (mean_dc - mean_nc)^2 + (sqrt(var_dc) - sqrt(var_nc))^2

        with the mean and variance of example n over its positions. Sums over layers are the
        distance of the network's statistics.

        Args:
            x: input of the layer, in the network that normalizes with this domain's statistics.
            state: of the method.
            domain: integer from 0 to D - 1, or (N,), one for each example.
            weights: how much each element counts; broadcasts against x. Channels of an example
                without weight count 0.
            batch_axis: axis of the examples.
            channel_axis: axis of the channels.

        Returns:
            `distance`, (N,), 0 where the statistics agree.

        Raises:
            TypeError: x is complex or integer, domain is not integer.
            ValueError: domain of another shape, state of another number of channels.

        Example:
            >>> state = {"mean": jnp.array([[0.0], [3.0]]), "var": jnp.ones((2, 1))}
            >>> x = jnp.array([[[-1.0], [1.0]]])
            >>> domain_batch_norm(2).observe(x, state, domain=1)["distance"].tolist()
            [9.0]

        Reference:
            Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672.
            That the distance is squared, and which pass it is measured in, are our choice.
        """
        x = inexact(x)
        batch, channel = single_axis(batch_axis, x.shape), single_axis(channel_axis, x.shape)
        options: Any = {"batch_axis": batch, "channel_axis": channel}
        check_state(self, state, x.shape, **options)
        row = _rows(recalled(state, x, options), _labels(domain, x.shape, batch), batch)
        m = measured(x, instance_norm(), **options | {"weights": weights})
        squared = jnp.square(row.mean - m.mean) + jnp.square(_root(row.var) - _root(m.var))
        squared = jnp.where(m.count > 0, squared, 0)
        return {"distance": squared.sum([i for i in range(x.ndim) if i != batch])}


def _labels(domain: ArrayLike, x_shape: Shape, batch: int) -> jax.Array:
    """The domain of the batch, a scalar, or of each example, (N,)."""
    domain, examples = jnp.asarray(domain), x_shape[batch]
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise TypeError(
            f"domain is the number of a domain. Got {domain.dtype}, shape {domain.shape}; expected "
            "integers."
        )
    if domain.shape not in ((), (examples,)):
        raise ValueError(
            f"domain has shape {domain.shape}, and x of shape {x_shape} has {examples} examples. "
            f"Expected (), one domain for the batch, or ({examples},), one for each example."
        )
    return domain


def _rows(bank: Moments, domain: jax.Array, batch: int) -> Moments:
    """Of moments with a row for each domain, those that serve x.

    They are the row of x's domain, or one row for each example.
    """

    def row(t: jax.Array) -> jax.Array:
        t = t.at[domain].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return t if domain.ndim == 0 else jnp.swapaxes(t, 0, 1 + batch).squeeze(0)

    return jax.tree.map(row, bank)


def _of_each_domain(
    x: jax.Array, domain: jax.Array, num_domains: int, batch: int, options: Options
) -> Moments:
    """Moments of the batch's examples of each domain, with a row for each.

    The row of an absent domain is empty.
    """
    several = domain.ndim > 0
    if several:
        domain = domain.reshape([-1 if i == batch else 1 for i in range(x.ndim)])
        m = measured(x, instance_norm(), **per_device(options))
    else:
        m = measured(x, batch_norm(), **options)

    def of(d: jax.Array) -> Moments:
        mine = Moments(jnp.where(domain == d, m.count, 0), m.mean, m.var)
        return pooled(mine, batch_norm(), **options) if several else mine

    return jax.vmap(of)(jnp.arange(num_domains, dtype=domain.dtype))


def _root(var: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)
