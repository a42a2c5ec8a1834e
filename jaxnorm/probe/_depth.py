"""The size of gradients and weights, layer by layer."""

from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import abs2, statistic_dtype
from jaxnorm._core.checks import as_index, check_number
from jaxnorm._core.groups import EACH
from jaxnorm.probe._trees import l2, named_leaves


def l2_by_layer(tree: Any) -> dict[str, jax.Array]:
    """The l2 norm of each layer's arrays: of gradients, their norm through depth.

        norm_layer = sqrt(sum over the layer's arrays of |t|^2)

    Args:
        tree: gradients, parameters or updates: nested dicts of linen, or a state of nnx, of
            floating or complex arrays. The arrays next to each other are a layer.

    Returns:
        A dict from the path of a layer, such as "Block_0/Conv_0", to a scalar in float32 or wider;
        "" is the root. It is in the order of the tree, which for dicts is that of the names.

    Raises:
        TypeError: arrays that are not floating or complex.
        ValueError: no arrays.

    Example:
        >>> dense = {"kernel": jnp.array([[3.0]]), "bias": jnp.array([4.0])}
        >>> norms = l2_by_layer({"Dense_0": dense, "LayerNorm_0": {"scale": jnp.ones(4)}})
        >>> {path: float(norm) for path, norm in norms.items()}
        {'Dense_0': 5.0, 'LayerNorm_0': 2.0}

    Reference:
        How Does Batch Normalization Help Optimization?, 2018, arXiv:1805.11604, and others draw it;
        no paper is followed.
    """
    layers: dict[str, list[jax.Array]] = {}
    for path, t in named_leaves(tree, "tree"):
        layers.setdefault("/".join(path[:-1]), []).append(t)
    return {path: l2(arrays) for path, arrays in layers.items()}


def effective_learning_rates(
    params: Any, *, learning_rate: ArrayLike, num_groups: SupportsIndex = 1
) -> Any:
    """The learning rate of the direction of weights whose scale does not matter.

        effective = learning_rate / ||w||^2

    A normalization that follows a layer makes the loss the same for w and a w. Gradient descent
    then turns the direction of w as it would that of a vector of length 1 with this rate, and
    weight decay, which shortens w, raises it.

    Args:
        params: weights in front of a normalization, such as the kernels alone, without the scales,
            biases and last layers that no normalization follows: a tree of floating or complex
            arrays.
        learning_rate: of plain gradient descent, 0 or more, a number or traced scalar.
        num_groups: into how many equal, contiguous groups the output channels, the last axis, are
            split: w is the kernel of one group. It is the channel number of the normalization: EACH
            for batch and instance norm, G for group norm, 1 for layer norm.

    Returns:
        A tree like `params` of arrays (num_groups,), infinite where a group's weights are all 0.

    Raises:
        TypeError: arrays that are not floating or complex, a learning rate that is not a number.
        ValueError: no arrays, channels that do not split, a negative learning rate.

    Example:
        >>> kernel = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> effective_learning_rates({"kernel": kernel}, learning_rate=0.5)["kernel"].tolist()
        [0.1...]
        >>> from jaxnorm import EACH
        >>> effective_learning_rates(kernel, learning_rate=0.5, num_groups=EACH).tolist()
        [0.5, 0.125]

    Reference:
        L2 Regularization versus Batch and Weight Normalization, 2017, arXiv:1706.05350; from
        memory, and the identity is tested.
    """
    check_number(learning_rate, "learning_rate", at_least=0)
    groups = as_index(num_groups)
    if groups is None or (groups < 1 and groups != EACH):
        raise ValueError(
            f"num_groups is {num_groups!r}; expected EACH or an integer of at least 1."
        )

    def effective(path: tuple[str, ...], w: jax.Array) -> jax.Array:
        channels = w.shape[-1] if w.ndim else 1
        k = channels if groups == EACH else groups
        if k == 0 or channels % k:
            raise ValueError(
                f"params has an array of shape {w.shape} at {'/'.join(path)!r}. Its last axis does "
                f"not split into num_groups={k} equal groups; expected the output channels there."
            )
        wide = abs2(w.astype(statistic_dtype(w.dtype)))
        squares = wide.reshape(-1, k, channels // k).sum((0, 2))
        return jnp.asarray(learning_rate, squares.dtype) / squares

    rates = [effective(path, w) for path, w in named_leaves(params, "params")]
    return jax.tree.unflatten(jax.tree.structure(params), rates)
