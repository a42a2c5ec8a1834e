"""Weight decay on the scale and bias of normalization layers, as optax transformations and masks.

A parameter of a norm is found by its name and its neighbours in the tree, as Flax and jaxnorm name
them, in dicts of linen and states of nnx: `scale` beside no `kernel` or `embedding`, and `bias`
beside such a scale or alone. The other parameters of some norms, `OTHERS` and `PROXY`, do not count
as neighbours.
"""

from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

OTHERS = {
    "v",
    "threshold",
    "slope",
    "learned_epsilon",
    "mixture",
    "mean_logits",
    "var_logits",
    "gain",
}
"""Other parameters of norms and of standardized kernels, which nothing here decays."""
PROXY = {"proxy_scale", "proxy_bias"}
"""Those of `methods.proxy_norm`, which decay as weights do: its authors decay them, and not its
scale and bias."""


def norm_mask(params: Any) -> Any:
    """Where the scales and biases of norms are, for `optax.masked` and the like.

    Args:
        params: tree of parameters: nested dicts of linen, or `nnx.state(model, nnx.Param)`.

    Returns:
        The same tree of True and False.

    Example:
        >>> norm_mask({"Dense_0": {"kernel": 1.0, "bias": 0.0}, "LayerNorm_0": {"bias": 0.0}})
        {'Dense_0': {'bias': False, 'kernel': False}, 'LayerNorm_0': {'bias': True}}
    """
    return _select(params, lambda t, name, kind: kind == "norm")


def decay_mask(params: Any, *, biases: bool = False) -> Any:
    """What the usual recipes decay: everything but the parameters of norms, and no other bias.

        optax.adamw(1e-3, weight_decay=1e-4, mask=decay_mask)

    Of norms and standardized kernels, `proxy_scale` and `proxy_bias` decay; `scale`, `bias`, `v`,
    `threshold`, `slope`, `learned_epsilon`, `mixture`, `mean_logits`, `var_logits` and `gain` do
    not.

    Args:
        params: tree of parameters.
        biases: also decay the biases of other layers.

    Returns:
        The same tree of True and False.

    Example:
        >>> decay_mask({"Dense_0": {"kernel": 1.0, "bias": 0.0}, "LayerNorm_0": {"bias": 0.0}})
        {'Dense_0': {'bias': False, 'kernel': True}, 'LayerNorm_0': {'bias': False}}
    """
    return _select(params, lambda t, name, kind: kind == "" and (biases or name != "bias"))


def add_norm_decay(
    weight_decay: optax.ScalarOrSchedule, *, target: float = 1.0, unit_offset: bool = False
) -> optax.GradientTransformation:
    """Decay the scales of norms toward 1 and their biases toward 0.

        g_scale <- g_scale + weight_decay (scale - target),    g_bias <- g_bias + weight_decay bias

    the gradient of `norm_penalty`. 1 is the identity, where a scale of 0 would switch a layer off;
    `target=0` is the recipe of Group Normalization, in which norms decay as weights do. Other
    parameters stay as they are. In front of an optimizer this is a penalty of the loss; behind
    `optax.scale_by_adam` and in front of the learning rate, decoupled decay.

    Args:
        weight_decay: coefficient, or a schedule of it, a function of the step.
        target: of the scales.
        unit_offset: scales are stored as their distance from 1, as by layers with
            `unit_offset=True`.

    Returns:
        An optax transformation; its update needs the parameters.

    Example:
        >>> params = {"BatchNorm_0": {"scale": jnp.array([3.0]), "bias": jnp.array([2.0])}}
        >>> decay = add_norm_decay(0.5)
        >>> decayed, _ = decay.update(
        ...     jax.tree.map(jnp.zeros_like, params), decay.init(params), params
        ... )
        >>> decayed["BatchNorm_0"]["scale"].tolist(), decayed["BatchNorm_0"]["bias"].tolist()
        ([1.0], [1.0])

    Reference:
        Four Things Everyone Should Know to Improve Batch Normalization, 2020, arXiv:1906.03548:
        toward 1, as in the authors' code. Group Normalization, 2018, arXiv:1803.08494: toward 0, as
        cited by reproductions.
    """
    inner = optax.add_decayed_weights(weight_decay)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "add_norm_decay decays parameters. Got params=None; expected update(updates, "
                "state, params)."
            )
        return inner.update(updates, state, _distances(params, target, unit_offset))

    return optax.GradientTransformation(inner.init, update)


def norm_penalty(
    params: Any, weight_decay: ArrayLike, *, target: float = 1.0, unit_offset: bool = False
) -> jax.Array:
    """The penalty on the scales and biases of all norms that `add_norm_decay` descends.

    weight_decay / 2 (sum (scale - target)^2 + sum bias^2).

    Args:
        params: tree of parameters.
        weight_decay: coefficient.
        target: of the scales.
        unit_offset: scales are stored as their distance from 1.

    Returns:
        A scalar, 0 for freshly initialized norms and target 1.

    Example:
        >>> norm = {"scale": jnp.array([3.0]), "bias": jnp.array([2.0])}
        >>> float(norm_penalty({"BatchNorm_0": norm}, 0.5))
        2.0

    Reference:
        See `add_norm_decay`.
    """
    distances = jax.tree.leaves(_distances(params, target, unit_offset))
    squares = sum((jnp.sum(jnp.square(t)) for t in distances), jnp.zeros(()))
    return jnp.asarray(weight_decay) / 2 * squares


def _distances(params: Any, target: float, unit_offset: bool) -> Any:
    """How far the scales of norms are from their target and their biases from 0.

    0 for everything else.
    """

    def distance(t: Any, name: str, kind: str) -> jax.Array:
        t = jnp.asarray(t)
        if kind != "norm":
            return jnp.zeros_like(t)
        return t - jnp.asarray(target - unit_offset if name == "scale" else 0, t.dtype)

    return _select(params, distance)


def _select(params: Any, rule: Any) -> Any:
    """The tree of rule(parameter, name, kind).

    The kind is "norm" for scales and biases of norms, "other" for `OTHERS`, and "" elsewhere.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [_names(path) for path, _ in leaves]
    neighbours = defaultdict(set)
    for path in paths:
        for i, name in enumerate(path):
            neighbours[path[:i]].add(name)

    def kind(path: tuple[str, ...]) -> str:
        name, beside = path[-1], neighbours[path[:-1]]
        if beside & {"kernel", "embedding"}:
            return "other" if name == "gain" and "kernel" in beside else ""
        if name == "scale" or (
            name == "bias" and ("scale" in beside or beside <= {"bias"} | OTHERS | PROXY)
        ):
            return "norm"
        return "other" if name in OTHERS and beside <= {"scale", "bias"} | OTHERS else ""

    return structure.unflatten(
        rule(t, path[-1], kind(path)) for (_, t), path in zip(leaves, paths, strict=True)
    )


def _names(path: Any) -> tuple[str, ...]:
    """Names on the way to a leaf, "" for the root; the value in a variable of nnx has none."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return ("", *(jax.tree_util.keystr((key,), simple=True) for key in path))
