"""What normalization stores, read off compiled programs: nothing is executed, so sizes are those of real networks.

A training step is y = relu(norm(x)) and its derivatives for a given dy. The unit is the normalized tensor x; what is small is
counted in vectors, float32 arrays with a value for each example and channel, or for each token. XLA's CPU compiler is asked.
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
from jaxnorm import EACH, Groups, linen, methods, norm

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
    examples = 1 if METHODS[method].groups.batch == 1 else x.shape[0]
    return 4 * examples * x.shape[channel_axis]


def by_norm(method, x, channel_axis=-1, **options):
    """`norm` as a function (parameters, x) -> y and what else it returns, and its parameters."""
    channel = jax.ShapeDtypeStruct((x.shape[channel_axis],), jnp.float32)

    def f(parameters, x):
        return norm(x, method, scale=parameters[0], bias=parameters[1], channel_axis=channel_axis, **options)

    return f, (channel, channel)


def by_layer(library, method, x):
    """A layer of jaxnorm.linen or flax.linen likewise."""
    with jax.numpy_dtype_promotion("standard"):
        layer = LIBRARIES[library].layer(method, x)
    return lambda parameters, x: layer.train(*parameters, x), (layer.parameters, layer.state)


def by(api, method, x):
    return by_norm(METHODS[method], x) if api == "norm" else by_layer({"linen": "jaxnorm"}.get(api, api), method, x)


def step(f, activation=jax.nn.relu):
    def run(parameters, x, dy):
        def forward(parameters, x):
            y, rest = f(parameters, x)
            return activation(y), rest

        y, back, rest = jax.vjp(forward, parameters, x, has_aux=True)
        return y, rest, back(dy)

    return run


def compiled(f, *arguments):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # for Flax; ours is strict elsewhere
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
    """Operations that store an array of `dtype` and of `size` elements or more. Values inside a fusion are not stored."""
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
    """Arrays that the backward pass of f keeps, each once: arguments too, if it needs them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jaxpr = jax.make_jaxpr(lambda *arguments: jax.vjp(f, *arguments, has_aux=True)[1])(*arguments).jaxpr
    return [variable.aval for variable in {id(variable): variable for variable in jaxpr.outvars}.values()]


def large(arrays, x):
    """Those that are not small beside x."""
    return [t for t in arrays if t.size * 16 > x.size]


cases = pytest.mark.parametrize(("name", "method"), CASES, ids="-".join)
dtypes = pytest.mark.parametrize("dtype", DTYPES)
apis = pytest.mark.parametrize("api", ["norm", "linen"])


@cases
@dtypes
@apis
def test_step_allocates_small_arrays_only(name, method, dtype, api):
    x = tensor(name, dtype)
    assert temporaries(compiled_step(name, method, dtype, api)) <= TEMPORARIES * nbytes(x) + 8 * vector(x, method)


@cases
@apis
def test_no_float32_copy(name, method, api):
    x = tensor(name, "bfloat16")
    f, parameters = by(api, method, x)
    assert stored(compiled_step(name, method, "bfloat16", api), "f32", x.size) == []
    assert stored(compiled(f, parameters, x), "f32", x.size) == []


@cases
@dtypes
@apis
def test_backward_keeps_x_and_small_arrays(name, method, dtype, api):
    x = tensor(name, dtype)
    f, parameters = by(api, method, x)
    kept = residuals(f, parameters, x)
    assert [(t.shape, t.dtype) for t in kept if t.size >= x.size] == [(x.shape, x.dtype)]
    assert sum(nbytes(t) for t in kept) <= nbytes(x) + 6 * vector(x, method)
