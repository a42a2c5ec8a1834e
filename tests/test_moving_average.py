"""Moving Average Batch Normalization: the authors' steps in NumPy, backward pass included, and its
reductions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from helpers import double
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm import linen
from jaxnorm import nnx as jnnx
from jaxnorm.kernels import centralize_kernel
from jaxnorm.methods import moving_average_norm

SHAPE = (4, 3, 3, 5)
AXES = (0, 1, 2)


def init(channels, window=16):
    return moving_average_norm(window=window).init((1, channels))


def of(state):
    """The method with as long a window as the state has."""
    return moving_average_norm(window=len(state["past_gradient"]))


def batch(seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    # x, and the loss's gradient by y
    return rng.normal(0.3, 1 + 0.5 * (seed % 3), shape), rng.normal(size=shape)


@partial(jax.jit, static_argnames=("axis_name", "axis_index_groups", "channel_axis"))
def step(x, weight, state, tap, scale, bias, **options):
    """y and the new state, then the gradients by x, tap, scale and bias of sum(y weight)."""

    def loss(x, tap, scale, bias):
        y, new = of(state).apply(x, state, train=True, tap=tap, scale=scale, bias=bias, **options)
        return (y * weight).sum(), (y, new)

    gradients, (y, new) = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, tap, scale, bias)
    return y, new, gradients


class Authors:
    """The authors' training step: forward, then backward, which also writes the state."""

    def __init__(self, window, channels, average_from, correct_from):
        self.squares, self.psis = np.zeros((window, channels)), np.zeros((window, channels))
        self.running, self.it = np.ones(channels), 0
        self.average_from, self.correct_from = average_from, correct_from

    def step(self, x, dy, scale, bias, epsilon=1e-5):
        self.it += 1
        k = len(self.squares)
        warming = self.it <= k or self.it < self.average_from
        self.squares[self.it % k] = (x * x).mean(AXES)
        v = self.squares[self.it % k] if warming else self.squares.mean(0)
        z = x / np.sqrt(v + epsilon)
        r = np.sqrt(v + epsilon) / np.sqrt(self.running + epsilon)
        r = np.ones_like(r) if self.it < self.correct_from else np.clip(r, 1 / 5, 5)
        self.running = 0.98 * self.running + 0.02 * v
        y = scale * r * z + bias
        g = dy * scale * r
        self.psis[self.it % k] = (g * z).mean(AXES)
        psi = self.psis[self.it % k] if warming else self.psis.mean(0)
        dx = (g - z * psi) / np.sqrt(v + epsilon)
        return y, dx, self.psis[self.it % k], (dy * r * z).sum(AXES), dy.sum(AXES)


@pytest.mark.usefixtures("x64")
def test_authors_recipe():
    """Values, gradients and state of twelve steps, through both warm-ups and where r is clipped;
    one trace."""
    scale, bias = jnp.asarray([1.0, 0.5, -2.0, 3.0, 1.0]), jnp.arange(5.0)
    traces = step._cache_size()
    authors = Authors(3, 5, average_from=6, correct_from=9)
    state, tap, clipped = double(init(5, window=3)), jnp.zeros(5), np.zeros(2)
    for it in range(1, 13):
        x, dy = batch(it)
        # less and more than five times the running root mean square
        x[..., 3:] *= (0.01, 30) if it >= 9 else 1
        before = authors.running
        expected = authors.step(x, dy, np.asarray(scale), np.asarray(bias))
        y, state, (dx, tap, dscale, dbias) = step(
            jnp.asarray(x), jnp.asarray(dy), state, tap, scale, bias, average_from=6, correct_from=9
        )
        for ours, theirs in zip((y, dx, tap, dscale, dbias), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(state["mean_square"], authors.running, rtol=1e-12)
        order = [(it - age) % 3 for age in range(3)]
        np.testing.assert_allclose(state["past_mean_square"], authors.squares[order], rtol=1e-12)
        np.testing.assert_allclose(state["past_gradient"][:2], authors.psis[order[1:]], atol=1e-12)
        ratio = authors.squares.mean(0) / before
        clipped += (it >= 9) * np.array([ratio.min() < 1 / 25, ratio.max() > 25])
    assert int(state["step"]) == 12 and clipped.all() and step._cache_size() == traces + 1


@pytest.mark.usefixtures("x64")
def test_one_batch_is_the_derivative():
    """K = 1 and r = 1: autodiff of x / sqrt(mean x^2 + epsilon); and the tap's gradient is mean(g
    z)."""
    x, dy = (jnp.asarray(t) for t in batch(3))
    scale, bias = jnp.arange(1.0, 6.0), jnp.ones(5)

    def plain(x, scale, bias):
        z = x / jnp.sqrt((x * x).mean(AXES, keepdims=True) + 1e-5)
        return (dy * (z * scale.reshape(1, 1, 1, 5) + bias.reshape(1, 1, 1, 5))).sum()

    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(x, scale, bias)
    state = double(init(5, window=1))
    for average_from in (1, 100):
        _, _, (dx, tap, dscale, dbias) = step(
            x, dy, state, jnp.ones(5), scale, bias, average_from=average_from, correct_from=9
        )
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), (dx, dscale, dbias), expected)
        z = x / jnp.sqrt((x * x).mean(AXES, keepdims=True) + 1e-5)
        psi = (np.asarray(dy) * np.asarray(scale) * np.asarray(z)).mean(AXES)
        np.testing.assert_allclose(tap, psi, atol=1e-12)


