"""Where jaxnorm differs from Flax on purpose: one test for each, which runs both.

`DIFFERENCES` says for each what Flax does and what jaxnorm does; docs/coming_from_flax.md has the
same table for readers.
"""

import contextlib
import pathlib
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

import jaxnorm.linen
import jaxnorm.nnx

DIFFERENCES = {
    "masked-devices": (
        "Flax averages the means of devices, whatever their masks count, and one device without a "
        "valid row gives NaN on all; jaxnorm weighs by count."
    ),
    "device-groups-checked": (
        "Flax divides sums over unequal `axis_index_groups` by the size of the first, fails inside "
        "XLA on incomplete ones, and ignores all without an `axis_name`; jaxnorm raises "
        "ValueError."
    ),
    "device-groups-everywhere": (
        "Flax has `axis_index_groups` in pmap only; jaxnorm also in vmap and shard_map."
    ),
    "initialize-without-axis": (
        "Flax's LayerNorm, RMSNorm, GroupNorm and InstanceNorm with `axis_name` cannot be "
        "initialized outside the map; jaxnorm's can, as both BatchNorms."
    ),
    "large-mean": (
        "Flax's default variance, E[x^2] - E[x]^2 in float32, is wrong where the mean is large "
        "beside the standard deviation; jaxnorm's default is right."
    ),
    "half-precision-nnx": (
        "Flax's nnx layers with `dtype=bfloat16` cast x and running statistics to bfloat16 before "
        "they compute; jaxnorm computes in float32 and casts the output."
    ),
    "float32-statistics": (
        "Flax with `force_float32_reductions=False` computes in half precision; jaxnorm always in "
        "float32 or wider, the flag says only how running statistics are stored, and an average "
        "that half precision would stop too early warns."
    ),
    "nnx-group-reduction": (
        "Flax's nnx GroupNorm takes statistics of the wrong groups with `reduction_axes`, also "
        "without the channels among them; jaxnorm computes what linen does, and raises."
    ),
    "half-precision-gradients": (
        "Flax rounds each part of the gradient to float16 before they are added, NaN where x has a "
        "standard deviation of 1e-3 under a cotangent of 400; jaxnorm adds them in float32 and "
        "rounds once."
    ),
    "complex-input": (
        "Flax's running mean of complex x turns from float32 to complex64 at the first update in "
        "linen and loses its imaginary part in nnx; jaxnorm's is complex from initialization in "
        "linen, a TypeError in nnx without a complex `dtype`."
    ),
    "float-masks": (
        "Flax casts a real mask to bool in linen and refuses it in nnx; jaxnorm takes it for "
        "weights."
    ),
    "group-masks": "Flax's GroupNorm needs masks with all channels; jaxnorm's may broadcast.",
    "nan-in-padding": (
        "Flax gives NaN outputs and gradients where x is NaN under the mask; jaxnorm gives y = "
        "bias, and finite gradients everywhere."
    ),
    "nothing-to-average": (
        "Flax stores NaN after an empty mask or batch; jaxnorm leaves running statistics as they "
        "are."
    ),
    "non-finite-batch": (
        "Flax stores infinity and NaN from a batch that has them; jaxnorm leaves the running "
        "statistics of these channels as they are."
    ),
    "overflow-in-half-precision": (
        "Flax stores infinity or NaN for good where a float16 statistic overflows; jaxnorm leaves "
        "that channel as it is."
    ),
    "average-of-large-means": (
        "Flax's running mean is off by 0.01 standard deviations at a mean of 10^4 of them, as 0.99 "
        "+ 0.01 is not 1 in float32; jaxnorm averages by differences."
    ),
    "momentum-checked": (
        "Flax takes a momentum of -1, 2, NaN or of any shape, which destroys or reshapes running "
        "statistics; jaxnorm raises ValueError."
    ),
    "state-dtype": (
        "Flax's running statistics take the dtype of wider x, float64; jaxnorm's keep theirs."
    ),
    "shape-errors": (
        "Flax fails with a TypeError of broadcasting on another number of channels than the layer "
        "has; jaxnorm raises a ValueError that names both."
    ),
}

KEY = jax.random.key(0)
FOUR = jax.devices()[:4]


@contextlib.contextmanager
def flax():
    """Flax needs JAX's default promotions."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def variables(channels=3):
    zeros, ones = jnp.zeros(channels, jnp.float32), jnp.ones(channels, jnp.float32)
    return {"params": {"scale": ones, "bias": zeros}, "batch_stats": {"mean": zeros, "var": ones}}


def batch_norm(module, x, mask=None, start=None, **kwargs):
    """Output, and the batch's own statistics: with momentum 0 they are what is stored."""
    layer = module.BatchNorm(use_running_average=False, **{"momentum": 0.0} | kwargs)
    start = variables(x.shape[-1]) if start is None else start
    y, new = jax.jit(lambda x, mask: layer.apply(start, x, mask=mask, mutable="batch_stats"))(
        x, mask
    )
    return y, new["batch_stats"]


