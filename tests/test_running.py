"""Running statistics: averages, counts, ghost batches, and what leaves them untouched."""

import contextlib
import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxnorm import (
    EACH,
    Groups,
    Moments,
    init_running,
    merge,
    methods,
    moments,
    norm,
    normalize,
    pool,
    running_moments,
    running_shape,
    update_averaged,
    update_cumulative,
    update_running,
)

BN = methods.batch_norm()
close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12))


def batches(sizes=(8, 8, 8), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 3, 6)) * (i + 1) + i for i, n in enumerate(sizes)]


def of(x):
    """Mean and biased variance of each channel."""
    return x.mean((0, 1)), x.var((0, 1))


@pytest.mark.parametrize(
    "groups, shape, state, statistic",
    [
        (BN, (8, 4, 5, 6), (6,), (1, 1, 1, 6)),
        (methods.ghost_batch_norm(3), (8, 4, 5, 6), (6,), (1, 1, 1, 6)),
        (methods.ghost_batch_norm(ghost_size=16), (1, 6), (6,), (1, 6)),
        (methods.batch_group_norm(3), (8, 4, 5, 6), (3,), (1, 1, 1, 3)),
        (methods.batch_group_norm(1), (8, 4, 5, 6), (1,), (1, 1, 1, 1)),
        (Groups(1, (2, 1), EACH), (8, 4, 5, 6), (2, 6), (1, 2, 1, 6)),
        (Groups(1, EACH, EACH), (8, 4, 5, 6), (4, 5, 6), (1, 4, 5, 6)),
        (Groups(1, EACH, 1), (8, 1, 5, 6), (5, 1), (1, 1, 5, 1)),
    ],
    ids=str,
)
def test_shape_of_state(groups, shape, state, statistic):
    """The batch axis and spatial axes of 1 are dropped, the channels stay; the batch number does
    not matter."""
    assert running_shape(groups, shape) == (state, statistic)
    assert running_moments(init_running(state), groups, shape).mean.shape == statistic


def test_shape_of_state_channels_first():
    assert running_shape(Groups(1, (1, EACH), 3), (8, 6, 4, 5), channel_axis=1) == (
        (3, 5),
        (1, 3, 1, 5),
    )
    assert running_shape(BN, (4, 6, 8), batch_axis=2, channel_axis=0) == ((4,), (4, 1, 1))


@pytest.mark.usefixtures("x64")
def test_exponential_average_in_flax_convention():
    """Momentum is the weight of the old value, from mean 0 and variance 1."""
    state, mean, var = init_running((6,), dtype="f8"), np.zeros(6), np.ones(6)
    assert state.count is None and len(jax.tree.leaves(state)) == 2
    for x in batches():
        state = update_running(state, moments(x, BN), momentum=0.7)
        mean, var = 0.7 * mean + 0.3 * of(x)[0], 0.7 * var + 0.3 * of(x)[1]
        close((state.mean, state.var), (mean, var))
    defaults = update_running(init_running((6,), dtype="f8"), moments(x, BN))
    close(defaults.mean, 0.01 * of(x)[0])


@pytest.mark.usefixtures("x64")
def test_counted_average_forgets_where_it_began():
    """sum of weights times values, over the sum of weights: the first batch is the state after one
    step."""
    state = init_running((6,), dtype="f8", counted=True)
    xs = batches()
    for k, x in enumerate(xs, start=1):
        state = update_running(state, moments(x, BN), momentum=0.7)
        weights = 0.3 * 0.7 ** np.arange(k)[::-1]
        mean, var = (
            sum(w * of(t)[i] for w, t in zip(weights, xs, strict=False)) / weights.sum()
            for i in (0, 1)
        )
        close((state.count, state.mean, state.var), (np.full(6, weights.sum()), mean, var))


