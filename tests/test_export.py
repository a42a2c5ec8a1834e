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

import jaxnorm
from jaxnorm import domains, inference, linen, methods, nnx, norm

C = 8
SIZES = {"b": 3, "h": 5, "w": 4}  # with which the exported programs are called
BATCH, IMAGE, GHOSTS = ("b", 4, 4), ("b", "h", "w"), ("2*b", "h", "w")


class Layer(NamedTuple):
    """A class of linen and nnx: its arguments, those of its call, and how x is sized."""

    args: tuple = ()
    options: dict = {}
    sizes: tuple = IMAGE
    remembers: bool = False
    call: dict = {}  # of training
    last: str = (
        "channel_axis"  # the option that says where the channels are; "" where they are last
    )
    name: str = ""


STATE = {"remembers": True}
WINDOW = {"sizes": BATCH, "last": "", **STATE}
LAYERS = {
    "BatchNorm": Layer(last="axis", **STATE),
    "LayerNorm": Layer(last="reduction_axes feature_axes"),
    "RMSNorm": Layer(last="reduction_axes feature_axes"),
    "GroupNorm": Layer((), {"num_groups": 4}, last=""),
    "InstanceNorm": Layer(last="feature_axes"),
    "Norm": Layer((methods.batch_group_norm(16, (1, 4, 4, C)),), **WINDOW),
    "GhostBatchNorm": Layer((2,), {"ghost_update": "sequential divided"}, GHOSTS, **STATE),
    "BatchGroupNorm": Layer((4,), **STATE),
    "BatchGroupNorm, positions": Layer((16,), **WINDOW, name="BatchGroupNorm"),
    "BatchAndGroupNorm": Layer((), {"ghost_size": 2, "num_groups": 4}, GHOSTS, **STATE),
    "PositionalNorm": Layer(),
    "BatchRenorm": Layer(call={"rmax": 1.5, "dmax": 0.5}, **STATE),
    "MomentumBatchNorm": Layer(call={"train_momentum": 0.5}, **STATE),
    "MemorizedBatchNorm": Layer((), {"memory_weights": (0.2, 0.3, 0.5)}, **STATE),
    "SwitchableNorm": Layer(**STATE),
    "GroupNormPlus": Layer((4,), **WINDOW),
    "MovingAverageNorm": Layer(**STATE),
    "CrossIterationNorm": Layer(last="", **STATE),
    "DomainSpecificBatchNorm": Layer((), {"num_domains": 2}, **STATE),
    "FilterResponseNorm": Layer((), {"use_slope": True, "use_learned_epsilon": True}),
    "EvoNormB0": Layer(**STATE),
    "EvoNormS0": Layer((), {"num_groups": 4}),
    "ProxyNorm": Layer((methods.layer_norm(),)),
    "DynamicMomentShortcut": Layer(last=""),
    "WSConv": Layer((), {"kernel_size": (3, 3)}, last=""),
    "WSDense": Layer(last=""),
}
WITH_POSITIONS = ("Norm", "BatchGroupNorm, positions", "GroupNormPlus")


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


def layer_program(library, key, train, channels_first):
    """A layer as a function of its variables and x: what it returns and remembers; in training also
    the gradient of a loss."""
    layer = LAYERS[key]
    args, options = list(layer.args), dict(layer.options)
    sizes = (*layer.sizes, C)
    if channels_first and layer.last:
        sizes = (layer.sizes[0], C, *layer.sizes[1:])
        options |= dict.fromkeys(layer.last.split(), 1)
    call = dict(layer.call if train else {})
    if layer.remembers:
        call["use_running_average"] = not train
    if key == "DomainSpecificBatchNorm":
        call["domain"] = 1
    name = layer.name or key
    others = [(*sizes[:-1], 1)] * 2 if name == "DynamicMomentShortcut" else []
    if key.startswith("WS"):
        options |= {"features": C} if library is linen else {}
        args = args if library is linen else [C, C]
    elif library is nnx and name != "CrossIterationNorm":
        args = [C, *args]
    if name == "CrossIterationNorm":
        conv = partial(fnn.Conv) if library is linen else partial(fnnx.Conv, C, rngs=fnnx.Rngs(0))
        args = [conv(C, (3, 3), use_bias=False)]
    if library is nnx and key in WITH_POSITIONS:
        options["x_shape"] = (1, *concrete(sizes)[1:])

    first = [jnp.zeros(concrete(s)) for s in (sizes, *others)]
    if library is linen:
        module = getattr(linen, name)(*args, **options)
        known = jax.eval_shape(partial(module.init, **call), jax.random.key(0), *first)
        mutable = [collection for collection in known if collection != "params"]

        def run(variables, *xs):
            return module.apply(variables, *xs, mutable=mutable, **call)
    else:
        make = getattr(nnx, name)
        graph, state = fnnx.split(
            fnnx.eval_shape(lambda: make(*args, rngs=fnnx.Rngs(0), **options))
        )
        known = fnnx.to_pure_dict(state)

        def run(variables, *xs):
            new = jax.tree.map(lambda t: t, state)
            fnnx.replace_by_pure_dict(new, variables)
            module = fnnx.merge(graph, new)
            y = module(*xs, **call)
            return y, fnnx.to_pure_dict(fnnx.state(module))

    def step(variables, *xs):
        def loss(x):
            y, state = run(variables, x, *xs[1:])
            return jnp.sin(y).sum(), (y, state)

        return jax.value_and_grad(loss, has_aux=True)(xs[0])

    return Program(step if train else run, values(known), (sizes, *others))


