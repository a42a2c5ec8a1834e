"""Every transformation of JAX, against plain autodiff of the formula written out."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnorm import methods, moments, norm, normalize, pool

SHAPE = (4, 3, 6)
pytestmark = pytest.mark.usefixtures("x64")

# (method, statistic's shape, whether the mean is fixed)
ROWS = [
    (methods.batch_norm(), (1, 1, 6), False),
    (methods.batch_and_group_norm(2, 3), (2, 1, 3), False),
    (methods.rms_norm(), (4, 3, 1), True),
]
OPTIONS = [{}, {"weights": True}, {"activation": True}]
CASES = [(row, option) for row in ROWS for option in OPTIONS if (row is ROWS[1]) != (option == {})]


def naive(x, scale, w, shape, fixed, activation):
    """y = (x - mean) / sqrt(var + epsilon) scale, with every axis n as (groups, n / groups)."""
    cut = [k for n, g in zip(x.shape, shape, strict=True) for k in (g, n // g)]
    rest = tuple(range(1, 2 * x.ndim, 2))
    t, w = x.reshape(cut), jnp.broadcast_to(w, x.shape).reshape(cut)
    n = w.sum(rest, keepdims=True)
    mean = 0 if fixed else (w * t).sum(rest, keepdims=True) / n
    var = (w * (t - mean) ** 2).sum(rest, keepdims=True) / n
    y = ((t - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * jnp.broadcast_to(scale, x.shape)
    return jnp.tanh(y) if activation else y


def functions(row, option):
    """The library's and the naive function of (x, scale), nonlinear in both."""
    method, shape, fixed = row
    w = np.random.default_rng(5).uniform(0.1, 1, SHAPE)
    activation = "activation" in option
    options = ({"weights": w} if "weights" in option else {}) | (
        {"activation": jnp.tanh} if activation else {}
    )

    def ours(x, scale):
        return norm(x, method, scale=scale, **options)[0]

    return ours, lambda x, scale: naive(
        x, scale, w if "weights" in option else 1.0, shape, fixed, activation
    )


def loss(f, x, scale):
    return jnp.sin(f(x, scale) * jnp.arange(1.0, 7.0).reshape(1, 1, 6)).sum()


def arguments(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=SHAPE)), jnp.asarray(rng.normal(size=6))


def stacked(k=3):
    return jax.tree.map(lambda *t: jnp.stack(t), *[arguments(i) for i in range(k)])


def gradient(f, x, scale):
    return jax.grad(partial(loss, f), (0, 1))(x, scale)


def scanned(f, x, scale):
    """Gradient descent as a scan."""

    def step(args, _):
        grads = gradient(f, *args)
        return jax.tree.map(lambda a, g: a - 0.01 * g, args, grads), args

    return jax.lax.scan(step, (x, scale), None, length=3)


def linearized(f, x, scale):
    y, tangent = jax.linearize(f, x, scale)
    return y, tangent(*arguments(1)), tangent(*arguments(2))


def transposed(f, x, scale):
    """Twice transposed is linearized."""
    _, tangent = jax.linearize(f, x, scale)
    back = jax.linear_transpose(tangent, x, scale)
    forth = jax.linear_transpose(lambda y: back(y), f(x, scale))
    return back(arguments(1)[0]), forth(arguments(2))


TRANSFORMS = {
    "value": lambda f, *args: f(*args),
    "grad": gradient,
    "vmap": lambda f, *_: jax.vmap(f)(*stacked()),
    "vmap of grad": lambda f, *_: jax.vmap(partial(gradient, f))(*stacked()),
    "vmap over other axes": lambda f, x, s: jax.vmap(f, (2, None), 1)(jnp.stack([x, 2 * x], 2), s),
    "jvp": lambda f, *args: jax.jvp(f, args, arguments(1)),
    "linearize": linearized,
    "transpose": transposed,
    "jacfwd": lambda f, *args: jax.jacfwd(f, 1)(*args),
    "jacrev": lambda f, *args: jax.jacrev(f, 1)(*args),
    "forward over reverse": lambda f, *args: jax.jvp(partial(gradient, f), args, arguments(1)),
    "reverse over forward": lambda f, *args: jax.grad(
        lambda *a: jax.jvp(partial(loss, f), a, arguments(1))[1], (0, 1)
    )(*args),
    "reverse over reverse": lambda f, *args: jax.vjp(partial(gradient, f), *args)[1](arguments(1)),
    "third order": lambda f, *args: jax.jvp(
        lambda *a: jax.jvp(partial(gradient, f), a, arguments(1))[1], args, arguments(2)
    ),
    "checkpoint": lambda f, *args: gradient(jax.checkpoint(f), *args),
    "checkpoint, nothing saved": lambda f, *args: gradient(
        jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable), *args
    ),
    "scan": scanned,
}


