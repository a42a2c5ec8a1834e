"""What normalization stores, read off compiled programs: nothing is executed, so sizes are those of
real networks.

A training step is y = relu(norm(x)) and its derivatives for a given dy. The unit is the normalized
tensor x; what is small is counted in vectors, float32 arrays with a value for each example and
channel, or for each token. XLA's CPU compiler is asked.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.libraries import LIBRARIES
from benchmarks.shapes import NUM_GHOSTS, NUM_GROUPS, QUICK, SHAPES
from jaxnorm import denormalize, linen, methods, moments, norm

METHODS = {
    "batch": methods.batch_norm(),
    "group": methods.group_norm(NUM_GROUPS),
    "instance": methods.instance_norm(),
    "token_layer": methods.token_layer_norm(),
    "batch_group": methods.batch_group_norm(NUM_GROUPS),
    "ghost_batch": methods.ghost_batch_norm(NUM_GHOSTS),
}

DTYPES = ("bfloat16", "float32")

CASES = [(name, method) for name in QUICK for method in SHAPES[name].methods]

TEMPORARIES = 0.05
"""Of x, beside eight vectors: no array as large as x but the results."""

ADDED = 12 / 7
"""Bytes for each element: three sums, with weights, and two without, are first taken of seven or
eight elements, in float32. Some of it is a result's memory before the result is there."""


def tensor(name, dtype, channel_axis=-1):
    shape = list(SHAPES[name].on("cpu"))
    if channel_axis == 1:
        shape.insert(1, shape.pop())
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))


def nbytes(x):
    return x.size * x.dtype.itemsize


def vector(x, method, channel_axis=-1):
    """Bytes of a vector."""
    if method == "token_layer":
        return 4 * x.size // x.shape[-1]
    row = METHODS[method].row(x.shape, channel_axis=channel_axis)
    examples = 1 if row.groups.batch == 1 else x.shape[0]
    return 4 * examples * x.shape[channel_axis]


def bound(x, method, channel_axis=-1):
    """Bytes of temporaries that a step may have."""
    return TEMPORARIES * nbytes(x) + ADDED * x.size + 8 * vector(x, method, channel_axis)


def by_norm(method, x, channel_axis=-1, **options):
    """`norm` as a function (parameters, x) -> y and what else it returns, and its parameters."""
    channel = jax.ShapeDtypeStruct((x.shape[channel_axis],), jnp.float32)

    def f(parameters, x):
        return norm(
            x, method, scale=parameters[0], bias=parameters[1], channel_axis=channel_axis, **options
        )

    return f, (channel, channel)


def by_module(module, x):
    """A linen module likewise."""
    variables = dict(jax.eval_shape(module.init, jax.random.key(0), x))
    parameters = variables.pop("params")

    def f(parameters, x):
        return module.apply({"params": parameters[0], **parameters[1]}, x, mutable=list(variables))

    return f, (parameters, variables)


def by_layer(library, method, x):
    """A layer of jaxnorm.linen or flax.linen likewise."""
    with jax.numpy_dtype_promotion("standard"):
        layer = LIBRARIES[library].layer(method, x)
    return lambda parameters, x: layer.train(*parameters, x), (layer.parameters, layer.state)


def by(api, method, x):
    return (
        by_norm(METHODS[method], x)
        if api == "norm"
        else by_layer({"linen": "jaxnorm"}.get(api, api), method, x)
    )


def step(f, activation=jax.nn.relu):
    def run(parameters, x, dy):
        def forward(parameters, x):
            y, rest = f(parameters, x)
            return activation(y), rest

        y, back, rest = jax.vjp(forward, parameters, x, has_aux=True)
        return y, rest, back(dy)

    return run


def compiled(f, *arguments):
    # for Flax; ours is strict elsewhere
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.jit(f).lower(*arguments).compile()


@functools.cache
def compiled_step(name, method, dtype, api):
    x = tensor(name, dtype)
    f, parameters = by(api, method, x)
    return compiled(step(f), parameters, x, x)


