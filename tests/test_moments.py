"""Statistics: weights, empty sets, precision, complex numbers, and laws of pooling and merging."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from jaxnorm import EACH, Groups, Moments, blend, merge, methods, moments, norm, pool

SHAPE = (4, 3, 6)
GROUP_NORM = (4, 1, 3)
SETS = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (n, c * 3 // C))
BATCH_SETS = oracle.set_numbers(SHAPE, lambda n, p, c, N, P, C: (c,))


def normal(shape=SHAPE, seed=0, dtype="f8"):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "c":
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


@partial(jax.jit, static_argnums=0)
def run(groups, x, w, gy, gm, gv, scale, bias, center=None):
    """Everything `norm` returns, and the pullback to x, weights, scale and bias; groups is
    (statistic's shape, mean)."""
    shape, mean = groups

    def f(x, w, scale, bias):
        y, m = norm(x, shape, scale=scale, bias=bias, weights=w, mean=mean, center=center)
        return (y, m.mean, m.var), m

    # a boolean mask has no derivative
    args = (x, w, scale, bias) if w is not None and w.dtype != bool else (x, scale, bias)
    (y, *_), pull, m = jax.vjp(
        f if len(args) == 4 else lambda x, *rest: f(x, w, *rest), *args, has_aux=True
    )
    return y, m, pull((gy, gm, gv))


def compare(groups, sets, x, w, *, mean=None, center=None, atol=1e-11, dw_at_zero=True):
    """`run` against the oracle, derivatives included."""
    gm, gv = normal(groups, 2), normal(groups, 3)
    gy, scale, bias = normal(x.shape, 1), normal(x.shape[-1:], 4), normal(x.shape[-1:], 5)
    if np.iscomplexobj(x):
        gy, gm = normal(x.shape, 1, "c16"), normal(groups, 2, "c16")
    y, m, grads = run((groups, mean), x, w, gy, gm, gv, scale, bias, center)
    spread = [oracle.at_elements(t, x.shape) for t in (gm, gv)]
    o = oracle.normalized(
        x, sets, weights=w, scale=scale, bias=bias, mean=mean, gy=gy, gm=spread[0], gv=spread[1]
    )
    np.testing.assert_allclose(y, o.y, atol=atol)
    for name in ("count", "mean", "var"):
        got = np.asarray(getattr(m, name))
        assert got.shape == groups
        np.testing.assert_allclose(
            oracle.at_elements(got, x.shape), getattr(o, name), atol=atol, err_msg=name
        )
    wanted = [o.dx, oracle.summed(o.dscale, -1).real, oracle.summed(o.dbias, -1).real]
    if len(grads) == 4:
        axes = [i for i in range(x.ndim) if np.shape(w)[i] != 1]
        wanted.insert(1, oracle.summed(o.dw, *axes).reshape(np.shape(w)))
    for i, (got, want) in enumerate(zip(grads, wanted, strict=True)):
        ignored = i == 1 and len(grads) == 4 and not dw_at_zero and (w == 0)
        np.testing.assert_allclose(np.where(ignored, 0, got), np.where(ignored, 0, want), atol=atol)
    return y, m, grads


def broadcasts(shape):
    """Every shape that broadcasts against `shape` with its rank."""
    return [
        tuple(n if i >> k & 1 else 1 for k, n in enumerate(shape)) for i in range(2 ** len(shape))
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ("mask", "weights"))
@pytest.mark.parametrize("shape", broadcasts(SHAPE), ids=str)
def test_weights_of_every_shape(shape, kind):
    w = np.random.default_rng(7).uniform(0.001, 0.02, shape)  # totals below 1
    if kind == "mask":
        w = np.random.default_rng(7).random(shape) < 0.6
        w[..., 0] = True
    compare(GROUP_NORM, SETS, normal(), w)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mean", (None, 0))
def test_weighted_batch_statistics(mean):
    w = np.random.default_rng(7).uniform(0, 1, SHAPE[:2] + (1,))
    compare((1, 1, 6), BATCH_SETS, normal(), w, mean=mean)


@pytest.mark.usefixtures("x64")
def test_weights_align_at_the_last_axis():
    w = np.random.default_rng(7).uniform(0, 1, SHAPE[1:])
    f = jax.jit(lambda x, w: moments(x, GROUP_NORM, weights=w))
    got, want = f(normal(), w), f(normal(), np.broadcast_to(w, SHAPE))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-14), got, want)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mean", (None, 0))
