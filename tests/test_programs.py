"""Programs that JAX makes of the library: outside of jit, and exported with symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax import export, monitoring

from jaxnorm import denormalize, linen, methods, moments, nnx, norm

METHODS = {
    "batch": methods.batch_norm(),
    "ghost": methods.ghost_batch_norm(ghost_size=2),
    "group": methods.group_norm(2),
    "layer": methods.layer_norm(),
    "tokens": methods.token_layer_norm(),
    "rms": methods.rms_norm(),
    "batch group": methods.batch_group_norm(2),
}


@pytest.fixture(scope="module")
def compilations():
    """Names of what is compiled, as it is."""
    names = []
    monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: names.append(event) if "backend_compile" in event else None
    )
    return names


def calls():
    x = jax.random.normal(jax.random.key(0), (4, 3, 3, 8))
    yield "norm", lambda: norm(x, methods.group_norm(2), scale=jnp.ones(8))[0]
    yield "norm, weights", lambda: norm(x, methods.batch_norm(), weights=jnp.ones((4, 1, 1, 1)))[0]
    batch, group = linen.BatchNorm(use_running_average=False), linen.GroupNorm(2)
    state = batch.init(jax.random.key(0), x)
    parameters = group.init(jax.random.key(0), x)
    yield "linen.GroupNorm", lambda: group.apply(parameters, x)
    yield "linen.BatchNorm", lambda: batch.apply(state, x, mutable="batch_stats")
    layer = nnx.BatchNorm(8, rngs=flax_nnx.Rngs(0))
    yield "nnx.BatchNorm", lambda: layer(x)
    yield (
        "grad",
        lambda: jax.grad(lambda x: batch.apply(state, x, mutable="batch_stats")[0].sum())(x),
    )

    def by(activation):
        return norm(x, methods.group_norm(2), activation=activation)[0]

    yield "activation", lambda: by(jax.nn.silu)
    yield "a scale as large as x", lambda: norm(x, methods.batch_norm(), scale=x)[0]
    m = moments(x, methods.group_norm(2))
    yield "denormalize", lambda: jax.grad(lambda x: denormalize(x, m, scale=x + 9).sum())(x)
    yield "frn", lambda: methods.filter_response_norm().apply(x, {}, train=True)


def test_an_activation_has_the_values_that_it_reads_at_the_time():
    """Nothing of an earlier call is remembered with it."""
    x, slope = jax.random.normal(jax.random.key(0), (4, 3, 3, 8)), [2.0]

    def step():
        def loss(x):
            y = norm(x, methods.batch_norm(), activation=lambda y: y * slope[0])[0]
            return y[0].sum()

        return jax.grad(loss)(x)

    first = step()
    slope[0] = 3.0
    np.testing.assert_allclose(step(), 1.5 * first, rtol=1e-4, atol=1e-6)


def test_the_second_call_outside_of_jit_compiles_nothing(compilations):
    for name, call in calls():
        for _ in range(2):
            jax.block_until_ready(call())
        compilations.clear()
        jax.block_until_ready(call())
        assert compilations == [], name


@pytest.mark.parametrize("platform", ("cpu", "cuda"))
@pytest.mark.parametrize("name", METHODS)
def test_export_with_symbolic_sizes(name, platform):
    """The batch for all; the image as well where the sets do not depend on it."""
    method = METHODS[name]
    n = "2*n" if name == "ghost" else "n"
    shape = export.symbolic_shape(f"{n}, h, w, 8")

    def f(x, scale):
        return jax.value_and_grad(lambda x: (norm(x, method, scale=scale)[0] * jnp.sin(x)).sum())(x)

    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    program = export.export(jax.jit(f), platforms=[platform])(
        x, jax.ShapeDtypeStruct((8,), jnp.float32)
    )
    if platform == "cpu":
        x, scale = jax.random.normal(jax.random.key(0), (4, 3, 5, 8)), jnp.arange(8.0)
        for got, want in zip(program.call(x, scale), jax.jit(f)(x, scale), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_export_of_arrays_of_the_rank_of_x():
    """A scale and a bias as large as x, there and back."""
    shape = export.symbolic_shape("n, t, 8")

    def f(x, scale, bias):
        def there(x, scale, bias):
            return norm(x, methods.token_layer_norm(), scale=scale, bias=bias)

        (y, m), pull = jax.vjp(there, x, scale, bias)
        return denormalize(y, m, scale=scale, bias=bias), pull((y, m))

    program = export.export(jax.jit(f))(*[jax.ShapeDtypeStruct(shape, jnp.float32)] * 3)
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    got, want = program.call(x, x + 5, x), jax.jit(f)(x, x + 5, x)
    np.testing.assert_allclose(got[0], x, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", (123.456, 100000.1, -1e18))
def test_a_constant_is_its_mean(name, value):
    """Whatever it is, y is 0: the mean is taken again about the first one, whose rounding would
    show."""
    if name != "rms":
        y, m = jax.jit(lambda x: norm(x, METHODS[name]))(jnp.full((16, 16, 16, 8), value))
        assert (m.var == 0).all()
        assert (y == 0).all()
