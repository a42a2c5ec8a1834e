"""Batch Normalization Embeddings as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import wide_enough
from jaxnorm._layers import StateOptions
from jaxnorm.domains import domain_batch_norm, domain_distance, init_domain_batch_norm
from jaxnorm.nnx._call import Function


class DomainDistance(nnx.Intermediate):
    """What `DomainSpecificBatchNorm` stores under `nnx.capture`: how far each example is from the
    domain, (N,)."""


class DomainSpecificBatchNorm(Function):
    """Batch normalization with statistics for each domain: `domains.domain_batch_norm`.

        y_n = (x_n - mean_d) / sqrt(var_d + epsilon) * scale + bias,    d the domain of example n

    Running statistics are `mean` and `var`, (D, C). The domain is an argument of the call: an
    integer for the batch, or (N,) integers. Under `nnx.capture(model, DomainDistance)` the layer
    stores how far each example is from the domain, (N,), for `domains.domain_ensemble`.

    Args:
        num_features: channels.
        num_domains: D.
        momentum: weight of the old running statistics per update.
        Others: as `Norm`. Scale and bias are shared; with `use_scale=False` the call takes
            domain-specific ones.

    Raises:
        ValueError: running statistics of another shape.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = DomainSpecificBatchNorm(3, num_domains=2, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((4, 8, 8, 3))
        >>> layer(x, domain=jnp.array([0, 0, 1, 1])).shape, layer.mean.shape
        ((4, 8, 8, 3), (2, 3))
        >>> y, stored = nnx.capture(layer, DomainDistance)(x, use_running_average=True, domain=1)
        >>> [t.shape for t in jax.tree.leaves(stored)]
        [(4,)]

    Reference:
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672; see
        `domains.domain_batch_norm`.
    """

    def __init__(
        self, num_features: int, *, num_domains: int, momentum: float = 0.99, **options: Any
    ):
        self.momentum = momentum
        state = partial(init_domain_batch_norm, num_domains=num_domains)
        super().__init__(num_features, state=state, **options)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: ArrayLike,
        **options: Unpack[StateOptions],
    ) -> jax.Array:
        """Normalize x; the options are those of `Norm`."""
        function = partial(domain_batch_norm, domain=domain, momentum=self.momentum)
        y = self._run(x, function, options, use_running_average=use_running_average)
        if hasattr(self, "__captures__"):  # elsewhere nnx would keep what it is given, and warn
            distance = domain_distance(
                wide_enough(as_array(x), jnp.float32),
                {name: getattr(self, name)[...] for name in ("mean", "var")},
                domain=domain,
                weights=options.get("mask"),
                batch_axis=self.batch_axis,
                channel_axis=self.channel_axis,
            )
            self.sow(DomainDistance, "distance", distance)
        return y
