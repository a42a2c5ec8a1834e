"""Cross-Iteration Batch Normalization: concatenated batches, the Taylor form with old kernels, the
authors' code."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from helpers import double
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm import linen, methods
from jaxnorm import nnx as jnnx
from jaxnorm.methods import cross_iteration_norm
from jaxnorm.schedules import cross_iteration_window

NHWC = ("NHWC", "HWIO", "NHWC")
GROUPED = {
    "window_strides": (2, 1),
    "padding": "SAME",
    "rhs_dilation": (1, 2),
    "feature_group_count": 2,
}
# name, layer in front, kernel, inputs, groups
LAYERS = {
    "dense": (jnp.matmul, (5, 6), (7, 5), 1),
    "valid": (
        partial(
            lax.conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NHWC
        ),
        (3, 2, 4, 6),
        (3, 5, 6, 4),
        1,
    ),
    "grouped": (
        partial(lax.conv_general_dilated, **GROUPED, dimension_numbers=NHWC),
        (3, 3, 2, 6),
        (3, 5, 6, 4),
        2,
    ),
}
each_layer = pytest.mark.parametrize(
    "name", ["dense", "grouped", pytest.param("valid", marks=pytest.mark.slow)]
)


def batches(shape, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0.3 * t + 1, 1 + 0.3 * t, shape)) for t in range(count)]


def kernels(shape, count=3, seed=1, step=0.1):
    rng = np.random.default_rng(seed)
    first = rng.normal(size=shape)
    return [jnp.asarray(first + step * t * rng.normal(size=shape)) for t in range(count)]


def init(kernel_shape, window=3, **options):
    """The state before the first step, for any y that the kernel makes."""
    method = cross_iteration_norm(window=window)
    return method.init((1, kernel_shape[-1]), kernel_shape=kernel_shape, **options)


def first_state(name, window=3):
    _, kernel, _, groups = LAYERS[name]
    return double(init(kernel, window=window, feature_group_count=groups))


@partial(jax.jit, static_argnames=("name", "axis_name", "axis_index_groups", "epsilon"))
def step(name, state, x, kernel, rho=1.0, window=3, epsilon=1e-5, **options):
    layer = LAYERS[name][0]
    options |= {"inputs": x, "kernel": kernel, "layer": layer, "rho": rho, "window": window}
    return cross_iteration_norm(epsilon=epsilon).apply(
        layer(x, kernel), state, train=True, **options
    )


def after(name, xs, ws, state=None):
    state = first_state(name) if state is None else state
    for x, w in zip(xs, ws, strict=True):
        _, state = step(name, state, x, w)
    return state


def per_channel(y):
    """Mean and mean square of each channel."""
    y = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    return y.mean(0), (y**2).mean(0)


def normalized(y, mean, var):
    y, mean, var = (np.asarray(t, np.float64) for t in (y, mean, var))
    return (y - mean) / np.sqrt(var + 1e-5)


@partial(jax.jit, static_argnames="name")
def carried(name, x, w, change, rho):
    """Mean and mean square of a batch, and the first-order steps from its kernel w, by autodiff."""

    def statistics(k):
        y = LAYERS[name][0](x, k).reshape(-1, k.shape[-1])
        return jnp.stack([y.mean(0), jnp.square(y).mean(0)])

    old, along = jax.jvp(statistics, (w,), (change,))
    return old + rho * along


def taylor(name, xs, ws, rho):
    """The definition, with old kernels: (mean', mean square') of each batch for the last kernel."""
    return np.array([carried(name, x, w, ws[-1] - w, rho) for x, w in zip(xs, ws, strict=True)])


def pooled(entries):
    mean = entries[:, 0].mean(0)
    return mean, np.maximum(entries[:, 1], entries[:, 0] ** 2).mean(0) - mean**2


@pytest.mark.usefixtures("x64")
@each_layer
def test_definition_with_old_kernels(name):
    """The form without old kernels is the Taylor form, for any rho, and where the maximum acts."""
    acted = 0
    for size, rho in ((0.1, 1.0), (0.1, 0.0), (0.1, 0.4), (1.5, 1.0)):
        xs, ws = batches(LAYERS[name][2]), kernels(LAYERS[name][1], step=size)
        y = LAYERS[name][0](xs[-1], ws[-1])
        z, _ = step(name, after(name, xs[:-1], ws[:-1]), xs[-1], ws[-1], rho=rho)
        entries = taylor(name, xs, ws, rho)
        np.testing.assert_allclose(z, normalized(y, *pooled(entries)), atol=1e-10)
        acted += (entries[:, 1] < entries[:, 0] ** 2).sum()
    assert acted > 0


@pytest.mark.usefixtures("x64")
@each_layer
@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_constant_kernel_is_the_concatenated_batches(name, rho):
    """Also Cross mini-Batch Normalization: micro-batches of one step, the window their number in
    it."""
    layer, shape, inputs, _ = LAYERS[name]
    w = kernels(shape)[0]
    state = first_state(name)
    for micro, x in enumerate(batches(inputs, 4)):
        seen = [layer(x, w) for x in batches(inputs, 4)[: micro + 1]]
        mean, square = per_channel(jnp.concatenate(seen))
        z, state = step(name, state, x, w, rho=rho, window=jnp.int32(micro))
        np.testing.assert_allclose(z, normalized(seen[-1], mean, square - mean**2), atol=1e-12)


@pytest.mark.usefixtures("x64")
@each_layer
def test_rounding_does_not_grow_with_the_mean(name):
    layer, shape, inputs, _ = LAYERS[name]
    w = kernels(shape)[0].astype(jnp.float32)
    xs = [1e4 + x.astype(jnp.float32) for x in batches(inputs, 2)]
    state = jax.tree.map(lambda t: t.astype(jnp.float32), first_state(name))
    _, state = step(name, state, xs[0], w)
    z, state = step(name, state, xs[1], w)
    exact = np.concatenate([np.asarray(layer(x, w), np.float64) for x in xs])
    mean = exact.mean(tuple(range(exact.ndim - 1)))
    var = exact.var(tuple(range(exact.ndim - 1)))
    np.testing.assert_allclose(z, normalized(exact[len(xs[0]) :], mean, var), atol=0.02)


@pytest.mark.usefixtures("x64")
@each_layer
def test_window_of_no_batches_is_batch_norm(name):
    layer, shape, inputs, _ = LAYERS[name]
    xs, ws = batches(inputs), kernels(shape)
    state = after(name, xs[:-1], ws[:-1])
    weight = jnp.asarray(np.random.default_rng(3).normal(size=layer(xs[0], ws[0]).shape))

    def loss(x, w, cross):
        y = layer(x, w)
        z = (
            step(name, state, x, w, window=0)[0]
            if cross
            else jaxnorm.norm(y, methods.batch_norm())[0]
        )
        return (jnp.sin(z) * weight).sum(), z

    gradients = (
        jax.jit(jax.grad(partial(loss, cross=cross), (0, 1), has_aux=True))
        for cross in (True, False)
    )
    ours, theirs = (gradient(xs[-1], ws[-1]) for gradient in gradients)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), ours, theirs)
    # and nothing is in the window of the first step
    first = step(name, first_state(name), xs[-1], ws[-1])[0]
    np.testing.assert_allclose(first, ours[1], atol=1e-12)


@pytest.mark.usefixtures("x64")
@each_layer
def test_mean_is_exact_and_variance_never_too_large(name):
    """For fixed inputs, however far the kernel moves."""
    layer, shape, inputs, _ = LAYERS[name]
    x, ws = batches(inputs)[0], kernels(shape, 2, step=2.0)
    entries = taylor(name, [x], ws[:1], 1.0)
    mean, square = per_channel(layer(x, ws[1]))
    entries = taylor(name, [x, x], ws, 1.0)
    np.testing.assert_allclose(entries[0, 0], mean, atol=1e-12)
    gap = square - entries[0, 1]
    # mean((inputs * change)^2) >= 0
    np.testing.assert_allclose(gap, per_channel(layer(x, ws[1] - ws[0]))[1], atol=1e-12)

    # In the library: the statistics used are those of both batches, the first one less its gap.
    v_first = np.maximum(square - gap - mean**2, 0)
    z, _ = step(name, after(name, [x], ws[:1]), x, ws[1])
    var = (v_first + square - mean**2) / 2
    np.testing.assert_allclose(z, normalized(layer(x, ws[1]), mean, var), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_variance_is_never_negative():
    name = "grouped"
    layer, shape, inputs, _ = LAYERS[name]
    state = first_state(name)
    for seed in range(8):
        x, w = batches(inputs, 1, seed)[0], 10.0 ** (seed % 4 - 2) * kernels(shape, 1, seed)[0]
        z, state = step(name, state, x, w, epsilon=0.0)
        y = np.asarray(layer(x, w))
        variance = (y.std((0, 1, 2)) / np.asarray(z).std((0, 1, 2))) ** 2  # used by the layer
        assert np.all(np.isfinite(z)) and np.all(variance > y.var((0, 1, 2)) / 4 * (1 - 1e-9))


@pytest.mark.usefixtures("x64")
def test_gradient_in_closed_form():
    """dL/dy = (g - mean(g) / K - (y - mean) / s mean(g z) / K) / s, and none through the window or
    the kernel's change."""
    xs, ws = batches((7, 5)), kernels((5, 6))
    state = after("dense", xs[:-1], ws[:-1])
    y, weight = xs[-1] @ ws[-1], jnp.asarray(np.random.default_rng(3).normal(size=(7, 6)))

    def loss(y, x, w, state):
        z, _ = cross_iteration_norm().apply(y, state, train=True, inputs=x, kernel=w)
        return (z * weight).sum()

    value, *rest = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(y, xs[-1], ws[-1], state)
    mean, var = pooled(taylor("dense", xs, ws, 1.0))
    s, g, z = np.sqrt(var + 1e-5), np.asarray(weight), normalized(y, mean, var)
    expected = (g - g.mean(0) / 3 - (np.asarray(y) - mean) / s * (g * z).mean(0) / 3) / s
    np.testing.assert_allclose(value, expected, atol=1e-10)
    assert all(np.all(np.asarray(t) == 0) for t in jax.tree.leaves(rest))