@pytest.mark.usefixtures("x64")
def test_cumulative_average_is_that_of_all_data():
    """Unequal batches, one of them empty."""
    state = init_running((6,), dtype="f8", counted=True)
    xs = batches((8, 0, 3, 5))
    for x in xs:
        state = update_cumulative(state, moments(x, BN))
    everything = np.concatenate(xs)
    close((state.count, state.mean, state.var), (np.full(6, 48.0), *of(everything)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("update", (update_running, update_cumulative))
@pytest.mark.parametrize("counted", (False, True))
def test_ghosts_are_pooled(update, counted):
    """The state is plain batch normalization's whatever the ghost size."""
    if update is update_cumulative and not counted:
        return
    x = batches()[2]
    want = update(init_running((6,), dtype="f8", counted=counted), moments(x, BN))
    for ghosts in (1, 2, 4, 8):
        m = moments(x, methods.ghost_batch_norm(ghosts))
        assert m.mean.shape == (ghosts, 1, 6)
        close(update(init_running((6,), dtype="f8", counted=counted), m), want)


@pytest.mark.usefixtures("x64")
def test_ghosts_are_pooled_on_any_batch_axis():
    x = batches()[2].transpose(2, 1, 0)
    m = moments(x, methods.ghost_batch_norm(4), batch_axis=2, channel_axis=0)
    state = update_running(init_running((6,), dtype="f8"), m, momentum=0.0, batch_axis=2)
    close((state.mean, state.var), (x.mean((1, 2)), x.var((1, 2))))


@pytest.mark.usefixtures("x64")
def test_state_of_several_axes():
    x = batches()[1]
    state = update_running(
        init_running((3, 6), dtype="f8"), moments(x, Groups(1, EACH, EACH)), momentum=0.0
    )
    close((state.mean, state.var), (x.mean(0), x.var(0)))
    groups = Groups(1, EACH, EACH)
    y = normalize(x, running_moments(state, groups, x.shape))
    close(y, norm(x, groups)[0])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "complex64"))