def temporaries(program):
    """Bytes that a program allocates beside arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def stored(program, dtype, size):
    """Operations that store an array of `dtype` and of `size` elements or more. Values inside a
    fusion are not stored."""
    text = program.as_text()
    fused = set(re.findall(r" fusion\(.*calls=%?([\w.\-]+)", text))
    found, computation = [], None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        computation = header[1] if header else computation
        if " = " in line and computation not in fused:
            kind = re.match(r"(\(.*?\)|\S+) ", line.split(" = ", 1)[1])[1]
            for dims in re.findall(rf"\b{dtype}\[([\d,]+)\]", kind):
                if math.prod(int(n) for n in dims.split(",")) >= size:
                    found.append(line.strip()[:120])
    return found


def residuals(f, *arguments):
    """Arrays that the backward pass of f keeps, each once; an argument too, where it is needed."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jaxpr = jax.make_jaxpr(lambda *arguments: jax.vjp(f, *arguments, has_aux=True)[1])(
            *arguments
        ).jaxpr
    return [
        variable.aval
        for variable in {id(variable): variable for variable in jaxpr.outvars}.values()
    ]


def full_size(arrays, size):
    return [(t.shape, t.dtype.name) for t in arrays if t.size >= size]


cases = pytest.mark.parametrize(("name", "method"), CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
apis = pytest.mark.parametrize("api", ["norm", "linen"])
programs = pytest.mark.parametrize(
    ("api", "dtype"),
    [
        *(("norm", dtype) for dtype in DTYPES),
        ("linen", "bfloat16"),
        pytest.param("linen", "float32", marks=pytest.mark.slow),
    ],
)


@cases
@programs
def test_step_allocates_small_arrays_only(name, method, dtype, api):
    x = tensor(name, dtype)
    assert temporaries(compiled_step(name, method, dtype, api)) <= bound(x, method)


@cases
@apis
def test_no_float32_copy(name, method, api):
    x = tensor(name, "bfloat16")
    f, parameters = by(api, method, x)
    assert stored(compiled_step(name, method, "bfloat16", api), "f32", x.size) == []
    assert stored(compiled(f, parameters, x), "f32", x.size) == []


@cases
@programs
def test_backward_keeps_x_and_small_arrays(name, method, dtype, api):
    x = tensor(name, dtype)
    f, parameters = by(api, method, x)
    kept = residuals(f, parameters, x)
    assert full_size(kept, x.size) == [(x.shape, dtype)]
    # mean, variance, scale and n
    assert sum(nbytes(t) for t in kept) <= nbytes(x) + 3 * vector(x, method) + 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "method"),
    [("resnet50_stage1", "batch"), ("diffusion_32", "group"), ("vit_b", "token_layer")],
)
def test_bounds_can_fail(name, method, dtype):
    """Flax under the same functions exceeds each."""
    x = tensor(name, dtype)
    f, parameters = by("flax.linen", method, x)
    assert temporaries(compiled_step(name, method, dtype, "flax.linen")) > bound(x, method)
    assert len(full_size(residuals(f, parameters, x), x.size)) > 1
    if dtype == "bfloat16":
        assert stored(compiled_step(name, method, dtype, "flax.linen"), "f32", x.size)
        assert stored(compiled(f, parameters, x), "f32", x.size)


@programs
@pytest.mark.parametrize("method", SHAPES["resnet50_stage1"].methods)
def test_channels_first(method, dtype, api):
    x = tensor("resnet50_stage1", dtype, channel_axis=1)
    if api == "norm":
        f, parameters = by_norm(METHODS[method], x, channel_axis=1)
    else:
        layer = linen.Norm(
            METHODS[method], use_running_average=False, channel_axis=1, dtype=x.dtype
        )
        f, parameters = by_module(layer, x)
    program = compiled(step(f), parameters, x, x)
    assert temporaries(program) <= bound(x, method, channel_axis=1)
    assert dtype == "float32" or stored(program, "f32", x.size) == []
    kept = residuals(f, parameters, x)
    assert full_size(kept, x.size) == [(x.shape, dtype)]
    assert sum(nbytes(t) for t in kept) <= nbytes(x) + 3 * vector(x, method, channel_axis=1) + 4


