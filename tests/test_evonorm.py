"""EvoNorm B0 and S0 against their definitions in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, differentiated

from jaxnorm import methods, moments

SHAPE = (4, 2, 3, 6)
pytestmark = pytest.mark.usefixtures("x64")


def draw(shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, shape), *rng.normal(size=(3, 1, 1, 1, shape[-1]))


def b0(xp, x, v, scale, bias, var=None):
    var = x.var((0, 1, 2), keepdims=True) if var is None else var
    own = x.var((1, 2), keepdims=True)
    return x / xp.maximum(xp.sqrt(var + 1e-5), v * x + xp.sqrt(own + 1e-5)) * scale + bias


def s0(xp, x, v, scale, bias):
    groups = x.reshape(*x.shape[:3], 3, 2)
    var = groups.var((1, 2, 4), keepdims=True)
    var = xp.broadcast_to(var, (x.shape[0], 1, 1, 3, 2)).reshape(x.shape[0], 1, 1, 6)
    return x / (1 + xp.exp(-v * x)) / xp.sqrt(var + 1e-5) * scale + bias


def flat(f):
    """f of parameters (C,)."""
    return lambda x, v, scale, bias, *rest: f(x, *(t.reshape(-1) for t in (v, scale, bias)), *rest)


def test_b0():
    args = draw()
    state = {"var": jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, 6), jnp.float32)}

    def ours(x, v, scale, bias, train=True):
        options = {"v": v, "scale": scale, "bias": bias}
        return methods.evonorm_b0().apply(x, state, train=train, **options)

    y, gradients, new = differentiated(flat(ours))(*args)
    close(y, b0(np, *args))
    close(gradients, differentiated(lambda *args: (b0(jnp, *args), None))(*args)[1])
    np.testing.assert_allclose(
        new["var"], 0.9 * np.asarray(state["var"]) + 0.1 * args[0].var((0, 1, 2)), rtol=1e-6
    )
    y, gradients, unchanged = differentiated(flat(partial(ours, train=False)))(*args)
    var = np.asarray(state["var"], "f8")
    close(y, b0(np, *args, var=var))
    close(
        gradients,
        differentiated(lambda *args: (b0(jnp, *args, var=var[None, None, None]), None))(*args)[1],
    )
    assert (unchanged["var"] == state["var"]).all()


def test_s0():
    args = draw()

    def ours(x, v, scale, bias):
        options = {"v": v, "scale": scale, "bias": bias}
        return methods.evonorm_s0(3).apply(x, {}, train=True, **options)[0], None

    y, gradients, _ = differentiated(flat(ours))(*args)
    close(y, s0(np, *args))
    close(gradients, differentiated(lambda *args: (s0(jnp, *args), None))(*args)[1])


def test_limits_and_bounds():
    x, v, *_ = draw()
    x, v = jnp.asarray(x), jnp.abs(jnp.asarray(v).ravel())
    first, exact = methods.evonorm_b0().init(SHAPE), {"epsilon": 0.0}

    @jax.jit
    def batch(x, v):
        return methods.evonorm_b0(**exact).apply(x, first, train=True, v=v)[0]

    @jax.jit
    def sample(x, v):
        return methods.evonorm_s0(3, **exact).apply(x, {}, train=True, v=v)[0]

    std, own, group = (
        jnp.sqrt(moments(x, m()).var)
        for m in (methods.batch_norm, methods.instance_norm, partial(methods.group_norm, 3))
    )
    group = jnp.repeat(group, 2, axis=-1)
    close(batch(x, jnp.zeros(6)), x / jnp.maximum(std, own))
    assert (batch(x, v) < 1 / v[None, None, None]).all()
    # one example
    close(batch(x[:1], v), x[:1] / (own[:1] + jnp.maximum(0, v[None, None, None] * x[:1])))
    close(sample(x, jnp.zeros(6)), x / (2 * group))
    close(sample(x, jnp.full(6, 1e6)), jax.nn.relu(x) / group)
    close(sample(x[:2], v), sample(x, v)[:2])  # of the others S0 knows nothing
    close(sample(2 * x, v / 2), sample(x, v))


def test_they_keep_x_alone():
    x, v = jnp.ones((16, 8, 8, 64), jnp.bfloat16), jnp.ones(64, jnp.float32)
    for method in (methods.evonorm_s0(), methods.evonorm_b0()):

        def f(x, v, method=method):
            return method.apply(x, method.init(x.shape), train=True, v=v, scale=v)[0]

        pull = jax.eval_shape(lambda x, v, f=f: jax.vjp(f, x, v)[1], x, v)
        kept = [t for t in jax.tree.leaves(pull) if t.size >= x.size]
        assert {(t.shape, t.dtype) for t in kept} == {(x.shape, x.dtype)}


def test_errors():
    x, method = jnp.ones(SHAPE), methods.evonorm_b0()
    with pytest.raises(
        ValueError, match="size 6, which does not split into 32 equal groups.* divisor of 6: 1, 2"
    ):
        methods.evonorm_s0().apply(x, {}, train=True, v=jnp.ones(6))
    with pytest.raises(ValueError, match="v has shape \\(4,\\).*Expected \\(6,\\)"):
        method.apply(x, method.init(SHAPE), train=True, v=jnp.ones(4))
    with pytest.raises(ValueError, match=r"var of shape \(4,\).*var of shape \(6,\)"):
        method.apply(x, method.init((1, 4)), train=False, v=jnp.ones(6))
