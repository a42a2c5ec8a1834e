"""Meshes with axes of type Explicit, the default of `jax.make_mesh`: what is sharded how, layers
and state included."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import EAGER, SHARDED, fitting, mesh, spec
from flax import linen as flax_linen
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
    update_averaged,
    update_cumulative,
    update_running,
)
from jaxnorm._core.meshes import _compiled

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
    one device computes; also where a group of channels spans devices."""
    method = methods.batch_norm()

    def f(x):
        fine = moments(x, methods.instance_norm())
        whole, groups = pool(fine, method), pool(fine, methods.group_norm(3))
        both = merge(whole, moments(x * 2, method))
        ghosts, first = moments(x, methods.ghost_batch_norm(4)), init_running((12,), counted=True)
        states = update_running(init_running((12,)), ghosts), update_averaged(first, ghosts)
        total = update_cumulative(first, both)
        return (
            (fine, whole, groups, both),
            (*states, total),
            normalize(x, running_moments(total, method, x.shape)),
        )

    x = sharded(x=X.astype("f8"))
    with entered(x, set_mesh):
        (fine, whole, groups, both), states, y = jax.jit(f)(x)
    assert specs(fine) == [spec("NC")] * 3
    assert specs(groups) == [spec("N")] * 3
    assert specs((whole, both)) == [P(None, None, None, "j")] * 6
    assert set(specs(states)) == {P(None)}
    assert y.sharding.spec == spec("NC")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        ((fine, whole, groups, both), states, y),
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


OWN_RULES = {
    "batch_norm": (methods.batch_norm(), {}),
    "batch_group_norm": (methods.batch_group_norm(8), {}),
    "batch_renorm": (methods.batch_renorm(), {"rmax": np.float32(1.5)}),
    "momentum_batch_norm": (methods.momentum_batch_norm(), {"train_momentum": np.float32(0.5)}),
    "memorized_batch_norm": (methods.memorized_batch_norm((0.5, 0.5)), {}),
    "cross_iteration_norm": (
        methods.cross_iteration_norm(),
        {"inputs": X, "kernel": np.eye(12, dtype="f4"), "layer": lambda x, kernel: x @ kernel},
    ),
    "moving_average_norm": (methods.moving_average_norm(), {"tap": np.zeros(12, "f4")}),
    "switchable_norm": (methods.switchable_norm(), {}),
    "domain_batch_norm": (methods.domain_batch_norm(2), {"domain": np.arange(16) % 2}),
    "group_norm_plus": (methods.group_norm_plus(3), {}),
    "filter_response_norm": (methods.filter_response_norm(), {}),
    "evonorm_b0": (methods.evonorm_b0(), {}),
    "evonorm_s0": (methods.evonorm_s0(3), {}),
    "proxy_norm": (methods.proxy_norm(methods.group_norm(3)), {"activation": jax.nn.relu}),
}


OFTEN = ("cross_iteration_norm", "group_norm_plus", "proxy_norm")


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in OWN_RULES],
)
def test_methods_with_a_rule(name):
    """Under jit and outside of it, from step to step: x's sharding and one device's numbers."""
    method, options = OWN_RULES[name]

    def step(x, state):
        return method.apply(x, state, train=True, **options)

    def two_steps(x):
        _, state = step(x, method.init(x.shape, kernel_shape=(12, 12)))
        return step(x * 2, state)

    x = sharded()
    y, state = jax.jit(two_steps)(x)
    eager, after = two_steps(x)
    assert y.sharding.spec == eager.sharding.spec == spec("NC")
    for got in ((y, state), (eager, after)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            got,
            jax.jit(two_steps)(X),
        )


def dense_of(scale):
    return lambda inputs, kernel: scale * jnp.matmul(inputs, kernel)


@pytest.mark.parametrize("jit, set_mesh", [(True, False), (False, True)])
def test_the_layer_in_front_is_a_new_function_in_each_step(jit, set_mesh):
    """None is kept, nor what it closes over; y, the state and the gradient are one device's.

    Outside of jit JAX differentiates scalars of a mesh under `jax.set_mesh` only.
    """
    method = methods.cross_iteration_norm()
    kernel = np.random.default_rng(1).normal(size=(12, 6)).astype("f4")

    def loss(kernel, x, state, scale):
        layer = dense_of(scale)
        options = {"inputs": x, "kernel": kernel, "layer": layer, "activation": jnp.sin}
        y, state = method.apply(layer(x, kernel), state, train=True, **options)
        return (y * y).sum(), (y, state)

    def two_steps(kernel, x):
        _, (_, state) = loss(kernel, x, method.init((1, 6), kernel_shape=(12, 6)), 1.0)
        return jax.grad(loss, has_aux=True)(kernel, x, state, 2.0)

    x, kept = sharded("N"), _compiled._cache_size()
    with entered(x, set_mesh):
        gradient, (y, state) = (jax.jit(two_steps) if jit else two_steps)(
            jax.device_put(kernel, NamedSharding(x.sharding.mesh, P())), x
        )
    assert y.sharding.spec == P("i", None, None, None)
    assert _compiled._cache_size() == kept
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        (gradient, (y, state)),
        jax.jit(two_steps)(kernel, X),
    )


@pytest.mark.parametrize(
    "method",
    [
        methods.cross_iteration_norm(),
        pytest.param(methods.moving_average_norm(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layers_with_a_layer_in_front(method):
    x = sharded("N")
    conv = flax_linen.Conv(6, (3, 3), use_bias=False)
    layer = linen.Norm(method, layer=conv, use_running_average=False)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, *SHAPE[1:])))

    def step(variables, x):
        return layer.apply(variables, x, mutable="batch_stats")

    y, new = jax.jit(step)(variables, x)
    wanted, state = jax.jit(step)(variables, X)
    conv = flax_nnx.Conv(12, 6, (3, 3), use_bias=False, rngs=flax_nnx.Rngs(0))
    twin = nnx.Norm(6, method, layer=conv, rngs=flax_nnx.Rngs(0))
    twin.layer.kernel[...] = variables["params"]["layer"]["kernel"]
    out = flax_nnx.jit(lambda layer, x: layer(x))(twin, x)
    assert y.sharding.spec == out.sharding.spec == P("i", None, None, None)
    for got in (y, out):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), new, state)
    for name, t in state["batch_stats"].items():
        np.testing.assert_allclose(getattr(twin, name)[...], t, atol=1e-4)


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