def nnx_layer(module, name, *args, **kwargs):
    return getattr(module, name)(*args, **kwargs, rngs=nnx.Rngs(0))


@nnx.jit
def call(layer, x, mask=None):
    return layer(x) if mask is None else layer(x, mask=mask)


def test_masked_devices():
    x, mask = data(2, 4, 3), jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)[..., None]

    def mean(module, mask):
        return jit(
            jax.vmap(lambda x, w: batch_norm(module, x, w, axis_name="i")[1]["mean"], axis_name="i")
        )(x, mask)[0]

    with flax():
        per_device = np.stack(
            [np.asarray(x)[i][np.asarray(mask)[i, :, 0]].mean(0) for i in range(2)]
        )
        np.testing.assert_allclose(mean(linen, mask), per_device.mean(0), rtol=1e-5)
        assert np.isnan(mean(linen, mask.at[1].set(False))).all()
    for valid in (mask, mask.at[1].set(False)):
        np.testing.assert_allclose(
            mean(jaxnorm.linen, valid), np.asarray(x)[np.asarray(valid)[..., 0]].mean(0), rtol=1e-5
        )


def test_device_groups_checked():
    x = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 2, 3))

    def means(module, groups):
        layer = {"axis_name": "i", "axis_index_groups": groups}
        return jax.pmap(
            lambda x: batch_norm(module, x, **layer)[1]["mean"], axis_name="i", devices=FOUR
        )(x)[:, 0]

    with flax():
        assert means(linen, [[0], [1, 2, 3]]).tolist() == [0, 6, 6, 6]  # the mean of 1, 2, 3 is 2
    for groups in ([[0], [1, 2, 3]], [[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2, 4]]):
        with pytest.raises(ValueError, match="groups of equal size"):
            means(jaxnorm.linen, groups)
    with flax():
        assert batch_norm(linen, x, axis_index_groups=[[0, 1]])[0].shape == x.shape
    with pytest.raises(ValueError, match="needs one named axis. Got axis_name=None"):
        batch_norm(jaxnorm.linen, x, axis_index_groups=[[0, 1]])


def test_device_groups_everywhere():
    x = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 2, 3))
    mesh = jax.sharding.Mesh(np.array(FOUR), ("i",))

    def mean(module, x):
        return batch_norm(module, x, axis_name="i", axis_index_groups=[[0, 3], [1, 2]])[1]["mean"][
            :1
        ]

    def mapped(module, context):
        if context == "vmap":
            return jit(jax.vmap(lambda x: mean(module, x), axis_name="i"))(x)
        f = jax.shard_map(
            lambda x: mean(module, x[0]),
            mesh=mesh,
            in_specs=P("i"),
            out_specs=P("i"),
            check_vma=True,
        )
        return jit(f)(x)

    for context in ("vmap", "shard_map"):
        with flax(), pytest.raises(NotImplementedError):
            mapped(linen, context)
        np.testing.assert_allclose(mapped(jaxnorm.linen, context).ravel(), 1.5)


def test_initialize_without_axis():
    x, affine = data(2, 3, 4), variables(4)["params"]
    for name, kwargs in (
        ("LayerNorm", {}),
        ("RMSNorm", {}),
        ("GroupNorm", {"num_groups": 2}),
        ("InstanceNorm", {}),
    ):
        with flax(), pytest.raises(NameError, match="unbound axis name"):
            getattr(linen, name)(**kwargs, axis_name="i").init(KEY, x)
        assert (
            "scale" in getattr(jaxnorm.linen, name)(**kwargs, axis_name="i").init(KEY, x)["params"]
        )
        # using it outside the map stays an error
        with pytest.raises(NameError, match="unbound axis name"):
            getattr(jaxnorm.linen, name)(**kwargs, axis_name="i").apply({"params": affine}, x)


def test_large_mean():
    x = data(64, 32) + 1e4
    plain = {"use_bias": False, "use_scale": False}

    def deviations(module):
        groups = jit(lambda x: module.GroupNorm(2, **plain).apply({}, x))(x).reshape(64, 2, 16)
        layers = jit(lambda x: module.LayerNorm(**plain).apply({}, x))(x)
        return [np.std(batch_norm(module, x)[0], 0), np.std(layers, 1), np.std(groups, 2)]

    with flax():
        for std in deviations(linen):
            assert np.abs(std - 1).max() > 1
    for std in deviations(jaxnorm.linen):
        np.testing.assert_allclose(std, 1, atol=1e-3)


