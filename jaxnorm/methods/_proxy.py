"""Proxy Normalization: the activation's output standardized as if its input were Gaussian."""

import functools
import statistics
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm._core.arithmetic import statistic_dtype
from jaxnorm._core.checks import check_epsilon
from jaxnorm._core.groups import Groups
from jaxnorm._core.moments import Moments
from jaxnorm._core.normalize import normalize
from jaxnorm.methods._fields import Count, as_value
from jaxnorm.methods._frame import applied, measured, parameter
from jaxnorm.methods._method import Method, Options, Parameters, Result, State
from jaxnorm.methods._row import Row


@as_value
class proxy_norm(Method):
    """Normalization, activation, and standardization of each channel by a Gaussian proxy.

        z = activation(scale x^ + bias),                 x^ normalized by `method`
        p = activation(scale (proxy_bias + (1 + proxy_scale) q) + bias)
        y = (z - mean_q(p)) / sqrt(var_q(p) + proxy_epsilon)

    with q the n quantiles sqrt(2) erfinv(2 (i + 1/2) / n - 1) of the normal distribution. So the
    channels of the output are standardized, as batch normalization's are, without any statistic of
    the batch. Training and inference are the same. Mean and variance of the proxy are computed at
    each call and pass gradients to all four parameters. The backward pass keeps x and small arrays.
    The activation of the equation is the one given to `apply`, and left out the identity. Decay
    `proxy_scale` and `proxy_bias`, as the authors do, and not scale and bias.

    Args:
        method: a row that shares no statistics between examples: `methods.layer_norm()`,
            `methods.group_norm(4)`.
        num_quantiles: n; 200 in the authors' code.
        proxy_epsilon: added to the proxy's variance, in the unit of the activation squared.
        epsilon: added to the variance of x, in the unit of x squared, in place of the row's.

    State: {}.

    Options of apply:
        proxy_scale: gamma', learned, (C,), 0 at first, which is the identity.
        proxy_bias: beta', learned, (C,), 0 at first.

    Raises:
        TypeError: the method is no row of the table.
        ValueError: a method that pools the batch, less than one quantile.

    Example:
        >>> from jaxnorm import methods
        >>> x = jax.random.normal(jax.random.key(0), (4, 32, 32, 8))
        >>> method = proxy_norm(methods.layer_norm())
        >>> y, _ = method.apply(x, {}, train=True, activation=jax.nn.relu)
        >>> round(abs(float(y.mean())), 1), round(float(y.var()), 1)  # var / (var + proxy_epsilon)
        (0.0, 0.9)

    Reference:
        Proxy-Normalizing Activations to Match Batch Normalization while Removing Batch Dependence,
        2021, arXiv:2106.03743. The definition was read in the authors' code; the gradient of the
        proxy's statistics is taken by differentiation, not by hand and from step to step as there.
    """

    method: Row
    num_quantiles: Count = 200
    proxy_epsilon: float = 0.03
    epsilon: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.method, Groups):
            object.__setattr__(self, "method", Row(self.method))
        if not isinstance(self.method, Row):
            raise TypeError(
                f"proxy_norm(method) takes a row of the table. Got {self.method!r}; expected for "
                "example methods.layer_norm() or methods.group_norm(4)."
            )
        if self.method.pools_batch:
            raise ValueError(
                f"proxy normalization stands in for statistics of the batch. Got {self.method}, "
                "which pools it; expected a row with batch=EACH such as methods.layer_norm() or "
                "methods.group_norm(4)."
            )
        check_epsilon(self.proxy_epsilon, "proxy_epsilon")

    @property
    def statistics(self) -> tuple[Method, ...]:  # type: ignore[override]
        return (self.method,)

    @property
    def activates(self) -> bool:
        return True

    def parameters(self, num_channels: int) -> Parameters:
        zeros = np.zeros(num_channels, np.float32)
        return {"proxy_scale": zeros, "proxy_bias": zeros}

    def rule(
        self,
        x: jax.Array,
        state: State,
        *,
        train: bool,
        proxy_scale: ArrayLike,
        proxy_bias: ArrayLike,
        **options: Unpack[Options],
    ) -> Result:
        wide = statistic_dtype(x.dtype)
        activation = options.get("activation") or (lambda y: y)
        names = {"scale": (options.get("scale"), 1), "bias": (options.get("bias"), 0)}
        names |= {"proxy_scale": (proxy_scale, 0), "proxy_bias": (proxy_bias, 0)}
        scale, bias, more_scale, more_bias = (
            (
                jnp.full((1,) * x.ndim, first) if t is None else parameter(t, name, x, options)
            ).astype(wide)
            for name, (t, first) in names.items()
        )
        q = jnp.asarray(_quantiles(self.num_quantiles), wide)
        proxy = jax.vmap(lambda q: scale * (more_bias + (1 + more_scale) * q) + bias)(q)
        proxy = activation(proxy)
        mean, var = proxy.mean(0), proxy.var(0)

        proxied = Moments(jnp.ones_like(var), mean, var)

        def activated(y: jax.Array) -> jax.Array:
            return normalize(activation(y), proxied, epsilon=self.proxy_epsilon)

        options["activation"] = activated
        m = measured(x, self.method, **options)
        centered = self.method.mean is None
        return applied(x, m, self.epsilon, centered=centered, **options), state


@functools.cache
def _quantiles(n: int) -> np.ndarray:
    normal = statistics.NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n) for i in range(n)])