def test_nothing_under_a_zero_weight_touches_anything(mean):
    """NaN and infinity there give y = bias and no gradient; a finite x is normalized as usual."""
    x, w = normal(), np.ones(SHAPE)
    w[0, 1:], w[1] = 0, 0  # a set partly, and sets wholly without weight
    x[0, 1, :3], x[0, 2, 2], x[1, 0, 0] = np.nan, np.inf, -np.inf
    for weights in (w, w > 0):
        y, _, grads = compare(GROUP_NORM, SETS, x, weights, mean=mean, dw_at_zero=False)
        assert all(np.isfinite(t).all() for t in (y, *grads))
        hidden = ~np.isfinite(x)
        assert (np.asarray(y)[hidden] == np.broadcast_to(normal((6,), 5), SHAPE)[hidden]).all()
        assert (np.asarray(grads[0])[hidden] == 0).all()


@pytest.mark.usefixtures("x64")
def test_derivative_of_a_weight_at_zero():
    """An element of weight 0 has an influence: what the statistics would do if it counted."""
    x = normal((3, 2))
    w = np.array([[1.0], [1.0], [0.0]])
    compare((1, 2), oracle.set_numbers((3, 2), lambda n, p, c, *_: (c,)), x, w)


def test_infinite_elements_that_count_show():
    """Nothing is hidden: NaN that counts reaches its own set, and only that."""
    m = moments(jnp.array([[1.0, jnp.nan], [2.0, 3.0]]), (2, 1))
    assert np.isnan(m.mean[0, 0]) and m.mean[1, 0] == 2.5


def test_empty_sets_have_no_moments():
    x = jnp.full((2, 3, 4), jnp.nan)
    y, m = jax.jit(
        lambda x: norm(x, (2, 1, 2), weights=jnp.zeros((2, 1, 1)), bias=jnp.arange(4.0))
    )(x)
    assert all((t == 0).all() for t in jax.tree.leaves(m))
    assert (y == jnp.arange(4.0).reshape(1, 1, 4)).all()


@pytest.mark.parametrize("weights", (None, (0, 1, 1), (0, 3, 4), (1, 1, 4)))
def test_empty_batch(weights):
    x = jnp.zeros((0, 3, 4))
    w = None if weights is None else jnp.ones(weights)
    for groups, shape in ((methods.batch_norm(), (1, 1, 4)), (methods.group_norm(2), (0, 1, 2))):
        y, m = jax.jit(lambda x, w, groups=groups: norm(x, groups, weights=w))(x, w)
        assert y.shape == x.shape and m.var.shape == shape
        assert all((t == 0).all() for t in jax.tree.leaves(m))


@pytest.mark.parametrize("centered_by", (None, 1e4))
def test_one_value_a_set_gives_the_bias_exactly(centered_by):
    """For any value: x - mean must be 0 to the bit."""
    x = jnp.asarray(normal((64, 1, 8), dtype="f4")) * 10.0 ** jnp.arange(
        -20, 20, 5, dtype="f4"
    ).reshape(1, 1, 8)
    bias = jnp.arange(8.0)
    center = None if centered_by is None else jnp.full((64, 1, 8), centered_by)

    def f(x, scale):
        return norm(x, methods.instance_norm(), scale=scale, bias=bias, center=center)

    (y, m), pull = jax.vjp(jax.jit(f), x, jnp.full(8, 3.0))
    assert (y == jnp.broadcast_to(bias, y.shape)).all()
    assert (m.mean == x).all() and (m.var == 0).all() and (m.count == 1).all()
    dx, dscale = pull((jnp.ones_like(y), jax.tree.map(jnp.zeros_like, m)))
    # the two terms of dx, g / s and its mean, cancel up to rounding: g is 3, 1 / s is 316
    assert (jnp.abs(dx) <= 4 * jnp.finfo("f4").eps * 3 * 317).all() and (dscale == 0).all()


def test_one_value_a_set_with_the_mean_fixed_keeps_its_sign():
    y, m = norm(jnp.array([[2.0, -3.0]]), (1, 2), mean=0, epsilon=0.0)
    np.testing.assert_allclose(y, [[1.0, -1.0]], rtol=1e-6)
    assert (m.mean == 0).all() and m.var.tolist() == [[4.0, 9.0]]


def test_constant_and_zero_sets_are_finite():
    f = jax.jit(lambda x: norm(x, (4, 1, 3))[0])
    for value in (0.0, 7.0, 1e4):
        y, pull = jax.vjp(f, jnp.full(SHAPE, value))
        assert np.abs(y).max() <= 1e-6 * value / np.sqrt(1e-5)
        assert np.isfinite(pull(jnp.ones_like(y))[0]).all()