def test_half_precision_nnx():
    x = data(64, 3) + 100
    spread = (np.asarray(x) - np.asarray(x).mean(0)) / np.asarray(x).std(0)

    def error(module):
        y = call(nnx_layer(module, "BatchNorm", 3, dtype=jnp.bfloat16), x)
        assert y.dtype == jnp.bfloat16
        return np.abs(np.asarray(y, np.float32) - spread).max()

    with flax():
        assert error(nnx) > 0.1
    assert error(jaxnorm.nnx) < 0.02  # the rounding of the output

    def stored(module):
        layer = nnx_layer(module, "BatchNorm", 3, momentum=0.0, dtype=jnp.bfloat16)
        call(layer, x)
        return np.abs(layer.var[...] - np.asarray(x).var(0)).max()

    with flax():
        assert stored(nnx) > 0.01
    assert stored(jaxnorm.nnx) < 1e-4


def test_float32_statistics():
    x = (data(64, 3) + 100).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64).var(0)
    start = jax.tree.map(lambda t: t.astype(jnp.bfloat16), variables())

    def var(module):
        stats = batch_norm(
            module, x, start=start, force_float32_reductions=False, param_dtype=jnp.bfloat16
        )[1]
        assert stats["var"].dtype == jnp.bfloat16
        return np.asarray(stats["var"], np.float64)

    with flax():
        assert np.abs(var(linen) / exact - 1).max() > 1
    np.testing.assert_allclose(var(jaxnorm.linen), exact, rtol=0.01)
    options = {"force_float32_reductions": False, "param_dtype": jnp.bfloat16, "momentum": 0.99}
    with pytest.warns(UserWarning, match="bfloat16.*an average with momentum 0.99 stops"):
        batch_norm(jaxnorm.linen, x, start=start, **options)


def test_overflow_in_half_precision():
    x = (data(64, 3) * jnp.array([[1.0, 1.0, 1e4]])).astype(jnp.float16)
    start = jax.tree.map(lambda t: t.astype(jnp.float16), variables())

    def stored(module):
        stats = batch_norm(
            module, x, start=start, force_float32_reductions=False, param_dtype=jnp.float16
        )[1]
        return stats["var"], stats["mean"]

    with flax():
        assert not np.isfinite(stored(linen)[0][2])
    var, mean = stored(jaxnorm.linen)
    assert (var[2], mean[2]) == (1, 0) and np.isfinite(var).all() and (mean[:2] != 0).all()


def test_average_of_large_means():
    """Of batches of 64, with standard deviation 1, in steady state."""
    x = data(500, 64, 3) + 1e4
    means = np.asarray(x, np.float64).mean(1)
    start = variables()
    start["batch_stats"]["mean"] = jnp.asarray(means.mean(0), jnp.float32)
    expected = np.float64(start["batch_stats"]["mean"])
    errors = []
    for mean in means:
        expected = expected + 0.01 * (mean - expected)
        errors.append(expected)

    def error(module):
        layer = module.BatchNorm(use_running_average=False)

        def step(stats, x):
            new = layer.apply(start | {"batch_stats": stats}, x, mutable="batch_stats")[1]
            return new["batch_stats"], new["batch_stats"]["mean"]

        got = jit(lambda x: jax.lax.scan(step, start["batch_stats"], x)[1])(x)
        return abs((np.float64(got) - np.array(errors))[200:].mean())

    with flax():
        assert error(linen) > 4e-3
    assert error(jaxnorm.linen) < 2e-3


def test_momentum_checked():
    x = data(4, 3)
    for momentum in (-1, 2, np.nan, np.full((2, 1), 0.9)):
        with flax():
            batch_norm(linen, x, momentum=momentum)
        with pytest.raises(ValueError, match="momentum .*expected a number of at least 0"):
            batch_norm(jaxnorm.linen, x, momentum=momentum)
        with pytest.raises(ValueError, match="momentum .*expected a number of at least 0"):
            nnx_layer(jaxnorm.nnx, "BatchNorm", 3, momentum=momentum)(x)


