"""Where float32 and half precision show: constant sets, large means, the ends of their range.

Every case runs with a gradient and without one, on the CPU's branch and on that of other platforms,
which computes the same on a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx as flax_nnx
from registry import REGISTRY, SHAPE
from rows import ROWS, shape_of

import jaxnorm.nnx
from jaxnorm import linen, methods, moments, norm
from jaxnorm._core.platforms import OTHERS

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(params=["cpu", "other platforms"], scope="module")
def platform(request):
    """The branch that programs take: compiled programs are forgotten where it changes."""
    if request.param == "cpu":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        for module in ("mean_var", "standardize"):
            patch.setattr(f"jaxnorm._core.{module}.by_platform", lambda f, *args: f(OTHERS, *args))
        jax.clear_caches()
        yield request.param
    jax.clear_caches()


@partial(jax.jit, static_argnums=0, static_argnames=("epsilon", "channel_axis"))
def value(method, x, **options):
    return norm(x, method, **options)[0]


@partial(jax.jit, static_argnums=0, static_argnames=("epsilon", "channel_axis"))
def differentiated_value(method, x, **options):
    return jax.vjp(lambda x: norm(x, method, **options)[0], x)[0]


@partial(jax.jit, static_argnums=0, static_argnames=("epsilon", "channel_axis"))
def gradient(method, x, dy, **options):
    return jax.vjp(lambda x: norm(x, method, **options)[0], x)[1](dy)[0]


moments_of_rows = jax.jit(partial(moments, groups=methods.token_layer_norm()))

CONSTANTS = (-3333.3, 123456.7, 0.1)


def constant_cases():
    """Every row of the table at 1 to 4096 elements a set: one shape of each, the rest slow."""
    for row in ROWS:
        for rank, positions in ((2, ()), (3, (2,)), (3, (1024,)), (4, (4, 6))):
            for channel_axis in (-1, 1) if rank > 2 else (-1,):
                shape = [4, *positions]
                shape.insert(1 if channel_axis == 1 else len(shape), 6)
                if row.mean == 0 or rank not in row.ranks:
                    continue
                first = positions == (1024,) or rank == row.ranks[0] == 4
                marks = () if first and channel_axis == -1 else pytest.mark.slow
                id = f"{row}-{'x'.join(map(str, shape))}"
                yield pytest.param(row, tuple(shape), channel_axis, id=id, marks=marks)


@pytest.mark.parametrize(("row", "shape", "channel_axis"), list(constant_cases()))
def test_constant_sets_give_zero(platform, row, shape, channel_axis):
    method = row.call(shape, channel_axis)
    for constant in CONSTANTS:
        x = jnp.full(shape, constant, jnp.float32)
        for f in (value, differentiated_value):
            np.testing.assert_array_equal(f(method, x, channel_axis=channel_axis), 0)


QUICK_LENGTHS = (1, 12, 128, 129, 4096)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        pytest.param(n, dtype, marks=() if n in QUICK_LENGTHS and wide else pytest.mark.slow)
        for n in (1, 2, 3, 12, 16, 64, 127, 128, 129, 1000, 4096)
        for dtype, wide in (("float32", True), ("float16", False), ("bfloat16", False))
    ],
)
def test_constant_rows_give_zero(platform, length, dtype):
    """Also under weights, and where each row has a constant of its own."""
    constants = jnp.asarray((*CONSTANTS, 1e-6, 0.0), jnp.float32).clip(max=6e4)
    x = jnp.broadcast_to(constants[:, None], (5, length)).astype(dtype)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, x.shape), jnp.float32)
    for f in (value, differentiated_value):
        np.testing.assert_array_equal(f(methods.token_layer_norm(), x), 0)
        np.testing.assert_array_equal(f(methods.token_layer_norm(), x, weights=weights), 0)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_layer_of_constant_rows_gives_its_bias(framework):
    """As Flax's layers nearly do, and PyTorch's."""
    x = jnp.full((4, 64), -3333.3)
    if framework == "linen":
        layer = linen.LayerNorm()
        y = layer.apply(layer.init(jax.random.key(0), x), x)
    else:
        y = jaxnorm.nnx.LayerNorm(64, rngs=flax_nnx.Rngs(0))(x)
    np.testing.assert_array_equal(y, 0)


def normalized_exactly(x, weights=None, epsilon=1e-5):
    rows = oracle.set_numbers(x.shape, lambda n, p, c, N, P, C: (n,))
    return oracle.normalized(x, rows, weights=weights, epsilon=epsilon)


@pytest.mark.parametrize("length", [16, 128, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_large_mean(platform, length, weighted):
    for mean in (0.0, 1.0, 50.0, 1e4, 1e6):
        check_rows_of_mean(mean, length, weighted)


def check_rows_of_mean(mean, length, weighted):
    """Rounding the mean moves y by EPS mean / std / 2, whichever way it was found."""
    rng = np.random.default_rng(length)
    x = (mean + rng.normal(size=(64, length))).astype(np.float32)
    weights = rng.uniform(0.1, 1, x.shape).astype(np.float32) if weighted else None
    exact = normalized_exactly(x, weights)
    tolerance = 4 * EPS * (np.sqrt(length) + mean / np.sqrt(exact.var.min()))
    ys = [f(methods.token_layer_norm(), x, weights=weights) for f in (value, differentiated_value)]
    for y in ys:
        np.testing.assert_allclose(y, exact.y, rtol=0, atol=tolerance)
    np.testing.assert_allclose(*ys, rtol=0, atol=tolerance)
    m = moments_of_rows(x, weights=weights)
    np.testing.assert_allclose(m.mean[:, 0], exact.mean[:, 0], rtol=4 * EPS, atol=4 * EPS)
    # x is exact, and so is x - mean near the mean: the variance does not depend on how large the
    # mean is
    np.testing.assert_allclose(m.var[:, 0], exact.var[:, 0], rtol=64 * EPS)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(
    "method",
    [methods.batch_norm(), methods.instance_norm(), methods.layer_norm(), methods.group_norm(2)],
    ids=["batch", "instance", "layer", "group"],
)
def test_every_layout_of_large_mean(platform, layout, method):
    """The value without a gradient is as exact as the one with it."""
    channel_axis = -1 if layout == "NHWC" else 1
    shape = shape_of(4, channel_axis)
    x = (1e5 + np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    found = [f(method, x, channel_axis=channel_axis) for f in (value, differentiated_value)]
    with jax.enable_x64(True):
        exact = norm(x.astype(np.float64), method, channel_axis=channel_axis)[0]
    for y in found:
        np.testing.assert_allclose(y, exact, rtol=0, atol=4 * EPS * 1e5)


STANDARD_DEVIATIONS = [
    (1e12, 1e-5),
    (1e14, 1e-5),
    (1e16, 1e-5),
    (1e17, 1e-5),
    (1e-12, 0.0),
    (1e-14, 0.0),
    (1e-16, 0.0),
]


@pytest.mark.parametrize(("std", "epsilon"), STANDARD_DEVIATIONS)
def test_gradient_at_the_ends_of_float32(platform, std, epsilon):
    """The part through the variance is not lost where std^3 leaves the range of float32."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(8, 64))
    x, dy = (std * z).astype(np.float32), (rng.normal(size=z.shape) + z).astype(np.float32)
    rows = oracle.set_numbers(x.shape, lambda n, p, c, N, P, C: (n,))
    exact = oracle.normalized(x, rows, epsilon=epsilon, gy=dy)
    found = gradient(methods.token_layer_norm(), x, dy, epsilon=epsilon)
    np.testing.assert_allclose(
        np.asarray(found, np.float64) * std, exact.dx * std, rtol=0, atol=64 * EPS
    )


