"""Test time: example weighing, adaptation, and running statistics measured anew."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from flax import nnx as fnnx
from helpers import data

import jaxnorm
from jaxnorm import EACH, Groups, Row, linen, methods, nnx
from jaxnorm.inference import adapt_moments, choose_example_weight, weigh_example

N, H, W, C = 3, 2, 4, 6
SHAPE = (N, H, W, C)


def state_of(shape, dtype=jnp.float64, seed=1):
    rng = np.random.default_rng(seed)
    return jaxnorm.Moments(
        None,
        jnp.asarray(rng.normal(size=shape), dtype),
        jnp.asarray(rng.uniform(0.5, 2, shape), dtype),
    )


def weighed(x, mean, var, groups, parts, alpha):
    """Output for x (N, H, W, C): the authors' second-moment form, set by set; `mean`, `var` of each
    channel."""
    y = np.empty_like(x)
    for n in range(x.shape[0]):
        for g in range(groups):
            for p in range(parts):
                c = slice(g * x.shape[3] // groups, (g + 1) * x.shape[3] // groups)
                h = slice(p * x.shape[1] // parts, (p + 1) * x.shape[1] // parts)
                one, m, v = x[n, h, :, c], mean[p, c], var[p, c]
                first = (1 - alpha) * m.mean() + alpha * one.mean()
                second = (1 - alpha) * (v + m**2).mean() + alpha * (one**2).mean()
                y[n, h, :, c] = (one - first) / np.sqrt(second - first**2 + 1e-5)
    return y


ROWS = {
    "batch_norm": (methods.batch_norm(), methods.batch_norm(), C, 1),
    "ghost_batch_norm": (methods.ghost_batch_norm(7), methods.batch_norm(), C, 1),
    "batch_group_norm": (methods.batch_group_norm(3), methods.batch_group_norm(3), 3, 1),
    "batch_group_norm of rows": (
        Row(Groups(batch=1, spatial=(2, 1), channel=EACH)),
        Row(Groups(batch=1, spatial=(2, 1), channel=EACH)),
        C,
        2,
    ),
    "batch_and_group_norm": (
        methods.batch_and_group_norm(ghost_size=2, num_groups=2),
        methods.batch_norm(),
        2,
        1,
    ),
}


def some(names, default):
    return [
        name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names
    ]


@pytest.mark.parametrize(
    "row", some(ROWS, ["batch_norm", "batch_group_norm of rows", "batch_and_group_norm"])
)
def test_values_and_gradients(row, x64):
    method, kept, groups, parts = ROWS[row]
    x = data(*SHAPE)
    shape = jaxnorm.running_shape(kept, SHAPE)[0]
    state = state_of(shape)
    spread = [
        np.repeat(np.asarray(t).reshape(parts, -1), C // t.shape[-1], 1)
        for t in (state.mean, state.var)
    ]

    g = data(*SHAPE, seed=2)

    @jax.jit
    def ours(x, alpha):
        def of(x, alpha):
            running = jaxnorm.running_moments(state, kept, SHAPE)
            y = jaxnorm.normalize(x, weigh_example(x, running, method, example_weight=alpha))
            return jnp.vdot(y, g), y

        return jax.value_and_grad(of, (0, 1), has_aux=True)(x, alpha)

    for alpha in (0.0, 0.3, 1.0):
        (_, y), (dx, dalpha) = ours(x, alpha)
        np.testing.assert_allclose(
            y, weighed(x, *spread, groups, parts, alpha), rtol=1e-9, atol=1e-9
        )
        step, direction = 1e-6, data(*SHAPE, seed=3)
        reference = partial(weighed, mean=spread[0], var=spread[1], groups=groups, parts=parts)
        up, down = (np.vdot(reference(x + e * direction, alpha=alpha), g) for e in (step, -step))
        np.testing.assert_allclose(np.vdot(dx, direction), (up - down) / (2 * step), rtol=1e-5)
        up, down = (np.vdot(reference(x, alpha=alpha + e), g) for e in (step, -step))
        np.testing.assert_allclose(dalpha, (up - down) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize(
    "row, alone",
    [
        (methods.batch_norm(), methods.instance_norm()),
        (methods.batch_group_norm(3), methods.group_norm(3)),
        (methods.batch_group_norm(1), methods.layer_norm()),
    ],
)
def test_the_ends_are_inference_and_the_example_alone(row, alone):
    x = jnp.asarray(data(*SHAPE, dtype=np.float32))
    state = state_of(jaxnorm.running_shape(row, SHAPE)[0], jnp.float32)
    running = jaxnorm.running_moments(state, row, SHAPE)
    m = weigh_example(x, running, row, example_weight=0)
    np.testing.assert_array_equal(m.mean, np.broadcast_to(running.mean, m.mean.shape))
    np.testing.assert_array_equal(m.var, np.broadcast_to(running.var, m.var.shape))
    between, own = weigh_example(x, running, row, example_weight=0.25), jaxnorm.moments(x, alone)
    known = (
        jnp.broadcast_to(t, own.var.shape) for t in (jnp.float32(0.75), running.mean, running.var)
    )
    merged = jaxnorm.merge(
        jaxnorm.Moments(*known), jaxnorm.Moments(jnp.full(own.var.shape, 0.25), own.mean, own.var)
    )
    np.testing.assert_allclose(between.mean, merged.mean, rtol=1e-5)
    np.testing.assert_allclose(between.var, merged.var, rtol=1e-5)
    m, own = weigh_example(x, running, row, example_weight=1), jaxnorm.moments(x, alone)
    np.testing.assert_array_equal(m.mean, own.mean)
    np.testing.assert_array_equal(m.var, own.var)


def test_channels_first_masks_and_the_plain_shape():
    x = jnp.asarray(data(*SHAPE, dtype=np.float32))
    row = methods.batch_group_norm(3)
    running = jaxnorm.running_moments(state_of((3,), jnp.float32), row, SHAPE)
    m = weigh_example(x, running, row, example_weight=0.25)
    first = jaxnorm.Moments(None, *(jnp.moveaxis(t, -1, 1) for t in (running.mean, running.var)))
    turned = weigh_example(jnp.moveaxis(x, -1, 1), first, row, example_weight=0.25, channel_axis=1)
    np.testing.assert_allclose(jnp.moveaxis(turned.var, 1, -1), m.var, rtol=1e-6)
    plain = weigh_example(x, running, (1, 1, 1, 3), example_weight=0.25)
    np.testing.assert_array_equal(plain.var, m.var)
    mask = jnp.arange(N)[:, None, None, None] < 2
    padded = jnp.where(mask, x, jnp.nan)
    masked = weigh_example(padded, running, row, example_weight=0.25, weights=mask)
    np.testing.assert_allclose(masked.var[:2], m.var[:2], rtol=1e-6)
    np.testing.assert_array_equal(masked.mean[2:], running.mean)  # an example without elements


def test_examples_on_another_axis():
    """Running moments of each channel are pooled to groups wherever the examples are."""
    x = jnp.asarray(data(*SHAPE, dtype=np.float32))
    row = methods.batch_and_group_norm(1, 3)
    running = jaxnorm.running_moments(state_of((C,), jnp.float32), methods.batch_norm(), SHAPE)
    m = weigh_example(x, running, row, example_weight=0.25)
    x, running = jax.tree.map(lambda t: jnp.moveaxis(t, 0, 2), (x, running))
    turned = weigh_example(x, running, row, example_weight=0.25, batch_axis=2)
    for ours, theirs in ((turned.mean, m.mean), (turned.var, m.var)):
        np.testing.assert_allclose(jnp.moveaxis(ours, 2, 0), theirs, rtol=1e-6)


def test_the_bound_of_training_and_that_it_is_reached(x64):
    """|y| <= sqrt((1 - w) / w) with w the weight of one value; alpha = 1/B gives training's sqrt(B
    H W - 1)."""
    B = 4
    x = np.zeros((1, H, W, 1))
    x[0, 0, 0, 0] = 1e8
    running = jaxnorm.running_moments(
        jaxnorm.init_running((1,), dtype=jnp.float64), methods.batch_norm(), x.shape
    )
    y = jaxnorm.normalize(x, weigh_example(x, running, methods.batch_norm(), example_weight=1 / B))
    np.testing.assert_allclose(np.abs(y).max(), np.sqrt(B * H * W - 1), rtol=1e-6)
    x = data(50, H, W, 1) ** 5
    y = jaxnorm.normalize(x, weigh_example(x, running, methods.batch_norm(), example_weight=1 / B))
    assert 0.5 * np.sqrt(B * H * W - 1) < np.abs(y).max() <= np.sqrt(B * H * W - 1)


def test_single_values_shrink(x64):
    x = data(5, C)
    running = jaxnorm.running_moments(state_of((C,)), methods.batch_norm(), x.shape)
    y = jaxnorm.normalize(
        x, m := weigh_example(x, running, methods.batch_norm(), example_weight=0.2)
    )
    np.testing.assert_allclose(y, 0.8 * (x - running.mean) / np.sqrt(m.var + 1e-5), rtol=1e-12)


def test_the_second_moment_of_a_running_average_holds_the_variance_of_means(x64):
    rng = np.random.default_rng(0)
    second, state = np.ones(C), jaxnorm.init_running((C,), dtype=jnp.float64)
    for _ in range(5):
        x = rng.normal(rng.normal(), 1, (8, C))
        second = 0.9 * second + 0.1 * (x**2).mean(0)
        state = jaxnorm.update_running(
            state, jaxnorm.moments(x, methods.batch_norm()), momentum=0.9
        )
    assert (second - np.asarray(state.mean) ** 2 > np.asarray(state.var)).all()


def test_errors():
    x = jnp.ones(SHAPE)
    running = jaxnorm.running_moments(jaxnorm.init_running((C,)), methods.batch_norm(), SHAPE)
    for alpha in (-0.1, 1.1, float("nan"), np.ones(2)):
        with pytest.raises(ValueError, match="expected a number of at least 0 and of at most 1"):
            weigh_example(x, running, methods.batch_norm(), example_weight=alpha)
    with pytest.raises(ValueError, match="with 1 for the batch, as running_moments"):
        weigh_example(x, jaxnorm.init_running((C,)), methods.batch_norm(), example_weight=0.5)
    with pytest.raises(ValueError, match="does not fit"):
        coarse = jaxnorm.running_moments(
            jaxnorm.init_running((2,)), methods.batch_group_norm(2), SHAPE
        )
        weigh_example(x, coarse, methods.batch_norm(), example_weight=0.5)
    complex_state = jaxnorm.init_running((C,), dtype=jnp.complex64)
    with pytest.raises(TypeError, match="running.mean is complex"):
        running = jaxnorm.running_moments(complex_state, methods.batch_norm(), SHAPE)
        weigh_example(x, running, methods.batch_norm(), example_weight=0.5)


def layers(name):
    """The same layer in both frameworks, its row, and the row that its running statistics are
    of."""
    batch, three = methods.batch_norm(), methods.batch_group_norm(3)
    row, kept = {
        "BatchNorm": (batch, batch),
        "batch_norm": (batch, batch),
        "ghost_batch_norm": (methods.ghost_batch_norm(ghost_size=2), batch),
        "batch_group_norm": (three, three),
        "batch_and_group_norm": (methods.batch_and_group_norm(ghost_size=2, num_groups=3), batch),
    }[name]
    rngs = fnnx.Rngs(0)
    if name == "BatchNorm":
        return linen.BatchNorm(), nnx.BatchNorm(C, rngs=rngs), row, kept
    return linen.Norm(row), nnx.Norm(C, row, rngs=rngs), row, kept


LAYERS = [
    "BatchNorm",
    "batch_norm",
    "ghost_batch_norm",
    "batch_group_norm",
    "batch_and_group_norm",
]


@pytest.mark.parametrize(
    "name", some(LAYERS, ["BatchNorm", "batch_group_norm", "batch_and_group_norm"])
)
def test_layers_equal_the_function(name):
    one, other, method, kept = layers(name)
    x = jnp.asarray(data(5, 2, 2, C, dtype=np.float32))
    state = state_of(jaxnorm.running_shape(kept, x.shape)[0], jnp.float32)
    parameters = {"scale": jnp.full(C, 2.0), "bias": jnp.ones(C)}
    variables = {"batch_stats": {"mean": state.mean, "var": state.var}, "params": parameters}
    for values in variables.values():
        for key, value in values.items():
            getattr(other, key)[...] = value
    running = jaxnorm.running_moments(state, kept, x.shape)
    traces = []

    @jax.jit
    def apply(variables, x, alpha):
        traces.append(alpha)
        return one.apply(variables, x, use_running_average=True, example_weight=alpha)

    for alpha in (0.25, 0.5):
        expected = jaxnorm.normalize(
            x,
            weigh_example(x, running, method, example_weight=alpha),
            scale=jnp.full(C, 2.0),
            bias=jnp.ones(C),
        )
        np.testing.assert_allclose(apply(variables, x, alpha), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            other(x, True, example_weight=alpha), expected, rtol=1e-5, atol=1e-5
        )
    assert len(traces) == 1
    # no example sees another
    np.testing.assert_allclose(apply(variables, x[:1], 0.5)[0], expected[0], rtol=1e-5, atol=1e-5)
    assert apply(variables, x.astype(jnp.bfloat16), 0.5).dtype == jnp.float32
    viewed = fnnx.view(other, use_running_average=True, example_weight=0.5)
    np.testing.assert_allclose(viewed(x), expected, rtol=1e-5, atol=1e-5)
    with linen.call_norms_with(use_running_average=True, example_weight=0.5):
        np.testing.assert_allclose(one.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="weighs an example against running statistics"):
        one.apply(variables, x[:4], False, example_weight=0.5, mutable="batch_stats")
    with pytest.raises(ValueError, match="weighs an example against running statistics"):
        other(x[:4], False, example_weight=0.5)


def test_layers_without_running_statistics_weigh_nothing():
    x = jnp.ones((2, 4))
    one, other = (
        linen.Norm(methods.layer_norm()),
        nnx.Norm(4, methods.layer_norm(), rngs=fnnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match="weighs an example against running statistics"):
        one.init(jax.random.key(0), x, example_weight=0.5)
    with pytest.raises(ValueError, match="weighs an example against running statistics"):
        other(x, example_weight=0.5)


@pytest.mark.parametrize("method", [methods.batch_renorm(), methods.batch_group_norm(4)], ids=repr)
def test_a_weight_for_a_whole_model_is_refused_where_no_layer_can_take_it(method):
    x = jnp.ones((2, 2, 2, 6))  # which has groups of positions where 4 do not divide the channels
    one, other = linen.Norm(method), nnx.Norm(6, method, x_shape=x.shape, rngs=fnnx.Rngs(0))
    variables = one.init(jax.random.key(0), x, use_running_average=True)
    message = (
        "example_weight=0.5 (for batch_renorm.*, which is no row|with groups that are not groups "
        "of channels)"
    )
    with linen.call_norms_with(example_weight=0.5):
        with pytest.raises(ValueError, match=message):
            one.apply(variables, x, use_running_average=True)
        one.apply(variables, x, use_running_average=False, mutable="batch_stats")
    with pytest.raises(ValueError, match=message):
        fnnx.view(other, use_running_average=True, example_weight=0.5)(x)
    fnnx.view(other, use_running_average=False, example_weight=0.5)(x)


def test_a_weight_for_a_whole_model_passes_layers_without_a_state():
    x = jnp.ones((2, 2, 2, 6))
    method = methods.evonorm_s0(3)
    one, other = linen.Norm(method), nnx.Norm(6, method, rngs=fnnx.Rngs(0))
    variables = one.init(jax.random.key(0), x)
    options = {"use_running_average": True, "update_running_average": False, "example_weight": 0.5}
    with linen.call_norms_with(**options):
        y = one.apply(variables, x)
    np.testing.assert_allclose(y, fnnx.view(other, **options)(x), rtol=1e-6)


def test_batch_and_group_norm_is_its_row_in_training_and_batch_norm_in_its_state():
    x = jnp.asarray(data(4, 2, 2, C, dtype=np.float32))
    row = methods.batch_and_group_norm(ghost_size=2, num_groups=3, momentum=0.5)
    layer = linen.Norm(row, use_running_average=False)
    variables = layer.init(jax.random.key(0), x[:1])
    y, new = jax.jit(partial(layer.apply, mutable="batch_stats"))(variables, x)
    np.testing.assert_allclose(y, jaxnorm.norm(x, row)[0], rtol=1e-5, atol=1e-5)
    batch = linen.BatchNorm(use_running_average=False, momentum=0.5)
    # which loads the same variables
    state = jax.jit(partial(batch.apply, mutable="batch_stats"))(variables, x)[1]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), new, state)
    other = nnx.Norm(C, row, rngs=fnnx.Rngs(0))
    np.testing.assert_allclose(other(x), y, rtol=1e-6)
    np.testing.assert_allclose(other.var[...], new["batch_stats"]["var"], rtol=1e-6)

    def loss(of):
        return jax.jit(jax.grad(lambda x: jnp.vdot(of(x), jnp.sin(x))))(x)

    ours = loss(lambda x: layer.apply(variables, x, mutable="batch_stats")[0])
    np.testing.assert_allclose(ours, loss(lambda x: jaxnorm.norm(x, row)[0]), rtol=1e-4, atol=1e-4)


def test_the_default_weight_of_batch_and_group_norm():
    x = jnp.asarray(data(*SHAPE, dtype=np.float32))
    variables = {"batch_stats": {"mean": jnp.ones(C), "var": jnp.full(C, 2.0)}}

    def layer(**options):
        method = methods.batch_and_group_norm(num_groups=3, **options)
        return linen.Norm(method, use_running_average=True, use_scale=False, use_bias=False)

    # one example a ghost, in training and in inference
    group_norm = jaxnorm.norm(x, methods.group_norm(3))[0]
    np.testing.assert_allclose(
        layer(ghost_size=1).apply(variables, x), group_norm, rtol=1e-5, atol=1e-5
    )
    quarter = layer(num_ghosts=1).apply(variables, x, example_weight=0.25)
    np.testing.assert_allclose(layer(ghost_size=4).apply(variables, x), quarter, rtol=1e-6)
    np.testing.assert_allclose(
        layer(ghost_size=1, example_weight=0.25).apply(variables, x), quarter, rtol=1e-6
    )
    plain = layer(ghost_size=4, example_weight=0.0).apply(variables, x)  # the authors' default
    np.testing.assert_allclose(plain, (x - 1) / np.sqrt(2 + 1e-5), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="which does not tell the size"):
        layer(num_ghosts=1).apply(variables, x)


def test_choosing_a_weight():
    asked, traces = [], []

    @jax.jit
    def quality(alpha, batch):
        traces.append(batch)
        return -jnp.sum((alpha - batch) ** 2)

    def evaluate(alpha, batch):
        asked.append(float(alpha))
        return quality(alpha, batch), len(batch)

    batches = [jnp.array([0.2, 0.3]), jnp.array([0.3, 0.2])]
    found = choose_example_weight(evaluate, iter(batches), alphas=[0.5, 0.0, 0.25])
    assert found.alphas == (0.0, 0.25, 0.5) and found.best == 0.25 and len(traces) == 1
    np.testing.assert_allclose(found.values, [-0.065, -0.0025, -0.065], atol=1e-6)
    # equal: the smaller
    assert choose_example_weight(evaluate, batches, alphas=[0.0, 0.5], maximize=False).best == 0.0
    assert choose_example_weight(evaluate, batches, examples=4).alphas == tuple(
        i / 8 for i in range(9)
    )
    assert choose_example_weight(evaluate, batches, examples=32).alphas == tuple(
        i / 64 for i in range(10)
    )
    unequal = choose_example_weight(
        lambda a, batch: (sum(batch), len(batch)), [[1.0], [4.0, 4.0]], alphas=[0.5]
    )
    assert unequal.values == (3.0,)
    for wrong, match in (
        ({}, "the B of 1/B"),
        ({"alphas": [2.0]}, "of at least 0 and of at most 1"),
        ({"alphas": []}, "nothing to choose by"),
    ):
        with pytest.raises(ValueError, match=match):
            choose_example_weight(evaluate, batches, **wrong)
    with pytest.raises(ValueError, match="nothing to choose by"):
        choose_example_weight(evaluate, [], examples=4)


@pytest.mark.parametrize("maximize, best", [(True, 0.75), (False, 0.25)])
def test_values_that_are_not_finite_are_not_chosen(maximize, best):
    values = {0.0: np.nan, 0.25: 1.0, 0.5: -np.inf, 0.75: 2.0, 1.0: np.inf}
    choose = partial(choose_example_weight, batches=[None], alphas=list(values), maximize=maximize)
    assert choose(lambda alpha, _: (values[float(alpha)], 1)).best == best
    with pytest.raises(
        ValueError, match="nothing to choose by. Got values .* expected one that is finite"
    ):
        choose(lambda alpha, _: (np.nan, 1))


def test_adaptation(x64):
    x = data(*SHAPE)
    state = state_of((C,))
    running, batch = (
        jaxnorm.running_moments(state, methods.batch_norm(), SHAPE),
        jaxnorm.moments(x, methods.batch_norm()),
    )
    m = adapt_moments(running, batch, source_size=16, size=N)
    prior = 16 / (16 + N)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(m.mean.ravel(), prior * state.mean + (1 - prior) * mean, rtol=1e-12)
    np.testing.assert_allclose(m.var.ravel(), prior * state.var + (1 - prior) * var, rtol=1e-12)
    np.testing.assert_allclose(
        adapt_moments(running, batch, source_size=0).var, batch.var, rtol=1e-12
    )
    np.testing.assert_array_equal(m.count, batch.count)
    m = adapt_moments(running, batch, source_size=16, size=N, correction=1)
    unbiased = x.var((0, 1, 2), ddof=1)  # as torch, in the authors' code
    np.testing.assert_allclose(
        m.var.ravel(), prior * state.var + (1 - prior) * unbiased, rtol=1e-12
    )
    for wrong in ({"source_size": -1}, {"source_size": 1, "size": 0}):
        with pytest.raises(ValueError, match="expected a number"):
            adapt_moments(running, batch, **wrong)
    with pytest.raises(TypeError, match="running.mean is complex .* Expected both real"):
        other = jaxnorm.Moments(running.count, running.mean.astype(complex), running.var)
        adapt_moments(other, batch, source_size=1)
    mask = jnp.arange(C) > 0  # no element of the first channel
    m = adapt_moments(
        running, jaxnorm.moments(x, methods.batch_norm(), weights=mask), source_size=16, size=N
    )
    np.testing.assert_array_equal(
        [m.mean.ravel()[0], m.var.ravel()[0]], [state.mean[0], state.var[0]]
    )
    np.testing.assert_allclose(
        m.var.ravel()[1:], (prior * state.var + (1 - prior) * var)[1:], rtol=1e-12
    )


class Net(fnn.Module):
    """Two norms, one that is not used, and dropout."""

    norm: object = linen.BatchNorm
    twice: bool = False

    @fnn.compact
    def __call__(self, x, train):
        first = self.norm(use_running_average=not train, name="first")
        x = fnn.Dense(4)(first(x))
        x = fnn.Dropout(0.5, deterministic=not train)(x)
        unused = self.norm(use_running_average=not train, name="unused")
        if self.is_initializing() or self.twice:
            unused(x)
        if self.twice:
            x = unused(x)
        return self.norm(use_running_average=not train, name="second")(x)


def test_other_modules_are_called_as_they_are():
    class Counts(fnn.Module):
        @fnn.compact
        def __call__(self, *, n):
            return linen.BatchNorm()(x=jnp.ones((n, 1)), use_running_average=True)

    variables = Counts().init(jax.random.key(0), n=2)
    with linen.call_norms_with(use_running_average=False, update_running_average=False):
        assert Counts().apply(variables, n=2).tolist() == [[0.0], [0.0]]
    assert Counts().apply(variables, n=2)[0, 0] > 0.9


def test_batch_statistics_at_test_with_the_rest_of_the_model_in_inference():
    x = jnp.asarray(data(8, 4, dtype=np.float32))
    variables = Net().init(jax.random.key(0), x, False)
    with linen.call_norms_with(use_running_average=False, update_running_average=False):
        y = Net().apply(variables, x, False)
    hidden = jaxnorm.norm(x, methods.batch_norm())[0] @ variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(
        y, jaxnorm.norm(hidden, methods.batch_norm())[0], rtol=1e-4, atol=1e-4
    )
    assert not np.allclose(y, Net().apply(variables, x, False), atol=1e-2)
    layer = nnx.BatchNorm(4, rngs=fnnx.Rngs(0))
    viewed = fnnx.view(layer, use_running_average=False, update_running_average=False)
    np.testing.assert_allclose(
        viewed(x), jaxnorm.norm(x, methods.batch_norm())[0], rtol=1e-5, atol=1e-5
    )
    assert not layer.mean[...].any()


def forward_of(model):
    def forward(variables, x):
        return model.apply(
            variables, x, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )

    return forward


SIZES = (5, 2)


def batches_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(rng.normal(), 1 + i, (n, *shape)), jnp.float32)
        for i, n in enumerate(SIZES)
    ]


def averaged(batches):
    flat = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in batches]
    return np.mean([x.mean(0) for x in flat], 0), np.mean([x.var(0, ddof=1) for x in flat], 0)


def pooled(batches):
    flat = np.concatenate([np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in batches])
    return flat.mean(0), flat.var(0)


REDUCED = {"pooled": pooled, "averaged": averaged}


@pytest.mark.parametrize("reducer", some(REDUCED, ["pooled"]))
def test_a_population_is_that_of_all_elements_in_any_order(reducer):
    batches = batches_of((4,))
    variables = jax.jit(Net().init, static_argnums=2)(jax.random.key(0), batches[0], False)
    measure = partial(linen.population_statistics, forward_of(Net()), variables, reducer=reducer)
    new = measure(batches)
    first = new["batch_stats"]["first"]
    for value, expected in zip(
        (first["mean"], first["var"]), REDUCED[reducer](batches), strict=True
    ):
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-6)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), new, measure(batches[::-1])
    )
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
    jax.tree.map(
        np.testing.assert_array_equal,
        new["batch_stats"]["unused"],
        variables["batch_stats"]["unused"],
    )
    assert not np.allclose(
        new["batch_stats"]["second"]["var"], variables["batch_stats"]["second"]["var"]
    )
    one = measure(batches[:1])["batch_stats"]["first"]
    np.testing.assert_allclose(one["mean"], REDUCED[reducer](batches[:1])[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(one["var"], REDUCED[reducer](batches[:1])[1], rtol=2e-6)


class Pair(fnnx.Module):
    def __init__(self, norm=nnx.BatchNorm):
        rngs = fnnx.Rngs(0)
        self.first, self.unused, self.second = (norm(4, rngs=rngs) for _ in range(3))
        self.dense, self.dropout = fnnx.Linear(4, 4, rngs=rngs), fnnx.Dropout(0.5, rngs=rngs)
        self.calls = fnnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        return self.second(self.dropout(self.dense(self.first(x))))


@pytest.mark.parametrize("reducer", some(REDUCED, ["averaged"]))
def test_a_population_in_nnx(reducer):
    batches, model = batches_of((4,)), Pair()
    model.unused.mean[...] = jnp.full(4, 7.0)
    structure = fnnx.graphdef(model)
    old = fnnx.state(model, fnnx.Not(fnnx.BatchStat))
    nnx.population_statistics(lambda model, x: model(x), model, batches, reducer=reducer)
    for value, expected in zip(
        (model.first.mean, model.first.var), REDUCED[reducer](batches), strict=True
    ):
        np.testing.assert_allclose(value[...], expected, rtol=2e-6, atol=1e-6)
    assert model.unused.mean[...].tolist() == [7.0] * 4 and model.second.mean[...].any()
    assert fnnx.graphdef(model) == structure and not hasattr(model.first, "elements")
    same = jax.tree.map(
        lambda a, b: a is b or bool((a == b).all()),
        old,
        fnnx.state(model, fnnx.Not(fnnx.BatchStat)),
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    "layer, kept",
    [
        (linen.Norm(methods.batch_and_group_norm(ghost_size=1, num_groups=2)), 4),
        (linen.Norm(methods.batch_group_norm(2, debias=True)), 2),
        pytest.param(
            linen.Norm(methods.ghost_batch_norm(1, correction=1)), 4, marks=pytest.mark.slow
        ),
        (linen.BatchNorm(force_float32_reductions=False, param_dtype=jnp.bfloat16), 4),
    ],
)
def test_populations_of_other_layers(layer, kept):
    batches = batches_of((3, 4))
    variables = layer.init(jax.random.key(0), batches[0], use_running_average=False)
    masks = [jnp.arange(x.shape[0])[:, None, None] != 1 for x in batches]

    def forward(variables, batch):
        return layer.apply(variables, batch[0], False, mask=batch[1], mutable="batch_stats")

    new = linen.population_statistics(forward, variables, zip(batches, masks, strict=True))[
        "batch_stats"
    ]
    seen = [
        np.delete(np.asarray(x), 1, 0).reshape(-1, kept, 4 // kept).swapaxes(1, 2).reshape(-1, kept)
        for x in batches
    ]
    rtol = 1e-2 if new["mean"].dtype == jnp.bfloat16 else 1e-5
    for value, expected in zip((new["mean"], new["var"]), pooled(seen), strict=True):
        np.testing.assert_allclose(
            np.asarray(value, np.float32), expected, rtol=rtol, atol=rtol / 5
        )
    assert [t.dtype for t in jax.tree.leaves(new)] == [
        t.dtype for t in jax.tree.leaves(variables["batch_stats"])
    ]
    assert "count" not in new or new["count"].tolist() == [1.0] * kept


def test_populations_of_scanned_layers():
    class Step(fnn.Module):
        @fnn.compact
        def __call__(self, x, _):
            return linen.BatchNorm(use_running_average=False)(x) * 2, None

    axes = {"params": 0, "batch_stats": 0}
    model = fnn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)()
    batches = batches_of((4,))
    variables = model.init(jax.random.key(0), batches[0], None)
    new = linen.population_statistics(
        lambda v, x: model.apply(v, x, None, mutable="batch_stats"), variables, batches
    )
    mean, var = (new["batch_stats"]["BatchNorm_0"][name] for name in ("mean", "var"))
    np.testing.assert_allclose(mean[0], pooled(batches)[0], rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(var[1], [4.0] * 4, rtol=1e-3)


def test_what_is_not_measured_is_refused():
    batches = batches_of((4,))
    for model, match in (
        (Net(twice=True), "layer unused was called 2 times in 1 batches"),
        (
            Net(norm=fnn.BatchNorm),
            "layer first updates its running statistics by a rule of its own",
        ),
    ):
        variables = model.init(jax.random.key(0), batches[0], False)
        with pytest.raises(ValueError, match=match):
            linen.population_statistics(forward_of(model), variables, batches)
    for method in (methods.batch_renorm(), methods.evonorm_b0()):
        model = fnn.Sequential(
            [
                linen.BatchNorm(use_running_average=False),
                linen.Norm(method, use_running_average=False),
            ]
        )
        inputs = [x[:, None, None] for x in batches]  # an image of one position
        variables = model.init(jax.random.key(0), inputs[0])
        with pytest.raises(
            ValueError,
            match="layer layers_1 updates its .* by a rule of its own. Got .*; expected a layer",
        ):
            linen.population_statistics(
                lambda v, x, m=model: m.apply(v, x, mutable="batch_stats"), variables, inputs
            )
        pair = fnnx.Sequential(
            nnx.BatchNorm(4, rngs=fnnx.Rngs(0)), nnx.Norm(4, method, rngs=fnnx.Rngs(0))
        )
        with pytest.raises(
            ValueError,
            match="layer layers/1 updates its .* by a rule of its own. Got .*; expected a layer",
        ):
            nnx.population_statistics(lambda model, x: model(x), pair, inputs)
    variables = Net().init(jax.random.key(0), batches[0], False)
    measure = partial(linen.population_statistics, forward_of(Net()), variables)
    with pytest.raises(ValueError, match="no running statistics were updated in 0 batches"):
        measure([])
    with pytest.raises(ValueError, match="reducer is one of 'pooled', 'averaged'. Got 'mean'"):
        measure(batches, reducer="mean")
    with pytest.raises(ValueError, match="no running statistics were updated in 2 batches"):
        linen.population_statistics(
            lambda v, x: Net().apply(v, x, False, mutable="batch_stats"), variables, batches
        )
    with pytest.raises(ValueError, match="layer first updates"):
        nnx.population_statistics(lambda model, x: model(x), Pair(fnnx.BatchNorm), batches)
    model = Pair()
    with pytest.raises(ValueError, match="layer first was called 2 times"):
        nnx.population_statistics(
            lambda model, x: model.second(model.first(model.first(x))), model, batches
        )
    assert not model.first.mean[...].any()


def test_averages_of_batches():
    state = jaxnorm.init_running((4,), counted=True)
    batches = batches_of((4,))
    # what says nothing changes nothing
    for x in (*batches, jnp.full((2, 4), jnp.nan), jnp.zeros((0, 4))):
        state = jaxnorm.update_averaged(state, jaxnorm.moments(x, methods.batch_norm()))
    np.testing.assert_allclose(state.mean, averaged(batches)[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(state.var, averaged(batches)[1], rtol=1e-6)
    assert state.count.tolist() == [float(len(SIZES))] * 4
    with pytest.raises(ValueError, match="an average over batches needs a count"):
        jaxnorm.update_averaged(
            jaxnorm.init_running((4,)), jaxnorm.moments(batches[0], methods.batch_norm())
        )


def test_groups_of_an_example():
    x = jnp.asarray(data(*SHAPE, dtype=np.float32))
    running = jaxnorm.running_moments(
        state_of((3,), jnp.float32), methods.batch_group_norm(3), SHAPE
    )
    one, other = (
        weigh_example(x, running, g, example_weight=0.5)
        for g in (Groups(1, 1, 3), Groups(EACH, 1, 3))
    )
    np.testing.assert_array_equal(one.var, other.var)
