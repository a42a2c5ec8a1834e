"""The normalizations of a linen model as a table."""

from typing import Any

import jax
from flax import linen as nn

from jaxnorm import _inspection
from jaxnorm.linen._probe import NORMS
from jaxnorm.probe import NormTable


def tabulate_norms(model: nn.Module, *args: Any, rngs: Any = None, **kwargs: Any) -> NormTable:
    """Every normalization of a model: what shares statistics, and how many elements do.

    Each row of the table is a call of a layer, with its path, method, groups, the shape of its
    statistics, the elements that share one, the bytes of what it remembers, and the bytes that a
    device adds up with others in a step of training where the layer is synchronized. Statistics of
    fewer than 16 elements are marked. Flax's own layers are in it too. Nothing is computed and no
    memory is taken: the model is initialized with shapes.

    Args:
        model: of linen.
        *args: what the model is called with: arrays or `jax.ShapeDtypeStruct`, with the batch that
            one device, or all devices under jit, normalize together.
        rngs: as for `model.init`, where the model needs more streams than `params`.
        **kwargs: likewise, such as `train=True` or `method=`.

    Returns:
        The table, a sequence of `probe.NormRow` that prints as text, and in notebooks as HTML.

    Raises:
        ValueError: the model calls no normalization, or x does not split into groups.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nn.Sequential([nn.Dense(32), nn.GroupNorm(num_groups=8), nn.relu])
        >>> table = tabulate_norms(model, jax.ShapeDtypeStruct((4, 10), jnp.float32))
        >>> print(table)
        path      layer      method         groups      statistic  elements  state  sent
        --------  ---------  -------------  ----------  ---------  --------  -----  ----
        layers_1  GroupNorm  group_norm(8)  EACH, 1, 8  (4,8)           4 !    0 B   0 B
        1 normalization; 0 B of state; 0 B sent by a device in a step, where they are synchronized
        ! fewer than 16 elements to a statistic, which is where statistics of batches fail: ...

    Reference:
        A tool of this library; no paper is followed.
    """
    calls: Any = None

    def interceptor(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, NORMS):
            return call(*arguments, **options)
        return calls.see("/".join(module.path), module, call, arguments, options)

    def init(arguments: Any) -> Any:
        nonlocal calls
        calls = _inspection.Calls()
        args, kwargs = arguments
        with nn.intercept_methods(interceptor):
            return model.init(jax.random.key(0) if rngs is None else rngs, *args, **kwargs)

    variables = nn.meta.unbox(_inspection.run_abstractly(init, (args, kwargs)))
    rows = []
    for path, (own, module, x) in calls.found.items():
        of = {name: _below(tree, own) for name, tree in variables.items()}
        state = of.get("batch_stats", {}) if path == own else {}
        parameters = [t for n, t in of.get("params", {}).items() if n in ("scale", "bias")]
        rows.append(_inspection.norm_row(path, module, type(module).__name__, x, state, parameters))
    return _inspection.table(rows, NORMS)


def _below(tree: Any, path: str) -> Any:
    """The variables of a module; {} where it has none."""
    for part in filter(None, path.split("/")):
        tree = tree.get(part, {})
    return tree
