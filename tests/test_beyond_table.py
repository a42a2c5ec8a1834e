"""What every method that is more than a row of the table does alike: layers, masks, devices,
precision, transformations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxnorm import batch_group, evonorm, frn, group_plus, linen, methods, proxy
from jaxnorm import nnx as nnx_layers

SHAPE = (8, 2, 3, 6)
C = SHAPE[-1]


@dataclasses.dataclass(frozen=True)
class Family:
    """One method: its function with the layer's parameters, the layers, and the state before the
    first step."""

    call: Callable[..., Any]
    linen: Any
    nnx: Callable[..., Any]
    state: Callable[[], dict[str, jax.Array]] = dict
    shares: bool = False
    """Whether an example's output depends on the others in training."""


def stateless(function):
    return lambda x, state, *, train, **options: (function(x, **options), state)


B0, GNP, BGN = evonorm.evonorm_b0, group_plus.group_norm_plus, batch_group.batch_group_norm
FRN = dict(use_slope=True, use_learned_epsilon=True)
FAMILIES = {
    "frn": Family(
        stateless(frn.filter_response_norm),
        linen.FilterResponseNorm(**FRN),
        partial(nnx_layers.FilterResponseNorm, C, **FRN),
    ),
    "evonorm_b0": Family(
        partial(B0, momentum=0.5),
        linen.EvoNormB0(momentum=0.5),
        partial(nnx_layers.EvoNormB0, C, momentum=0.5),
        lambda: evonorm.init_evonorm_b0(C),
        shares=True,
    ),
    "evonorm_s0": Family(
        stateless(partial(evonorm.evonorm_s0, num_groups=3)),
        linen.EvoNormS0(num_groups=3),
        partial(nnx_layers.EvoNormS0, C, num_groups=3),
    ),
    "proxy_norm": Family(
        stateless(partial(proxy.proxy_norm, method=methods.group_norm(3), activation=jax.nn.silu)),
        linen.ProxyNorm(methods.group_norm(3), jax.nn.silu),
        partial(nnx_layers.ProxyNorm, C, methods.group_norm(3), jax.nn.silu),
    ),
    "group_norm_plus": Family(
        partial(GNP, num_groups=3, momentum=0.5),
        linen.GroupNormPlus(3, momentum=0.5),
        partial(nnx_layers.GroupNormPlus, C, 3, momentum=0.5, x_shape=SHAPE),
        lambda: group_plus.init_group_norm_plus(SHAPE),
        shares=True,
    ),
    "group_norm_plus_channels": Family(
        partial(GNP, num_groups=3, momentum=0.5, per_position=False),
        linen.GroupNormPlus(3, momentum=0.5, per_position=False),
        partial(nnx_layers.GroupNormPlus, C, 3, momentum=0.5, per_position=False),
        lambda: group_plus.init_group_norm_plus(SHAPE, per_position=False),
        shares=True,
    ),
    "batch_group_norm": Family(
        partial(BGN, num_groups=4, momentum=0.5),
        linen.BatchGroupNorm(4, momentum=0.5),
        partial(nnx_layers.BatchGroupNorm, C, 4, momentum=0.5, x_shape=SHAPE),
        lambda: batch_group.init_batch_group_norm(4, SHAPE),
        shares=True,
    ),
}


def each(*names, among=tuple(FAMILIES)):
    """These families, the rest of `among` in the slow run."""
    cases = [
        pytest.param(
            FAMILIES[name], id=name, marks=[] if not names or name in names else pytest.mark.slow
        )
        for name in among
    ]
    return pytest.mark.parametrize("family", cases)


STATEFUL = tuple(name for name, family in FAMILIES.items() if family.shares)


def data(shape=SHAPE, seed=0, dtype="f4"):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 2, shape), dtype)


def parameters(family, dtype="f4"):
    """The layer's parameters, drawn at random: as the function's options."""
    init = partial(family.linen.init, use_running_average=True)
    shapes = jax.eval_shape(init, jax.random.key(0), data())["params"]
    return {
        name: data(t.shape, seed=3 + i, dtype=dtype)
        for i, (name, t) in enumerate(sorted(shapes.items()))
    }


def same(a, b, atol=2e-5):
    chex.assert_trees_all_close(a, b, rtol=2e-5, atol=atol)


