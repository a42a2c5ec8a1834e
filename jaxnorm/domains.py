"""Batch normalization with statistics for each domain, and predictions weighted by how near each
domain is.

The statistics of a domain over all layers are its embedding; an example of an unknown domain is
placed among them by its own statistics.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.axes import single_axis
from jaxnorm._core.checks import check_count, check_flag, check_number
from jaxnorm._core.moments import Moments
from jaxnorm._core.running import usable
from jaxnorm._frame import (
    Options,
    State,
    applied,
    averaged,
    check_state,
    measured,
    per_device,
    pooled,
    real,
    recalled,
)
from jaxnorm.methods import batch_norm, instance_norm


def init_domain_batch_norm(num_channels: int, num_domains: int) -> State:
    """State before the first step: mean 0 and variance 1 for each domain and channel.

    Args:
        num_channels: C.
        num_domains: D, 1 or more.

    Returns:
        `mean` and `var`, (D, C), float32.

    Raises:
        ValueError: no domains.

    Example:
        >>> {name: t.shape for name, t in init_domain_batch_norm(3, 2).items()}
        {'mean': (2, 3), 'var': (2, 3)}
    """
    shape = (check_count(num_domains, "num_domains"), num_channels)
    return {"mean": jnp.zeros(shape, jnp.float32), "var": jnp.ones(shape, jnp.float32)}


def domain_batch_norm(
    x: ArrayLike,
    state: State,
    *,
    train: bool,
    domain: ArrayLike,
    momentum: ArrayLike = 0.99,
    epsilon: float = 1e-5,
    **options: Unpack[Options],
) -> tuple[jax.Array, State]:
    """Batch normalization of each domain's examples by themselves.

        y_n = (x_n - mean_d) / sqrt(var_d + epsilon) * scale + bias,    d the domain of example n

    with the moments of the batch's examples of domain d in training, and those of row d of the
    state in inference. Training updates the rows of the domains that are in the batch. Scale and
    bias are shared by all domains; domain-specific ones are `scale=scales[domain]`, (C,) or (N, C).
    With one domain it is batch normalization.

    Args:
        x: real floating array with examples and channels.
        state: see `init_domain_batch_norm`.
        train: use the batch's statistics and update the state, or use the state.
        domain: integer from 0 to D - 1, for the whole batch, or (N,), one for each example; data,
            not a static argument. Outside that range y is NaN and no row changes. Where devices
            hold different domains, (N,) on each.
        momentum: weight of the old row per update, 0 to 1.
        epsilon: added to the variance, in the unit of x squared.
        **options: as `norm`. With one domain for each example, examples are whole on each device.

    Returns:
        y, of x's shape, and the new state. Rows of absent domains stay, as do channels of empty or
        non-finite sets.

    Raises:
        TypeError: x is complex or integer, domain is not integer.
        ValueError: domain of another shape, state of another number of channels or of another
            method, a momentum outside 0 to 1.

    Example:
        >>> x = jnp.array([[0.0], [2.0], [10.0], [14.0]])
        >>> domain = jnp.array([0, 0, 2, 2])
        >>> y, state = domain_batch_norm(
        ...     x,
        ...     init_domain_batch_norm(1, 3),
        ...     train=True,
        ...     domain=domain,
        ...     momentum=0.5,
        ...     epsilon=0.0,
        ... )
        >>> y.ravel().tolist(), state["mean"].ravel().tolist()
        ([-1.0, 1.0, -1.0, 1.0], [0.5, 0.0, 6.0])

    Reference:
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672, by
        its summaries. With scale and bias for each domain as well: Domain-Specific Batch
        Normalization for Unsupervised Domain Adaptation, 2019, arXiv:1906.03950.
    """
    check_flag(train, "train")
    x = real(x, "domain_batch_norm")
    check_state(state, "domain_batch_norm", mean=2, var=2)
    batch_axis = options.get("batch_axis", 0)
    domain = _labels(domain, x, batch_axis)
    bank = recalled(state, x, options.get("channel_axis", -1))
    if not train:
        return applied(x, _rows(bank, domain, x, batch_axis), epsilon, **options), state
    m = _of_each_domain(x, domain, bank.mean.shape, options)
    keep = usable(m)
    new = {
        name: averaged(state[name], getattr(m, name), momentum, keep) for name in ("mean", "var")
    }
    return applied(x, _rows(m, domain, x, batch_axis), epsilon, **options), new


def domain_distance(
    x: ArrayLike,
    state: State,
    *,
    domain: ArrayLike,
    weights: ArrayLike | None = None,
    batch_axis: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """How far each example's own statistics are from a domain's: the squared 2-Wasserstein distance
    of normal distributions.

        distance_n = sum_c (mean_dc - mean_nc)^2 + (sqrt(var_dc) - sqrt(var_nc))^2

    with the mean and variance of example n over its positions. Sums over layers are the distance of
    the network's statistics.

    Args:
        x: input of the layer, in the network that normalizes with the statistics of this domain.
        state: see `init_domain_batch_norm`.
        domain: integer from 0 to D - 1, or (N,), one for each example.
        weights: how much each element counts; broadcasts against x. Channels of an example without
            weight count 0.
        batch_axis: axis of the examples.
        channel_axis: axis of the channels.

    Returns:
        (N,), 0 where the statistics agree.

    Raises:
        TypeError: x is complex or integer, domain is not integer.
        ValueError: domain of another shape, state of another number of channels.

    Example:
        >>> state = {"mean": jnp.array([[0.0], [3.0]]), "var": jnp.ones((2, 1))}
        >>> domain_distance(jnp.array([[[-1.0], [1.0]]]), state, domain=1).tolist()
        [9.0]

    Reference:
        arXiv:2011.12672; see `domain_batch_norm`. That the distance is squared, and which pass it
        is measured in, are our choice.
    """
    x = real(x, "domain_distance")
    check_state(state, "domain_batch_norm", mean=2, var=2)
    row = _rows(recalled(state, x, channel_axis), _labels(domain, x, batch_axis), x, batch_axis)
    m = measured(
        x, instance_norm(), weights=weights, batch_axis=batch_axis, channel_axis=channel_axis
    )
    squared = jnp.square(row.mean - m.mean) + jnp.square(_root(row.var) - _root(m.var))
    squared = jnp.where(m.count > 0, squared, 0)
    return squared.sum([i for i in range(x.ndim) if i != single_axis(batch_axis, x.shape)])


def domain_weights(distances: Any, *, exponent: ArrayLike = 1.0) -> jax.Array:
    """How much each domain counts for each example: inversely to its distance.

        w_d = D_d^-exponent / sum_d D_d^-exponent

    with D_d the sum of the distances to domain d over all layers. An example at distance 0 of some
    domains counts them alone.

    Args:
        distances: one array (D, N), or a tree of them, one for each layer, which are added up.
        exponent: above 0; 1 is the paper's inverse distance, more prefers the nearest domain more.

    Returns:
        (D, N), adding up to 1 over the domains.

    Raises:
        ValueError: no distances, an exponent of 0 or less.

    Example:
        >>> domain_weights(jnp.array([[1.0], [3.0]])).tolist()
        [[0.75], [0.25]]

    Reference:
        arXiv:2011.12672; see `domain_batch_norm`.
    """
    check_number(exponent, "exponent", above=0)
    leaves: list[jax.Array] = jax.tree.leaves(distances)
    if not leaves:
        raise ValueError(
            "there are no distances. Expected an array (D, N) or a tree of them, such as the "
            "layers store when the collection 'distances' is mutable."
        )
    total = functools.reduce(operator.add, leaves)
    nearest = total.min(0, keepdims=True)
    closeness = jnp.where(total > 0, nearest / jnp.where(total > 0, total, 1), 1) ** jnp.asarray(
        exponent, total.dtype
    )
    return closeness / closeness.sum(0, keepdims=True)


def domain_ensemble(
    forward: Callable[[jax.Array], tuple[Any, Any]], num_domains: int, *, exponent: ArrayLike = 1.0
) -> tuple[Any, jax.Array]:
    """Predictions for examples of an unknown domain: the network with each domain's statistics,
    weighted by nearness.

        p_n = sum_d w_dn p_dn

    Args:
        forward: `forward(domain)` returns what is averaged, such as probabilities (N, K), or a tree
            of such arrays, and the distances of its layers, a tree of (N,): see `domain_distance`.
            It is mapped over the domains by vmap.
        num_domains: D, passes through the network.
        exponent: see `domain_weights`.

    Returns:
        The weighted averages, and the weights, (D, N).

    Raises:
        TypeError: outputs that are not floating or complex, which have no weighted average.
        ValueError: no distances.

    Example:
        >>> state = {"mean": jnp.array([[0.0], [3.0]]), "var": jnp.ones((2, 1))}
        >>> x = jnp.array([[[0.0], [2.0]]])
        >>> def forward(domain):
        ...     y, _ = domain_batch_norm(x, state, train=False, domain=domain, epsilon=0.0)
        ...     return y.sum((1, 2)), domain_distance(x, state, domain=domain)
        >>> mean, weights = domain_ensemble(forward, 2)
        >>> weights.ravel().tolist(), mean.tolist()  # 0.8 * 2 + 0.2 * -4
        ([0.8..., 0.2...], [0.8...])

    Reference:
        arXiv:2011.12672; see `domain_batch_norm`.
    """
    domains = jnp.arange(check_count(num_domains, "num_domains"))
    outputs, distances = jax.vmap(forward)(domains)
    weights = domain_weights(distances, exponent=exponent)

    def average(t: jax.Array) -> jax.Array:
        if not jnp.issubdtype(t.dtype, jnp.inexact):
            raise TypeError(
                f"forward returns {t.dtype}. Expected floating or complex outputs to average, such "
                "as probabilities."
            )
        return (weights.astype(t.dtype).reshape(*weights.shape, *(1 for _ in t.shape[2:])) * t).sum(
            0
        )

    return jax.tree.map(average, outputs), weights


def _labels(domain: ArrayLike, x: jax.Array, batch_axis: int) -> jax.Array:
    """The domain of the batch, a scalar, or of each example, (N,)."""
    domain = jnp.asarray(domain)
    if not jnp.issubdtype(domain.dtype, jnp.integer):
        raise TypeError(
            f"domain is the number of a domain. Got {domain.dtype}, shape {domain.shape}; expected "
            "integers."
        )
    examples = x.shape[single_axis(batch_axis, x.shape)]
    if domain.shape not in ((), (examples,)):
        raise ValueError(
            f"domain has shape {domain.shape}, and x of shape {x.shape} has {examples} examples. "
            f"Expected (), one domain for the batch, or ({examples},), one for each example."
        )
    return domain


def _rows(bank: Moments, domain: jax.Array, x: jax.Array, batch_axis: int) -> Moments:
    """Of moments with a row for each domain, those that serve x: of its domain, or of each
    example's."""

    def row(t: jax.Array) -> jax.Array:
        t = t.at[domain].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return (
            t
            if domain.ndim == 0
            else jnp.swapaxes(t, 0, 1 + single_axis(batch_axis, x.shape)).squeeze(0)
        )

    return jax.tree.map(row, bank)


def _of_each_domain(
    x: jax.Array, domain: jax.Array, shape: tuple[int, ...], options: Options
) -> Moments:
    """Moments of the batch's examples of each domain, with a row for each, empty where the domain
    is absent."""
    domains = jnp.arange(shape[0], dtype=domain.dtype)
    if domain.ndim == 0:
        m = measured(x, batch_norm(), **options)
        mean, var = (jnp.broadcast_to(t, shape) for t in (m.mean, m.var))
        return Moments(jax.vmap(lambda d: jnp.where(d == domain, m.count, 0))(domains), mean, var)
    instance = measured(x, instance_norm(), **per_device(options))
    batch = single_axis(options.get("batch_axis", 0), x.shape)
    domain = domain.reshape([-1 if i == batch else 1 for i in range(x.ndim)])

    def of(d: jax.Array) -> Moments:
        mine = Moments(jnp.where(domain == d, instance.count, 0), instance.mean, instance.var)
        return pooled(mine, batch_norm(), **options)

    return jax.vmap(of)(domains)


def _root(var: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), 0)