def warmed(window=2, channels=5):
    """A state in which both averages act."""
    rng = np.random.default_rng(7)
    return double(init(channels, window=window)) | {
        "past_mean_square": jnp.asarray(rng.uniform(0.5, 2, (window, channels))),
        "past_gradient": jnp.asarray(rng.normal(size=(window, channels))),
        "mean_square": jnp.asarray(rng.uniform(0.5, 2, channels)),
        "step": jnp.asarray(2000.0),
    }


@pytest.mark.usefixtures("x64")
def test_masks_channels_first_and_vmap():
    (x, dy), tap, state = batch(1), jnp.linspace(-1, 1, 5), warmed()
    arguments = (state, tap, jnp.arange(1.0, 6.0), jnp.ones(5))
    y, new, gradients = step(jnp.asarray(x), jnp.asarray(dy), *arguments)

    padded = (
        np.concatenate([x, np.full((2, 3, 3, 5), np.nan)]),
        np.concatenate([dy, np.zeros((2, 3, 3, 5))]),
    )
    mask = jnp.arange(6).reshape(6, 1, 1, 1) < 4
    y_mask, new_mask, gradients_mask = step(*map(jnp.asarray, padded), *arguments, weights=mask)
    np.testing.assert_allclose(y_mask[:4], y, atol=1e-12)
    np.testing.assert_array_equal(gradients_mask[0][4:], 0)
    same = (new_mask, (gradients_mask[0][:4], *gradients_mask[1:]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), same, (new, gradients))

    turned = (jnp.moveaxis(jnp.asarray(t), -1, 1) for t in (x, dy))
    y_first, new_first, gradients_first = step(*turned, *arguments, channel_axis=1)
    same = (
        jnp.moveaxis(y_first, 1, -1),
        new_first,
        (jnp.moveaxis(gradients_first[0], 1, -1), *gradients_first[1:]),
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), same, (y, new, gradients))

    twice = jax.vmap(lambda x, dy, tap: step(x, dy, state, tap, *arguments[2:]))
    many = twice(*(jnp.stack([t, 2 * t]) for t in (jnp.asarray(x), jnp.asarray(dy), tap)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-12), many, (y, new, gradients)
    )