def test_values_whose_squares_overflow():
    """The squares of 1e20 are no float32; the variance about the mean is."""
    m = moments(jnp.full((8, 2), 1e20), (1, 2))
    np.testing.assert_allclose(m.mean, 1e20, rtol=1e-6)
    assert (m.var <= (1e20 * 1e-6) ** 2).all()


CENTERS = (0.0, 1e4, 1.0001e4, -1e4, np.nan, np.inf)


@pytest.mark.parametrize(
    "ratio, center",
    [(1e4, c) for c in (None, *CENTERS)] + [(1e3, None), (1e2, None), (1e3, 1.0)],
    ids=str,
)
def test_center_never_changes_the_result(ratio, center):
    """Large mean / std in float32. At 1e4 a difference of means of squares has no digit left, at
    100 it has three."""
    x = (normal((256, 4), dtype="f4") + np.float32(ratio)).astype("f4")
    gy = normal((256, 4), 1, dtype="f4")
    sets = oracle.set_numbers(x.shape, lambda n, p, c, *_: (c,))
    o = oracle.normalized(x, sets, gy=gy)
    c = None if center is None else jnp.full((1, 4), center, "f4")

    @jax.jit
    def f(x, gy):
        y, pull, m = jax.vjp(lambda x: norm(x, (1, 4), center=c), x, has_aux=True)
        return y, pull(gy)[0], m

    y, dx, m = f(x, gy)
    # an error eps |mu| of the mean is one of eps |mu| / sigma in y and in dx
    tolerance = 4 * float(np.finfo("f4").eps) * (np.sqrt(256) + ratio)
    np.testing.assert_allclose(m.mean[0], o.mean[0], rtol=1e-6)
    np.testing.assert_allclose(m.var[0], o.var[0], rtol=tolerance)
    np.testing.assert_allclose(y, o.y, atol=tolerance)
    np.testing.assert_allclose(dx, o.dx, atol=tolerance)


@pytest.mark.usefixtures("x64")
def test_center_has_no_gradient():
    x = normal()
    f = jax.jit(jax.grad(lambda c, x: jnp.sin(norm(x, GROUP_NORM, center=c)[0]).sum()))
    assert (f(normal(GROUP_NORM, 1), x) == 0).all()
    compare(GROUP_NORM, SETS, x, None, center=normal(GROUP_NORM, 1))
    # shared by the groups
    compare(GROUP_NORM, SETS, x, normal(SHAPE, 3) ** 2, center=normal((4, 1, 1), 1))


@pytest.mark.parametrize("dtype", ("bfloat16", "float16", "float32"))
def test_statistics_are_float32(dtype):
    """Half precision costs the rounding of x and of y, not of the sums."""
    x = jnp.asarray(normal((512, 4), dtype="f4") + np.float32(3)).astype(dtype)
    f = jax.jit(lambda x: norm(x, (1, 4), scale=jnp.ones(4, dtype)))
    (y, m), pull = jax.vjp(f, x)
    assert y.dtype == dtype and {t.dtype for t in jax.tree.leaves(m)} == {jnp.dtype("f4")}
    o = oracle.normalized(
        np.asarray(x, "f8"), oracle.set_numbers(x.shape, lambda n, p, c, *_: (c,))
    )
    np.testing.assert_allclose(m.mean[0], o.mean[0], rtol=1e-6)
    np.testing.assert_allclose(m.var[0], o.var[0], rtol=2e-5)
    half = float(jnp.finfo(dtype).eps) / 2 * np.abs(o.y).max()
    np.testing.assert_allclose(np.asarray(y, "f8"), o.y, rtol=0, atol=half + 3e-5)
    assert pull((y, m))[0].dtype == dtype


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weights", (False, True))
@pytest.mark.parametrize("mean", (None, 0))
def test_complex_numbers(mean, weights):
    w = np.random.default_rng(7).uniform(0, 1, SHAPE[:2] + (1,)) if weights else None
    _, m, _ = compare(GROUP_NORM, SETS, normal(dtype="c16"), w, mean=mean)
    assert m.var.dtype == m.count.dtype == "f8" and m.mean.dtype == "c16"


