"""Running statistics: averages, counts, ghost batches, and what leaves them untouched."""

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
    methods,
    moments,
    norm,
    normalize,
    running_moments,
    running_shape,
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
        (methods.batch_group_norm(12, (8, 4, 5, 6)), (8, 4, 5, 6), (2, 6), (1, 2, 1, 6)),
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
    """Nothing in the update stops the gradient: who normalizes with it gets (1 - momentum) of
    it."""
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
    groups = methods.batch_group_norm(12, (8, 4, 4, 6))
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
    with pytest.raises(ValueError, match=r"needs a count.*init_running\(counted=True\)"):
        update_cumulative(init_running((6,)), moments(jnp.ones((2, 6)), BN))
