"""Whole linen models at test time: other statistics in all layers at once."""

import contextlib
from collections.abc import Iterator
from typing import Any

from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm import _layers
from jaxnorm.linen._flax_batch_norm import BatchNorm
from jaxnorm.linen._norm import Norm
from jaxnorm.methods._row import as_method


@contextlib.contextmanager
def call_norms_with(
    *,
    use_running_average: bool | None = None,
    update_running_average: bool | None = None,
    example_weight: ArrayLike | None = None,
) -> Iterator[None]:
    """Call every layer that has running statistics with these options, inside of a context.

    They take precedence over what the model passes.

    `use_running_average=False, update_running_average=False` normalizes with the batch's statistics
    at test time, while the rest of the model stays in inference. `example_weight` is one weight for
    a whole network.

    Args:
        use_running_average: in place of the layer's field and of what it is called with; None
            leaves them.
        update_running_average: likewise.
        example_weight: alpha of `inference.weigh_example`, a number or traced scalar; layers that
            do not use running statistics do not get it.

    Returns:
        A context manager.

    Raises:
        ValueError: an `example_weight` for a layer that uses running statistics and is neither
            `BatchNorm` nor `Norm` of a row of the table of methods.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = BatchNorm(use_running_average=True)
        >>> x = jnp.array([[1.0], [3.0]])
        >>> variables = layer.init(jax.random.key(0), x)
        >>> with call_norms_with(use_running_average=False, update_running_average=False):
        ...     y = layer.apply(variables, x)
        >>> y.round(3).tolist()
        [[-1.0], [1.0]]

    Reference:
        Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift, 2020,
        arXiv:2006.10963, for batch statistics at test time; by its summaries.
    """

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, BatchNorm | Norm):
            return call(*args, **kwargs)
        own = module.use_running_average
        kwargs = dict(zip(("x", "use_running_average"), args, strict=False)) | kwargs
        x, use = kwargs.pop("x"), kwargs.pop("use_running_average", None)
        if use_running_average is not None:
            use = use_running_average
            # a field and an argument together are an error
            object.__setattr__(module, "use_running_average", None)
        if update_running_average is not None:
            kwargs["update_running_average"] = update_running_average
        try:
            remembers = "batch_stats" in module.variables
            if example_weight is not None and remembers and (own if use is None else use):
                if isinstance(module, Norm):
                    _layers.check_weighs_examples(as_method(module.method), example_weight)
                kwargs["example_weight"] = example_weight
            return call(x, use, **kwargs)
        finally:
            object.__setattr__(module, "use_running_average", own)

    with nn.intercept_methods(interceptor):
        yield
