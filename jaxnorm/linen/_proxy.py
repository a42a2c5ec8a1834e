"""Proxy Normalization as a layer."""

import dataclasses
from functools import partial
from typing import Unpack

import jax
from flax import linen as nn
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._core.groups import Groups, Method
from jaxnorm._layers import Activation, CallOptions
from jaxnorm.linen._call import Layer, call_function, channel_parameter, zeros
from jaxnorm.proxy import proxy_norm


class ProxyNorm(Layer):
    """Normalization, activation, and its output standardized by a Gaussian proxy:
    `proxy.proxy_norm`.

        z = activation(scale x^ + bias),    y = (z - mean_q(p)) / sqrt(var_q(p) + proxy_epsilon)

    Parameters are `scale`, `bias`, `proxy_scale` and `proxy_bias`, (C,). Decay the last two, as the
    authors do, and not the first two.

    Args:
        method: a row that shares no statistics between examples, such as `methods.layer_norm()`.
        activation: what follows the normalization; one given at the call takes its place.
        num_quantiles: of the proxy.
        proxy_epsilon: added to the proxy's variance.
        proxy_scale_init: initializer of gamma', whose 0 is the identity.
        proxy_bias_init: initializer of beta'.
        Others: as `Norm`.

    Raises:
        ValueError: a method that pools the batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxnorm import methods
        >>> variables = ProxyNorm(methods.layer_norm()).init(
        ...     jax.random.key(0), jnp.ones((4, 8, 8, 3))
        ... )
        >>> sorted(variables["params"])
        ['bias', 'proxy_bias', 'proxy_scale', 'scale']

    Reference:
        Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence,
        2021, arXiv:2106.03743; see `proxy.proxy_norm`.
    """

    method: Method | Groups
    activation: Activation = jax.nn.relu
    num_quantiles: int = 200
    proxy_epsilon: float = 0.03
    proxy_scale_init: Initializer = zeros
    proxy_bias_init: Initializer = zeros
    epsilon: float = dataclasses.field(default=1e-3, kw_only=True)

    @nn.compact
    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        function = partial(
            proxy_norm,
            method=self.method,
            proxy_scale=channel_parameter(self, "proxy_scale", self.proxy_scale_init, x),
            proxy_bias=channel_parameter(self, "proxy_bias", self.proxy_bias_init, x),
            num_quantiles=self.num_quantiles,
            proxy_epsilon=self.proxy_epsilon,
        )
        if options.get("activation") is None:
            options["activation"] = self.activation
        return call_function(self, x, function, options)