@each(*(name for name in FAMILIES if name != "group_norm_plus_channels"))
def test_layers_are_the_function(family):
    x, p, first = data(), parameters(family), family.state()
    layer = family.nnx(rngs=nnx.Rngs(0))
    assert {name for name, t in nnx.to_flat_state(nnx.state(layer, nnx.Param))} == {
        (name,) for name in p
    }
    for name, value in p.items():
        getattr(layer, name)[...] = value

    @partial(jax.jit, static_argnames="train")
    def function(p, x, state, train):
        return family.call(x, state, train=train, **p)

    @partial(jax.jit, static_argnames="train")
    def in_linen(p, x, state, train):
        return family.linen.apply(
            {"params": p, "batch_stats": state},
            x,
            use_running_average=not train,
            mutable="batch_stats",
        )

    @partial(nnx.jit, static_argnames="train")
    def in_nnx(layer, x, train):
        return layer(x, use_running_average=not train)

    def kept():
        return {name: getattr(layer, name)[...] for name in first}

    initial = jax.jit(partial(family.linen.init, use_running_average=False))(jax.random.key(0), x)
    chex.assert_trees_all_equal(initial.get("batch_stats", {}), first, kept())
    y, state = function(p, x, first, True)
    same((y, {"batch_stats": state}), in_linen(p, x, first, True))
    same((y, state), (in_nnx(layer, x, True), kept()))
    later, unchanged = function(p, x, state, False)
    same((later, {"batch_stats": state}), in_linen(p, x, state, False))
    same((later, state), (in_nnx(layer, x, False), kept()))
    chex.assert_trees_all_equal(unchanged, state)
    assert (np.abs(later - y).max() > 1e-3) == family.shares


@each("frn", "group_norm_plus")
def test_half_precision_is_that_of_float32_rounded(family):
    x, p, first = data(dtype="bfloat16"), parameters(family), family.state()
    run = jax.jit(partial(family.call, train=True))
    y, state = run(x, first, **p)
    exact, exact_state = run(x.astype("f4"), first, **p)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first, exact_state)
    same(state, exact_state)
    np.testing.assert_allclose(y.astype("f4"), exact, rtol=2**-7, atol=2e-5)


@each("frn", "evonorm_b0", "group_norm_plus")
@pytest.mark.usefixtures("x64")
def test_masked_examples_and_what_is_under_a_mask_count_nowhere(family):
    """Two examples of NaN under the mask: output, gradients and state are those without them."""
    x, gy, p, first = (
        data(dtype="f8"),
        data(seed=1, dtype="f8"),
        parameters(family, "f8"),
        family.state(),
    )
    mask = jnp.arange(8).reshape(8, 1, 1, 1) < 6

    @jax.jit
    def masked(x, p):
        y, pull, state = jax.vjp(
            lambda x, p: family.call(x, first, train=True, weights=mask, **p), x, p, has_aux=True
        )
        return y, pull(jnp.where(mask, gy, 0)), state

    @jax.jit
    def alone(x, p):
        y, pull, state = jax.vjp(
            lambda x, p: family.call(x, first, train=True, **p), x, p, has_aux=True
        )
        return y, pull(gy[:6]), state

    y, (dx, dp), state = masked(x.at[6:].set(jnp.nan), p)
    few, (few_dx, few_dp), few_state = alone(x[:6], p)
    same((y[:6], dx[:6], dp, state), (few, few_dx, few_dp, few_state), atol=1e-10)
    bias = (
        p["bias"]
        if "threshold" not in p
        else jnp.maximum(p["bias"], p["slope"] * p["bias"] + p["threshold"])
    )
    if "proxy_bias" not in p:
        np.testing.assert_allclose(y[6:], jnp.broadcast_to(bias, y[6:].shape), atol=1e-12)
    assert jnp.isfinite(y).all()
    np.testing.assert_array_equal(dx[6:], 0)


@each("evonorm_b0", "group_norm_plus", "batch_group_norm")
@pytest.mark.usefixtures("x64")
def test_eight_devices_are_one(family):
    """Output, gradient of x and state, with masks that leave devices unequal counts, one of them
    none."""
    x, gy, p, first = (
        data(dtype="f8"),
        data(seed=1, dtype="f8"),
        parameters(family, "f8"),
        family.state(),
    )
    mask = jnp.asarray(np.random.default_rng(2).random(SHAPE) < 0.7).at[3].set(not family.shares)

    def step(x, gy, mask, **options):
        def f(x):
            return family.call(x, first, train=True, weights=mask, **p, **options)

        y, pull, state = jax.vjp(f, x, has_aux=True)
        return y, *pull(gy), state

    mesh, options = (
        Mesh(np.array(jax.devices()), ("i",)),
        {"axis_name": "i"} if family.shares else {},
    )
    shards = jax.shard_map(
        partial(step, **options), mesh=mesh, in_specs=P("i"), out_specs=(P("i"), P("i"), P())
    )
    same(jax.jit(shards)(x, gy, mask), jax.jit(step)(x, gy, mask), atol=1e-11)