def test_complex_statistics_are_pooled_and_blended():
    @jax.jit
    def f(x):
        fine, whole = moments(x, Groups(EACH, 1, EACH)), moments(x, (1, 1, 6))
        return fine, whole, pool(fine, (1, 1, 6)), blend([whole, whole], [0.5, 0.5])

    fine, whole, pooled, blended = f(normal(dtype="c8"))
    assert (fine.mean.dtype, fine.var.dtype) == ("c8", "f4")
    close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6))
    close(pooled, whole)
    close((blended.mean, blended.var), (whole.mean, whole.var))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "coarse",
    ((4, 1, 3), (4, 1, 1), (1, 1, 6), (2, 1, 2), (1, 1, 1), Groups(1, 1, 3), methods.layer_norm()),
    ids=str,
)
def test_pooled_instance_moments_are_the_moments_of_the_method(coarse):
    """Including the derivative, and unequal counts."""
    w = np.random.default_rng(7).uniform(0, 1, SHAPE) * (np.arange(4) != 2).reshape(4, 1, 1)
    x, gm, gv = normal(), normal((), 1), normal((), 2)

    @partial(jax.jit, static_argnums=0)
    def both(pooled, x, w):
        def f(x, w):
            m = (
                pool(moments(x, methods.instance_norm(), weights=w), coarse)
                if pooled
                else moments(x, coarse, weights=w)
            )
            weight = jnp.arange(1.0, m.var.size + 1).reshape(m.var.shape)
            return (weight * (gm * m.mean + gv * m.var)).sum(), m

        (dx, dw), m = jax.grad(f, (0, 1), has_aux=True)(x, w)
        # an empty set has no mean for a first element to differ from
        return dx, jnp.where(w > 0, dw, 0), m

    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-12), both(True, x, w), both(False, x, w)
    )


def test_means_fixed_at_zero_stay_there_when_pooled():
    x = normal(dtype="f4")
    pooled = pool(moments(x, (4, 1, 6), mean=0), (4, 1, 1))
    np.testing.assert_allclose(pooled.var, (x**2).mean((1, 2), keepdims=True), rtol=1e-5)
    assert (pooled.mean == 0).all()


@pytest.mark.usefixtures("x64")
def test_moments_are_a_commutative_monoid():
    rng = np.random.default_rng(0)
    close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12))
    fused = jax.jit(merge)

    def draw():
        count = rng.integers(0, 5, (3, 2)) * rng.uniform(0, 1, (3, 2))  # empty sets among them
        return Moments(
            *(jnp.asarray(t) for t in (count, rng.normal(size=(3, 2)), rng.uniform(0, 2, (3, 2))))
        )

    nothing = jax.tree.map(jnp.zeros_like, draw())
    for _ in range(5):
        a, b, c = draw(), draw(), draw()
        a, b, c = (jax.tree.map(lambda t, m=m: jnp.where(m.count > 0, t, 0), m) for m in (a, b, c))
        close(fused(a, nothing), a)
        close(fused(nothing, a), a)
        close(fused(a, b), fused(b, a))
        close(fused(fused(a, b), c), fused(a, fused(b, c)))
        close(merge(a, b, c), fused(fused(a, b), c))
    close(merge(a), a)


@pytest.mark.usefixtures("x64")
def test_merged_micro_batches_are_the_batch():
    x = normal((7, 3, 6))

    @jax.jit
    def f(x):
        parts = [moments(t, (1, 1, 6)) for t in (x[:1], x[1:3], x[3:3], x[3:])]
        return merge(*parts), moments(x, (1, 1, 6))

    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-13), *f(x))


@pytest.mark.usefixtures("x64")
def test_blends_lack_the_variance_of_the_means():
    """The gap of two parts with weights a and 1 - a is a (1 - a) (mean - mean')^2."""
    one, two = (moments(normal((n, 6), n), (1, 6)) for n in (3, 9))
    a = 0.25  # their share of the elements
    union, average = merge(one, two), blend([one, two], [a, 1 - a])
    np.testing.assert_allclose(average.mean, union.mean, atol=1e-14)
    np.testing.assert_allclose(
        union.var - average.var, a * (1 - a) * (one.mean - two.mean) ** 2, atol=1e-14
    )
    assert (average.count == union.count).all()
    arrays = blend([one, two], [jnp.full((1, 6), a), jnp.array(1 - a)])
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-15), arrays, average)


@pytest.mark.parametrize("axis", (0, 1))
def test_large_sums_keep_their_digits(axis):
    """2^18 elements a set: 4 eps (sqrt(n) + |mu| / sigma)."""
    x = normal((2**18, 2), dtype="f4") + np.float32(100)
    x, shape = (x, (1, 2)) if axis == 0 else (x.T.copy(), (2, 1))
    m = jax.jit(lambda x: moments(x, shape))(x)
    wide = x.astype("f8")
    tolerance = 4 * float(np.finfo("f4").eps) * (512 + 100)
    np.testing.assert_allclose(m.mean, wide.mean(axis, keepdims=True), atol=tolerance)
    np.testing.assert_allclose(m.var, wide.var(axis, keepdims=True), atol=tolerance)
