"""Meshes with axes of type Explicit, the default of `jax.make_mesh`: what is sharded how, layers
and state included."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import EAGER, SHARDED, fitting, mesh, spec
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_contexts import ROWS, check

from jaxnorm import (
    init_running,
    linen,
    merge,
    methods,
    moments,
    nnx,
    norm,
    normalize,
    pool,
    running_moments,
    update_cumulative,
    update_running,
)

SHAPE = (16, 8, 3, 12)
X = np.random.default_rng(0).normal(size=SHAPE).astype("f4")
BY_NAME = {row.name: row for row in ROWS}


def sharded(cut="NC", kind=AxisType.Explicit, x=X):
    return jax.device_put(x, NamedSharding(mesh(cut, kind), spec(cut)))


def entered(x, set_mesh):
    return jax.set_mesh(x.sharding.mesh) if set_mesh else contextlib.nullcontext()


def specs(tree):
    return [t.sharding.spec for t in jax.tree.leaves(tree)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("context", EAGER, ids=str)
def test_outside_of_jit(context):
    """Weights have a gradient here: JAX makes the zeros of an unused argument under `jax.set_mesh`
    only."""
    check(BY_NAME["group_norm"], context, "NC", True)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("set_mesh", (True, False))
def test_every_step_between_statistics_and_output(set_mesh):
    """moments, pool, merge, running state, normalize: typed as they should be, and equal to what
    one device computes."""
    method = methods.batch_norm()

    def f(x):
        fine = moments(x, methods.instance_norm())
        whole = pool(fine, method)
        both = merge(whole, moments(x * 2, method))
        state = update_running(init_running((12,)), moments(x, methods.ghost_batch_norm(4)))
        total = update_cumulative(init_running((12,), counted=True), both)
        return (
            (fine, whole, both),
            (state, total),
            normalize(x, running_moments(total, method, x.shape)),
        )

    x = sharded(x=X.astype("f8"))
    with entered(x, set_mesh):
        (fine, whole, both), state, y = jax.jit(f)(x)
    assert specs(fine) == [spec("NC")] * 3
    assert specs((whole, both)) == [P(None, None, None, "j")] * 6
    assert set(specs(state)) == {P(None)}
    assert y.sharding.spec == spec("NC")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        ((fine, whole, both), state, y),
        jax.jit(f)(X.astype("f8")),
    )


def test_state_is_a_carry_with_its_own_sharding():
    def step(state, _):
        return update_running(state, moments(x, methods.batch_norm())), None

    for s in (P(None), P("j")):
        with jax.set_mesh(mesh("NC", AxisType.Explicit)):
            x = sharded()
            state = jax.tree.map(lambda t, s=s: jax.device_put(t, s), init_running((12,)))
            assert specs(
                jax.jit(lambda state: jax.lax.scan(step, state, None, length=2)[0])(state)
            ) == [s, s]


@pytest.mark.parametrize("cut, set_mesh", [("N", True), ("NC", False)])
def test_linen_layers(cut, set_mesh):
    layers = [
        linen.BatchNorm(use_running_average=False),
        linen.Norm(methods.ghost_batch_norm(4), use_running_average=False),
    ]
    layers += [linen.GroupNorm(3)]

    def f(x, gy):
        outs = []
        for layer in layers:
            variables = jax.tree.map(
                lambda t: t + 0.1, layer.init(jax.random.key(0), jnp.ones((1, *x.shape[1:])))
            )
            apply = functools.partial(layer.apply, mutable="batch_stats")
            y, pull, new = jax.vjp(apply, variables, x, has_aux=True)
            outs.append((y, pull(gy)[0]["params"], pull(gy)[1], new))
        return outs

    x = sharded(cut)
    with entered(x, set_mesh):
        got = jax.jit(f)(x, x)
    for y, _, dx, new in got:
        assert y.sharding.spec == dx.sharding.spec == spec(cut)
        assert all(entry is None for s in specs(new) for entry in s)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), got, jax.jit(f)(X, X))


def test_nnx_layers():
    x = sharded("N")
    for make in (lambda r: nnx.BatchNorm(12, rngs=r), lambda r: nnx.GroupNorm(12, 3, rngs=r)):
        layer, single = make(flax_nnx.Rngs(0)), make(flax_nnx.Rngs(0))
        y = flax_nnx.jit(lambda layer, x: layer(x))(layer, x)
        assert y.sharding.spec == spec("N")
        np.testing.assert_allclose(y, single(jnp.asarray(X)), atol=1e-5)
        state, wanted = (flax_nnx.to_pure_dict(flax_nnx.state(t)) for t in (layer, single))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state, wanted)


@pytest.mark.parametrize("set_mesh", (True, False))
def test_activations_may_use_arrays_of_the_mesh(set_mesh):
    """A learned slope: its gradient, and no value of an earlier call."""

    class Slope:
        def __call__(self, y):
            return jnp.where(y > 0, y, self.slope * y)

    activation = Slope()

    def loss(x, slope):
        activation.slope = slope
        return (norm(x, methods.group_norm(3), activation=activation)[0] * x).sum()

    x = sharded("N")
    for factor in (1.0, 2.0):

        def scaled(x, slope, factor=factor):
            return loss(x, slope * factor)

        run = jax.jit(jax.grad(scaled, (0, 1)))
        wanted = run(X, jnp.float32(0.5))
        with entered(x, set_mesh):
            got = run(x, jnp.float32(0.5))
        assert got[0].sharding.spec == spec("N")
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted
        )


def test_transformations_compose():
    """remat, scan over layers, vmap along a sharded axis and forward over reverse, each on typed
    arrays."""
    f = lambda x: norm(x, methods.batch_and_group_norm(2, 3))[0]  # noqa: E731

    def g(x):
        scanned = jax.lax.scan(lambda x, _: (f(x), None), x, None, length=2)[0]
        mapped = jax.vmap(lambda t: norm(t[None], methods.group_norm(3))[0][0])(x)
        hvp = jax.jvp(jax.grad(lambda x: jnp.sin(jax.checkpoint(f)(x)).sum()), (x,), (x,))[1]
        return scanned, mapped, hvp

    got = jax.jit(g)(sharded("N"))
    assert specs(got) == [spec("N")] * 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, jax.jit(g)(X))


def test_axes_named_together_on_one_array_axis():
    """Four groups fit the first of two mesh axes, and are typed so; three fit none."""
    where = mesh("NC", AxisType.Explicit)
    x = jax.device_put(np.ones((24, 2, 4), "f4"), NamedSharding(where, P(("i", "j"))))
    for ghosts, wanted in (
        (2, None),
        (3, None),
        (4, "i"),
        (8, ("i", "j")),
        (12, "i"),
        (24, ("i", "j")),
    ):
        assert moments(x, methods.ghost_batch_norm(ghosts)).mean.sharding.spec == P(
            wanted, None, None
        ), ghosts


@pytest.mark.parametrize("context", SHARDED[1:], ids=str)
def test_statistics_fit(context):
    m = context.run(lambda x: moments(x, methods.group_norm(4)), "NC")(X)
    assert specs(m) == [spec("NC")] * 3
    m = context.run(lambda x: moments(x, methods.group_norm(3)), "NC")(X)
    assert specs(m) == [fitting(m.mean, "NC")] * 3 == [P("i", None, None, None)] * 3