HALF_METHODS = {
    "token_layer": methods.token_layer_norm(),
    "batch": methods.batch_norm(),
    "group": methods.group_norm(4),
    "instance": methods.instance_norm(),
    "rms": methods.rms_norm(),
}


@pytest.mark.parametrize("name", HALF_METHODS)
def test_float16_gradient_adds_up_before_it_is_rounded(platform, name):
    """Each part of it is out of float16's range here, and their sum is not."""
    rng = np.random.default_rng(0)
    x = (1e-3 * rng.normal(size=(8, 16, 64))).astype(np.float16)
    method, dy = HALF_METHODS[name], np.full(x.shape, 400, np.float16)
    if method.mean == 0:  # what this one does not let through is a cotangent along x
        dy = (1e5 * x.astype(np.float32)).clip(-6e4, 6e4).astype(np.float16)
    found = gradient(method, x, dy, epsilon=1e-12)
    wide = gradient(method, x.astype(np.float32), dy.astype(np.float32), epsilon=1e-12)
    assert jnp.isfinite(found).all()
    np.testing.assert_allclose(
        found.astype(np.float32), wide, rtol=float(np.finfo(np.float16).eps), atol=4e5 * 4 * EPS
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gradients_are_rounded_once(dtype):
    """The gradient is that of float32, rounded."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(8, 16, 64)), dtype) for _ in range(2))
    for method in HALF_METHODS.values():
        found = gradient(method, x, dy)
        wide = gradient(method, x.astype(jnp.float32), dy.astype(jnp.float32))
        half_ulp = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(
            found.astype(np.float32), wide, rtol=1.01 * half_ulp, atol=64 * EPS
        )


def first_step(entry):
    """A method as x -> y in training, before it has seen anything."""
    return lambda x: entry(x, entry.init(x.shape))[0]


def entries(*without):
    return [entry for entry in REGISTRY if entry.constructor not in set().union(*without)]


ACTIVATIONS = {
    "rms_norm",
    "instance_rms_norm",
    "filter_response_norm",
    "moving_average_norm",
    "evonorm_b0",
    "evonorm_s0",
}
"""Methods that do not subtract a mean."""

TOWARDS_STATE = {"batch_renorm", "momentum_batch_norm", "cross_iteration_norm", "proxy_norm"}
"""Methods whose output is not centered on the batch, by definition."""


@pytest.mark.parametrize("entry", entries(ACTIVATIONS, TOWARDS_STATE), ids=str)
def test_every_method_gives_zero_for_constant_input(entry):
    method = jax.jit(first_step(entry))
    for constant in CONSTANTS:
        x = jnp.full(SHAPE, constant, jnp.float32)
        np.testing.assert_allclose(method(x), 0, atol=1e-6)


@pytest.mark.parametrize("entry", entries(ACTIVATIONS), ids=str)
def test_float16_gradient_of_every_method(entry):
    """As that of float32, rounded."""
    x = (1e-2 * np.random.default_rng(0).normal(size=SHAPE)).astype(np.float16)

    @jax.jit
    def pull(x):
        y, back = jax.vjp(first_step(entry), x)
        return back(jnp.full(y.shape, 1000, y.dtype))[0].astype(jnp.float32)

    wide = pull(x.astype(np.float32))
    assert jnp.abs(wide).max() < 6e4  # else float16 cannot hold it
    tolerance = {"atol": 1e5 * 16 * EPS, "rtol": 2 * float(np.finfo(np.float16).eps)}
    np.testing.assert_allclose(pull(x), wide, **tolerance)


OF_EACH_KIND = {"batch_norm", "token_layer_norm", "batch_renorm", "evonorm_b0", "switchable_norm"}


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=() if entry.name in OF_EACH_KIND else pytest.mark.slow)
        for entry in REGISTRY
    ],
    ids=str,
)
def test_half_precision_second_derivatives(entry):
    """As those of float32, but for rounding: functions that share x lose none of its parts."""
    rng = np.random.default_rng(0)
    x, along = (rng.normal(size=SHAPE).astype(jnp.bfloat16) for _ in range(2))

    @jax.jit
    def curvature(x, along):
        def slope(x):
            gradient = jax.grad(lambda x: (first_step(entry)(x).astype(jnp.float32) ** 3).sum())(x)
            return (gradient.astype(jnp.float32) * along.astype(jnp.float32)).sum()

        return jax.grad(slope)(x).astype(jnp.float32)

    wide = curvature(x.astype(np.float32), along)
    assert jnp.linalg.norm(curvature(x, along) - wide) < 0.02 * jnp.linalg.norm(wide)


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_half_precision_backward_keeps_no_float32_copy(entry):
    """GN+ keeps its z, which is float32."""
    x = jnp.ones(SHAPE, jnp.bfloat16)
    pull = jax.eval_shape(lambda x: jax.vjp(first_step(entry), x)[1], x)
    kept = [t for t in jax.tree.leaves(pull) if t.size >= x.size]
    wide = [t for t in kept if t.dtype == jnp.float32]
    assert len(wide) == (entry.constructor == "group_norm_plus")