@dtypes
def test_root_mean_square(dtype):
    x = tensor("vit_b", dtype)
    f, parameters = by_norm(methods.rms_norm(), x)
    program = compiled(step(f), parameters, x, x)
    assert temporaries(program) <= bound(x, "token_layer")
    assert dtype == "float32" or stored(program, "f32", x.size) == []
    assert full_size(residuals(f, parameters, x), x.size) == [(x.shape, dtype)]


UNBIASED = [
    ("resnet50_stage1", "batch"),
    ("diffusion_32", "group"),
    ("vit_b", "token_layer"),
    ("vit_b", "rms"),
]


@dtypes
@pytest.mark.parametrize(("name", "method"), UNBIASED)
def test_without_bias(name, method, dtype):
    x = tensor(name, dtype)
    layers = {
        "batch": lambda: linen.BatchNorm(use_running_average=False, use_bias=False, dtype=x.dtype),
        "group": lambda: linen.GroupNorm(NUM_GROUPS, use_bias=False, dtype=x.dtype),
        "token_layer": lambda: linen.LayerNorm(use_bias=False, dtype=x.dtype),
        "rms": lambda: linen.RMSNorm(dtype=x.dtype),
    }
    f, parameters = by_module(layers[method](), x)
    assert full_size(residuals(f, parameters, x), x.size) == [(x.shape, dtype)]
    program = compiled(step(f), parameters, x, x)
    assert temporaries(program) <= bound(x, "token_layer" if method == "rms" else method)
    assert dtype == "float32" or stored(program, "f32", x.size) == []


@dtypes
@pytest.mark.parametrize(("name", "method"), UNBIASED[:3])
def test_without_scale(name, method, dtype):
    """The sum for the bias and that for the mean are one only where they are of the same sets."""
    x = tensor(name, dtype)
    channel = jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)

    def f(bias, x):
        return norm(x, METHODS[method], bias=bias)

    assert full_size(residuals(f, channel, x), x.size) == [(x.shape, dtype)]
    program = compiled(step(f), channel, x, x)
    assert temporaries(program) <= bound(x, method)
    assert dtype == "float32" or stored(program, "f32", x.size) == []


@dtypes
@pytest.mark.parametrize("per", ["example", "position"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("resnet50_stage1", "batch"), ("diffusion_32", "group"), ("vit_b", "token_layer")],
)
def test_masks(name, method, per, dtype):
    """For tokens XLA's CPU compiler hands sums to a library that takes in no `where`, so the masked
    array is stored, in float32."""
    x = tensor(name, dtype)
    ones = x.shape[1:] if per == "example" else x.shape[-1:]
    mask = jax.ShapeDtypeStruct((*x.shape[: x.ndim - len(ones)], *(1 for _ in ones)), jnp.bool_)
    channel = jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)

    def f(parameters, x):
        scale, bias, mask = parameters
        return norm(x, METHODS[method], scale=scale, bias=bias, weights=mask)

    def run(scale, bias, mask, x, dy):
        return step(lambda parameters, x: f((*parameters, mask), x))((scale, bias), x, dy)

    program = compiled(run, channel, channel, mask, x, x)
    stored_masked = 2 * 4 * x.size if method == "token_layer" else 0
    assert temporaries(program) <= stored_masked + bound(x, method)
    assert full_size(residuals(f, (channel, channel, mask), x), x.size) == [(x.shape, dtype)]


@cases
@dtypes
def test_activation_keeps_x_and_small_arrays(name, method, dtype):
    x = tensor(name, dtype)
    f, parameters = by_norm(METHODS[method], x, activation=jax.nn.silu)
    kept = residuals(f, parameters, x)
    assert full_size(kept, x.size) == [(x.shape, dtype)]
    assert sum(nbytes(t) for t in kept) <= nbytes(x) + 8 * vector(x, method)


