"""The layers of linen and nnx are every method: its values, state and parameters, by its names."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import nnx as fnnx
from helpers import close, data
from registry import KERNEL, REGISTRY, SHAPE, STATEFUL, C, by_turns

from jaxnorm import linen, methods, nnx

close = partial(close, atol=2e-5, rtol=2e-5)
TAP = "_overwrite_with_gradient"


def linen_variables(entry, state):
    """Collections of the layer, with the entry's parameters."""
    params = entry.parameters()
    taps = {name: params.pop(name) for name in entry.method.overwritten_by_gradient}
    params |= {"layer": {"kernel": KERNEL}} if entry.needs_kernel else {}
    some = {"params": params, "batch_stats": state, TAP: taps}
    return {name: collection for name, collection in some.items() if collection}


def nnx_layer(entry, **fields):
    """The layer with the entry's parameters."""
    layer = entry.in_nnx(**fields)
    for name, value in entry.parameters().items():
        getattr(layer, name)[...] = jnp.asarray(value)
    if entry.needs_kernel:
        layer.layer.kernel[...] = jnp.asarray(KERNEL)
    return layer


@by_turns()
def test_layers_are_the_method(entry):
    """Two steps of training, with a mask, and inference of another batch size; parameters and state
    by the same names."""
    x, few = data(*SHAPE, dtype="f4"), data(4, *SHAPE[1:], seed=1, dtype="f4")
    mask = np.arange(8).reshape(8, 1, 1, 1) < 7
    first, layer, theirs = entry.init(SHAPE), entry.in_linen(), nnx_layer(entry)

    def call(n):
        return entry.options | entry.by_example(n)

    init = partial(layer.init, use_running_average=True, **call(1))
    initial = jit(init)(jax.random.key(0), few[:1])
    variables = linen_variables(entry, first)
    chex.assert_trees_all_equal_shapes_and_dtypes(initial, variables)
    chex.assert_trees_all_equal(initial.get("batch_stats", {}), first)
    parameters = entry.parameters()
    params = fnnx.to_pure_dict(fnnx.state(theirs, fnnx.Any(fnnx.Param, nnx.Tap)))
    assert params.keys() - {"layer"} == parameters.keys()

    def kept():
        return {name: getattr(theirs, name)[...] for name in first}

    chex.assert_trees_all_equal(kept(), first)

    @partial(jit, static_argnames="train")
    def function(state, x, mask, train):
        return entry(x, state, train, weights=mask, **parameters)

    @partial(jit, static_argnames="train")
    def in_linen(variables, x, mask, train):
        options = {"use_running_average": not train, "mask": mask, **call(len(x))}
        return layer.apply(variables, x, **options, mutable="batch_stats")

    @fnnx.jit(static_argnames="train")
    def in_nnx(layer, x, mask, train):
        return layer(x, use_running_average=not train, mask=mask, **call(len(x)))

    state = first
    for t, train in ((x, True), (x[::-1], True), (few, False)):
        arrays = t, mask[: len(t)], train
        y, state = function(state, *arrays)
        y_linen, updates = in_linen(variables, *arrays)
        variables |= updates
        close((y_linen, in_nnx(theirs, *arrays)), (y, y))
        close((variables.get("batch_stats", {}), kept()), (state, state))


@by_turns(STATEFUL)
def test_use_and_update_are_apart(entry):
    """What normalizes, and whether the batch enters the state; initializing does neither."""
    x, first, parameters = data(*SHAPE, dtype="f4"), entry.init(SHAPE), entry.parameters()
    call, layer = entry.options | entry.by_example(8), entry.in_linen()
    variables = linen_variables(entry, first)
    initial = jit(partial(layer.init, use_running_average=False, **call))(jax.random.key(0), x)
    chex.assert_trees_all_equal(initial["batch_stats"], first)
    (trained, new), (evaluated, _) = (
        jit(partial(entry, train=train, **parameters))(x, first) for train in (True, False)
    )
    for use, update in ((True, True), (False, False)):
        flags = {"use_running_average": use, "update_running_average": update}
        theirs = nnx_layer(entry)
        y, stats = jit(partial(layer.apply, **flags, **call, mutable="batch_stats"))(variables, x)
        y_nnx = fnnx.jit(lambda layer, x, flags=flags: layer(x, **flags, **call))(theirs, x)
        want = evaluated if use else trained
        close((y, y_nnx), (want, want))
        kept = {name: getattr(theirs, name)[...] for name in first}
        want = new if update else first
        close((stats["batch_stats"], kept), (want, want))


