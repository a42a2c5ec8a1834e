"""The linen layers for any row of the table: state, training, evaluation, and Flax's
transformations."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import linen as nn

from jaxnorm import EACH, Groups, Row, Size, methods, moments, normalize
from jaxnorm import linen as layers

KEY = jax.random.key(0)
SHAPE = (4, 4, 6, 6)
PARTS = Row(Groups(batch=1, spatial=(2, 1), channel=EACH))

# Each row with the shape of its state for SHAPE, None where it needs none.
ROWS = {
    "batch_norm": (methods.batch_norm(), (6,)),
    "ghost_batch_norm": (methods.ghost_batch_norm(2), (6,)),
    "ghost_batch_norm_size": (methods.ghost_batch_norm(ghost_size=2), (6,)),
    "batch_group_norm": (methods.batch_group_norm(3), (3,)),
    "batch_group_norm_one": (methods.batch_group_norm(1), (1,)),
    "batch_and_group_norm": (methods.batch_and_group_norm(2, 3, example_weight=0), (6,)),
    "parts": (PARTS, (2, 6)),
    "parts_of_columns": (Row(Groups(batch=1, spatial=(4, 2), channel=EACH)), (4, 2, 6)),
    "instance_norm": (methods.instance_norm(), None),
    "group_norm": (methods.group_norm(3), None),
    "layer_norm": (methods.layer_norm(), None),
    "token_layer_norm": (methods.token_layer_norm(), None),
    "positional_norm": (methods.positional_norm(), None),
    "rms_norm": (methods.rms_norm(), None),
}
TRAIN, EVAL = {"use_running_average": False}, {"use_running_average": True}


def data(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape), jnp.float32)


def initial(layer, shape=SHAPE, **flags):
    return jit(lambda x: layer.init(KEY, x, **(TRAIN | flags)))(data(shape))


def apply(layer, variables, x, mutable="batch_stats", **flags):
    """Output and updated statistics."""
    static = {k: v for k, v in flags.items() if v is None or isinstance(v, bool) or callable(v)}
    traced = {k: v for k, v in flags.items() if k not in static}
    y, new = jit(lambda v, x, t: layer.apply(v, x, mutable=mutable, **static, **t))(
        variables, x, traced
    )
    return y, new.get("batch_stats", {})


def same(a, b, **tolerance):
    chex.assert_trees_all_close(a, b, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


MORE = (
    "ghost_batch_norm_size",
    "parts_of_columns",
    "layer_norm",
    "positional_norm",
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row in MORE else row for row in ROWS]
)
def test_a_row_is_initialized_by_one_example_trained_and_evaluated_with_any_batch(row):
    method, state = ROWS[row]
    method = dataclasses.replace(method, momentum=0.0)
    layer = layers.Norm(method)
    variables = initial(layer, (1, *SHAPE[1:]))
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes.get("batch_stats", {}) == ({} if state is None else {"mean": state, "var": state})
    assert shapes["params"] == {"scale": (6,), "bias": (6,)}

    x = data()
    y, stats = apply(layer, variables, x, **TRAIN)
    same(y, normalize(x, moments(x, method)))
    few = data((3, *SHAPE[1:]), seed=1)
    evaluated, unchanged = apply(
        layer, variables | {"batch_stats": stats} if state else variables, few, **EVAL
    )
    if state is None:
        same(evaluated, normalize(few, moments(few, method)))
        return
    groups = method.row(SHAPE).groups
    pooled = Row(Groups(1, groups.spatial, groups.channel))
    same(evaluated, normalize(few, moments(x, pooled)))
    chex.assert_trees_all_equal(unchanged, stats)


@pytest.mark.parametrize(
    "method", [methods.ghost_batch_norm(3), methods.ghost_batch_norm(ghost_size=3)]
)
def test_a_batch_that_ghosts_do_not_divide_is_an_error_in_training_only(method):
    layer = layers.Norm(method)
    variables = initial(layer, (1, 2, 6))
    with pytest.raises(ValueError, match="batch axis 0 of x has size 4, which does not split"):
        layer.apply(variables, data((4, 2, 6)), **TRAIN, mutable="batch_stats")
    assert layer.apply(variables, data((4, 2, 6)), **EVAL).shape == (4, 2, 6)


def test_use_and_update_are_apart():
    """Four combinations: what normalizes, and whether the batch enters the running statistics."""
    layer = layers.Norm(methods.batch_norm(momentum=0.5))
    variables = initial(layer)
    variables["batch_stats"] = {"mean": jnp.full(6, 3.0), "var": jnp.full(6, 9.0)}
    x = data()
    batch = (x - x.mean((0, 1, 2), keepdims=True)) / jnp.sqrt(
        x.var((0, 1, 2), keepdims=True) + 1e-5
    )
    running = (x - 3) / jnp.sqrt(9 + 1e-5)
    new = {"mean": 1.5 + x.mean((0, 1, 2)) / 2, "var": 4.5 + x.var((0, 1, 2)) / 2}
    for use in (True, False):
        for update in (True, False, None):
            y, stats = apply(
                layer, variables, x, use_running_average=use, update_running_average=update
            )
            same(y, running if use else batch)
            same(stats, new if update or (update is None and not use) else variables["batch_stats"])
    frozen = layer.apply(variables, x, **TRAIN, update_running_average=False)  # nothing is mutable
    same(frozen, batch)


def test_flags_are_given_exactly_once():
    x, layer = data((2, 3)), layers.Norm(methods.batch_norm())
    with pytest.raises(ValueError, match='"use_running_average" must be passed'):
        layer.init(KEY, x)
    with pytest.raises(ValueError, match="was passed to the constructor and at call time"):
        layers.Norm(methods.batch_norm(), use_running_average=True).init(KEY, x, **TRAIN)
    for method in (methods.layer_norm(), methods.group_norm(3)):  # without state it is ignored
        assert layers.Norm(method).init(KEY, x).keys() == {"params"}


def test_without_momentum_there_is_no_state():
    layer = layers.Norm(methods.batch_norm(momentum=None))
    variables = layer.init(KEY, data())
    assert variables.keys() == {"params"}
    same(layer.apply(variables, data()), normalize(data(), moments(data(), methods.batch_norm())))


def test_debiased_statistics_are_those_of_the_batches_alone():
    layer = layers.Norm(methods.batch_norm(momentum=0.9, debias=True))
    variables, x = initial(layer), data()
    assert variables["batch_stats"].keys() == {"count", "mean", "var"}
    for _ in range(2):
        _, stats = apply(layer, variables, x, **TRAIN)
        variables["batch_stats"] = stats
        same([stats["mean"], stats["var"]], [x.mean((0, 1, 2)), x.var((0, 1, 2))])
    other = data(seed=1)
    _, stats = apply(layer, variables, other, **TRAIN)
    weights = np.array([0.1 * 0.81, 0.1 * 0.9, 0.1]) / (1 - 0.9**3)
    means = np.array([x.mean((0, 1, 2)), x.mean((0, 1, 2)), other.mean((0, 1, 2))])
    same(stats["mean"], jnp.asarray(weights @ means, jnp.float32))


def test_correction_stores_the_unbiased_variance():
    layer, x = layers.Norm(methods.batch_norm(momentum=0.0, correction=1)), data((4, 6))
    y, stats = apply(layer, initial(layer, (4, 6)), x, **TRAIN)
    same(stats["var"], x.var(0, ddof=1))
    same(y, (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5))


def test_scale_and_bias_may_come_with_each_example():
    x, g, b = data(), data((4, 6), seed=1), data((4, 6), seed=2)
    for layer, flags in (
        (layers.Norm(methods.batch_norm(), use_scale=False, use_bias=False), TRAIN),
        (layers.GroupNorm(3, use_scale=False, use_bias=False), {}),
        (layers.BatchNorm(use_scale=False, use_bias=False), TRAIN),
    ):
        variables = layer.init(KEY, x, **flags)
        plain, _ = apply(layer, variables, x, **flags)
        y, _ = apply(layer, variables, x, **flags, scale=g, bias=b)
        same(y, plain * g[:, None, None, :] + b[:, None, None, :])
    with pytest.raises(ValueError, match="scale was given at the call, but the layer has its own"):
        layers.LayerNorm().init(KEY, x, scale=g)
    with pytest.raises(ValueError, match="scale has shape"):
        layers.LayerNorm(use_scale=False).init(KEY, x, scale=g[:3])


def test_an_activation_is_applied_to_the_output():
    x = data()
    for layer, flags in (
        (layers.Norm(methods.ghost_batch_norm(2)), TRAIN),
        (layers.LayerNorm(), {}),
    ):
        variables = jit(lambda x, layer=layer, flags=flags: layer.init(KEY, x, **flags))(x)

        def loss(params, x, layer=layer, flags=flags, variables=variables, inside=True):
            v = variables | {"params": params}
            y = layer.apply(
                v, x, **flags, mutable="batch_stats", **({"activation": nn.silu} if inside else {})
            )[0]
            return (y if inside else nn.silu(y)).sum()

        fused, plain = (functools.partial(loss, inside=inside) for inside in (True, False))
        same(*(jit(jax.value_and_grad(f, (0, 1)))(variables["params"], x) for f in (fused, plain)))


def test_unit_offset_stores_the_distance_from_one():
    x = data()
    for cls, args in (
        (layers.Norm, (methods.layer_norm(),)),
        (layers.RMSNorm, ()),
        (layers.GroupNorm, (3,)),
    ):
        offset, plain = cls(*args, unit_offset=True), cls(*args)
        variables, usual = offset.init(KEY, x), plain.init(KEY, x)
        assert not variables["params"]["scale"].any()
        same(offset.apply(variables, x), plain.apply(usual, x))
        moved = {"params": usual["params"] | {"scale": jnp.full(6, 0.25)}}
        times = {"params": usual["params"] | {"scale": jnp.full(6, 1.25)}}
        same(offset.apply(moved, x), plain.apply(times, x))
        custom = cls(*args, unit_offset=True, scale_init=nn.initializers.constant(0.5))
        # the scale itself starts at 0.5
        assert custom.init(KEY, x)["params"]["scale"].tolist() == [-0.5] * 6


@pytest.mark.parametrize("row", ["batch_norm", "ghost_batch_norm", "group_norm", "positional_norm"])
def test_channels_first_is_channels_last_transposed(row):
    method, state = ROWS[row]
    first, last = layers.Norm(method, channel_axis=1), layers.Norm(method)
    x, turned = data(), jnp.moveaxis(data(), -1, 1)
    variables = initial(first, turned.shape)
    chex.assert_trees_all_equal(variables, initial(last))
    (y, stats), (expected, usual) = (
        apply(first, variables, turned, **TRAIN),
        apply(last, variables, x, **TRAIN),
    )
    same((jnp.moveaxis(y, 1, -1), stats), (expected, usual))


def test_state_that_keeps_positions_is_tied_to_the_image():
    layer = layers.Norm(Row(Groups(batch=1, spatial=(EACH, 1), channel=EACH)))
    variables = initial(layer, (1, 4, 6, 3))
    assert variables["batch_stats"]["mean"].shape == (4, 3)
    for flags in (TRAIN, EVAL):
        with pytest.raises(ValueError, match="running statistics of shape \\(4, 3\\) do not fit"):
            layer.apply(variables, data((2, 8, 6, 3)), **flags, mutable="batch_stats")


def test_masks_leave_padding_out_of_statistics_and_state():
    x, layer = data(), layers.Norm(methods.ghost_batch_norm(2, momentum=0.0))
    mask = jnp.asarray(np.random.default_rng(3).random((4, 4, 6, 1)) < 0.7)
    y, stats = apply(layer, initial(layer), x, mask=mask, **TRAIN)
    same(y, normalize(x, moments(x, methods.ghost_batch_norm(2), weights=mask)))
    counted = np.asarray(x)[np.asarray(mask)[..., 0]]
    same(stats, {"mean": counted.mean(0), "var": counted.var(0)})


FLAX = {"epsilon": 1e-6}
NAMED = [
    (layers.BatchNorm(), layers.Norm(methods.batch_norm())),
    (layers.GroupNorm(3), layers.Norm(methods.group_norm(3, **FLAX))),
    (layers.LayerNorm(), layers.Norm(methods.token_layer_norm(**FLAX))),
    (layers.InstanceNorm(), layers.Norm(methods.instance_norm(**FLAX))),
    (layers.RMSNorm(), layers.Norm(methods.rms_norm(**FLAX), use_bias=False)),
    (
        layers.Norm(Groups(batch=Size(2), spatial=1, channel=2)),
        layers.Norm(Row(Groups(batch=Size(2), spatial=1, channel=2))),
    ),
    (
        layers.Norm(methods.ghost_batch_norm(ghost_size=1, momentum=None)),
        layers.Norm(methods.instance_norm()),
    ),
]


@pytest.mark.parametrize("layer, general", NAMED, ids=lambda v: type(v).__name__)
def test_flaxs_names_and_groups_are_norm_with_their_row(layer, general):
    x = data()
    flags = TRAIN if isinstance(layer, layers.BatchNorm | layers.Norm) else {}
    variables = initial(general)
    chex.assert_trees_all_equal(layer.init(KEY, x, **flags), variables)
    same(apply(layer, variables, x, **flags), apply(general, variables, x, **TRAIN))


def test_a_layer_without_scale_bias_and_state_has_no_variables():
    layer = layers.Norm(methods.positional_norm(), use_bias=False, use_scale=False)
    assert not initial(layer)
    same(apply(layer, {}, data())[0], normalize(data(), moments(data(), methods.positional_norm())))


def test_groups_that_do_not_divide_are_refused():
    for method, match in (
        (methods.batch_group_norm(5), "5 groups do not divide"),
        (methods.group_norm(5), "channel axis -1 of x has size 6, which does not split into 5"),
    ):
        with pytest.raises(ValueError, match=match):
            layers.Norm(method).init(KEY, data(), **TRAIN)


@pytest.mark.parametrize("context", ["vmap", "shard_map"])
def test_a_row_over_a_named_axis_is_the_row_of_the_whole_batch(context):
    x = data((4, 2, 3, 6))
    for method in (methods.batch_norm(momentum=0.5), methods.batch_group_norm(3, momentum=0.5)):
        layer = layers.Norm(method, axis_name="i")
        variables = layer.init(KEY, x[0], **TRAIN)

        def part(x, layer=layer, variables=variables):
            return layer.apply(variables, x, **TRAIN, mutable="batch_stats")

        if context == "vmap":
            y, new = jit(jax.vmap(part, axis_name="i", out_axes=(0, None)))(x)
            y = y.reshape(8, 3, 6)
        else:
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("i",))
            p = jax.sharding.PartitionSpec
            y, new = jit(jax.shard_map(part, mesh=mesh, in_specs=p("i"), out_specs=(p("i"), p())))(
                x.reshape(8, 3, 6)
            )
        whole = layers.Norm(method)
        same((y, new), whole.apply(variables, x.reshape(8, 3, 6), **TRAIN, mutable="batch_stats"))


class Block(nn.Module):
    """A layer with parameters, state, and a carry, as transformations like it."""

    @nn.compact
    def __call__(self, x, _=None):
        return (
            layers.Norm(methods.ghost_batch_norm(2, momentum=0.5), use_running_average=False)(
                x + 1
            ),
            None,
        )


def test_scan_over_layers_is_the_loop():
    scanned = nn.scan(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
    )()
    x = data((4, 3))
    variables = jit(scanned.init)(KEY, x)
    (y, _), new = jit(lambda v, x: scanned.apply(v, x, mutable="batch_stats"))(variables, x)
    expected, states = x, []
    for i in range(2):
        (expected, _), state = Block().apply(
            jax.tree.map(lambda t, i=i: t[i], variables), expected, mutable="batch_stats"
        )
        states.append(state)
    same((y, new), (expected, jax.tree.map(lambda *t: jnp.stack(t), *states)))


def test_scan_carries_the_state_through_time():
    steps = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
        length=3,
    )()
    x = data((4, 3))
    variables = jit(Block().init)(KEY, x)  # Flax cannot create what is carried inside the loop
    (y, _), new = jit(lambda v, x: steps.apply(v, x, mutable="batch_stats"))(variables, x)
    state = variables["batch_stats"]
    for _ in range(3):
        (x, _), state = Block().apply(
            {"params": variables["params"]} | {"batch_stats": state}, x, mutable="batch_stats"
        )
        state = state["batch_stats"]
    same((y, new["batch_stats"]), (x, state))


def test_vmap_over_layers_keeps_them_apart():
    many = nn.vmap(
        Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=0
    )()
    x = data((3, 4, 5))
    variables = jit(many.init)(KEY, x)
    (y, _), new = jit(lambda v, x: many.apply(v, x, mutable="batch_stats"))(variables, x)
    for i in range(3):
        (expected, _), state = Block().apply(
            jax.tree.map(lambda t, i=i: t[i], variables), x[i], mutable="batch_stats"
        )
        same((y[i], jax.tree.map(lambda t, i=i: t[i], new)), (expected, state))


def test_remat_changes_no_gradient_and_updates_once():
    x = data((4, 3))
    variables = Block().init(KEY, x)

    def loss(cls, x):
        (y, _), new = cls().apply(variables, x, mutable="batch_stats")
        return jnp.sin(y).sum(), new

    run = [
        jit(jax.value_and_grad(functools.partial(loss, cls), has_aux=True))(x)
        for cls in (Block, nn.remat(Block))
    ]
    same(*run)
    same(run[1][0][1]["batch_stats"]["Norm_0"]["mean"], (x + 1).mean(0) / 2)
