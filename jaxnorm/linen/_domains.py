"""Batch Normalization Embeddings as a layer."""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxnorm._core.moments import as_array
from jaxnorm._flax_rules import wide_enough
from jaxnorm._layers import StateOptions
from jaxnorm.domains import domain_batch_norm, domain_distance, init_domain_batch_norm
from jaxnorm.linen._call import Layer, call_function


class DomainSpecificBatchNorm(Layer, kw_only=True):
    """Batch normalization with statistics for each domain: `domains.domain_batch_norm`.

        y_n = (x_n - mean_d) / sqrt(var_d + epsilon) * scale + bias,    d the domain of example n

    The collection `batch_stats` holds `mean` and `var`, (D, C). The domain is an argument of the
    call: an integer for the batch, or (N,) integers. In inference with the collection `distances`
    mutable, the layer stores in it how far each example is from the domain, (N,), for
    `domains.domain_ensemble`.

    Args:
        num_domains: D.
        momentum: weight of the old running statistics per update.
        Others: as `Norm`. Scale and bias are shared; with `use_scale=False` the call takes
            domain-specific ones.

    Raises:
        ValueError: `use_running_average` given nowhere or twice, running statistics of another
            shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer, x = DomainSpecificBatchNorm(num_domains=2), jnp.ones((4, 8, 8, 3))
        >>> variables = layer.init(jax.random.key(0), x, use_running_average=True, domain=0)
        >>> variables["batch_stats"]["mean"].shape
        (2, 3)
        >>> y, stored = layer.apply(
        ...     variables, x, use_running_average=True, domain=1, mutable="distances"
        ... )
        >>> jax.tree.map(jnp.shape, stored)
        {'distances': {'distance': ((4,),)}}

    Reference:
        Batch Normalization Embeddings for Deep Domain Generalization, 2020, arXiv:2011.12672; see
        `domains.domain_batch_norm`.
    """

    num_domains: int
    momentum: float = 0.99

    @nn.compact
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
        state = partial(init_domain_batch_norm, num_domains=self.num_domains)
        y = call_function(
            self, x, function, options, state=state, use_running_average=use_running_average
        )
        if self.is_mutable_collection("distances") and not self.is_initializing():
            distance = domain_distance(
                wide_enough(as_array(x), jnp.float32),
                {name: self.get_variable("batch_stats", name) for name in ("mean", "var")},
                domain=domain,
                weights=options.get("mask"),
                batch_axis=self.batch_axis,
                channel_axis=self.channel_axis,
            )
            self.sow("distances", "distance", distance)
        return y