def test_no_forward_mode():
    state, tap = init(3), jnp.zeros(3)
    with pytest.raises(TypeError, match="can't apply forward-mode .* to a custom_vjp function"):

        def f(x):
            def y(x):
                return of(state).apply(x, state, train=True, tap=tap)[0]

            return jax.jvp(y, (x,), (x,))

        jax.jit(f).lower(jnp.ones((4, 3)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["check_vma", "shard_map", "vmap"])
def test_devices_equal_one(kind):
    """Gradients by x and, summed as the docstring says, by the tap; and device groups."""
    x, dy = (jnp.asarray(t) for t in batch(2, (8, 3, 3, 5)))
    arguments = (warmed(), jnp.linspace(-1, 1, 5), jnp.arange(1.0, 6.0), jnp.ones(5))
    y, new, gradients = step(x, dy, *arguments)

    def f(x, dy, groups=None):
        y, new, (dx, tap, *affine) = step(
            x, dy, *arguments, axis_name="data", axis_index_groups=groups
        )
        if kind != "check_vma":
            tap, affine = lax.psum((tap, affine), "data")
        return y, dx, (new, tap, affine)

    def run(f, replicated):
        if kind == "vmap":
            cut = (t.reshape(8, 1, *t.shape[1:]) for t in (x, dy))
            y, dx, rest = jax.jit(jax.vmap(f, axis_name="data"))(*cut)
            return y.reshape(x.shape), dx.reshape(x.shape), jax.tree.map(lambda t: t[0], rest)
        mesh = Mesh(np.array(jax.devices()), ("data",))
        specs = {
            "in_specs": P("data"),
            "out_specs": (P("data"), P("data"), replicated),
            "check_vma": kind == "check_vma",
        }
        return jax.jit(jax.shard_map(f, mesh=mesh, **specs))(x, dy)

    got_y, dx, (got_new, tap, affine) = run(f, P())
    expected = (y, new, gradients)
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-11),
        (got_y, got_new, (dx, tap, *affine)),
        expected,
    )

    halves = ((0, 1, 2, 3), (4, 5, 6, 7))
    got_y, dx, _ = run(lambda x, dy: (*f(x, dy, halves)[:2], jnp.zeros(())), P())
    for part in (slice(4), slice(4, 8)):
        y, _, gradients = step(x[part], dy[part], *arguments)
        np.testing.assert_allclose(got_y[part], y, atol=1e-11)
        np.testing.assert_allclose(dx[part], gradients[0], atol=1e-11)


def whole_batch(x, dy, state, tap, epsilon=1e-5):
    """dL/dx and psi of (N, C) by the docstring's formulas, of averages without a correction."""
    window = len(state["past_gradient"])
    v = ((x * x).mean(0) + np.asarray(state["past_mean_square"])[:-1].sum(0)) / window
    z = x / np.sqrt(v + epsilon)
    psi = (dy * z).mean(0)
    past = (np.asarray(tap) + np.asarray(state["past_gradient"])[:-2].sum(0)) if window > 1 else 0
    return (dy - z * (psi + past) / window) / np.sqrt(v + epsilon), psi


