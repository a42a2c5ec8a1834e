"""Every layer and method exported with symbolic sizes, stored, and loaded in a process that has
never seen the library."""

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from flax import nnx as fnnx
from jax import export
from registry import REGISTRY, STATEFUL, C

import jaxnorm
from jaxnorm import Moments, inference, linen, methods, nnx, norm

SIZES = {"b": 3, "h": 5, "w": 4}  # with which the exported programs are called


class Layer(NamedTuple):
    """A layer that is not `Norm`: its options, and how its channels come first."""

    options: dict = {}
    last: str = ""  # the options that say where the channels are; "" where they are last
    remembers: bool = False


LAYERS = {
    "BatchNorm": Layer(last="axis", remembers=True),
    "LayerNorm": Layer(last="reduction_axes feature_axes"),
    "RMSNorm": Layer(last="reduction_axes feature_axes"),
    "GroupNorm": Layer({"num_groups": 4}),
    "InstanceNorm": Layer(last="feature_axes"),
    "DynamicMomentShortcut": Layer(),
    "WSConv": Layer({"kernel_size": (3, 3)}),
    "WSDense": Layer(),
}


class Program(NamedTuple):
    """A function of some arrays of known sizes and some of symbolic ones."""

    function: Callable
    known: Any
    sizes: tuple  # of each array that follows


def shapes(*sizes):
    """Symbolic shapes in one scope."""
    scope = export.SymbolicScope()
    return [export.symbolic_shape(", ".join(map(str, s)), scope=scope) for s in sizes]


def concrete(sizes):
    return tuple(eval(str(n), {}, SIZES) for n in sizes)


def values(tree, seed=0):
    """Variables as after training: nothing is 0 or 1, and a variance is positive."""
    rng = np.random.default_rng(seed)

    def value(t):
        if jnp.issubdtype(t.dtype, jnp.inexact):
            return rng.uniform(0.5, 1.5, t.shape).astype(t.dtype)
        return np.zeros(t.shape, t.dtype)

    return jax.tree.map(value, tree)


def sizes_of(entry):
    """A symbolic shape of x: batches that ghosts divide, and images of one size where the state
    belongs to it."""
    batch = "4*b" if entry.has_ghosts else "b"
    return (batch, 4, 3, C) if entry.method.keeps_positions(C) else (batch, "h", "w", C)


def norm_program(library, entry, train, channels_first):
    """`Norm` of a method, with what a step of it needs."""
    sizes = sizes_of(entry)
    options = {"channel_axis": 1} if channels_first else {}
    sizes = (sizes[0], C, *sizes[1:3]) if channels_first else sizes
    make = entry.in_linen if library is linen else partial(entry.in_nnx, concrete(sizes))
    call = dict(entry.options) | ({"use_running_average": not train} if entry in STATEFUL else {})

    def by_example(x):
        return {"domain": jnp.arange(x.shape[0], dtype="i4") % 3} if entry.has_labels else {}

    return program(library, partial(make, **options), (sizes,), train, call, by_example)


def layer_program(library, name, train, channels_first):
    """Another layer."""
    layer, sizes = LAYERS[name], ("b", "h", "w", C)
    options = dict(layer.options)
    if channels_first:
        sizes = ("b", C, "h", "w")
        options |= dict.fromkeys(layer.last.split(), 1)
    others = [(*sizes[:-1], 1)] * 3 if name == "DynamicMomentShortcut" else []
    features = (C, C) if name.startswith("WS") else (C,)
    make = getattr(library, name)
    if library is nnx:
        make = partial(make, *features)
    elif name.startswith("WS"):
        make = partial(make, C)
    call = {"use_running_average": not train} if layer.remembers else {}
    return program(library, partial(make, **options), (sizes, *others), train, call)


def with_moments(arrays):
    """x, and the moments that a layer may take beside it."""
    x, *m = arrays
    return (x, Moments(*m)) if m else (x,)


def program(library, make, sizes, train, call, by_example=lambda x: {}):
    """A layer as a function of its variables and x: what it returns and remembers; in training also
    the gradient of a loss."""
    first = [jnp.zeros(concrete(s)) for s in sizes]
    if library is linen:
        module = make()
        init = partial(module.init, **call, **by_example(first[0]))
        known = jax.eval_shape(init, jax.random.key(0), *with_moments(first))
        mutable = [collection for collection in known if collection != "params"]

        def run(variables, *xs):
            options = {"mutable": mutable, **call, **by_example(xs[0])}
            return module.apply(variables, *with_moments(xs), **options)
    else:
        graph, state = fnnx.split(fnnx.eval_shape(lambda: make(rngs=fnnx.Rngs(0))))
        known = fnnx.to_pure_dict(state)

        def run(variables, *xs):
            new = jax.tree.map(lambda t: t, state)
            fnnx.replace_by_pure_dict(new, variables)
            module = fnnx.merge(graph, new)
            y = module(*with_moments(xs), **call, **by_example(xs[0]))
            return y, fnnx.to_pure_dict(fnnx.state(module))

    def step(variables, *xs):
        def loss(x):
            y, state = run(variables, x, *xs[1:])
            return jnp.sin(y).sum(), (y, state)

        return jax.value_and_grad(loss, has_aux=True)(xs[0])

    return Program(step if train else run, values(known), sizes)