def functions():
    """What is behind no layer, or has moments for arguments and results."""
    state = {"mean": np.ones((2, C), "f4"), "var": np.full((2, C), 2, "f4")}
    first = jaxnorm.init_running((C,), counted=True)
    x = (*IMAGE, C)

    def masked(_, x, mask):
        return norm(x, methods.group_norm(4), weights=mask)[0]

    def distances(state, x):
        return domains.domain_distance(x, state, domain=1)

    def by_example(running, x):
        running = jaxnorm.running_moments(running, methods.batch_norm(), x.shape)
        weighed = inference.weigh_example(x, running, methods.batch_norm(), example_weight=0.3)
        return jaxnorm.normalize(x, weighed)

    def update(running, x):
        m = jaxnorm.moments(x, methods.instance_norm())
        pooled = jaxnorm.merge(*[jaxnorm.pool(m, methods.batch_norm())] * 2)
        return jaxnorm.update_running(running, pooled), jaxnorm.update_cumulative(running, m)

    yield "mask", Program(masked, (), (x, (*IMAGE, 1)))
    yield "distance", Program(distances, state, (x,))
    yield "example weight", Program(by_example, first, (x,))
    yield "moments", Program(update, first, (x,))


def cases():
    """Each layer in both libraries, both layouts, in training and at inference; by default one of
    these for each."""
    for i, (key, layer) in enumerate(LAYERS.items()):
        layouts = (False, True) if layer.last else (False,)
        trains = (True, False) if layer.remembers else (False,)
        all_of_it = list(itertools.product((linen, nnx), layouts, trains))
        for j, (library, first, train) in enumerate(all_of_it):
            name = f"{library.__name__}, {key}" + ", training" * train + ", NCHW" * first
            often = j == 3 * i % len(all_of_it)
            yield name, partial(layer_program, library, key, train, first), often
    for name, program in functions():
        yield name, (lambda program=program: program), True


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
        program = export.export(jax.jit(function))(fixed, *free)
        rng = np.random.default_rng(1)
        xs = [rng.uniform(0.1, 2, concrete(s)).astype("f4") for s in sizes]
        data = program.serialize(vjp_order=1 if differentiable else 0)
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


def test_stored_programs_run_in_a_process_without_the_library(tmp_path):
    check([(name, make) for name, make, often in cases() if often], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_all_stored_programs(part, tmp_path):
    check([(name, make) for name, make, often in cases() if not often][part::4], tmp_path)


@pytest.mark.parametrize("library", (linen, nnx))
def test_every_layer_is_exported(library):
    public = {
        name
        for name, t in vars(library).items()
        if isinstance(t, type) and issubclass(t, fnn.Module | fnnx.Module)
    }
    assert public - {"FoldedNorm"} == {layer.name or key for key, layer in LAYERS.items()}


def test_a_batch_that_may_not_split_says_so():
    (shape,) = shapes(("b", 4, C))
    with pytest.raises(ValueError, match=r"size b, which does not split into 2 .* such as 2\*n in"):
        methods.ghost_batch_norm(2).shape(shape)
    with pytest.raises(ValueError, match="size b, which does not split into groups of 2"):
        jax.eval_shape(
            lambda x: norm(x, methods.group_norm(group_size=2)),
            jax.ShapeDtypeStruct(shapes((4, "b"))[0], jnp.float32),
        )