AVERAGING = [entry for entry in STATEFUL if "momentum" in entry.method.options]


@pytest.mark.parametrize("entry", AVERAGING, ids=str)
def test_state_in_half_precision_warns_where_it_is_updated(entry):
    """And nowhere else: what is not stored is not rounded."""
    x, call = jnp.ones(SHAPE), entry.options | entry.by_example(8)
    half = {
        name: t if name == "count" else t.astype(jnp.bfloat16)
        for name, t in entry.init(SHAPE).items()
    }
    layer, variables, theirs = entry.in_linen(), linen_variables(entry, half), nnx_layer(entry)
    for name, value in half.items():
        setattr(theirs, name, fnnx.BatchStat(value))

    def in_linen(**flags):
        f = partial(layer.apply, use_running_average=False, **flags, **call, mutable="batch_stats")
        jax.eval_shape(f, variables, x)

    def in_nnx(**flags):
        flags |= {"use_running_average": False, **call}
        fnnx.eval_shape(lambda layer, x: layer(x, **flags), theirs, x)

    for run in (in_linen, in_nnx):
        run(update_running_average=False)
        with pytest.warns(UserWarning, match="running statistics in bfloat16"):
            run(update_running_average=True)


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_layers_refuse_options_of_other_names(entry):
    x, flags = jax.ShapeDtypeStruct(SHAPE, "f4"), {"use_running_average": True, "weights": 1}
    message = "a layer with .* got an unexpected option weights. Expected some of mask, update"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(partial(entry.in_linen().init, **flags), jax.random.key(0), x)
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(partial(entry.in_nnx(), **flags), x)


@pytest.mark.parametrize("momentum", (-1, 2, np.nan, None, np.full(C, 0.5)), ids=str)
def test_batch_norm_checks_its_momentum(momentum):
    """As Flax's layers have it; whether or not they update."""
    x, flags = jnp.ones((6, C)), {"use_running_average": True}
    ours = linen.BatchNorm(momentum=momentum)
    for call in (
        lambda: ours.init(jax.random.key(0), x, **flags),
        lambda: nnx.BatchNorm(C, momentum=momentum, rngs=fnnx.Rngs(0))(x, **flags),
    ):
        with pytest.raises((TypeError, ValueError), match="momentum .*expected a number of at lea"):
            call()


def test_nnx_layers_promote_running_statistics():
    x, options = jnp.ones((6, C), jnp.bfloat16), {"use_scale": False, "use_bias": False}
    options["rngs"] = fnnx.Rngs(0)
    for method in (methods.batch_norm(), methods.batch_renorm()):
        assert nnx.Norm(C, method, **options)(x).dtype == jnp.float32
        assert nnx.Norm(C, method, dtype=jnp.bfloat16, **options)(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("entry", REGISTRY, ids=str)
def test_nnx_layers_call_the_hook(entry):
    """With input, state and affine parameters, whatever the method."""
    given = []

    def hook(arrays, dtype):
        given.append((*map(jnp.shape, arrays), dtype))
        return arrays

    layer = entry.in_nnx(promote_dtype=hook, dtype=jnp.float32)
    call = entry.options | entry.by_example(8)
    jax.eval_shape(lambda x: layer(x, use_running_average=True, **call), jnp.ones(SHAPE))
    state = [t.shape for t in entry.init(SHAPE).values()]
    assert given == [(SHAPE, *state, (C,), (C,), jnp.float32)]