SLOW = ("third order", "checkpoint, nothing saved", "reverse over forward")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in TRANSFORMS]
)
def test_transformations(name):
    """One compilation for each transformation: all rows and options at once."""

    @partial(jax.jit, static_argnums=0)
    def run(which, x, scale):
        return [TRANSFORMS[name](functions(*case)[which], x, scale) for case in CASES]

    ours, theirs = run(0, *arguments()), run(1, *arguments())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), ours, theirs)


def test_eager_equals_compiled():
    x, scale = arguments()
    for case in CASES[1:2]:
        f = functions(*case)[0]
        np.testing.assert_allclose(f(x, scale), jax.jit(f)(x, scale), atol=1e-13)


def test_derivatives_through_what_stands_between():
    """Moments, ordinary JAX that closes over traced state, then normalize: Momentum BN's blend as
    an example."""
    x, _ = arguments()
    mean, var = jnp.ones((1, 1, 6)), jnp.full((1, 1, 6), 2.0)

    def ours(x, a):
        m = moments(x, methods.batch_norm())
        return normalize(
            x, jax.tree.map(lambda t, s: a * t + (1 - a) * s, m, type(m)(m.count, mean, var))
        )

    def plain(x, a):
        mu = a * x.mean((0, 1), keepdims=True) + (1 - a) * mean
        v = a * x.var((0, 1), keepdims=True) + (1 - a) * var
        return (x - mu) / jnp.sqrt(v + 1e-5)

    @partial(jax.jit, static_argnums=0)
    def hvp(f, x, a):
        g = jax.grad(lambda x, a: jnp.sin(f(x, a)).sum(), (0, 1))
        return f(x, a), g(x, a), jax.jvp(g, (x, a), (jnp.cos(x), jnp.ones_like(a)))[1]

    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-10),
        *(hvp(f, x, jnp.array(0.3)) for f in (ours, plain)),
    )


def test_second_derivatives_of_moments_and_weights():
    """Every entry of count, mean and var, pooled, twice differentiated in x and weights."""
    x, w = arguments()[0], jnp.asarray(np.random.default_rng(3).uniform(0.2, 1, SHAPE))

    def ours(x, w):
        m = pool(moments(x, (4, 1, 6), weights=w), (2, 1, 3))
        return jnp.sin(m.count) * m.mean + jnp.cos(m.var)

    def plain(x, w):
        t, u = x.reshape(2, 2, 3, 3, 2), w.reshape(2, 2, 3, 3, 2)
        n = u.sum((1, 2, 4), keepdims=True)
        mean = (u * t).sum((1, 2, 4), keepdims=True) / n
        var = (u * (t - mean) ** 2).sum((1, 2, 4), keepdims=True) / n
        return (jnp.sin(n) * mean + jnp.cos(var)).reshape(2, 1, 3)

    @partial(jax.jit, static_argnums=0)
    def hvp(f, x, w):
        g = jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))
        return g(x, w), jax.jvp(g, (x, w), (jnp.cos(x), jnp.sin(w)))[1]

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-10), hvp(ours, x, w), hvp(plain, x, w))


def test_traced_options_do_not_retrace():
    """epsilon, scale, center and weights are data."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def f(x, epsilon, center, w):
        return norm(x, methods.group_norm(3), epsilon=epsilon, center=center, weights=w)[0]

    x, _ = arguments()
    for k in range(1, 4):
        y = f(x, 1e-3 * k, jnp.full((4, 1, 3), float(k)), jnp.full((4, 1, 1), k, "f8"))
    np.testing.assert_allclose(y, norm(x, (4, 1, 3), epsilon=3e-3)[0], atol=1e-12)