@pytest.mark.usefixtures("x64")
def test_order_of_the_window_does_not_matter():
    xs, ws = batches((3, 5, 6, 4), 4), kernels((3, 3, 2, 6), 4)
    state = after("grouped", xs[:-1], ws[:-1])
    turned = {k: t[jnp.array([2, 0, 1])] if k.startswith("past_") else t for k, t in state.items()}
    one, other = (step("grouped", s, xs[-1], ws[-1])[0] for s in (state, turned))
    np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_batches_of_different_size_and_masks():
    layer, shape, inputs, _ = LAYERS["grouped"]
    w = kernels(shape)[0]
    x, more = batches(inputs)[:2]
    keep = jnp.array([1.0, 0.5, 0.0]).reshape(3, 1, 1, 1)
    padded = more.at[2].set(1e6)
    state = after("grouped", [x[:1]], [w])
    z, state = step("grouped", state, padded, w, weights=keep)
    weight = np.concatenate([[1.0], [1.0], [0.5]])
    ys = np.concatenate([layer(x[:1], w), layer(more[:2], w)])
    weight = np.broadcast_to(weight.reshape(3, 1, 1, 1), ys.shape)
    mean = np.average(ys, (0, 1, 2), weight)
    var = np.average((ys - mean) ** 2, (0, 1, 2), weight)
    np.testing.assert_allclose(z[:2], normalized(layer(more[:2], w), mean, var), atol=1e-12)
    # and what is remembered is that of the kept examples: compensation for another kernel
    clean = after("grouped", [x[:1]], [w])
    _, clean = step("grouped", clean, more[:2], w, weights=keep[:2])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-10), state, clean)


