"""Weight Standardization: the parity switches of the kernel's function, and the layers of both
frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxnorm import kernels, linen
from jaxnorm import nnx as nnx_layers

KEY = jax.random.key(0)
RELEASED = {"epsilon": 1e-5, "correction": 1, "epsilon_outside": True}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 0.5, shape)


def standardized(xp, kernel, gain=None, epsilon=1e-6, correction=0, epsilon_outside=False):
    flat = kernel.reshape(-1, kernel.shape[-1])
    centered = flat - flat.mean(0, keepdims=True)
    var = (centered**2).sum(0, keepdims=True) / (len(flat) - correction)
    divisor = xp.sqrt(var) + epsilon if epsilon_outside else xp.sqrt(var + epsilon)
    gain = 1 if gain is None else gain.reshape(1, -1) / len(flat) ** 0.5
    return (centered / divisor * gain).reshape(kernel.shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", ({}, RELEASED), ids=("ours", "released torch"))
@pytest.mark.parametrize("shape", ((3, 3, 2, 8), (5, 4)), ids=str)
def test_kernels_with_gain_and_released_divisors(shape, options):
    kernel, gain, gy = normal(*shape), normal(shape[-1], seed=1), normal(*shape, seed=2)

    def run(f):
        def g(kernel, gain, gy):
            y, pull = jax.vjp(f, kernel, gain)
            return y, pull(gy)

        return jax.jit(g)(kernel, gain, gy)

    y, gradients = run(
        lambda kernel, gain: kernels.standardize_kernel(kernel, gain=gain, **options)
    )
    np.testing.assert_allclose(y, standardized(np, kernel, gain, **options), atol=1e-12)
    theirs = run(lambda kernel, gain: standardized(jnp, kernel, gain, **options))[1]
    for a, b in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_a_constant_kernel_has_finite_gradients():
    for options in ({}, RELEASED):
        grad = jax.grad(lambda w, o=options: kernels.standardize_kernel(w, **o).sum())(
            jnp.ones((3, 4))
        )
        assert jnp.isfinite(grad).all()


@pytest.mark.usefixtures("x64")
def test_the_gain_keeps_variance():
    """A unit gain makes outputs of unit variance from white inputs."""
    x = np.random.default_rng(0).normal(size=(20_000, 64))
    y = x @ kernels.standardize_kernel(normal(64, 4, seed=1), gain=jnp.ones(4))
    np.testing.assert_allclose(y.var(0), 1, atol=0.05)


CASES = {
    "conv": ((2, 6, 6, 4), {"features": 8, "kernel_size": (3, 3)}, {}),
    "grouped": ((2, 6, 6, 4), {"features": 8, "kernel_size": (3, 3), "feature_group_count": 2}, {}),
    "depthwise": (
        (2, 6, 4),
        {"features": 4, "kernel_size": (3,), "feature_group_count": 4},
        RELEASED,
    ),
    "strided": (
        (2, 6, 6, 4),
        {"features": 8, "kernel_size": (3, 3), "strides": 2, "use_bias": False},
        {},
    ),
    "dense": ((2, 6, 4), {"features": 8}, {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("conv", "strided"))) for n in CASES]
)
def test_layers_are_flax_layers_with_a_standardized_kernel(name):
    (shape, arguments, options), use_gain = CASES[name], name in ("grouped", "strided", "dense")
    conv = "kernel_size" in arguments
    flax_layer, layer = (nn.Conv, linen.WSConv) if conv else (nn.Dense, linen.WSDense)
    layer = layer(**arguments, **options, use_gain=use_gain)
    x = jnp.asarray(normal(*shape), jnp.float32)
    shapes = jax.eval_shape(layer.init, KEY, x)["params"]
    assert set(shapes) == {"kernel"} | ({"bias"} if arguments.get("use_bias", True) else set()) | (
        {"gain"} if use_gain else set()
    )
    p = {
        name: jnp.asarray(normal(*t.shape, seed=i), jnp.float32)
        for i, (name, t) in enumerate(sorted(shapes.items()))
    }
    y = jax.jit(layer.apply)({"params": p}, x)

    gain = np.asarray(p["gain"], "f8") if use_gain else None
    kernel = standardized(np, np.asarray(p["kernel"], "f8"), gain, **options)
    plain = {name: t for name, t in p.items() if name != "gain"} | {
        "kernel": jnp.asarray(kernel, jnp.float32)
    }
    expected = jax.jit(flax_layer(**arguments).apply)({"params": plain}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)

    rest = {
        name: value for name, value in arguments.items() if name not in ("features", "kernel_size")
    }
    sizes = (shape[-1], arguments["features"], *([arguments["kernel_size"]] if conv else []))
    twin = (nnx_layers.WSConv if conv else nnx_layers.WSDense)(
        *sizes, **rest, **options, use_gain=use_gain, rngs=nnx.Rngs(0)
    )
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(twin, nnx.Param))} == set(p)
    for name, value in p.items():
        getattr(twin, name)[...] = value
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(twin, x), y, rtol=1e-6, atol=1e-6)


def test_the_kernel_is_standardized_before_its_dtype_is_changed():
    """A kernel far from 0 beside its spread would be lost in half precision."""
    x = jnp.asarray(normal(2, 16), jnp.bfloat16)
    kernel = jnp.asarray(100 + normal(16, 4), jnp.float32)
    expected = np.asarray(x, "f8") @ standardized(np, np.asarray(kernel, "f8"))
    layer = linen.WSDense(4, use_bias=False, dtype=jnp.bfloat16)
    y = layer.apply({"params": {"kernel": kernel}}, x)
    twin = nnx_layers.WSDense(16, 4, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    twin.kernel[...] = kernel
    for out in (y, twin(x)):
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype("f4"), expected, rtol=0.05, atol=0.05)


def test_gradients_reach_the_kernel_and_leave_its_shift_and_scale_alone():
    """The gradient is orthogonal to the directions in which the standardized kernel does not
    change."""
    layer = nnx_layers.WSConv(4, 8, (3, 3), use_bias=False, epsilon=0.0, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(2, 6, 6, 4), jnp.float32)
    grad = nnx.jit(nnx.grad(lambda layer, x: jnp.sin(layer(x)).sum()))(layer, x).kernel[...]
    assert jnp.abs(grad).max() > 1e-2
    for direction in (jnp.ones_like(grad), layer.kernel[...]):
        np.testing.assert_allclose(
            (grad * direction).sum((0, 1, 2)), 0, atol=1e-4 * float(jnp.abs(grad).max())
        )


def test_one_weight_an_output_is_refused():
    match = "has 1 weight for each output channel"
    with pytest.raises(ValueError, match=match):
        linen.WSConv(4, (1, 1), feature_group_count=4).init(KEY, jnp.ones((1, 2, 2, 4)))
    with pytest.raises(ValueError, match=match):
        nnx_layers.WSConv(4, 4, (1, 1), feature_group_count=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="gain|scale"):
        kernels.standardize_kernel(jnp.ones((3, 4)), gain=jnp.ones(3))