def test_nnx_group_reduction():
    x, axes = data(2, 3, 4, 4, 8), (2, 3, 4)
    with flax():
        in_linen = linen.GroupNorm(2, reduction_axes=axes, use_bias=False, use_scale=False)
        expected = jit(lambda x: in_linen.apply({}, x))(x)
    for module, right in ((nnx, False), (jaxnorm.nnx, True)):
        with flax() if module is nnx else contextlib.nullcontext():
            y = call(nnx_layer(module, "GroupNorm", 8, num_groups=2, reduction_axes=axes), x)
        assert np.allclose(y, expected, atol=1e-4) == right
    with flax():
        nnx_layer(nnx, "GroupNorm", 8, num_groups=2, reduction_axes=(0, 1))(x[0, 0])
    with pytest.raises(ValueError, match="must include the final dimension"):
        nnx_layer(jaxnorm.nnx, "GroupNorm", 8, num_groups=2, reduction_axes=(0, 1))(x[0, 0])


@pytest.mark.parametrize("name", ["BatchNorm", "GroupNorm", "LayerNorm", "InstanceNorm"])
def test_half_precision_gradients(name):
    """Of x with a standard deviation of 1e-3 under a cotangent of 400: zero, within rounding."""
    x = (1e-3 * np.random.default_rng(0).normal(size=(8, 16, 64))).astype(np.float16)
    options = {"epsilon": 1e-12, "dtype": jnp.float16}
    options |= {"num_groups": 4} if name == "GroupNorm" else {}
    options |= {"use_running_average": False} if name == "BatchNorm" else {}

    def of_linen(module):
        layer = getattr(module, name)(**options)
        start = layer.init(KEY, x)
        return lambda x: layer.apply(start, x, mutable=["batch_stats"])[0]

    def of_nnx(module):
        return lambda x: nnx_layer(module, name, 64, **options)(x)

    def gradient(f):
        return jax.vjp(f, x)[1](jnp.full(x.shape, 400, jnp.float16))[0].astype(jnp.float32)

    with flax():
        assert not np.isfinite(gradient(of_linen(linen))).all()
        assert not np.isfinite(gradient(of_nnx(nnx))).all()
        # each part is 400 over the standard deviation, and the sum of them is zero
        rounding = 400 / 1e-3 * 8 * np.finfo(np.float32).eps
        for f in (of_linen(jaxnorm.linen), of_nnx(jaxnorm.nnx)):
            np.testing.assert_allclose(gradient(f), 0, atol=rounding)


def test_complex_input():
    x = jax.lax.complex(data(4, 3), data(4, 3, seed=1) + 1)
    mean = np.asarray(x).mean(0)

    def dtypes(module):
        first = jit(module.BatchNorm(use_running_average=False).init)(KEY, x)
        _, new = batch_norm(module, x, start=first)
        assert new["var"].dtype == jnp.float32
        np.testing.assert_allclose(new["mean"], mean, rtol=1e-5)
        return [first["batch_stats"]["mean"].dtype, new["mean"].dtype]

    with flax():
        assert dtypes(linen) == [jnp.float32, jnp.complex64]
        layer = nnx_layer(nnx, "BatchNorm", 3, momentum=0.0)
        call(layer, x)
        np.testing.assert_allclose(layer.mean[...], mean.real, rtol=1e-5)
    assert dtypes(jaxnorm.linen) == [jnp.complex64, jnp.complex64]
    with pytest.raises(TypeError, match="complex running mean"):
        nnx_layer(jaxnorm.nnx, "BatchNorm", 3)(x)
    layer = nnx_layer(jaxnorm.nnx, "BatchNorm", 3, momentum=0.0, dtype=jnp.complex64)
    call(layer, x)
    np.testing.assert_allclose(layer.mean[...], mean, rtol=1e-5)


def test_float_masks():
    x, weights = data(4, 3), jnp.array([0.5, 0.25, 2.0, 0.0])[:, None]
    weighted = np.average(x, axis=0, weights=weights[:, 0])
    with flax():
        np.testing.assert_allclose(
            batch_norm(linen, x, weights)[1]["mean"], x[:3].mean(0), rtol=1e-5
        )
        with pytest.raises(ValueError, match="boolean"):
            call(nnx_layer(nnx, "BatchNorm", 3), x, weights)
    np.testing.assert_allclose(
        batch_norm(jaxnorm.linen, x, weights)[1]["mean"], weighted, rtol=1e-5
    )
    layer = nnx_layer(jaxnorm.nnx, "BatchNorm", 3, momentum=0.0)
    call(layer, x, weights)
    np.testing.assert_allclose(layer.mean[...], weighted, rtol=1e-5)