@pytest.mark.usefixtures("x64")
def test_authors_code():
    """Their training steps in NumPy: list of entries, burn-in, dropped entries, running statistics.

    Differences by design: theirs divides by sqrt(v) + epsilon (here epsilon = 0 compares),
    normalizes with the unbiased variance during burn-in, keeps it in the running statistics, and
    drops entries whose variance is negative.
    """
    layer, shape, inputs, _ = LAYERS["grouped"]
    xs, ws = batches(inputs, 8), kernels(shape, 8, step=0.02)
    state, entries, running = first_state("grouped"), [], (np.zeros(6), np.ones(6))
    for it, (x, w) in enumerate(zip(xs, ws, strict=True), start=1):
        y = np.asarray(layer(x, w))
        n = y[..., 0].size
        mean, square = per_channel(y)
        active = it > 3
        if active:
            entries = ([(x, w)] + entries)[:3]
            both = taylor(
                "grouped", [e[0] for e in entries[::-1]], [e[1] for e in entries[::-1]], 1.0
            )
            kept = both[:, 1] - both[:, 0] ** 2 >= 0
            assert kept.all()
            used_mean = (both[:, 0] * kept).sum(0) / kept.sum(0)
            used_var = (both[:, 1] * kept).sum(0) / kept.sum(0) - used_mean**2
        else:
            used_mean, used_var = mean, (square - mean**2) * n / (n - 1)
        expected = (y - used_mean) / np.sqrt(used_var)
        running = (
            0.9 * running[0] + 0.1 * mean,
            0.9 * running[1] + 0.1 * (square - mean**2) * n / (n - 1),
        )
        window = cross_iteration_window(it - 1, burn_in=3, window=2)
        z, state = step("grouped", state, x, w, window=window, epsilon=0.0)
        z = z if active else z * np.sqrt((n - 1) / n)
        np.testing.assert_allclose(z, expected, atol=1e-10)
    np.testing.assert_allclose(state["mean"], running[0], atol=1e-12)
    ours = (np.asarray(state["var"]) - 0.9**8) * n / (n - 1) + 0.9**8
    np.testing.assert_allclose(ours, running[1], atol=1e-12)
    y = layer(xs[0], ws[0])
    z, same = cross_iteration_norm().apply(
        y, state, train=False, inputs=xs[0], kernel=ws[0], layer=layer
    )
    np.testing.assert_allclose(z, normalized(y, state["mean"], state["var"]), atol=1e-12)
    assert same is state