@pytest.mark.parametrize("counted", (False, True))
@pytest.mark.parametrize("update", (update_running, update_cumulative))
def test_state_is_a_fixed_point_of_the_update(update, counted, dtype):
    """Same shapes and dtypes, so that it is the carry of a scan."""
    if update is update_cumulative and not counted:
        return
    x = jnp.asarray(np.stack(batches())).astype("complex64" if dtype == "complex64" else "float32")
    start = init_running((6,), dtype=dtype, counted=counted)
    half = pytest.warns(UserWarning, match="bfloat16.*in float32")
    with half if dtype == "bfloat16" else contextlib.nullcontext():
        state, _ = jax.jit(
            lambda s, xs: jax.lax.scan(lambda s, x: (update(s, moments(x, BN)), None), s, xs)
        )(start, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    assert state.mean.dtype == dtype


@pytest.mark.parametrize("kind", ("empty", "nan", "inf", "1e30"))
@pytest.mark.parametrize("counted", (False, True))
def test_unusable_sets_leave_the_state(counted, kind):
    """Channel by channel: what is empty or not finite stays to the bit, what is usable moves. 1e30
    has no finite square."""
    x = jnp.asarray(batches()[0], "f4")
    weights = jnp.ones((1, 1, 6)).at[..., 2].set(0) if kind == "empty" else None
    if kind != "empty":
        x = x.at[0, 0, 2].set(float(kind))
    m = moments(x, BN, weights=weights)
    for update in (update_running, update_cumulative)[: 1 + counted]:
        state = update(
            init_running((6,), counted=counted), moments(jnp.asarray(batches()[1], "f4"), BN)
        )
        new = jax.jit(update)(state, m)
        for old, now in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
            assert now[2] == old[2] and (np.delete(now, 2) != np.delete(old, 2)).all()
        nothing = jax.jit(update)(state, moments(x, BN, weights=jnp.zeros((1, 1, 1))))
        chex.assert_trees_all_equal(nothing, state)


@pytest.mark.usefixtures("x64")
def test_correction_is_the_unbiased_variance_of_torch():
    """n / (n - 1), with n the elements of the pooled set; one element stays finite."""
    x = batches()[0]
    for method in (BN, methods.ghost_batch_norm(4)):
        m = moments(x, method)
        state = update_running(init_running((6,), dtype="f8"), m, momentum=0.9, correction=1)
        close((state.mean, state.var), (0.1 * of(x)[0], 0.9 + 0.1 * x.var((0, 1), ddof=1)))
    w = np.arange(8.0).reshape(8, 1, 1)
    m = moments(x, BN, weights=w)
    n = w.sum() * 3
    corrected = update_running(init_running((6,), dtype="f8"), m, momentum=0.0, correction=1)
    close(corrected.var, m.var[0, 0] * n / (n - 1))
    one = update_running(
        init_running((6,), dtype="f8"), moments(x[:1, :1], BN), momentum=0.5, correction=1
    )
    close(one.var, np.full(6, 0.5))


def test_constant_stream_is_approached_geometrically():
    m = Moments(jnp.ones((1, 6)), jnp.full((1, 6), 8.0), jnp.full((1, 6), 3.0))
    state = init_running((6,))
    for _ in range(4):
        state = update_running(state, m, momentum=0.5)
    np.testing.assert_allclose(state.mean, 8 * (1 - 1 / 16), rtol=1e-6)
    np.testing.assert_allclose(state.var, 3 - 2 / 16, rtol=1e-6)


def test_momentum_is_data():
    """A schedule does not retrace."""

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state, m, momentum):
        return update_running(state, m, momentum=momentum)

    state, m = init_running((6,)), moments(jnp.asarray(batches()[0], "f4"), BN)
    for momentum in (0.9, 0.5, 0.0):
        new = update(state, m, momentum)
        np.testing.assert_allclose(new.mean, (1 - momentum) * m.mean[0, 0], rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradient_of_an_update_used_at_once():
    """The update does not stop the gradient: normalizing with it passes on (1 - momentum) of it."""
    x, gy = batches()[0], batches(seed=1)[0]
    sets = oracle.set_numbers(x.shape, lambda n, p, c, *_: (c,))

    def f(x):
        return update_running(init_running((6,), dtype="f8"), moments(x, BN), momentum=0.75).mean

    np.testing.assert_allclose(
        jax.vjp(f, x)[1](gy[0, 0])[0], 0.25 * oracle.normalized(x, sets, gy=0 * gy, gm=gy[0, 0]).dx
    )


def test_complex_moments_need_a_complex_state():
    m = moments(jnp.ones((8, 6), "complex64"), BN)
    for update in (update_running, update_cumulative):
        with pytest.raises(
            TypeError,
            match=(
                r"mean is complex.*running mean float32.*init_running\(shape, dtype=jnp.complex64\)"
            ),
        ):
            update(init_running((6,), counted=True), m)


def test_state_of_another_size_is_refused():
    groups = Groups(1, (2, 1), EACH)
    state = init_running(running_shape(groups, (8, 4, 4, 6))[0])
    assert running_moments(state, groups, (1, 4, 9, 6)).mean.shape == (1, 2, 1, 6)
    whole = Groups(1, EACH, EACH)
    with pytest.raises(
        ValueError,
        match=r"shape \(4, 4, 6\) do not fit x of shape \(2, 8, 8, 6\).*\(1, 8, 8, 6\).*image size",
    ):
        running_moments(init_running((4, 4, 6)), whole, (2, 8, 8, 6))
    with pytest.raises(ValueError, match=r"shape \(6,\) do not fit x of shape \(2, 8\).*\(1, 8\)"):
        running_moments(init_running((6,)), BN, (2, 8))
    with pytest.raises(
        ValueError, match=r"moments of shape \(1, 8\) do not fit running statistics of shape \(6,\)"
    ):
        update_running(init_running((6,)), moments(jnp.ones((2, 8)), BN))
    with pytest.raises(ValueError, match=r"needs a count.*init_running\(shape, counted=True\)"):
        update_cumulative(init_running((6,)), moments(jnp.ones((2, 6)), BN))


def stream(steps, mean, ghosts=1):
    """Means and variances of batches of 64 with standard deviation 1, as float32."""
    rng = np.random.default_rng(0)
    shape = (steps, ghosts, 1)
    means = mean + rng.normal(size=shape) / 8
    return means.astype("f4"), rng.chisquare(63, shape).astype("f4") / np.float32(64)


def after(update, state, means, variances, every=False):
    """The state after these batches, or after each of them."""

    def step(state, t):
        new = update(state, Moments(jnp.full(t[0].shape, 64.0), *t))
        return new, new if every else None

    run = jax.jit(lambda state, t: jax.lax.scan(step, state, t))
    return jax.tree.map(np.float64, run(state, (means, variances))[int(every)])


@pytest.mark.parametrize("mean", (1.0, 1e4))
def test_long_cumulative_averages_do_not_drift(mean):
    """10^5 batches: the mean moves by its last digits, which must not enter the variance."""
    means, variances = stream(100_000, mean)
    m, v = (t.astype("f8")[:, 0, 0] for t in (means, variances))
    digit = np.spacing(np.float32(mean))
    for update, expected in (
        (update_cumulative, v.mean() + m.var()),
        (update_averaged, v.mean() * 64 / 63),
    ):
        state = after(update, init_running((1,), counted=True), means, variances)
        np.testing.assert_allclose(state.mean, m.mean(), rtol=0, atol=20 * digit)
        np.testing.assert_allclose(state.var, expected, rtol=1e-5 if mean == 1 else 1e-4)


def test_long_merges_do_not_drift():
    """Neither does pooling one by one, nor pooling at once."""
    means, variances = stream(20_000, 1e4)
    m, v = (t.astype("f8")[:, 0, 0] for t in (means, variances))
    start = Moments(*jnp.zeros((3, 1, 1)))
    state = after(merge, start, means, variances)
    np.testing.assert_allclose(state.mean, m.mean(), rtol=0, atol=0.02)
    np.testing.assert_allclose(state.var, v.mean() + m.var(), rtol=1e-4)


@pytest.mark.parametrize("parts", (2, 3, 7, 100))
def test_pooled_variances_are_exact_at_large_means(parts):
    """What the rounding of the mean lacks does not count as variance; equal sets have none."""
    means, variances = (t[:, 0] for t in stream(parts, 1e6))
    m, v = means.astype("f8"), variances.astype("f8")
    pooled = jax.jit(lambda *t: pool(Moments(*t), (1, 1)))
    counts = np.random.default_rng(1).uniform(1, 9, (parts, 1)).astype("f4")
    got, w = pooled(counts, means, variances), counts.astype("f8") / counts.astype("f8").sum()
    center = (w * m).sum()
    np.testing.assert_allclose(got.mean, [[center]], rtol=6e-8)
    np.testing.assert_allclose(got.var, [[(w * (v + (m - center) ** 2)).sum()]], rtol=1e-6)
    equal = pooled(counts, np.full_like(means, 123456.7), np.zeros_like(variances))
    assert (equal.mean == np.float32(123456.7)).all() and (equal.var <= 1e-9).all()
    assert (equal.var >= 0).all()


@pytest.mark.usefixtures("x64")
def test_gradient_of_pooling_is_the_definitions():
    """Whatever the value is about which sums are taken."""
    rng = np.random.default_rng(0)
    n, m, v = rng.uniform(1, 3, (4, 1)), rng.normal(5, 1, (4, 1)), rng.uniform(1, 2, (4, 1))

    def definition(n, m, v):
        mean = (n * m).sum() / n.sum()
        return mean**2 + 3 * (n * (v + (m - mean) ** 2)).sum() / n.sum()

    def pooled(n, m, v):
        new = pool(Moments(n, m, v), (1, 1))
        return (new.mean**2 + 3 * new.var).sum()

    for transform in (jax.grad, lambda f, args: jax.jacfwd(f, args)):
        close(transform(pooled, (0, 1, 2))(n, m, v), jax.grad(definition, (0, 1, 2))(n, m, v))


@pytest.mark.parametrize("counted", (False, True))
@pytest.mark.parametrize("convention", ("pooled", "averaged", "sequential", "sequential divided"))
def test_averages_of_large_means_are_not_biased(convention, counted):
    """Against the recurrence in double precision: the two weights, rounded, must not count."""
    ghosts, rate = 3, 0.01
    means, variances = stream(6000, 1e4, ghosts)
    update = partial(update_running, momentum=1 - rate, ghost_update=convention)
    state = after(update, init_running((1,), counted=counted), means, variances, every=True)
    mean, var, weight, expected = 0.0, 1.0, 0.0, []
    for m, v in zip(means.astype("f8")[..., 0], variances.astype("f8")[..., 0], strict=True):
        if convention == "pooled":
            batches = [(m.mean(), v.mean() + m.var(), rate)]
        elif convention == "averaged":
            batches = [(m.mean(), v.mean(), rate)]
        else:
            share = rate / (ghosts if "divided" in convention else 1)
            batches = [(*t, share) for t in zip(m, v, strict=True)]
        for one_mean, one_var, r in batches:
            weight += r * (1 - weight)
            r = r / weight if counted else r
            mean, var = mean + r * (one_mean - mean), var + r * (one_var - var)
        expected.append((mean, var))
    wanted = np.array(expected)
    error = np.array([state.mean[:, 0], state.var[:, 0]]).T - wanted
    assert abs(error[3000:, 0].mean()) < 2.5e-3  # standard deviations; it was 0.04
    assert abs(error[3000:, 0]).max() < 1.2e-2
    np.testing.assert_allclose(error[:, 1], 0, atol=1e-5)


@pytest.mark.parametrize("counted", (False, True))
def test_momentum_of_0_and_1(counted):
    """The batch to the bit, and the state to the bit, however far they are apart."""
    m = Moments(jnp.ones(2), jnp.array([1.2345678, -3.3e8]), jnp.array([0.1, 7e5]))
    count = jnp.ones(2) if counted else None
    old = Moments(count, jnp.array([1e8, 1.7]), jnp.array([3e7, 0.3]))
    new, same = (update_running(old, m, momentum=momentum) for momentum in (0.0, 1.0))
    chex.assert_trees_all_equal((new.mean, new.var), (m.mean, m.var))
    chex.assert_trees_all_equal(same, old)
    first = update_running(init_running((2,), counted=True), m, momentum=0.9)
    chex.assert_trees_all_equal((first.mean, first.var), (m.mean, m.var))


@pytest.mark.parametrize("update", (update_running, update_cumulative, update_averaged))
def test_what_is_stored_is_finite(update):
    """A batch that overflows the dtype of the state leaves it, mean and variance alike."""
    m = Moments(jnp.ones(3), jnp.array([7e4, 1.0, 1.0]), jnp.array([1.0, 7e4, 2.0]))
    old = init_running((3,), dtype="float16", counted=True)
    with pytest.warns(UserWarning, match="float16"):
        new = update(old, m)
    for t, was in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert (t[:2] == was[:2]).all() and t.dtype == was.dtype
    assert new.mean[2] == 1


def test_averages_in_half_precision_warn():
    """Where they would stop far from where they go, and only there."""
    m = Moments(jnp.ones(1), jnp.zeros(1), jnp.full(1, 1.15))
    narrow = init_running((1,), dtype="bfloat16", counted=True)
    message = "bfloat16: a step below 0.4% of their value is lost, so an average.* in float32"
    for call in (
        lambda: update_running(narrow, m),
        lambda: jax.jit(lambda d: update_running(narrow, m, momentum=d))(0.5),
        lambda: jax.eval_shape(update_cumulative, narrow, m),
        lambda: update_averaged(narrow, m),
    ):
        with pytest.warns(UserWarning, match=message.replace("an average", "an? ")):
            call()
    for momentum in (0.0, 0.5, 1.0):
        update_running(narrow, m, momentum=momentum)
    state = init_running((1,))
    for _ in range(1000):
        state = update_running(state, m)
    np.testing.assert_allclose(state.var, 1.15, rtol=1e-4)


def test_correction_counts_elements_and_never_shrinks():
    """Weights that add up to less than one element leave the biased variance; the factor is
    continuous."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)), "f4")
    for weight, factor in (
        (1e-3, 1.0),
        (1 / 64, 1.0),
        (1.5 / 64, 1.5),
        (2 / 64, 2.0),
        (1, 64 / 63),
    ):
        m = moments(x, BN, weights=jnp.full((64, 1), weight))
        state = update_running(init_running((1,)), m, momentum=0.0, correction=1)
        np.testing.assert_allclose(state.var, factor * np.var(x), rtol=1e-5)


WRONG = (-1, 2, np.nan, None, np.full(6, 0.5), np.ones(1), True, "0.9", 0.5j)


@pytest.mark.parametrize("momentum", WRONG, ids=str)
def test_momentum_that_is_no_weight_is_refused(momentum):
    m = moments(jnp.ones((2, 6)), BN)
    with pytest.raises(
        (TypeError, ValueError), match="momentum .*expected a number of at least 0 and of at most 1"
    ):
        update_running(init_running((6,)), m, momentum=momentum)


def test_traced_momentum_never_destroys_the_state():
    """Beyond 0 and 1 it is clipped, and NaN leaves the state; a shape is known when traced."""
    x = jnp.asarray(batches()[0], "f4")
    old, m = update_running(init_running((6,), counted=True), moments(x, BN)), moments(2 * x, BN)
    update = jax.jit(lambda momentum: update_running(old, m, momentum=momentum))
    for wrong, right in ((-1.0, 0.0), (2.0, 1.0), (np.inf, 1.0)):
        chex.assert_trees_all_equal(update(wrong), update(right))
    chex.assert_trees_all_equal(update(np.nan), old)
    for convention in ("averaged", "sequential", "sequential divided"):
        ghosts = moments(x, methods.ghost_batch_norm(2))
        options = {"ghost_update": convention}
        new = jax.jit(lambda d, o=options, g=ghosts: update_running(old, g, momentum=d, **o))(
            np.nan
        )
        chex.assert_trees_all_equal(new, old)
    with pytest.raises(ValueError, match=r"momentum has shape \(6,\)"):
        update(jnp.full(6, 0.5))


@pytest.mark.parametrize("convention", ("pooled", "averaged", "sequential", "sequential divided"))
def test_equal_ghosts_are_one_of_them(convention):
    """To the bit: weights whose sum, rounded, is not 1 do not move the mean."""
    state = Moments(None, jnp.zeros(1), jnp.ones(1))

    @partial(jax.jit, static_argnums=0)
    def new(ghosts, mean):
        m = Moments(*(jnp.full((ghosts, 1), t) for t in (64.0, mean, 1.0)))
        near = dataclasses.replace(state, mean=mean[None])
        return update_running(near, m, momentum=0.9, ghost_update=convention).mean[0]

    for ghosts in (3, 7, 11, 13):
        for mean in np.array([1234.567, 123456.7, 1e4 / 3], "f4"):
            assert new(ghosts, mean) == mean
