"""Predictions for examples of an unknown domain, weighted by how near each domain is.

The statistics of a domain over all layers are its embedding; an example of an unknown domain is
placed among them by its own statistics, which `methods.domain_batch_norm(D).observe` measures.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.checks import check_count, check_number


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
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672; see
        `methods.domain_batch_norm`.
    """
    check_number(exponent, "exponent", above=0)
    leaves: list[jax.Array] = jax.tree.leaves(distances)
    if not leaves:
        raise ValueError(
            "there are no distances. Expected an array (D, N) or a tree of them, such as "
            "methods.domain_batch_norm(D).observe measures and layers store."
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
    """Predict for examples of an unknown domain with the statistics of every known one.

    The network's outputs with each domain's statistics are weighted by how near the domain is.

        p_n = sum_d w_dn p_dn

    Args:
        forward: `forward(domain)` returns what is averaged, such as probabilities (N, K), or a tree
            of such arrays, and the distances of its layers, a tree of (N,): see
            `methods.domain_batch_norm(D).observe`.
            It is mapped over the domains by vmap.
        num_domains: D, passes through the network.
        exponent: see `domain_weights`.

    Returns:
        The weighted averages, and the weights, (D, N).

    Raises:
        TypeError: outputs that are not floating or complex, which have no weighted average.
        ValueError: no distances.

    Example:
        >>> from jaxnorm import methods
        >>> method = methods.domain_batch_norm(2, epsilon=0.0)
        >>> state = {"mean": jnp.array([[0.0], [3.0]]), "var": jnp.ones((2, 1))}
        >>> x = jnp.array([[[0.0], [2.0]]])
        >>> def forward(domain):
        ...     y, _ = method.apply(x, state, train=False, domain=domain)
        ...     return y.sum((1, 2)), method.observe(x, state, domain=domain)
        >>> mean, weights = domain_ensemble(forward, 2)
        >>> weights.ravel().tolist(), mean.tolist()  # 0.8 * 2 + 0.2 * -4
        ([0.8..., 0.2...], [0.8...])

    Reference:
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672; see
        `methods.domain_batch_norm`.
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