def test_window_schedule():
    steps = range(12)
    ours = [int(cross_iteration_window(t, burn_in=5, window=3)) for t in steps]
    growing = [int(cross_iteration_window(t, burn_in=9, window=3, growing=True)) for t in steps]
    lengths, stages, length, grown = [], [], 0, 0  # of the authors' list before each iteration
    for it in range(1, 13):
        stages.append(length)
        lengths.append(grown)
        length = min(length + 1, 3) if it > 5 else 0
        grown = min(grown + 1, int(3 * min(it / 9, 1)))
    assert (ours, growing) == (stages, lengths)
    for wrong, expected in (
        ({"burn_in": 0, "growing": True}, "burn_in is 0; expected a number of at least 1"),
        ({"burn_in": -1}, "burn_in is -1; expected a number of at least 0"),
        ({"burn_in": 5, "window": 0}, "window is 0; expected a number of at least 1"),
    ):
        with pytest.raises(ValueError, match=expected):
            cross_iteration_window(1, **wrong)


def test_numbers_are_checked():
    y, state = jnp.ones((4, 3)), init((2, 3))
    for name, value in (("rho", 1.5), ("rho", -0.1), ("window", -1)):
        options = {"inputs": jnp.ones((4, 2)), "kernel": jnp.ones((2, 3)), name: value}
        with pytest.raises(ValueError, match=f"{name} is {value}; expected a number"):
            cross_iteration_norm().apply(y, state, train=True, **options)
    for value in (1.5, -0.1):
        with pytest.raises(ValueError, match=f"rho is {value}; expected a number"):
            cross_iteration_norm(rho=value)