def mapped(kind, f, tap_axis):
    """f(x, dy, tap) of a part, over the parts of arrays with a leading axis for them."""
    axes = {"axis_name": "i", "in_axes": (0, 0, tap_axis)}
    if kind == "pmap":
        return jax.pmap(f, devices=jax.devices()[:4], **axes)
    if "vmap" in kind:
        return jax.vmap(jax.jit(f) if kind == "vmap of jit" else f, **axes)

    def local(x, dy, tap):
        y = f(x[0], dy[0], tap if tap_axis is None else tap[0])
        return jax.tree.map(lambda t: t[None], y)

    return jax.shard_map(
        local,
        mesh=Mesh(np.array(jax.devices()[:4]), ("i",)),
        in_specs=(P("i"), P("i"), P() if tap_axis is None else P("i")),
        out_specs=P("i"),
        check_vma=kind == "shard_map",
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("own_tap", (False, True), ids=("shared", "own"))
@pytest.mark.parametrize("kind", ("vmap", "vmap of jit", "pmap", "shard_map", "unchecked"))
def test_every_order_of_gradient_and_map(kind, own_tap):
    """The past gradients enter dL/dx once, and the parts of the tap's gradient add up to psi."""
    rng = np.random.default_rng(3)
    x, dy = rng.normal(0.3, 1, (8, 5)), rng.normal(size=(8, 5))
    state, tap = warmed(window=3), np.linspace(-1, 1, 5)
    tap_axis = 0 if own_tap else None
    given = jnp.asarray(np.stack([tap] * 4) if own_tap else tap)
    for groups, sets in ((None, [slice(8)]), (((0, 1), (2, 3)), [slice(4), slice(4, 8)])):

        def loss(x, dy, tap, groups=groups):
            options = {"axis_name": "i", "axis_index_groups": groups, "correct_from": 10**6}
            y, _ = of(state).apply(x, state, train=True, tap=tap, **options)
            return (y * dy).sum()

        def outside(x, dy, tap, loss=loss):
            return jax.grad(lambda x, tap: mapped(kind, loss, tap_axis)(x, dy, tap).sum(), (0, 1))(
                x, tap
            )

        cut = (jnp.asarray(t.reshape(4, 2, 5)) for t in (x, dy))
        cut = (*cut, given)
        expected = [whole_batch(x[part], dy[part], state, tap) for part in sets]
        inside = mapped(kind, jax.grad(loss, (0, 2)), tap_axis)
        for grad, run in (("inside", inside), ("outside", outside)):
            dx, dtap = (jax.jit(run) if kind != "pmap" else run)(*cut)
            dx = np.asarray(dx).reshape(8, 5)
            np.testing.assert_allclose(dx, np.concatenate([e[0] for e in expected]), atol=1e-12)
            summed = not own_tap and (grad == "outside" or kind == "shard_map")
            dtap = np.asarray(dtap)
            if summed and grad == "inside":  # the same on every device
                np.testing.assert_array_equal(dtap, np.broadcast_to(dtap[0], dtap.shape))
                dtap = dtap[0]
            dtap = dtap if summed else dtap.sum(0)
            np.testing.assert_allclose(dtap, sum(e[1] for e in expected), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_gradient_between_two_maps_and_of_sharded_arrays():
    rng = np.random.default_rng(4)
    x, dy = rng.normal(0.3, 1, (8, 5)), rng.normal(size=(8, 5))
    state, tap = warmed(window=3), jnp.linspace(-1, 1, 5)
    expected = whole_batch(x, dy, state, tap)

    def loss(x, dy, tap, names=None):
        y, _ = moving_average_norm(window=3, correct_from=10**6).apply(
            x, state, train=True, tap=tap, axis_name=names
        )
        return (y * dy).sum()

    def middle(x, dy, tap):
        inner = jax.vmap(partial(loss, names=("i", "j")), (0, 0, None), axis_name="j")
        return jax.grad(lambda x, tap: inner(x, dy, tap).sum(), (0, 1))(x, tap)

    cut = (jnp.asarray(t.reshape(2, 2, 2, 5)) for t in (x, dy))
    dx, dtap = jax.jit(jax.vmap(middle, (0, 0, None), axis_name="i"))(*cut, tap)
    np.testing.assert_allclose(np.asarray(dx).reshape(8, 5), expected[0], atol=1e-12)
    np.testing.assert_allclose(dtap.sum(0), expected[1], atol=1e-12)

    where = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    arrays = (jax.device_put(t, where) for t in (x, dy))
    got = jax.jit(jax.grad(loss, (0, 2)))(*arrays, tap)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), got, expected)


