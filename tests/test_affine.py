"""Scale and bias of x's rank: whatever broadcasts against x, in values and derivatives, in every
context, by every method and layer."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compiled import jit
from contexts import CONTEXTS, parts, whole
from flax import nnx as fnnx
from helpers import data
from registry import REGISTRY, SHAPE, C

from jaxnorm import linen, methods, moments, nnx, norm, normalize

SHAPES = {
    "full": SHAPE,
    "token": (8, 8, 1, 8),
    "position": (1, 8, 3, 1),
    "example": (8, 1, 1, 1),
    "channel": (1, 1, 1, 8),
    "one": (1, 1, 1, 1),
}
METHODS = {
    "batch": (methods.batch_norm(), lambda n, p, c, N, P, C: (c,)),
    "group": (methods.group_norm(4), lambda n, p, c, N, P, C: (n, c * 4 // C)),
    "token": (methods.token_layer_norm(), lambda n, p, c, N, P, C: (n, *p)),
    "ghost": (methods.ghost_batch_norm(2), lambda n, p, c, N, P, C: (n * 2 // N, c)),
}


def summed_to(t, shape):
    """The derivative of what is broadcast from `shape`."""
    return t.sum(tuple(i for i, n in enumerate(shape) if n == 1), keepdims=True)


def differentiated(method, **options):
    def f(x, scale, bias, gy):
        y, pull = jax.vjp(
            lambda x, s, b: norm(x, method, scale=s, bias=b, **options)[0], x, scale, bias
        )
        return y, *pull(gy)

    return f


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name, weighted",
    [*((name, False) for name in METHODS), ("group", True), ("token", True)],
)
def test_values_and_gradients(name, weighted):
    """Scales of some shapes, with biases of others."""
    method, label = METHODS[name]
    x, gy, sets = data(*SHAPE), data(*SHAPE, seed=1), oracle.set_numbers(SHAPE, label)
    w = np.random.default_rng(5).uniform(0, 1, (8, 8, 3, 1)) if weighted else None
    names = [("full", "full"), ("token", "position"), ("example", "full"), ("channel", "one")]
    shapes = [[SHAPES[name] for name in pair] for pair in names]
    given = [(data(*s, seed=2), data(*b, seed=3)) for s, b in shapes]

    @jit
    def run(given):
        return [differentiated(method, weights=w)(x, scale, bias, gy) for scale, bias in given]

    for (scale, bias), got in zip(given, run(given), strict=True):
        o = oracle.normalized(x, sets, weights=w, scale=scale, bias=bias, gy=gy)
        wanted = (o.y, o.dx, summed_to(o.dscale, scale.shape), summed_to(o.dbias, bias.shape))
        for t, want in zip(got, wanted, strict=True):
            np.testing.assert_allclose(t, want, atol=1e-10)


CASES = [
    pytest.param(context, cut, id=f"{context}-{cut}")
    for context in CONTEXTS
    for cut in (("N", "H", "NH") if context.named else ("N", "H", "NH", "NC"))
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("context, cut", CASES)
def test_every_context(context, cut):
    """Scale and bias are cut between devices as x is."""
    shape = (16, 8, 3, 6)
    x, gy, scale, bias = (data(*shape, seed=i) for i in range(4))
    method, names = methods.batch_norm(), ("i", "j")[: len(cut)]
    options = {"axis_name": names} if context.named else {}
    got = context.run(differentiated(method, **options), cut)(x, scale, bias, gy)
    sets = oracle.set_numbers(shape, lambda n, p, c, N, P, C: (c,))
    o = oracle.normalized(x, sets, scale=scale, bias=bias, gy=gy)
    for t, want in zip(got, (o.y, o.dx, o.dscale, o.dbias), strict=True):
        np.testing.assert_allclose(t, want, atol=1e-10)


def test_parts_are_those_of_the_contexts():
    t = data(16, 8, 3, 6)
    np.testing.assert_array_equal(whole(parts(t, "NH"), "NH"), t)


@pytest.mark.usefixtures("x64")
def test_transformations():
    """Forward mode, vmap over x and scale, and second derivatives, against plain autodiff."""

    def plain(x, scale, bias):
        z = x.reshape(4, 3, 2, 3)
        z = (z - z.mean((1, 3), keepdims=True)) / jnp.sqrt(z.var((1, 3), keepdims=True) + 1e-5)
        return z.reshape(x.shape) * scale + bias

    def ours(x, scale, bias):
        return norm(x, methods.group_norm(2), scale=scale, bias=bias)[0]

    shapes = (4, 3, 6), (4, 3, 6), (4, 1, 6)
    args, tangents = (tuple(data(*s, seed=i + k) for i, s in enumerate(shapes)) for k in (0, 5))

    @partial(jit, static_argnums=0)
    def run(f, args, tangents):
        gradient = jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2))
        stacked = jax.tree.map(lambda s, t: jnp.stack([s, t]), args, tangents)
        return (
            jax.jvp(f, args, tangents),
            jax.jvp(gradient, args, tangents),
            jax.vmap(gradient)(*stacked),
            jax.vmap(gradient, (None, 0, None))(args[0], stacked[1], args[2]),
            jax.jacfwd(f, 1)(*args),
            jax.linearize(f, *args)[1](*tangents),
        )

    for a, b in zip(*(jax.tree.leaves(run(f, args, tangents)) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """They stay in their dtype, and every result is rounded once."""
    x, gy, scale, bias = (jnp.asarray(data(*SHAPE, seed=i)).astype(dtype) for i in range(4))
    got = jit(differentiated(methods.group_norm(4)))(x, scale, bias, gy)
    sets = oracle.set_numbers(SHAPE, METHODS["group"][1])
    wide = [np.asarray(t, "f8") for t in (x, scale, bias, gy)]
    o = oracle.normalized(wide[0], sets, scale=wide[1], bias=wide[2], gy=wide[3])
    for t, want in zip(got, (o.y, o.dx, o.dscale, o.dbias), strict=True):
        assert t.dtype == dtype
        half = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(t, "f8"), want, rtol=1.01 * half, atol=1e-4)


def test_two_dimensions_are_examples_and_channels():
    """Also where other axes of x have the same sizes."""
    x = jnp.asarray(data(6, 6, 6, 6, dtype="f4"))
    scale = jnp.asarray(data(6, 6, seed=1, dtype="f4"))
    y, _ = norm(x, methods.group_norm(2), scale=scale)
    z, _ = norm(x, methods.group_norm(2), scale=scale[:, None, None, :])
    np.testing.assert_array_equal(y, z)
    # x of shape (C, N)
    one = moments(x[0, 0], (1, 1))
    y = normalize(x[0, 0], one, scale=scale, batch_axis=1, channel_axis=0)
    z = normalize(x[0, 0].T, one, scale=scale)
    np.testing.assert_array_equal(y, z.T)
    # three dimensions where two axes hold the channels: the examples come first
    options = {"batch_axis": 2, "channel_axis": (0, 1)}
    several = jnp.asarray(data(6, 6, 6, seed=2, dtype="f4"))
    one = moments(x[0], (1, 1, 1))
    y = normalize(x[0], one, scale=several, **options)
    z = normalize(x[0], one) * jnp.moveaxis(several, 0, 2)
    np.testing.assert_allclose(y, z, atol=1e-6)


def affine(kind):
    """A scale and a bias for each channel, or the same numbers repeated for each element."""
    rng = np.random.default_rng(3)
    small = [rng.uniform(0.5, 1.5, C).astype("f4") for _ in range(2)]
    return small if kind == "small" else [np.broadcast_to(t, SHAPE) for t in small]


def unlike(got, want):
    return max(
        float(np.abs(a - np.asarray(b)).max(initial=0))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    )


@pytest.mark.parametrize("entry", [entry for entry in REGISTRY if not entry.needs_kernel], ids=str)
def test_every_method_takes_them(entry):
    """Scale and bias (C,), given for each element, in values, state and gradients."""
    x = data(*SHAPE, dtype="f4")
    before, options = entry.some_state(), entry.by_example(8) | entry.learned

    @jit
    def run(scale, bias):
        def f(x, scale, bias):
            y, state = entry(x, before, True, scale=scale, bias=bias, **options)
            return jnp.sin(y).sum(), (y, state)

        grads, out = jax.grad(f, (0, 1, 2), has_aux=True)(x, scale, bias)
        return out, grads[0], [summed_to(t, (1, 1, 1, C)).ravel() for t in grads[1:]]

    small = run(*(t.reshape(1, 1, 1, C) for t in affine("small")))
    assert unlike(run(*affine("full")), small) < 1e-4
    # each element has its own
    (y, _), *_ = run(*(data(*SHAPE, seed=i, dtype="f4") for i in (1, 2)))
    assert unlike(y, small[0][0]) > 0.1


@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.parametrize("name", ["Norm", "BatchNorm", "GroupNorm", "LayerNorm"])
def test_layers_take_them(library, name):
    """Layers without parameters of their own."""
    x = data(*SHAPE, dtype="f4")
    first = {"Norm": [methods.group_norm(4)], "GroupNorm": [4]}.get(name, [])
    call = {"use_running_average": False} if name in ("Norm", "BatchNorm") else {}
    options = {"use_scale": False, "use_bias": False}
    if library == "linen":
        layer = getattr(linen, name)(*first, **options)
        variables = jit(partial(layer.init, **call))(jax.random.key(0), x)
        run = partial(layer.apply, variables, mutable="batch_stats")
    else:
        layer = getattr(nnx, name)(C, *first, rngs=fnnx.Rngs(0), **options)
        run = layer
    results = []
    for kind in ("small", "full"):
        scale, bias = affine(kind)
        y = run(x, scale=scale, bias=bias, **call)
        results.append(y[0] if library == "linen" else y)
    np.testing.assert_allclose(*results, atol=1e-5)


@pytest.mark.slow
def test_all_shapes():
    """Abstractly, since there are many."""
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    of_each_axis = ((1, n) for n in SHAPE)
    for shape in itertools.product(*of_each_axis):
        t = jax.ShapeDtypeStruct(shape, jnp.float32)
        out = jax.eval_shape(differentiated(methods.batch_norm()), x, t, t, x)
        assert [s.shape for s in out] == [SHAPE, SHAPE, shape, shape]