def test_schedule_in_a_scan_traces_once():
    layer, shape, inputs, _ = LAYERS["grouped"]
    traces = []

    @jax.jit
    def run(state, x, w, rho):
        traces.append(1)

        def body(state, t):
            window = cross_iteration_window(t, burn_in=2)
            y = layer(x, w)
            z, state = cross_iteration_norm().apply(
                y, state, train=True, inputs=x, kernel=w, layer=layer, window=window, rho=rho
            )
            return state, z

        return lax.scan(body, state, jnp.arange(4))

    x, w = batches(inputs)[0].astype(jnp.float32), kernels(shape)[0].astype(jnp.float32)
    state = init(shape, feature_group_count=2)
    new, z = run(state, x, w, 0.0)
    run(state, x, w, 1.0)
    assert len(traces) == 1 and jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
    np.testing.assert_allclose(z[0], z[3], atol=1e-4)  # the same batch again


def test_half_precision():
    layer, shape, inputs, _ = LAYERS["grouped"]
    x, w = batches(inputs)[0].astype(jnp.bfloat16), kernels(shape)[0].astype(jnp.bfloat16)
    y, state = layer(x, w), init(shape, feature_group_count=2)
    run = jax.jit(partial(cross_iteration_norm().apply, train=True, layer=layer))
    z, state = run(y, state, inputs=x, kernel=w)
    assert z.dtype == jnp.bfloat16 and all(t.dtype == jnp.float32 for t in state.values())
    y, x, w = (t.astype(jnp.float32) for t in (y, x, w))
    _, exact = run(y, init(shape, feature_group_count=2), inputs=x, kernel=w)
    np.testing.assert_allclose(state["past_slope"][0], exact["past_slope"][0], atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_channels_first_vmap_and_forward_mode():
    layer, shape, inputs, _ = LAYERS["grouped"]
    first = partial(lax.conv_general_dilated, **GROUPED, dimension_numbers=("NCHW", "HWIO", "NCHW"))
    xs, ws = batches(inputs), kernels(shape)
    state = after("grouped", xs[:-1], ws[:-1])
    x, w = xs[-1], ws[-1]
    z, new = step("grouped", state, x, w)
    t = jnp.moveaxis(x, -1, 1)
    run = jax.jit(partial(cross_iteration_norm().apply, train=True, layer=first, channel_axis=1))
    z_first, new_first = run(first(t, w), state, inputs=t, kernel=w)
    np.testing.assert_allclose(jnp.moveaxis(z_first, 1, -1), z, atol=1e-12)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-12), new_first, new)

    many = jax.vmap(lambda x, w: step("grouped", state, x, w))(jnp.stack(xs), jnp.stack(ws))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b, atol=1e-12), many, (z, new))

    def loss(w):
        return jnp.sin(step("grouped", state, x, w)[0] * jnp.arange(6.0).reshape(1, 1, 1, 6)).sum()

    forward, gradient = jax.jit(lambda w: (jax.jvp(loss, (w,), (ws[0],))[1], jax.grad(loss)(w)))(w)
    np.testing.assert_allclose(forward, (gradient * ws[0]).sum(), rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_devices_equal_one(check_vma):
    layer, shape, _, _ = LAYERS["grouped"]
    xs, ws = batches((8, 5, 6, 4)), kernels(shape)
    state = after("grouped", xs[:-1], ws[:-1])
    mask = jnp.arange(8.0).reshape(8, 1, 1, 1) != 3
    mesh = Mesh(np.array(jax.devices()), ("data",))
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))

    def f(x, w, state, mask):
        synced = [
            step("grouped", state, x, w, axis_name="data", **options)
            for options in ({}, {"weights": mask})
        ]
        halves, _ = step("grouped", state, x, w, axis_name="data", axis_index_groups=groups)
        # without an axis, each device's own, also of what it remembers
        _, local = step("grouped", state, x, w)
        return ([z for z, _ in synced], halves, jax.tree.map(lambda t: t[None], local)), [
            new for _, new in synced
        ]

    specs = {
        "in_specs": (P("data"), P(), P(), P("data")),
        "out_specs": (P("data"), P()),
        "check_vma": check_vma,
    }
    (zs, halves, local), news = jax.jit(jax.shard_map(f, mesh=mesh, **specs))(
        xs[-1], ws[-1], state, mask
    )
    same = partial(jax.tree.map, partial(np.testing.assert_allclose, atol=1e-11))
    for z, new, options in zip(zs, news, ({}, {"weights": mask}), strict=True):
        same((z, new), step("grouped", state, xs[-1], ws[-1], **options))
    same(
        halves,
        jnp.concatenate([step("grouped", state, x, ws[-1])[0] for x in (xs[-1][:4], xs[-1][4:])]),
    )
    same({name: t[5] for name, t in local.items()}, step("grouped", state, xs[-1][5:6], ws[-1])[1])


