"""The nnx layers for any row of the table: the same results as the linen ones, state, switches and
transformations."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import data

from jaxnorm import EACH, Groups, Row, Size, linen, methods, moments, normalize
from jaxnorm import nnx as layers

SHAPE = (4, 4, 6, 6)
data = partial(data, dtype="f4")
PARTS = Row(Groups(batch=1, spatial=(2, 1), channel=EACH))
ROWS = {
    "batch_norm": methods.batch_norm(),
    "ghost_batch_norm": methods.ghost_batch_norm(2),
    "ghost_batch_norm_size": methods.ghost_batch_norm(ghost_size=2),
    "batch_group_norm": methods.batch_group_norm(3),
    "batch_group_norm_one": methods.batch_group_norm(1),
    "batch_group_norm_rows": methods.batch_group_norm(12),
    "batch_and_group_norm": methods.batch_and_group_norm(ghost_size=2, num_groups=3),
    "parts": PARTS,
    "instance_norm": methods.instance_norm(),
    "group_norm": methods.group_norm(3),
    "layer_norm": methods.layer_norm(),
    "token_layer_norm": methods.token_layer_norm(),
    "rms_norm": methods.rms_norm(),
}


def make(cls, *args, **kwargs):
    return cls(*args, **kwargs, rngs=nnx.Rngs(0))


@nnx.jit(static_argnames=("use_running_average", "update_running_average", "activation"))
def call(layer, x, **kwargs):
    return layer(x, **kwargs)


def values(layer):
    return nnx.to_pure_dict(nnx.state(layer))


def stats(layer):
    return {
        name: getattr(layer, name)[...]
        for name in ("count", "mean", "var", "positions")
        if hasattr(layer, name)
    }


def same(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_gives_what_it_gives_in_linen(row):
    method, x, few = ROWS[row], data(*SHAPE), data(3, *SHAPE[1:], seed=1)
    method = dataclasses.replace(method, momentum=0.7, correction=1, debias=True)
    size = {"x_shape": (1, *SHAPE[1:])} if method.keeps_positions(6) else {}
    ours, theirs = make(layers.Norm, 6, method, **size), linen.Norm(method)

    @jax.jit
    def in_linen(x, few):
        variables = theirs.init(jax.random.key(0), x[:1], use_running_average=False)
        start = variables.get("batch_stats", {})
        y, new = theirs.apply(variables, x, use_running_average=False, mutable="batch_stats")
        return (
            start,
            y,
            new.get("batch_stats", {}),
            theirs.apply(variables | new, few, use_running_average=True),
        )

    start, y, new, evaluated = in_linen(x, few)
    chex.assert_trees_all_equal(stats(ours), dict(start))
    same(call(ours, x), y)
    same(stats(ours), dict(new))
    ours.eval()
    same(call(ours, few), evaluated)
    same(stats(ours), dict(new))


def test_use_and_update_are_apart():
    x = data(*SHAPE)
    batch = normalize(x, moments(x, methods.batch_norm()))
    for use in (True, False):
        for update in (True, False, None):
            layer = make(layers.Norm, 6, methods.batch_norm(momentum=0.5))
            y = call(layer, x, use_running_average=use, update_running_average=update)
            same(y, x / jnp.sqrt(1 + 1e-5) if use else batch)
            moved = update or (update is None and not use)
            same(layer.mean[...], x.mean((0, 1, 2)) / 2 if moved else jnp.zeros(6))
            same(layer.var[...], 0.5 + x.var((0, 1, 2)) / 2 if moved else jnp.ones(6))


def test_train_eval_and_view_reach_every_layer_with_state():
    model = nnx.Sequential(
        make(layers.Norm, 6, methods.batch_norm()),
        make(layers.Norm, 6, methods.ghost_batch_norm(2)),
        make(layers.Norm, 6, methods.batch_group_norm(3)),
        make(layers.BatchNorm, 6),
        make(layers.GroupNorm, 6, 3),
    )
    x, before = data(*SHAPE), values(model)
    model.eval()
    model(x)
    chex.assert_trees_all_equal(values(model), before)
    viewed = nnx.view(model, use_running_average=False)
    assert [layer.use_running_average for layer in viewed.layers[:4]] == [False] * 4
    assert [layer.use_running_average for layer in model.layers[:4]] == [True] * 4
    model.train()
    for layer in model.layers[:4]:
        layer(x)
        assert (layer.var[...] != 1).all()


def test_without_a_flag_anywhere_it_is_an_error():
    layer = make(layers.Norm, 6, methods.batch_norm(), use_running_average=None)
    with pytest.raises(ValueError, match="No `use_running_average` argument was provided"):
        layer(data(*SHAPE))
    make(layers.Norm, 6, methods.layer_norm(), use_running_average=None)(data(*SHAPE))


def test_momentum_none_and_methods_of_one_example_keep_no_state():
    for method in (methods.batch_norm(momentum=None), methods.group_norm(3)):
        layer = make(layers.Norm, 6, method)
        assert set(values(layer)) == {"scale", "bias"}
        same(layer(data(*SHAPE)), normalize(data(*SHAPE), moments(data(*SHAPE), method)))


def test_state_that_keeps_positions_needs_their_number_and_keeps_to_it():
    with pytest.raises(ValueError, match="x_shape=None; expected the shape of an input"):
        make(layers.Norm, 6, PARTS)
    with pytest.raises(ValueError, match="x_shape=None; expected the shape of an input"):
        make(layers.Norm, 6, methods.batch_group_norm(12))
    method = Row(Groups(batch=1, spatial=(EACH, 1), channel=EACH))
    layer = make(layers.Norm, 6, method, x_shape=(1, 4, 6, 6))
    assert layer.mean.shape == (4, 6)
    with pytest.raises(ValueError, match=r"mean of shape \(4, 6\).* mean of shape \(8, 6\)"):
        layer(data(2, 8, 6, 6))
    assert layer(data(3, 4, 2, 6), use_running_average=True).shape == (3, 4, 2, 6)


def test_a_batch_that_ghosts_do_not_divide_is_an_error_in_training_only():
    layer = make(layers.Norm, 6, methods.ghost_batch_norm(ghost_size=3))
    with pytest.raises(ValueError, match="batch axis 0 of x has size 4, which does not split"):
        layer(data(4, 2, 6))
    assert layer(data(4, 2, 6), use_running_average=True).shape == (4, 2, 6)


NAMED = [
    (lambda: make(layers.BatchNorm, 6), methods.batch_norm()),
    (lambda: make(layers.GroupNorm, 6, 3), methods.group_norm(3, epsilon=1e-6)),
    (lambda: make(layers.LayerNorm, 6), methods.token_layer_norm(epsilon=1e-6)),
    (lambda: make(layers.InstanceNorm, 6), methods.instance_norm(epsilon=1e-6)),
    (lambda: make(layers.RMSNorm, 6), methods.rms_norm(epsilon=1e-6)),
    (
        lambda: make(layers.Norm, 6, methods.ghost_batch_norm(ghost_size=1)),
        methods.instance_norm(),
    ),
    (lambda: make(layers.Norm, 6, methods.batch_group_norm(12), x_shape=SHAPE), PARTS),
    (
        lambda: make(layers.Norm, 6, Groups(batch=Size(2), spatial=1, channel=2)),
        methods.batch_and_group_norm(2, 2),
    ),
]


@pytest.mark.parametrize("construct, method", NAMED)
def test_layers_are_their_row(construct, method):
    x = data(*SHAPE)
    same(call(construct(), x), normalize(x, moments(x, method), epsilon=method.epsilon))


def test_a_layer_without_scale_bias_and_state_has_no_variables():
    layer = make(layers.Norm, 6, methods.positional_norm(), use_bias=False, use_scale=False)
    assert not values(layer)
    same(
        layer(data(*SHAPE)),
        normalize(data(*SHAPE), moments(data(*SHAPE), methods.positional_norm())),
    )


def test_channels_first_is_channels_last_transposed():
    x = data(*SHAPE)
    for method in (methods.batch_norm(), methods.group_norm(3), methods.ghost_batch_norm(2)):
        first, last = make(layers.Norm, 6, method, channel_axis=1), make(layers.Norm, 6, method)
        same(jnp.moveaxis(call(first, jnp.moveaxis(x, -1, 1)), 1, -1), call(last, x))
        same(stats(first), stats(last))


def test_scale_bias_and_activation_at_the_call():
    x, g, b = data(*SHAPE), data(4, 6, seed=1), data(4, 6, seed=2)
    bare = {"use_scale": False, "use_bias": False}
    for layer in (
        make(layers.Norm, 6, methods.batch_norm(), **bare),
        make(layers.LayerNorm, 6, **bare),
    ):
        plain = call(layer, x)
        expected = jax.nn.silu(plain * g[:, None, None, :] + b[:, None, None, :])
        same(call(layer, x, scale=g, bias=b, activation=jax.nn.silu), expected)
    with pytest.raises(ValueError, match="bias was given at the call, but the layer has its own"):
        make(layers.LayerNorm, 6)(x, bias=b)


def test_unit_offset_stores_the_distance_from_one():
    x = data(*SHAPE)
    for cls, args in (
        (layers.Norm, (6, methods.layer_norm())),
        (layers.RMSNorm, (6,)),
        (layers.GroupNorm, (6, 3)),
    ):
        offset, plain = make(cls, *args, unit_offset=True), make(cls, *args)
        assert not offset.scale[...].any()
        same(offset(x), plain(x))
        offset.scale[...], plain.scale[...] = jnp.full(6, 0.25), jnp.full(6, 1.25)
        same(offset(x), plain(x))


def test_split_merge_jit_and_grad():
    """The functional form gives what the layer gives, and its own state stays untouched."""
    x, layer = data(*SHAPE), make(layers.Norm, 6, methods.ghost_batch_norm(2, momentum=0.5))
    before = values(layer)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def step(state, x):
        copy = nnx.merge(graphdef, state, copy=True)
        y = copy(x)
        return y, nnx.state(copy)

    y, new = step(state, x)
    chex.assert_trees_all_equal(values(layer), before)
    same(call(layer, x), y)
    same(values(layer), nnx.to_pure_dict(new))

    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params):
        return jnp.sin(nnx.merge(graphdef, params, rest, copy=True)(x)).sum()

    expected = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    grads = nnx.jit(nnx.grad(lambda layer, x: jnp.sin(layer(x)).sum()))(layer, x)
    same(nnx.to_pure_dict(grads), expected)
    # the gradient's forward pass counts as a step of training: 1/2 of 1/2 of the start is left
    same(layer.mean[...], 0.75 * x.mean((0, 1, 2)))


def test_running_statistics_carry_no_gradient():
    layer = make(layers.Norm, 6, methods.batch_norm(momentum=0.5))
    graphdef, state = nnx.split(layer)

    def mean(x):
        copy = nnx.merge(graphdef, state, copy=True)
        copy(x)
        return copy.mean[...].sum()

    assert not jax.grad(mean)(data(*SHAPE)).any()


def test_layers_are_scanned_and_mapped_over():
    x = data(4, 6)

    @nnx.vmap(in_axes=0)
    def several(key):
        layer = layers.Norm(
            6,
            methods.batch_norm(momentum=0.5),
            scale_init=nnx.initializers.normal(),
            rngs=nnx.Rngs(key),
        )
        return layer

    stack = several(jax.random.split(jax.random.key(0), 3))
    assert stack.scale.shape == stack.mean.shape == (3, 6)

    @nnx.jit
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return layer(x)

    graphdef, state = nnx.split(stack)
    singles = [
        nnx.merge(graphdef, jax.tree.map(lambda t, i=i: t[i], state), copy=True) for i in range(3)
    ]
    expected = x
    for layer in singles:
        expected = layer(expected)
    same(through(stack, x), expected)
    same(stack.mean[...], jnp.stack([layer.mean[...] for layer in singles]))


def test_rows_over_a_named_axis_are_the_rows_of_the_whole_batch():
    x, whole = data(4, 2, 3, 6), make(layers.Norm, 6, methods.batch_norm(momentum=0.5))
    graphdef, state = nnx.split(
        make(layers.Norm, 6, methods.batch_norm(momentum=0.5), axis_name="i")
    )

    def part(x):
        layer = nnx.merge(graphdef, state, copy=True)
        return layer(x), nnx.to_pure_dict(nnx.state(layer))

    y, new = jax.jit(jax.vmap(part, axis_name="i", out_axes=(0, None)))(x)
    same(y.reshape(8, 3, 6), call(whole, x.reshape(8, 3, 6)))
    same(new, values(whole))