@dtypes
@pytest.mark.parametrize("activation", [None, jax.nn.silu], ids=["", "activation"])
@pytest.mark.parametrize(("name", "method"), [("diffusion_32", "group"), ("vit_b", "token_layer")])
def test_a_scale_as_large_as_x_is_kept_and_nothing_else(name, method, activation, dtype):
    """Beside x, in its own dtype; an activation needs the bias, too."""
    x = tensor(name, dtype)

    def f(affine, x):
        return norm(x, METHODS[method], scale=affine[0], bias=affine[1], activation=activation)

    kept = residuals(f, (x, x), x)
    assert full_size(kept, x.size) == [(x.shape, dtype)] * (2 if activation is None else 3)
    assert sum(nbytes(t) for t in kept if t.size < x.size) <= 2 * vector(x, method) + 4
    if activation is None:
        program = compiled(step(f, lambda y: y), (x, x), x, x)
        assert temporaries(program) <= bound(x, method)
        assert dtype == "float32" or stored(program, "f32", x.size) == []


@dtypes
@pytest.mark.parametrize(("name", "method"), [("diffusion_32", "group"), ("vit_b", "token_layer")])
def test_the_way_back_keeps_y_and_small_arrays(name, method, dtype):
    """And a scale and a bias as large as y, if they are."""
    x = tensor(name, dtype)
    channel = jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)
    m = jax.eval_shape(lambda x: moments(x, METHODS[method]), x)

    def f(given, y):
        m, scale, bias = given
        return denormalize(y, m, scale=scale, bias=bias), None

    kept = residuals(f, (m, channel, channel), x)
    assert full_size(kept, x.size) == [(x.shape, dtype)]
    assert sum(nbytes(t) for t in kept if t.size < x.size) <= 3 * vector(x, method)
    program = compiled(step(f, lambda y: y), (m, channel, channel), x, x)
    assert temporaries(program) <= bound(x, method)
    assert dtype == "float32" or stored(program, "f32", x.size) == []
    assert full_size(residuals(f, (m, x, x), x), x.size) == [(x.shape, dtype)] * 3


@dtypes
def test_activation_keeps_more_after_the_layer(dtype):
    x = tensor("resnet50_stage1", dtype)
    f, parameters = by_norm(METHODS["batch"], x)

    def outside(parameters, x):
        y, rest = f(parameters, x)
        return jax.nn.silu(y), rest

    assert len(full_size(residuals(outside, parameters, x), x.size)) > 1


MAPPED = [
    ("resnet50_stage3", "batch"),
    ("diffusion_32", "group"),
    ("detector_p3", "batch_group"),
    ("vit_b", "token_layer"),
]


@programs
@pytest.mark.parametrize(("name", "method"), MAPPED)
def test_vmap_of_grad(name, method, dtype, api):
    """A gradient for each of three micro-batches. Rows of channels may store an array in x's own
    dtype."""
    x = tensor(name, dtype)
    f, parameters = by(api, method, x)
    many = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)

    def loss(parameters, x, weights):
        return (jax.nn.relu(f(parameters, x)[0]) * weights).sum()

    program = compiled(
        jax.vmap(jax.grad(loss, argnums=(0, 1)), (None, 0, 0)), parameters, many, many
    )
    stored_rows = nbytes(many) if method == "token_layer" else 0
    assert temporaries(program) <= stored_rows + 3 * bound(x, method)
    assert dtype == "float32" or stored(program, "f32", x.size) == []


@programs
@pytest.mark.parametrize(("name", "method"), MAPPED)
def test_scan(name, method, dtype, api):
    """Four layers in a loop keep the input of each, and store as much as if they only multiplied it
    by their scale.

    How much that is, is XLA's affair: on the CPU its loops hold bfloat16 arrays in float32.
    """
    x = tensor(name, dtype)
    f, parameters = by(api, method, x)
    stacked = jax.tree.map(lambda t: jax.ShapeDtypeStruct((4, *t.shape), t.dtype), parameters)

    def layers(f):
        def run(stacked, x):
            return lax.scan(lambda x, parameters: (f(parameters, x)[0], None), x, stacked)

        return run

    kept = residuals(layers(f), stacked, x)
    assert full_size(kept, 4 * x.size) == [((4, *x.shape), dtype)]
    ours = temporaries(compiled(step(layers(f), lambda y: y), stacked, x, x))
    scales = jax.ShapeDtypeStruct((4, x.shape[-1]), x.dtype)
    product = layers(lambda scale, x: (x * scale[(None,) * (x.ndim - 1)], None))
    others = temporaries(compiled(step(product, lambda y: y), scales, x, x))
    assert ours <= others + 4 * bound(x, method)
