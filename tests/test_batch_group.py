"""Batch Group Normalization with any number of groups: the flat definition of the paper's
implementations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, differentiated

from jaxnorm import EACH, Groups, Row, linen, methods, norm
from jaxnorm import nnx as nnx_layers
from jaxnorm.methods import batch_group_norm

SHAPE = (4, 2, 6, 6)  # 72 features
KEY = jax.random.key(0)


def flat(xp, x, scale, bias, groups):
    """Channel, row, column in one axis, cut into pieces; and the statistics, (G,)."""
    t = xp.moveaxis(x, -1, 1).reshape(x.shape[0], groups, -1)
    mean, var = t.mean((0, 2), keepdims=True), t.var((0, 2), keepdims=True)
    y = ((t - mean) / xp.sqrt(var + 1e-5)).reshape(x.shape[0], x.shape[3], *x.shape[1:3])
    return xp.moveaxis(y, 1, -1) * scale + bias, (mean.ravel(), var.ravel())


def draw():
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, SHAPE) * rng.uniform(0.5, 2, SHAPE[1:]), *rng.normal(size=(2, 6))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "groups",
    [4, 9, 12, 72] + [pytest.param(g, marks=pytest.mark.slow) for g in (1, 2, 3, 6, 8, 18, 24, 36)],
)
def test_any_number_of_groups_is_the_flat_definition(groups):
    """Output, gradients, state, and inference by it."""
    args, method = draw(), batch_group_norm(groups, momentum=0.5)
    first = method.init(SHAPE)

    def ours(x, scale, bias, state=first, train=True):
        return method.apply(x, state, train=train, scale=scale, bias=bias)

    y, gradients, state = differentiated(ours)(*args)
    expected, (mean, var) = flat(np, *args, groups)
    close(y, expected)
    close(
        gradients,
        differentiated(
            lambda *args: flat(jnp, args[0], *(t[None, None, None] for t in args[1:]), groups)
        )(*args)[1],
    )
    close(
        {"mean": state["mean"], "var": state["var"]},
        {"mean": mean / 2, "var": 0.5 + var / 2},
        atol=1e-5,
    )
    served, unchanged = jax.jit(partial(ours, train=False))(args[0][:1], *args[1:], state=state)
    t = np.moveaxis(args[0][:1], -1, 1).reshape(1, groups, -1)
    t = (t - np.asarray(state["mean"], "f8")[:, None]) / np.sqrt(
        np.asarray(state["var"], "f8")[:, None] + 1e-5
    )
    close(served, np.moveaxis(t.reshape(1, 6, 2, 6), 1, -1) * args[1] + args[2])
    close(unchanged, state)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "groups, row",
    [
        (6, methods.batch_norm()),
        (3, batch_group_norm(3)),
        (3, Row(Groups(batch=1, spatial=1, channel=3))),
        (12, Row(Groups(batch=1, spatial=(2, 1), channel=EACH))),
        (36, Row(Groups(batch=1, spatial=(2, 3), channel=EACH))),
        (72, Row(Groups(batch=1, spatial=EACH, channel=EACH))),
    ],
    ids=str,
)
def test_where_groups_are_a_row_it_is_that_row(groups, row):
    x, method = jnp.asarray(draw()[0]), batch_group_norm(groups)
    ours = differentiated(lambda x: method.apply(x, method.init(SHAPE), train=True))
    close(ours(x)[:2], differentiated(lambda x: norm(x, row))(x)[:2])


def test_only_groups_of_channels_are_a_row():
    x = jnp.ones(SHAPE)
    for groups in (1, 2, 3, 6):
        assert norm(x, batch_group_norm(groups))[1].mean.shape == (1, 1, 1, groups)
        assert batch_group_norm(groups).shape(SHAPE) == (1, 1, 1, groups)
    for groups in (4, 12, 72):
        with pytest.raises(ValueError, match="no row of the table for x of shape .4, 2, 6, 6."):
            norm(x, batch_group_norm(groups))


@pytest.mark.usefixtures("x64")
def test_it_depends_on_the_position():
    """Where G does not divide C; where it does, permuted positions give permuted outputs."""
    x = jnp.asarray(draw()[0])
    for groups, equivariant in ((3, True), (4, False)):
        method = batch_group_norm(groups)
        run = jax.jit(lambda x, m=method: m.apply(x, m.init(SHAPE), train=True)[0])
        assert (np.abs(run(x[:, ::-1]) - run(x)[:, ::-1]).max() < 1e-12) == equivariant


def test_another_image_size_is_refused_also_under_jit():
    method = batch_group_norm(4)
    x = jnp.ones((2, 6, 2, 6))  # as many features
    for train in (True, False):
        run = jax.jit(partial(method.apply, train=train))
        with pytest.raises(
            ValueError,
            match=r"positions of shape .*positions of shape \(6, 2\).*\(2, 6, 2, 6\): .* one image",
        ):
            run(x, method.init(SHAPE))
    layer = linen.Norm(method, use_running_average=True)
    variables = layer.init(KEY, jnp.ones(SHAPE))
    with pytest.raises(
        ValueError, match=r"positions of shape \(6, 2\)|positions has shape \(6, 2\)"
    ):
        layer.apply(variables, x)
    with pytest.raises(
        ValueError, match=r"positions of shape \(6, 2\)|positions has shape \(6, 2\)"
    ):
        nnx_layers.Norm(6, method, x_shape=SHAPE, rngs=nnx.Rngs(0))(x)
    for layer_groups in (3, 6):  # groups of channels serve any size
        layer = linen.Norm(batch_group_norm(layer_groups), use_running_average=True)
        assert layer.apply(layer.init(KEY, jnp.ones(SHAPE)), x).shape == x.shape


def test_errors():
    x = jnp.ones(SHAPE)
    with pytest.raises(
        ValueError, match="5 groups do not divide the features of x.*a divisor of 72"
    ):
        batch_group_norm(5).init(SHAPE)
    with pytest.raises(
        ValueError, match="Expected its own state, a dict with .*positions of shape"
    ):
        batch_group_norm(4).apply(x, batch_group_norm(3).init(SHAPE), train=True)
    with pytest.raises(
        ValueError,
        match=r"got a state with mean of shape \(9,\).* a dict with mean of shape \(4,\)",
    ):
        batch_group_norm(4).apply(x, batch_group_norm(9).init(SHAPE), train=True)
    with pytest.raises(ValueError, match="Expected its own state, a dict with mean of .*, var of"):
        batch_group_norm(3).apply(x, batch_group_norm(4).init(SHAPE), train=True)
    with pytest.raises(ValueError, match="keep positions apart. Got x_shape=None"):
        nnx_layers.Norm(6, batch_group_norm(4), rngs=nnx.Rngs(0))


def test_layers_debias_correct_and_keep_no_state():
    x = jnp.asarray(draw()[0], "f4")
    _, (mean, var) = flat(np, np.asarray(x, "f8"), 1, 0, 4)
    method = batch_group_norm(4, debias=True, correction=1)
    layer = linen.Norm(method)
    variables = layer.init(KEY, x, use_running_average=False)
    _, new = layer.apply(variables, x, use_running_average=False, mutable="batch_stats")
    twin = nnx_layers.Norm(6, method, x_shape=SHAPE, rngs=nnx.Rngs(0))
    twin(x)
    for stats in (
        new["batch_stats"],
        {name: getattr(twin, name)[...] for name in new["batch_stats"]},
    ):
        close((stats["mean"], stats["var"]), (mean, var * 72 / 71), atol=1e-4)
        close(stats["count"], np.full(4, 0.01), atol=1e-6)
    method = batch_group_norm(4, momentum=None)
    bare = linen.Norm(method)
    y, variables = bare.init_with_output(KEY, x)
    assert set(variables) == {"params"}
    twin = nnx_layers.Norm(6, method, x_shape=SHAPE, rngs=nnx.Rngs(0))
    assert not hasattr(twin, "mean")
    close((y, twin(x)), (flat(np, np.asarray(x, "f8"), 1, 0, 4)[0],) * 2, atol=1e-5)


def test_the_unbiased_variance_counts_each_device_once():
    """Pieces are pooled over devices after they are made, in one sum."""
    x = jnp.asarray(draw()[0], "f4")
    method = batch_group_norm(4, correction=1, momentum=0.0)
    step = partial(method.apply, state=method.init(SHAPE), train=True)
    y, want = jax.jit(step)(x)
    parts, got = jax.jit(jax.vmap(partial(step, axis_name="i"), axis_name="i"))(x[:, None])
    close((parts[:, 0], jax.tree.map(lambda t: t[0], got)), (y, want), 1e-5)


@pytest.mark.parametrize("num_channels", (1, 6, 16, 48))
def test_batch_group_count_divides_the_channels_and_grows_to_them(num_channels):
    counts = [methods.batch_group_count(size, num_channels) for size in (1, 2, 4, 8, 16, 32)]
    assert all(num_channels % count == 0 for count in counts)
    assert counts == sorted(counts)
    assert counts[-2:] == [num_channels, num_channels]
    for size, count in zip((1, 2, 4, 8, 16), counts, strict=False):
        assert count == 1 or size * num_channels // count >= 16
        larger = [g for g in range(count + 1, num_channels + 1) if num_channels % g == 0]
        assert all(size * num_channels < 16 * g for g in larger)  # the next one would pool too few


def test_batch_group_count_refuses_nothing():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="is 0; expected an integer of at least 1"):
            methods.batch_group_count(*sizes)