@pytest.mark.usefixtures("x64")
def test_bad_batches_leave_the_state():
    layer, shape, inputs, _ = LAYERS["grouped"]
    x, w = batches(inputs)[0], kernels(shape)[0]
    _, state = step("grouped", first_state("grouped"), x, w)
    _, new = step("grouped", state, x.at[0].set(jnp.nan), w)
    jax.tree.map(np.testing.assert_array_equal, new, state)
    z, new = step("grouped", state, x, w, weights=jnp.zeros((3, 1, 1, 1)))
    jax.tree.map(np.testing.assert_array_equal, new, state)
    assert np.isfinite(z).all()


def test_errors():
    x, w = jnp.ones((4, 5)), jnp.ones((5, 6))
    state, method = init((5, 6)), cross_iteration_norm()

    def call(y=x @ w, state=state, **options):
        return method.apply(y, state, **{"train": True, "inputs": x, "kernel": w} | options)

    for options in ({"kernel": w[:3]}, {"inputs": x[:, :3]}, {"y": x}):
        with pytest.raises(
            ValueError, match="Expected the shape of the kernel in front, .* groups that"
        ):
            call(**options)
    for state_of_other in (init((6, 5)), init((5, 6), 5), {"mean": state["mean"]}):
        with pytest.raises(ValueError, match=r"own state, .*past_slope of shape \(3, 5, 6\)"):
            call(state=state_of_other)
    with pytest.raises(ValueError, match="differ between the channels"):
        call(weights=jnp.ones((4, 6)))
    with pytest.raises(TypeError, match="defined for real x"):
        call(y=(x @ w).astype(jnp.complex64))
    with pytest.raises(TypeError, match="cross_iteration_norm needs inputs, kernel"):
        method.apply(x @ w, state, train=True)
    with pytest.raises(ValueError, match="window is 0; expected an integer of at least 1"):
        cross_iteration_norm(window=0)
    for options in (
        {"kernel_shape": (6,)},
        {"kernel_shape": (5, 6), "feature_group_count": 4},
        {},
    ):
        with pytest.raises(
            ValueError, match="Expected the shape of the kernel in front, .* groups that divide C"
        ):
            method.init((4, 6), **options)
    with pytest.raises(ValueError, match="without a bias"):
        linen.Norm(method, layer=nn.Dense(3)).init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(ValueError, match="without a bias"):
        layer = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        jnnx.Norm(3, method, layer=layer, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", [pytest.param("conv", marks=pytest.mark.slow), "dense"])
def test_layers_equal_the_function(kind):
    rngs = nnx.Rngs(0)
    if kind == "conv":
        options = {
            "strides": 2,
            "kernel_dilation": 1,
            "feature_group_count": 2,
            "padding": "CIRCULAR",
            "use_bias": False,
        }
        front, front_nnx = (
            nn.Conv(6, (3, 3), **options),
            nnx.Conv(4, 6, (3, 3), **options, rngs=rngs),
        )
        xs = [x.astype(jnp.float32) for x in batches((4, 6, 6, 4))]
    else:
        front, front_nnx = nn.Dense(6, use_bias=False), nnx.Linear(4, 6, use_bias=False, rngs=rngs)
        xs = [x.astype(jnp.float32) for x in batches((4, 3, 4))]
    method = cross_iteration_norm(window=2)
    layer, other = (
        linen.Norm(method, layer=front),
        jnnx.Norm(6, method, layer=front_nnx, rngs=rngs),
    )
    variables = jax.jit(partial(layer.init, use_running_average=False))(jax.random.key(0), xs[0])
    kernel = variables["params"]["layer"]["kernel"]
    assert variables["params"].keys() == {"layer", "scale", "bias"}
    groups = 2 if kind == "conv" else 1
    state = init(kernel.shape, window=2, feature_group_count=groups)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], state)
    other.layer.kernel[...] = kernel

    def plain(x, kernel):
        return front.clone(features=kernel.shape[-1]).apply({"params": {"kernel": kernel}}, x)

    @jax.jit
    def train(variables, x):
        def loss(params):
            y, updates = layer.apply(
                variables | {"params": params}, x, use_running_average=False, mutable="batch_stats"
            )
            return jnp.sin(y).sum(), (y, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    function = jax.jit(partial(method.apply, train=True, layer=plain))
    train_nnx = nnx.jit(nnx.value_and_grad(lambda model, x: jnp.sin(model(x)).sum()))
    for x in xs:
        gradients, (y, updates) = train(variables, x)
        kernel = variables["params"]["layer"]["kernel"]
        options = {
            "inputs": x,
            "kernel": kernel,
            "scale": variables["params"]["scale"],
            "bias": variables["params"]["bias"],
        }
        expected, state = function(plain(x, kernel), state, **options)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        loss, gradients_nnx = train_nnx(other, x)
        np.testing.assert_allclose(loss, jnp.sin(y).sum(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            gradients["layer"]["kernel"], gradients_nnx["layer"]["kernel"][...], atol=2e-5
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        variables = {"params": params, **updates}
        other.layer.kernel[...], other.scale[...], other.bias[...] = kernel_, scale_, bias_ = (
            params["layer"]["kernel"],
            params["scale"],
            params["bias"],
        )
        for name, value in state.items():
            np.testing.assert_allclose(updates["batch_stats"][name], value, atol=1e-5)
            np.testing.assert_allclose(getattr(other, name)[...], value, atol=1e-5)
    y = jax.jit(partial(layer.apply, use_running_average=True))(variables, xs[0])
    np.testing.assert_allclose(other(xs[0], use_running_average=True), y, atol=1e-5)
    m = variables["batch_stats"]
    expected = normalized(plain(xs[0], kernel_), m["mean"], m["var"]) * np.asarray(
        scale_
    ) + np.asarray(bias_)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@pytest.mark.usefixtures("x64")
def test_state_is_float32():
    assert {t.dtype for t in init((3, 3, 2, 4)).values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("dtype", "forward", "step"), [("float32", 3.1, 3.1), ("bfloat16", 9.1, 8.2)]
)
@pytest.mark.parametrize("size", [1, 3])
def test_temporaries_and_products(dtype, forward, step, size):
    """Bytes over those of y: little more than the derivative by the kernel alone, which is 2, with
    y itself. In bfloat16 XLA:CPU convolves float32 copies."""
    x = jax.ShapeDtypeStruct((32, 28, 28, 128), dtype)
    w = jax.ShapeDtypeStruct((size, size, 128, 128), dtype)
    layer = partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC
    )

    def train(x, w, state):
        y, front = cross_iteration_norm().in_front(x, w, layer)
        return cross_iteration_norm().apply(y, state, train=True, **front)

    def train_step(x, w, state, dz):
        z, back, state = jax.vjp(lambda x, w: train(x, w, state), x, w, has_aux=True)
        return z, state, back(dz)

    state = jax.eval_shape(lambda: init(w.shape))
    programs = (
        jax.jit(train).lower(x, w, state).compile(),
        jax.jit(train_step).lower(x, w, state, x).compile(),
    )
    for program, bound in zip(programs, (forward, step), strict=True):
        temporary = program.memory_analysis().temp_size_in_bytes
        assert temporary <= bound * x.size * x.dtype.itemsize
    # The layer, the derivatives of variance and mean by its kernel, and two small ones.
    products = re.findall(r" (?:convolution|dot)\(", programs[0].as_text())
    assert 3 <= len(products) <= 5