def functions():
    """What is behind no layer, or has moments for arguments and results."""
    state = {"mean": np.ones((2, C), "f4"), "var": np.full((2, C), 2, "f4")}
    method = methods.domain_batch_norm(2)
    first = jaxnorm.init_running((C,), counted=True)
    image = ("b", "h", "w")
    x = (*image, C)

    def masked(_, x, mask):
        return norm(x, methods.group_norm(4), weights=mask)[0]

    def distances(state, x):
        return method.observe(x, state, domain=1)

    def by_example(running, x):
        running = jaxnorm.running_moments(running, methods.batch_norm(), x.shape)
        weighed = inference.weigh_example(x, running, methods.batch_norm(), example_weight=0.3)
        return jaxnorm.normalize(x, weighed)

    def update(running, x):
        m = jaxnorm.moments(x, methods.instance_norm())
        pooled = jaxnorm.merge(*[jaxnorm.pool(m, methods.batch_norm())] * 2)
        return jaxnorm.update_running(running, pooled), jaxnorm.update_cumulative(running, m)

    yield "mask", Program(masked, (), (x, (*image, 1)))
    yield "distance", Program(distances, state, (x,))
    yield "example weight", Program(by_example, first, (x,))
    yield "moments", Program(update, first, (x,))


def cases():
    """Each layer in both libraries, both layouts, in training and at inference; by default one of
    these for each."""
    norms = [
        (
            f"Norm, {entry}",
            partial(norm_program, entry=entry),
            not entry.needs_kernel,
            entry in STATEFUL,
        )
        for entry in REGISTRY
    ]
    others = [
        (name, partial(layer_program, name=name), bool(layer.last), layer.remembers)
        for name, layer in LAYERS.items()
    ]
    for i, (name, make, any_layout, remembers) in enumerate(norms + others):
        layouts = (False, True) if any_layout else (False,)
        trains = (True, False) if remembers else (False,)
        all_of_it = list(itertools.product((linen, nnx), layouts, trains))
        for j, (library, first, train) in enumerate(all_of_it):
            title = f"{library.__name__}, {name}" + ", training" * train + ", NCHW" * first
            often = j == 3 * i % len(all_of_it)
            yield title, partial(make, library, train=train, channels_first=first), often
    for name, example in functions():
        yield name, (lambda example=example: example), True


LOADER = """
import pickle, sys
import jax
from jax import export

with open(sys.argv[1], "rb") as file:
    programs = pickle.load(file)
results = {}
for name, stored, leaves, differentiable in programs:
    if name in ("moments", "example weight"):
        import jaxnorm  # which registers the type of an argument
    else:
        assert "jaxnorm" not in sys.modules
    program = export.deserialize(bytearray(stored))
    arguments, _ = jax.tree.unflatten(program.in_tree, leaves)

    def leading(x):
        return jax.tree.leaves(program.call(arguments[0], x, *arguments[2:]))[0].sum()

    out = jax.jit(program.call)(*arguments)
    gradient = jax.jit(jax.grad(leading))(arguments[1]) if differentiable else ()
    results[name] = [jax.device_get(t) for t in jax.tree.leaves((out, gradient))]
with open(sys.argv[2], "wb") as file:
    pickle.dump(results, file)
"""


def check(programs, folder):
    """Export and store the programs, load and run them elsewhere, and compare."""
    stored, expected = [], {}
    for name, make in programs:
        function, known, sizes = make()
        differentiable = "training" not in name  # which is a gradient already
        fixed = jax.tree.map(lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype), known)
        free = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes(*sizes)]
        exported = export.export(jax.jit(function))(fixed, *free)
        rng = np.random.default_rng(1)
        xs = [rng.uniform(0.1, 2, concrete(s)).astype("f4") for s in sizes]
        data = exported.serialize(vjp_order=1 if differentiable else 0)
        stored.append((name, bytes(data), jax.tree.leaves((known, xs)), differentiable))

        def both(known, x, *others, function=function, differentiable=differentiable):
            def leading(x):
                out = function(known, x, *others)
                return jax.tree.leaves(out)[0].sum(), out

            if not differentiable:
                return function(known, x, *others)
            gradient, out = jax.grad(leading, has_aux=True)(x)
            return out, gradient

        expected[name] = [np.asarray(t) for t in jax.tree.leaves(jax.jit(both)(known, *xs))]
    there, back = folder / "programs", folder / "results"
    there.write_bytes(pickle.dumps(stored))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", LOADER, there, back], check=True, env=environment)
    results = pickle.loads(back.read_bytes())
    assert list(results) == list(expected)
    for name, want in expected.items():
        assert len(results[name]) == len(want), name
        for got, t in zip(results[name], want, strict=True):
            scale = np.abs(t).max(initial=1)
            np.testing.assert_allclose(got, t, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_stored_programs_run_in_a_process_without_the_library(tmp_path):
    check([(name, make) for name, make, often in cases() if often], tmp_path)


@pytest.mark.parametrize(
    "part",
    [pytest.param(i, marks=pytest.mark.rest if i else pytest.mark.slow) for i in range(4)],
)
def test_all_stored_programs(part, tmp_path):
    check([(name, make) for name, make, often in cases() if not often][part::4], tmp_path)


@pytest.mark.parametrize("library", (linen, nnx))
def test_every_layer_is_exported(library):
    public = {
        name
        for name, t in vars(library).items()
        if isinstance(t, type) and issubclass(t, fnn.Module | fnnx.Module)
    }
    assert public - {"FoldedNorm"} == {"Norm", *LAYERS}


def test_a_batch_that_may_not_split_says_so():
    (shape,) = shapes(("b", 4, C))
    with pytest.raises(ValueError, match=r"size b, which does not split into 2 .* such as 2\*n in"):
        methods.ghost_batch_norm(2).shape(shape)
    with pytest.raises(ValueError, match="size b, which does not split into groups of 2"):
        jax.eval_shape(
            lambda x: norm(x, methods.group_norm(group_size=2)),
            jax.ShapeDtypeStruct(shapes((4, "b"))[0], jnp.float32),
        )
