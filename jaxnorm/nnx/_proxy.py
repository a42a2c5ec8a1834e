"""Proxy Normalization as a layer."""

from functools import partial
from typing import Any, Unpack

import jax
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxnorm._core.groups import Groups, Method
from jaxnorm._layers import Activation, CallOptions
from jaxnorm.nnx._call import Function, zeros
from jaxnorm.proxy import proxy_norm


class ProxyNorm(Function):
    """Normalization, activation, and its output standardized by a Gaussian proxy:
    `proxy.proxy_norm`.

        z = activation(scale x^ + bias),    y = (z - mean_q(p)) / sqrt(var_q(p) + proxy_epsilon)

    Parameters are `scale`, `bias`, `proxy_scale` and `proxy_bias`, (C,). Decay the last two, as the
    authors do, and not the first two.

    Args:
        num_features: channels.
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
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxnorm import methods
        >>> layer = ProxyNorm(3, methods.layer_norm(), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.proxy_scale.shape
        ((4, 8, 8, 3), (3,))

    Reference:
        Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence,
        2021, arXiv:2106.03743; see `proxy.proxy_norm`.
    """

    def __init__(
        self,
        num_features: int,
        method: Method | Groups,
        activation: Activation = jax.nn.relu,
        *,
        num_quantiles: int = 200,
        proxy_epsilon: float = 0.03,
        proxy_scale_init: Initializer = zeros,
        proxy_bias_init: Initializer = zeros,
        epsilon: float = 1e-3,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.method, self.activation = method, activation
        self.num_quantiles, self.proxy_epsilon = num_quantiles, proxy_epsilon
        super().__init__(num_features, epsilon=epsilon, rngs=rngs, **options)
        self.proxy_scale = nnx.Param(
            proxy_scale_init(rngs.params(), (num_features,), self.param_dtype)
        )
        self.proxy_bias = nnx.Param(
            proxy_bias_init(rngs.params(), (num_features,), self.param_dtype)
        )

    def __call__(
        self, x: ArrayLike, use_running_average: bool | None = None, **options: Unpack[CallOptions]
    ) -> jax.Array:
        """Normalize x; options as in `Norm`, except that `use_running_average` has no effect."""
        function = partial(
            proxy_norm,
            method=self.method,
            proxy_scale=self.proxy_scale[...],
            proxy_bias=self.proxy_bias[...],
            num_quantiles=self.num_quantiles,
            proxy_epsilon=self.proxy_epsilon,
        )
        if options.get("activation") is None:
            options["activation"] = self.activation
        return self._run(x, function, options)