@each("batch_group_norm", among=STATEFUL)
@pytest.mark.usefixtures("x64")
def test_groups_of_devices_are_batches_of_their_own(family):
    x, p, first = data(dtype="f8"), parameters(family, "f8"), family.state()
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]

    def part(x, **options):
        return family.call(x, first, train=True, **p, **options)[0]

    split = jax.jit(jax.vmap(partial(part, axis_name="i", axis_index_groups=pairs), axis_name="i"))(
        x[:, None]
    )
    same(
        split.reshape(SHAPE),
        jax.jit(jax.vmap(part))(x.reshape(4, 2, *SHAPE[1:])).reshape(SHAPE),
        atol=1e-11,
    )


@each("evonorm_s0", "proxy_norm", "batch_group_norm")
@pytest.mark.usefixtures("x64")
def test_forward_mode_scan_and_traced_momentum(family):
    """jvp is the transpose of vjp; state is a fixed point of shapes and dtypes; a schedule compiles
    nothing again."""
    x, gy, dx, p, first = (
        *(data(seed=i, dtype="f8") for i in range(3)),
        parameters(family, "f8"),
        family.state(),
    )
    traces = []

    @jax.jit
    def both(x, gy, dx, schedule):
        traces.append(1)
        options = schedule if family.shares else {}

        def f(x):
            return family.call(x, first, train=True, **p, **options)[0]

        def step(state, x):
            y, state = family.call(x, state, train=True, **p, **options)
            return state, y

        tangent = jax.jvp(f, (x,), (dx,))[1]
        last, ys = jax.lax.scan(step, first, jnp.stack([x, gy]))
        return (
            jnp.vdot(gy, tangent),
            jnp.vdot(dx, jax.vjp(f, x)[1](gy)[0]),
            last,
            ys,
            jax.vmap(f)(jnp.stack([x, gy])),
        )

    forward, backward, last, ys, mapped = both(x, gy, dx, {"momentum": jnp.asarray(0.25)})
    np.testing.assert_allclose(forward, backward, rtol=1e-9)
    chex.assert_trees_all_equal_shapes_and_dtypes(last, first)
    same(ys, mapped, atol=1e-10)
    faster = both(x, gy, dx, {"momentum": jnp.asarray(0.75)})[2]
    assert len(traces) == 1
    for name in first:
        if name != "positions":
            assert np.abs(faster[name] - last[name]).max() > 1e-3


@each("evonorm_b0", "batch_group_norm", among=STATEFUL)
def test_batches_of_nothing_and_of_nan_leave_the_state(family):
    x, p, first = data(), parameters(family), family.state()
    run = jax.jit(partial(family.call, train=True))
    chex.assert_trees_all_equal(run(x, first, weights=jnp.zeros((8, 1, 1, 1), bool), **p)[1], first)
    chex.assert_trees_all_equal(run(x.at[:].set(jnp.nan), first, **p)[1], first)


@each("group_norm_plus", "batch_group_norm")
def test_layouts_agree(family):
    x, p, first = data(), parameters(family), family.state()
    last = jax.jit(partial(family.call, train=True))(x, first, **p)
    order = (1, 3, 2, 0)  # rows, channels, columns, examples
    run = jax.jit(partial(family.call, train=True, batch_axis=3, channel_axis=1))
    if first.get("mean", jnp.zeros(1)).ndim == 3:
        turned = {name: t.transpose(0, 2, 1) for name, t in first.items()}
        y, state = run(x.transpose([1, 3, 2, 0]), turned, **p)
        state = {name: t.transpose(0, 2, 1) for name, t in state.items()}
    else:
        y, state = run(x.transpose(order), first, **p)
    same((y.transpose(np.argsort(order)), state), last)


@each()
def test_complex_and_integer_input_is_refused(family):
    p, first = parameters(family), family.state()
    with pytest.raises(TypeError, match="is defined for real x. Got complex64"):
        family.call(data().astype("complex64"), first, train=True, **p)
    with pytest.raises(TypeError, match="x must be floating or complex. Got int32"):
        family.call(data().astype("int32"), first, train=True, **p)
