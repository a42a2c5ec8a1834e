"""GN+ against its definition and the released code in NumPy, and the methods it lies between."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as fnnx
from helpers import close, differentiated

from jaxnorm import EACH, Groups, Row, linen, methods, nnx, norm
from jaxnorm.methods import group_norm_plus

SHAPE, GROUPS = (4, 2, 3, 6), 3
pytestmark = pytest.mark.usefixtures("x64")


def definition(xp, x, scale, bias, mixture, per_position=True, running=None, ddof=0, outside=False):
    """With ddof=1 and epsilon outside the root it is the released code."""

    def standardized(t, axes, mean=None, var=None):
        n = math.prod(t.shape[a] for a in axes)
        mean = t.mean(axes, keepdims=True) if mean is None else mean
        var = ((t - mean) ** 2).sum(axes, keepdims=True) / (n - ddof) if var is None else var
        return (t - mean) / (xp.sqrt(var) + 1e-5 if outside else xp.sqrt(var + 1e-5))

    z = standardized(x.reshape(*x.shape[:3], GROUPS, -1), (1, 2, 4)).reshape(x.shape)
    u = standardized(z, (0,) if per_position else (0, 1, 2), *(running or ()))
    w = 1 / (1 + xp.exp(-mixture))
    return (w * z + (1 - w) * u) * scale + bias


def draw(shape=SHAPE):
    rng = np.random.default_rng(0)
    return rng.normal(1, 2, shape), *rng.normal(size=(2, 1, 1, 1, 6)), np.float64(0.3)


def ours(x, scale, bias, mixture, state=None, train=True, weights=None, **fields):
    method = group_norm_plus(GROUPS, **fields)
    state = method.init(x.shape) if state is None else state
    options = {"scale": scale.reshape(-1), "bias": bias.reshape(-1), "weights": weights}
    return method.apply(x, state, train=train, mixture=mixture, **options)


@pytest.mark.parametrize("per_position", (True, False))
def test_values_gradients_and_state(per_position):
    args = draw()
    y, gradients, state = differentiated(partial(ours, per_position=per_position, momentum=0.5))(
        *args
    )
    close(y, definition(np, *args, per_position=per_position))
    close(
        gradients,
        differentiated(lambda *args: (definition(jnp, *args, per_position=per_position), None))(
            *args
        )[1],
    )
    x = args[0].reshape(4, 2, 3, GROUPS, 2)
    z = (
        (x - x.mean((1, 2, 4), keepdims=True)) / np.sqrt(x.var((1, 2, 4), keepdims=True) + 1e-5)
    ).reshape(SHAPE)
    axes = 0 if per_position else (0, 1, 2)
    close(state, {"mean": z.mean(axis=axes) / 2, "var": 0.5 + z.var(axis=axes) / 2}, atol=1e-6)
    y, gradients, _ = differentiated(
        partial(ours, per_position=per_position, state=state, train=False)
    )(*args)
    running = tuple(
        np.asarray(state[name], "f8").reshape(1, *([2, 3] if per_position else [1, 1]), 6)
        for name in ("mean", "var")
    )
    close(y, definition(np, *args, running=running))
    close(
        gradients,
        differentiated(lambda *args: (definition(jnp, *args, running=running), None))(*args)[1],
    )


def test_the_first_branch_stays_on_its_device():
    """Statistics of one example are not summed over devices, those of the batch are."""
    x, method = draw()[0], group_norm_plus(GROUPS)
    step = partial(method.apply, state=method.init(SHAPE), train=True)
    want = jax.jit(step)(x)
    y, new = jax.jit(jax.vmap(partial(step, axis_name="i"), axis_name="i"))(x[:, None])
    close((y[:, 0], jax.tree.map(lambda t: t[0], new)), want, 1e-7)


def test_parity_with_the_released_code():
    args, switches = draw(), {"correction": 1, "epsilon_outside": True}
    y, gradients, _ = differentiated(partial(ours, **switches))(*args)
    close(y, definition(np, *args, ddof=1, outside=True))
    close(
        gradients,
        differentiated(lambda *args: (definition(jnp, *args, ddof=1, outside=True), None))(*args)[
            1
        ],
        atol=1e-10,
    )


def test_limits_of_the_mixture():
    """Group normalization, and standardization over the batch of it; with the released divisors up
    to their ratios."""
    x = draw()[0]

    def between(logit, x, **fields):
        method = group_norm_plus(GROUPS, **fields)
        return method.apply(x, method.init(x.shape), train=True, mixture=logit)[0], None

    def second(x, method):
        return norm(norm(x, methods.group_norm(GROUPS))[0], method)[0], None

    gn = differentiated(lambda x: (norm(x, methods.group_norm(GROUPS))[0], None))(x)[:2]
    close(differentiated(partial(between, 40.0))(x)[:2], gn)
    each_position = Row(Groups(batch=1, spatial=EACH, channel=EACH))
    for per_position, method in ((True, each_position), (False, methods.batch_norm())):
        limit = differentiated(lambda x, p=per_position: between(-1e3, x, per_position=p))(x)[:2]
        close(limit, differentiated(partial(second, method=method))(x)[:2])
    released = {"correction": 1, "epsilon_outside": True, "epsilon": 1e-12}
    k = 12  # positions times channels of a group
    z = (
        x.reshape(*SHAPE[:3], GROUPS, 2)
        - x.reshape(4, -1, GROUPS, 2).mean((1, 3))[:, None, None, :, None]
    ).reshape(SHAPE)
    z = (
        z
        / np.repeat(np.sqrt((z**2).reshape(4, -1, GROUPS, 2).mean((1, 3))), 2, axis=-1)[
            :, None, None
        ]
    )
    u = (z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)
    run = jax.jit(lambda logit, x: between(logit, x, **released)[0])
    close(run(40.0, x), z * np.sqrt((k - 1) / k), atol=1e-9)
    close(run(-1e3, x), u * np.sqrt(3 / 4), atol=1e-9)


def test_shift_of_a_group_and_one_example():
    args = draw()
    run = differentiated(ours)
    shift = np.random.default_rng(1).normal(size=(4, 1, 1, GROUPS))
    close(run(args[0] + np.repeat(shift, 2, axis=-1), *args[1:])[0], run(*args)[0])
    one = draw((1, *SHAPE[1:]))  # u is 0: what is left is group normalization times its weight
    for options, divisors in (
        ({}, {}),
        ({"correction": 1, "epsilon_outside": True}, {"ddof": 1, "outside": True}),
    ):
        y, gradients, _ = differentiated(partial(ours, **options))(*one)
        assert all(np.isfinite(t).all() for t in gradients)
        gn = definition(np, *one[:3], np.float64(40), running=(0.0, 1.0), **divisors)
        close(y, (gn - one[2]) / (1 + np.exp(-one[3])) + one[2], atol=1e-10)


def oracle(x, scale, bias, mixture, epsilon, outside):
    """y in NumPy; for one example w z, because u is 0."""

    def standardized(t, axes):
        d = t - t.mean(axes, keepdims=True)
        var = (d * d).mean(axes, keepdims=True)
        return d / (np.sqrt(var) + epsilon if outside else np.sqrt(var + epsilon))

    z = standardized(x.reshape(*x.shape[:3], GROUPS, -1), (1, 2, 4)).reshape(x.shape)
    w = 1 / (1 + np.exp(-mixture))
    return (w * z + (1 - w) * standardized(z, (0,))) * scale + bias


@pytest.mark.parametrize("outside", (False, True), ids=("inside", "outside"))
@pytest.mark.parametrize("examples", (1, 2, 8))
def test_rounding(examples, outside):
    """float32 against float64, under jit: where one example is standardized, and for few."""
    rng = np.random.default_rng(examples)
    x = rng.normal(1, 2, (examples, 4, 4, 6))
    if examples == 2:  # where two z nearly agree, no float32 z says by how much they differ
        x += np.sign(x[:1] - x[1:]) * np.array([3, -3]).reshape(2, 1, 1, 1)
    args = (x, *rng.normal(size=(2, 1, 1, 1, 6)), np.float64(1.0))
    args = jax.tree.map(lambda t: np.asarray(t, "f4").astype("f8"), args)
    cotangent = rng.normal(size=x.shape)
    for epsilon in (1e-5, 1e-3):

        def run(*args, epsilon=epsilon):
            fields = {"epsilon": epsilon, "epsilon_outside": outside}
            y, pull = jax.vjp(lambda *args: ours(*args, **fields)[0], *args)
            return y, *pull(jnp.asarray(cotangent, y.dtype))

        expected = jax.jit(run)(*args)
        close(expected[0], oracle(*args, epsilon, outside), atol=1e-9)
        with jax.enable_x64(False):
            got = jax.jit(run)(*(jnp.asarray(t, "f4") for t in args))
        for a, b in zip(got, expected, strict=True):
            close(a, b, atol=4e-6 * max(1, np.abs(b).max()))


def test_one_example_under_a_mask():
    """It is as if it came alone, and what is NaN where nothing counts is the bias."""
    x = draw((3, *SHAPE[1:]))[0]
    mask = (jnp.arange(3) == 1).reshape(3, 1, 1, 1)
    z = definition(np, x, 1.0, 0.0, np.float64(40), running=(0.0, 1.0), outside=True)
    with jax.enable_x64(False):
        run = jax.jit(partial(ours, epsilon_outside=True, weights=mask))
        x, rest = jnp.asarray(x, "f4"), (jnp.ones(6), jnp.full(6, 7.0), jnp.asarray(0.3))
        y, masked = run(x, *rest)[0], run(x.at[0].set(jnp.nan), *rest)[0]
    close(y[1], z[1] / (1 + np.exp(-0.3)) + 7, atol=1e-5)
    close(masked[1], y[1], atol=1e-6)
    np.testing.assert_array_equal(masked[0], 7)


@pytest.mark.parametrize("mixture", [-20.0, -44.0, -200.0])
def test_gradient_of_one_example_by_its_mixture(mixture):
    """y = w z, whose derivative by the mixture is w (1 - w) z, however small w is."""
    x = draw((1, *SHAPE[1:]))[0]
    z, w = (
        definition(np, x, 1.0, 0.0, np.float64(40), running=(0.0, 1.0)),
        1 / (1 + np.exp(-mixture)),
    )
    with jax.enable_x64(False):
        x, rest = jnp.asarray(x, "f4"), (jnp.ones(6), jnp.zeros(6))
        loss = lambda mixture: jnp.abs(ours(x, *rest, mixture)[0]).sum()  # noqa: E731
        found = jax.grad(loss)(jnp.float32(mixture))
    close(found, w * (1 - w) * np.abs(z).sum(), atol=1e-10)


@pytest.mark.parametrize("per_position", (True, False))
def test_scale_and_bias_of_each_example(per_position):
    x, (scale, bias) = draw()[0], np.random.default_rng(2).normal(size=(2, 4, 6))
    method = group_norm_plus(GROUPS, per_position=per_position)
    apply = partial(method.apply, state=method.init(SHAPE), mixture=0.3, train=True)
    run = jax.jit(apply)
    y = run(x, scale=scale, bias=bias)[0]
    cut = (t.reshape(4, 1, 1, 6) for t in (scale, bias))
    close(y, definition(np, x, *cut, np.float64(0.3), per_position=per_position))
    first = partial(apply, channel_axis=2, batch_axis=3)
    turned = np.moveaxis(x, (0, 3), (3, 2))
    close(np.moveaxis(first(turned, scale=scale, bias=bias)[0], (3, 2), (0, 3)), y)


def test_state_is_tied_to_the_image_size():
    method, x = group_norm_plus(3), jnp.ones((2, 4, 8, 6))
    state = method.init((1, 4, 4, 6))
    for train in (True, False):
        with pytest.raises(
            ValueError,
            match=(
                r"mean of shape \(4, 4, 6\).* mean of shape \(4, 8, 6\).* x of shape "
                r"\(2, 4, 8, 6\): state belongs .* to one image size"
            ),
        ):
            jax.eval_shape(lambda x, t=train: method.apply(x, state, train=t), x)
    method = group_norm_plus(3, per_position=False)
    y, _ = method.apply(x, method.init((1, 4, 4, 6)), train=False)
    assert y.shape == x.shape


def test_layers_have_the_switches_of_the_released_code():
    x, method = (
        jnp.asarray(draw()[0]),
        group_norm_plus(GROUPS, correction=1, epsilon_outside=True),
    )
    expected = definition(np, np.asarray(x), 1.0, 0.0, 1.0, ddof=1, outside=True)
    layer = linen.Norm(method, use_running_average=False)
    y, _ = layer.init_with_output(jax.random.key(0), x)
    close(y, expected)
    close(nnx.Norm(6, method, x_shape=SHAPE, rngs=fnnx.Rngs(0))(x), expected)
