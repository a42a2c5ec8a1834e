"""Training steps that a method asks for."""

from collections.abc import Callable
from typing import Any

import jax


def double_forward(
    loss: Callable[..., tuple[jax.Array, Any]], update: Callable[[Any, Any, Any], tuple[Any, Any]]
) -> Callable[..., tuple[Any, Any, Any, jax.Array]]:
    """A training step that remembers the statistics that the new parameters give, not the old ones.

    The gradient is taken with the remembered statistics as they are; after the update the same
    batch passes once more forward, with the new parameters, and only the statistics of that pass
    are kept. It costs a second forward pass.

    Args:
        loss: `loss(params, state, *batch)` returns the loss, a scalar, and the new state, any tree.
        update: `update(gradients, optimizer_state, params)` returns the new parameters and
            optimizer state.

    Returns:
        `step(params, optimizer_state, state, *batch)`, which returns the new params,
        optimizer_state and state, and the loss of the first pass. Random numbers, such as a dropout
        key, belong to the batch and are the same in both passes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxnorm import methods
        >>> method = methods.memorized_batch_norm((0.5, 0.5))
        >>> def loss(params, state, x):
        ...     y, state = method.apply(params * x, state, train=True)
        ...     return jnp.sum(y**4), state
        >>> step = double_forward(loss, lambda gradients, _, params: (params + 1, None))
        >>> x = jnp.array([[0.0], [2.0]])
        >>> params, _, state, value = step(jnp.ones(()), None, method.init(x.shape), x)
        >>> state["mean"].tolist()  # of 2 x
        [[2.0]]

    Reference:
        Double Forward Propagation for Memorized Batch Normalization, 2020, arXiv:2010.04947.
        Whether the second pass uses the memory is not known; here it does, so that later layers see
        what they will in training.
    """

    def step(
        params: Any, optimizer_state: Any, state: Any, *batch: Any
    ) -> tuple[Any, Any, Any, jax.Array]:
        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, state, *batch)
        params, optimizer_state = update(gradients, optimizer_state, params)
        _, state = loss(params, state, *batch)
        return params, optimizer_state, state, value

    return step