def test_group_masks():
    x, mask = data(2, 5, 4), jnp.array([1, 1, 0, 1, 0], bool)[:, None]
    full = jnp.broadcast_to(mask, x.shape)

    def apply(module, mask):
        layer = module.GroupNorm(2, use_scale=False, use_bias=False)
        return jit(lambda x, mask: layer.apply({}, x, mask=mask))(x, mask)

    with flax():
        expected = apply(linen, full)
        with pytest.raises(TypeError):
            apply(linen, full[..., :1])
    for narrow in (full, full[..., :1], mask):
        np.testing.assert_allclose(apply(jaxnorm.linen, narrow), expected, atol=1e-5)


def test_nan_in_padding():
    mask = jnp.array([1, 1, 1, 0], bool)[:, None]
    clean = data(4, 3)
    bias = jnp.array([1.0, 2.0, 3.0])
    start = variables() | {"params": {"scale": jnp.full(3, 2.0), "bias": bias}}

    def run(module, x, use):
        def loss(params, x):
            layer = module.BatchNorm(use_running_average=use)
            y = layer.apply(start | {"params": params}, x, mask=mask, mutable="batch_stats")[0]
            # the loss ignores the padding, as it should
            return jnp.where(mask, jnp.sin(y), 0).sum(), y

        (_, y), grads = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(start["params"], x)
        return y, grads

    for bad in (jnp.nan, jnp.inf):
        x = clean.at[3].set(bad)
        for use in (False, True):
            with flax():
                y, grads = run(linen, x, use)
            assert not np.isfinite(y[3]).any() and np.isnan(grads[0]["scale"]).all()
            y, grads = run(jaxnorm.linen, x, use)
            np.testing.assert_array_equal(y[3], bias)
            expected, of_clean = run(jaxnorm.linen, clean, use)
            chex.assert_trees_all_close((y[:3], grads), (expected[:3], of_clean), rtol=1e-6)


def test_nothing_to_average():
    x = data(4, 3)
    for batch, mask in ((x, jnp.zeros((4, 1), bool)), (x[:0], None)):
        with flax():
            assert np.isnan(batch_norm(linen, batch, mask)[1]["mean"]).all()
        y, stats = batch_norm(jaxnorm.linen, batch, mask)
        chex.assert_trees_all_equal(stats, variables()["batch_stats"])
        assert np.isfinite(y).all()
        layer = nnx_layer(jaxnorm.nnx, "Norm", 3, jaxnorm.methods.batch_norm(debias=True))
        call(layer, batch, mask)
        assert layer.count[...].tolist() == [0, 0, 0]


def test_non_finite_batch():
    for bad in (jnp.nan, jnp.inf):
        x = data(4, 3).at[0, 0].set(bad)
        with flax():
            theirs = batch_norm(linen, x)[1]
        ours = batch_norm(jaxnorm.linen, x)[1]
        assert not np.isfinite(theirs["mean"][0]) and not np.isfinite(theirs["var"][0])
        assert (ours["mean"][0], ours["var"][0]) == (0, 1)
        chex.assert_trees_all_close(
            *[{k: v[1:] for k, v in stats.items()} for stats in (ours, theirs)], rtol=1e-5
        )


def test_state_dtype(x64):
    x, start = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float64), variables()
    with flax():
        assert {str(t.dtype) for t in batch_norm(linen, x, start=start)[1].values()} == {"float64"}
    y, stats = batch_norm(jaxnorm.linen, x, start=start)
    assert y.dtype == jnp.float64 and {str(t.dtype) for t in stats.values()} == {"float32"}


def test_shape_errors():
    x = data(2, 3, 5)
    for use in (True, False):
        for module, error in ((linen, TypeError), (jaxnorm.linen, ValueError)):
            with flax() if module is linen else contextlib.nullcontext(), pytest.raises(error):
                module.BatchNorm(use_running_average=use).apply(
                    variables(4), x, mutable="batch_stats"
                )
    for name, kwargs in (
        ("BatchNorm", {}),
        ("LayerNorm", {}),
        ("RMSNorm", {}),
        ("GroupNorm", {"num_groups": 2}),
    ):
        with flax(), pytest.raises(TypeError):
            nnx_layer(nnx, name, 4, **kwargs)(x)
        with pytest.raises(ValueError):
            nnx_layer(jaxnorm.nnx, name, 4, **kwargs)(x)


def test_every_difference_has_a_test():
    tests = {
        name.removeprefix("test_").replace("_", "-")
        for name in globals()
        if name.startswith("test_")
    }
    assert set(DIFFERENCES) <= tests


def test_the_page_has_a_row_for_every_difference():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "coming_from_flax.md").read_text()
    assert re.findall(r"^\| *`([a-z0-9-]+)` *\|", page, re.MULTILINE) == list(DIFFERENCES)