def test_smallest_case_of_a_gradient_outside():
    """Two parts of two examples, window 2, past gradient 0.3: dL/dx once was 1.2086."""
    x, dy = jnp.arange(8.0).reshape(4, 2) / 3 - 1, jnp.cos(jnp.arange(8.0)).reshape(4, 2)
    state = init(2, window=2) | {
        "past_gradient": jnp.full((2, 2), 0.3),
        "past_mean_square": jnp.ones((2, 2)),
        "step": jnp.asarray(200.0),
    }

    def loss(x, dy):
        tap = jnp.full(2, 0.3)
        y, _ = of(state).apply(x, state, train=True, tap=tap, axis_name="i")
        return (y * dy).sum()

    def outside(x):
        return jax.vmap(loss, axis_name="i")(x.reshape(2, 2, 2), dy.reshape(2, 2, 2)).sum()

    dx = jax.jit(jax.grad(outside))(x)
    np.testing.assert_allclose(dx[0, 0], 1.3051, atol=1e-4)
    expected = whole_batch(*(np.asarray(t, np.float64) for t in (x, dy)), state, jnp.full(2, 0.3))
    np.testing.assert_allclose(dx, expected[0], atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_history_gets_no_gradient():
    x, dy = (jnp.asarray(t) for t in batch(1))

    def loss(state):
        y, _ = of(state).apply(x, state, train=True, tap=jnp.zeros(5))
        return (y * dy).sum()

    assert all(
        np.all(np.asarray(t) == 0)
        for n, t in jax.jit(jax.grad(loss))(warmed()).items()
        if n != "mean_square"
    )


def test_half_precision_and_inference():
    x = jnp.asarray(batch(1)[0], jnp.bfloat16)
    run = jax.jit(partial(moving_average_norm(window=4).apply, train=True))
    y, state = run(x, init(5, window=4), tap=jnp.zeros(5))
    assert y.dtype == jnp.bfloat16 and all(t.dtype == jnp.float32 for t in state.values())
    x = x.astype(jnp.float32)
    square = np.square(np.asarray(x, np.float64)).mean(AXES)
    np.testing.assert_allclose(state["past_mean_square"][0], square, rtol=1e-5)
    y, same = of(state).apply(x, state, train=False)
    np.testing.assert_allclose(y, np.asarray(x) / np.sqrt(0.98 + 0.02 * square + 1e-5), rtol=1e-4)
    assert same is state


def test_bad_batches_leave_their_channels():
    state = jax.tree.map(lambda t: t.astype(jnp.float32), init(5, window=2))
    x = jnp.asarray(batch(1)[0], jnp.float32)
    tap = jnp.array([jnp.nan, 1.0, jnp.inf, 2.0, 3.0])
    run = jax.jit(partial(of(state).apply, train=True))
    _, new = run(x.at[0, 0, 0, 1].set(jnp.nan), state, tap=tap)
    changed = [
        np.atleast_2d(new[name] != state[name])[0].tolist()
        for name in ("mean_square", "past_mean_square")
    ]
    assert changed == [[True, False, True, True, True]] * 2
    np.testing.assert_array_equal(new["past_gradient"][0], [0, 1, 0, 2, 3])
    y, new = run(x, state, tap=jnp.zeros(5), weights=jnp.zeros((4, 1, 1, 1)))
    jax.tree.map(np.testing.assert_array_equal, new, state)
    assert np.isfinite(y).all()


def test_centralized_kernel_ignores_a_constant():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 6)), jnp.float32)
    centered = centralize_kernel(kernel)
    np.testing.assert_allclose(centered, kernel - kernel.mean((0, 1, 2), keepdims=True), atol=1e-7)
    conv = partial(
        lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    constant = jnp.full((2, 5, 5, 4), 7.0)
    np.testing.assert_allclose(conv(constant, centered, padding="VALID"), 0, atol=1e-4)
    assert np.abs(conv(constant, kernel, padding="VALID")).max() > 1
    shifted = conv(constant + 1, centered, padding="SAME") - conv(
        constant, centered, padding="SAME"
    )
    assert np.abs(shifted).max() > 0.1  # padding is not constant
    with pytest.raises(ValueError, match="one weight for each output channel"):
        centralize_kernel(jnp.ones((1, 1, 1, 8)))


def test_errors():
    state, apply = init(3), moving_average_norm().apply
    for tap in (None, jnp.zeros(4)):
        with pytest.raises(
            ValueError, match="zeros in the first step, then the gradient by the tap"
        ):
            apply(jnp.ones((4, 3)), state, train=True, tap=tap)
    with pytest.raises(
        ValueError, match=r"mean_square of shape \(3,\).* mean_square of shape \(5,\)"
    ):
        apply(jnp.ones((4, 5)), state, train=True, tap=jnp.zeros(3))
    with pytest.raises(TypeError, match="defined for real x"):
        apply(jnp.ones((4, 3), jnp.complex64), state, train=False)
    for window, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match=f"window is {window}; expected an integer of at least 1"):
            moving_average_norm(window=window)
    for name, value in (("rmax", 0.5), ("average_from", -1), ("correct_from", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected a number of at least"):
            apply(jnp.ones((4, 3)), state, train=True, tap=jnp.zeros(3), **{name: value})
    layer = linen.Norm(moving_average_norm())
    variables = layer.init(jax.random.key(0), jnp.ones((4, 3)), use_running_average=True)
    del variables["_overwrite_with_gradient"]
    layer.apply(variables, jnp.ones((4, 3)), use_running_average=True)  # inference needs none
    with pytest.raises(ValueError, match="tap has shape None"):
        layer.apply(variables, jnp.ones((4, 3)), use_running_average=False, mutable="batch_stats")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        conv = nn.Conv(16, (3, 3), use_bias=False)
        norm = linen.Norm(moving_average_norm(window=4), layer=conv)
        x = nn.relu(norm(x, not train, average_from=3, correct_from=8))
        return nn.Dense(2)(x.mean((1, 2)))


class NetNNX(nnx.Module):
    def __init__(self, rngs):
        conv = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm = jnnx.Norm(16, moving_average_norm(window=4), layer=conv, rngs=rngs)
        self.dense = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x, train):
        return self.dense(
            nnx.relu(self.norm(x, not train, average_from=3, correct_from=8)).mean((1, 2))
        )


@pytest.mark.slow
def test_small_nets_learn_and_agree():
    """Two images at a time, in linen through Flax's TrainState, in nnx through its optimizer: the
    same numbers."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (80, 2))
    xs = rng.normal(size=(80, 2, 6, 6, 1)).astype(np.float32) * (
        1 + 2 * labels[..., None, None, None]
    ).astype(np.float32)
    net = Net()
    variables = jax.jit(partial(net.init, train=False))(jax.random.key(0), xs[0])
    trained = {name: variables[name] for name in ("params", "_overwrite_with_gradient")}
    start = TrainState.create(apply_fn=net.apply, params=trained, tx=optax.sgd(0.05))

    @jax.jit
    def train(carry, data):
        def body(carry, data):
            state, stats = carry
            x, label = data

            def loss(params):
                logits, new = net.apply(
                    params | {"batch_stats": stats}, x, train=True, mutable="batch_stats"
                )
                return (
                    optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(),
                    new["batch_stats"],
                )

            (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
            carry = state.apply_gradients(grads=gradients), stats
            return carry, (value, carry)

        return lax.scan(body, carry, data)

    _, (losses, after) = train(
        (start.replace(step=jnp.asarray(0)), variables["batch_stats"]), (xs, labels)
    )
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()

    model = NetNNX(nnx.Rngs(0))
    model.norm.layer.kernel[...] = variables["params"]["Conv_0"]["kernel"]
    model.dense.kernel[...] = variables["params"]["Dense_0"]["kernel"]
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)

    @nnx.jit
    def train_nnx(model, optimizer, x, label):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(x, train=True), label
            ).mean()

        value, gradients = nnx.value_and_grad(
            loss, argnums=nnx.DiffState(0, (nnx.Param, jnnx.Tap))
        )(model)
        params, taps = nnx.split_state(gradients, nnx.Param, jnnx.Tap)
        optimizer.update(model, params)
        nnx.update(model, taps)
        return value

    values = [
        train_nnx(model, optimizer, x, label) for x, label in zip(xs[:12], labels[:12], strict=True)
    ]
    np.testing.assert_allclose(values, losses[:12], rtol=1e-3)
    state, stats = jax.tree.map(lambda t: t[11], after)
    tap = state.params["_overwrite_with_gradient"]["Norm_0"]["tap"]
    np.testing.assert_allclose(model.norm.tap[...], tap, rtol=1e-2, atol=1e-6)
    assert np.abs(tap).max() > 1e-4
    for name, value in stats["Norm_0"].items():
        np.testing.assert_allclose(getattr(model.norm, name)[...], value, rtol=1e-2, atol=1e-4)
    y = net.apply(state.params | {"batch_stats": stats}, xs[0], train=False)
    np.testing.assert_allclose(model(xs[0], train=False), y, atol=1e-2)


@pytest.mark.usefixtures("x64")
def test_state_and_tap_are_float32():
    """Also in double precision, and after a step."""
    single, x, state = (
        {jnp.dtype("float32")},
        jnp.ones(SHAPE, jnp.float32),
        init(SHAPE[-1]),
    )
    assert {t.dtype for t in state.values()} == single
    assert {
        t.dtype
        for t in moving_average_norm()
        .apply(x, state, train=True, tap=jnp.zeros(5, "f4"))[1]
        .values()
    } == single
    layer = linen.Norm(moving_average_norm())
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    assert {t.dtype for t in jax.tree.leaves(variables)} == single
    layer = jnnx.Norm(SHAPE[-1], moving_average_norm(), rngs=nnx.Rngs(0))
    assert layer.tap.dtype in single
