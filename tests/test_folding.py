"""Norms folded into the layers before them: equal outputs, and only where it is right."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as fnn
from flax import nnx as fnnx
from jax.sharding import NamedSharding

import jaxnorm
from benchmarks.resnet import Bottleneck
from jaxnorm import EACH, Groups, Row, folding, linen, methods, nnx


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax's own batch normalization promotes float64."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trained(tree, dtype=jnp.float32, seed=0):
    """Variables as after training, from their shapes: nothing is 0 or 1."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    rng = np.random.default_rng(seed)

    def value(path, t):
        names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        low, high = (0.5, 2.0) if "var" in names or "scale" in names else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, t.shape), dtype)

    return structure.unflatten([value(path, t) for path, t in leaves])


def tolerance(dtype):
    return {"rtol": 0, "atol": 1e-12 if dtype == jnp.float64 else 1e-5}


class Layers(fnn.Module):
    """Every kind of layer and of norm that can be folded."""

    dtype: object = jnp.float32

    @fnn.compact
    def __call__(self, x):
        norm = {"use_running_average": True, "param_dtype": self.dtype}
        conv = {"kernel_size": (3, 3), "param_dtype": self.dtype}
        x = linen.BatchNorm(**norm)(
            fnn.Conv(8, use_bias=False, strides=2, **conv)(x), activation=jax.nn.relu
        )
        x = linen.Norm(methods.ghost_batch_norm(2), use_scale=False, **norm)(
            fnn.Conv(8, feature_group_count=8, padding="CIRCULAR", **conv)(x)
        )
        x = linen.Norm(methods.batch_group_norm(2, epsilon=0.1), unit_offset=True, **norm)(
            fnn.Conv(12, feature_group_count=4, **conv)(x)
        )
        x = fnn.BatchNorm(use_bias=False, **norm)(
            fnn.ConvTranspose(6, transpose_kernel=True, **conv)(jax.nn.relu(x))
        )
        x = linen.Norm(methods.batch_norm(), **norm)(
            fnn.ConvTranspose(6, use_bias=False, strides=(2, 2), **conv)(x)
        )
        x = fnn.Dense(5, use_bias=False, param_dtype=self.dtype)(x.mean((1, 2)))
        return linen.BatchNorm(use_bias=False, use_scale=False, **norm)(x)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_every_layer_and_norm(dtype, x64):
    dtype = jnp.dtype(dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 4)), dtype)
    model = Layers(dtype)
    variables = trained(jax.eval_shape(model.init, jax.random.key(0), x), dtype)
    forward, folded, pairs = linen.fold_norms(
        model.apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    assert len(pairs) == 6 and "batch_stats" not in folded
    assert all("Conv" in name or "Dense" in name for name in folded["params"])
    assert all("bias" in layer for layer in folded["params"].values())
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(jax.jit(forward)(folded, x), expected, **tolerance(dtype))
    assert "rsqrt" not in str(jax.make_jaxpr(forward)(folded, x))
    assert np.abs(expected).max() > 0.1


def _without_biases(tree):
    return {
        name: _without_biases(t) if isinstance(t, dict) else t
        for name, t in tree.items()
        if name != "bias"
    }


def test_a_residual_network_and_the_same_network_without_norms(x64):
    class Identity:
        def __init__(self, **options):
            pass

        def __call__(self, x, use_running_average):
            return x

    class Net(fnn.Module):
        norm: object

        @fnn.compact
        def __call__(self, x):
            for width in (4, 8):
                x = Bottleneck(self.norm, partial(fnn.Conv, dtype=x.dtype), width, 2)(
                    x, train=False
                )
            return x

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 6)))
    model = Net(partial(linen.BatchNorm, dtype=x.dtype))
    variables = trained(jax.eval_shape(model.init, jax.random.key(0), x), x.dtype)
    forward, folded, pairs = linen.fold_norms(model.apply, variables, x)
    assert len(pairs) == 8 and pairs["Bottleneck_1/BatchNorm_3"] == "Bottleneck_1/Conv_3"
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(
        jax.jit(forward)(folded, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max()
    )
    bare = Net(lambda **options: Identity())
    # what a model without norms has, but for the biases
    seen = jax.eval_shape(bare.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, {"params": _without_biases(folded["params"])}) == jax.tree.map(
        jnp.shape, dict(seen)
    )


class Awkward(fnn.Module):
    """Where folding would be wrong."""

    @fnn.compact
    def __call__(self, x):
        def norm(**options):
            return linen.BatchNorm(use_running_average=True, **options)

        y = fnn.Conv(4, (1, 1), name="used_twice")(x)
        x = norm(name="a")(y) + y
        x = norm(name="b")(jax.nn.relu(fnn.Conv(4, (1, 1), name="activated_before")(x)))
        shared = fnn.Conv(4, (1, 1), name="called_twice")
        x = norm(name="c")(shared(x))
        x = norm(name="d")(shared(x))
        x = linen.GroupNorm(2, name="e")(fnn.Conv(4, (1, 1), name="before_group_norm")(x))
        x = norm(name="f")(fnn.Conv(4, (1, 1), name="weighed")(x), example_weight=0.5)
        weighing = methods.batch_and_group_norm(ghost_size=2, num_groups=2)
        x = linen.Norm(weighing, use_running_average=True, name="g")(
            fnn.Conv(4, (1, 1), name="with_groups")(x)
        )
        x = norm(name="h", axis=1)(fnn.Conv(4, (1, 1), name="other_axis")(x))
        x = norm(name="i")(fnn.WeightNorm(fnn.Conv(4, (1, 1), name="kernel_made_on_the_way"))(x))
        x = norm(name="j", use_bias=False)(
            fnn.Conv(4, (1, 1), name="before_a_given_bias")(x), bias=jnp.ones((2, 4))
        )
        x = linen.BatchNorm(name="k")(
            fnn.Conv(4, (1, 1), name="trained")(x), False, update_running_average=False
        )
        return norm(name="z")(fnn.Conv(4, (1, 1), name="good")(x))


def test_only_where_it_is_right():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, 5, 3)), jnp.float32)
    variables = trained(jax.eval_shape(Awkward().init, jax.random.key(0), x))
    _, folded, pairs = linen.fold_norms(Awkward().apply, variables, x)
    assert pairs == {"z": "good"}
    assert (
        {*variables["params"]} - {*folded["params"]}
        == {*variables["batch_stats"]} - {*folded["batch_stats"]}
        == {"z"}
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        variables["params"]["called_twice"],
        folded["params"]["called_twice"],
    )


def test_a_scan_and_remat_stay_as_they_are():
    class Step(fnn.Module):
        @fnn.compact
        def __call__(self, x, _):
            return linen.BatchNorm(use_running_average=True)(fnn.Dense(4)(x)), None

    axes = {"params": 0, "batch_stats": 0}
    scanned = fnn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)()
    x = jnp.ones((2, 4))
    variables = trained(jax.eval_shape(scanned.init, jax.random.key(0), x, None))
    assert linen.fold_norms(scanned.apply, variables, x, None).pairs == {}


class Model(fnnx.Module):
    """Every kind of layer and of norm that can be folded, and some that cannot."""

    def __init__(self, dtype, rngs):
        options = {"param_dtype": dtype, "rngs": rngs}
        self.blocks = fnnx.List(
            [
                fnnx.Sequential(
                    fnnx.Conv(3, 8, (3, 3), use_bias=False, **options), nnx.BatchNorm(8, **options)
                ),
                fnnx.Sequential(
                    fnnx.Conv(8, 8, (3, 3), feature_group_count=8, **options),
                    fnnx.BatchNorm(8, **options),
                ),
                fnnx.Sequential(
                    fnnx.ConvTranspose(
                        8, 6, (3, 3), transpose_kernel=True, use_bias=False, **options
                    ),
                    nnx.Norm(
                        6,
                        methods.batch_group_norm(3),
                        use_bias=False,
                        unit_offset=True,
                        **options,
                    ),
                ),
            ]
        )
        self.twice, self.after = fnnx.Conv(6, 6, (1, 1), **options), nnx.BatchNorm(6, **options)
        self.shared = self.twice
        self.dense, self.norm = (
            fnnx.Linear(6, 5, **options),
            nnx.Norm(5, methods.ghost_batch_norm(2), use_scale=False, **options),
        )
        self.skip, self.skipped = fnnx.Linear(5, 5, **options), nnx.BatchNorm(5, **options)
        self.groups = nnx.GroupNorm(5, num_groups=5, **options)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.after(self.shared(self.twice(x)))
        x = self.norm(self.dense(x.mean((1, 2))), activation=jax.nn.relu)
        y = self.skip(x)
        return self.groups(self.skipped(y) + y)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_nnx(dtype, x64):
    dtype = jnp.dtype(dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 3)), dtype)
    graph, state = fnnx.split(fnnx.eval_shape(lambda: Model(dtype, fnnx.Rngs(0))))
    model = fnnx.view(fnnx.merge(graph, trained(state, dtype)), use_running_average=True)
    before = jax.tree.map(np.asarray, fnnx.state(model))
    folded, run = nnx.fold_norms(model, x), fnnx.jit(lambda m, x: m(x))
    names = {
        "/".join(map(str, p)) for p, m in fnnx.iter_modules(folded) if isinstance(m, nnx.FoldedNorm)
    }
    assert names == {*(f"blocks/{i}/layers/1" for i in range(3)), "norm"}
    np.testing.assert_allclose(run(folded, x), run(model, x), **tolerance(dtype))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, fnnx.state(model)))
    assert folded.blocks[0].layers[0].bias is not None and model.blocks[0].layers[0].bias is None
    training = nnx.fold_norms(fnnx.view(model, use_running_average=False), x)
    assert not any(isinstance(m, nnx.FoldedNorm) for _, m in fnnx.iter_modules(training))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_tied_weights_stay_as_they_are(wrap):
    """A kernel or bias that the model uses once more, beside one that it does not."""

    class Tied(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            tied, biased = fnn.Dense(6, use_bias=False, name="tied"), fnn.Dense(6, name="biased")
            first, second, third = (
                linen.BatchNorm(use_running_average=True, name=name) for name in "abc"
            )
            x = second(biased(jax.nn.relu(first(tied(x)))))
            x = third(fnn.Dense(6, name="free")(x))
            return (
                x @ tied.variables["params"]["kernel"].T + biased.variables["params"]["bias"][None]
            )

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    variables = trained(jax.eval_shape(Tied().init, jax.random.key(0), x))
    forward, folded, pairs = linen.fold_norms(
        lambda variables, x: wrap(lambda x: Tied().apply(variables, x))(x), variables, x
    )
    assert pairs == {"c": "free"}
    np.testing.assert_allclose(
        forward(folded, x), Tied().apply(variables, x), **tolerance(jnp.float32)
    )


@pytest.mark.parametrize("used", [True, False])
def test_tied_weights_of_nnx_stay_as_they_are(used):
    class Tied(fnnx.Module):
        def __init__(self):
            rngs = fnnx.Rngs(0)
            self.first, self.second, self.free = (fnnx.Linear(4, 4, rngs=rngs) for _ in range(3))
            self.second.kernel = self.first.kernel
            self.norm, self.other, self.last = (nnx.BatchNorm(4, rngs=rngs) for _ in range(3))

        def __call__(self, x):
            x = self.norm(self.first(x))
            x = jax.nn.relu(self.second(x)) if used else x
            return self.last(self.free(x))

    graph, state = fnnx.split(Tied())
    model = fnnx.view(fnnx.merge(graph, trained(state)), use_running_average=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    folded = nnx.fold_norms(model, x)
    assert isinstance(folded.last, nnx.FoldedNorm) and not isinstance(folded.norm, nnx.FoldedNorm)
    np.testing.assert_allclose(folded(x), model(x), **tolerance(jnp.float32))
    np.testing.assert_array_equal(folded.second.kernel[...], model.second.kernel[...])


def test_half_precision_keeps_dtypes():
    class Half(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            x = fnn.Conv(4, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            return linen.BatchNorm(use_running_average=True)(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 3)), jnp.float32)
    variables = trained(jax.eval_shape(Half().init, jax.random.key(0), x))
    forward, folded, _ = linen.fold_norms(Half().apply, variables, x)
    expected = Half().apply(variables, x)
    assert forward(folded, x).dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(forward(folded, x), expected, atol=0.05)


def test_fold_refuses_statistics_that_do_not_fit():
    running = jaxnorm.init_running((3,))
    with pytest.raises(ValueError, match=r"shape \(3,\) do not fit 4 output channels"):
        folding.fold(jnp.ones((2, 4)), None, running)
    with pytest.raises(ValueError, match="do not fit"):
        folding.fold(jnp.ones((2, 4)), None, jaxnorm.init_running((2, 4)))


BY_POSITION = {
    "pieces across channels": methods.batch_group_norm(9),
    "parts of channels": methods.batch_group_norm(12),
    "parts of channels, a row": Row(Groups(batch=1, spatial=(2, 1), channel=EACH)),
    "every position": Groups(1, EACH, EACH),
    "group norm, plus": methods.group_norm_plus(3),
}


@pytest.mark.parametrize("method", BY_POSITION.values(), ids=BY_POSITION.keys())
def test_statistics_that_depend_on_the_position_stay(method):
    class Model(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            stays = linen.Norm(method, use_running_average=True, name="stays")
            x = stays(fnn.Conv(6, (3, 3))(x))
            return linen.BatchNorm(use_running_average=True, name="folds")(fnn.Dense(6)(x))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 3)), jnp.float32)
    variables = trained(jax.eval_shape(Model().init, jax.random.key(0), x))
    forward, folded, pairs = linen.fold_norms(Model().apply, variables, x)
    assert pairs == {"folds": "Dense_0"}
    expected = Model().apply(variables, x)
    np.testing.assert_allclose(forward(folded, x), expected, **tolerance(jnp.float32))

    rngs = fnnx.Rngs(0)
    layers = fnnx.Sequential(
        fnnx.Conv(3, 6, (3, 3), rngs=rngs),
        nnx.Norm(6, method, x_shape=(1, 6, 6, 6), rngs=rngs),
        fnnx.Linear(6, 6, rngs=rngs),
        nnx.BatchNorm(6, rngs=rngs),
    )
    graph, state = fnnx.split(layers)
    model = fnnx.view(fnnx.merge(graph, trained(state)), use_running_average=True)
    folded = nnx.fold_norms(model, x)
    kinds = [type(layer) for layer in folded.layers]
    assert kinds[1] is type(model.layers[1]) and kinds[3] is nnx.FoldedNorm
    np.testing.assert_allclose(folded(x), model(x), **tolerance(jnp.float32))


PER_CHANNEL = {
    "finer statistics": methods.batch_and_group_norm(2, 3, example_weight=0, epsilon=0.1),
    "counted statistics": methods.batch_group_norm(3, debias=True),
}


@pytest.mark.parametrize("method", PER_CHANNEL.values(), ids=PER_CHANNEL.keys())
def test_norms_whose_state_is_not_what_they_normalize_with_fold(method):
    class Model(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            return linen.Norm(method, use_running_average=True)(fnn.Conv(6, (3, 3))(x))

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 6, 3)), jnp.float32)
    variables = trained(jax.eval_shape(Model().init, jax.random.key(0), x))
    forward, folded, pairs = linen.fold_norms(Model().apply, variables, x)
    assert pairs == {"Norm_0": "Conv_0"} and "batch_stats" not in folded
    expected = Model().apply(variables, x)
    np.testing.assert_allclose(forward(folded, x), expected, **tolerance(jnp.float32))

    rngs = fnnx.Rngs(0)
    layers = fnnx.Sequential(fnnx.Conv(3, 6, (3, 3), rngs=rngs), nnx.Norm(6, method, rngs=rngs))
    graph, state = fnnx.split(layers)
    model = fnnx.view(fnnx.merge(graph, trained(state)), use_running_average=True)
    folded = nnx.fold_norms(model, x)
    assert isinstance(folded.layers[1], nnx.FoldedNorm)
    np.testing.assert_allclose(folded(x), model(x), **tolerance(jnp.float32))


def test_norms_that_see_more_than_their_state_stay():
    """The example itself, its domain, or a parameter of their own."""
    stay = (
        methods.batch_and_group_norm(ghost_size=2, num_groups=3),
        methods.batch_norm(example_weight=0.25),
        methods.switchable_norm(),
        methods.evonorm_b0(),
    )

    class Model(fnn.Module):
        @fnn.compact
        def __call__(self, x):
            for method in stay:
                x = linen.Norm(method, use_running_average=True)(fnn.Conv(6, (1, 1))(x))
            domains = linen.Norm(methods.domain_batch_norm(2), use_running_average=True)
            x = domains(fnn.Conv(6, (1, 1))(x), domain=1)
            return linen.Norm(methods.memorized_batch_norm((1, 1)), use_running_average=True)(
                fnn.Conv(6, (1, 1))(x)
            )

    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)
    variables = Model().init(jax.random.key(0), x)
    assert "Norm_5" in variables["batch_stats"]
    forward, folded, pairs = linen.fold_norms(Model().apply, variables, x)
    assert pairs == {}
    np.testing.assert_array_equal(forward(folded, x), Model().apply(variables, x))


class Boxed(fnn.Module):
    """Parameters with names for their axes, as the sharding of large models asks for them."""

    box: object

    @fnn.compact
    def __call__(self, x):
        def init(*names):
            return self.box(fnn.initializers.normal(), names)

        x = fnn.Conv(6, (1, 1), use_bias=False, kernel_init=init(None, None, "in", "out"))(x)
        norm = {"scale_init": init("out"), "bias_init": init("out")}
        x = jax.nn.relu(linen.BatchNorm(use_running_average=True, **norm)(x))
        of_dense = {"kernel_init": init("in", "out"), "bias_init": init("features")}
        x = fnn.Dense(5, **of_dense)(x)
        x = linen.BatchNorm(use_running_average=True, **norm)(x)
        swapped = {"transpose_kernel": True, "use_bias": False}
        x = fnn.ConvTranspose(4, (1, 1), kernel_init=init(None, None, "out"), **swapped)(x)
        return fnn.BatchNorm(use_running_average=True)(x)


@pytest.mark.parametrize("box", (fnn.with_partitioning, fnn.with_logical_partitioning))
def test_boxed_parameters_stay_boxed(box):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32)
    boxed, plain = Boxed(box), Boxed(lambda init, names: init)
    variables = trained(jax.eval_shape(boxed.init, jax.random.key(0), x))
    forward, folded, pairs = linen.fold_norms(boxed.apply, variables, x)
    assert pairs == {
        "BatchNorm_0": "Conv_0",
        "BatchNorm_1": "Dense_0",
        "BatchNorm_2": "ConvTranspose_0",
    }
    names = {
        "Conv_0": {"kernel": (None, None, "in", "out"), "bias": ("out",)},
        "Dense_0": {"kernel": ("in", "out"), "bias": ("features",)},
        "ConvTranspose_0": {"kernel": (None, None, "out"), "bias": ("out",)},
    }
    got = {layer: {name: t.names for name, t in p.items()} for layer, p in folded["params"].items()}
    assert got == names
    assert {type(t) for layer in folded["params"].values() for t in layer.values()} == {
        type(variables["params"]["Conv_0"]["kernel"])
    }
    expected = linen.fold_norms(plain.apply, fnn.meta.unbox(variables), x)
    jax.tree.map(np.testing.assert_array_equal, fnn.meta.unbox(folded), expected.variables)
    np.testing.assert_array_equal(forward(folded, x), expected.forward(expected.variables, x))
    np.testing.assert_allclose(
        forward(folded, x), boxed.apply(variables, x), **tolerance(jnp.float32)
    )


P = jax.sharding.PartitionSpec
SHARDINGS = {
    "names": ((None, None, "in", "out"), ("out",)),
    "spec": (P(None, None, "in", "out"), P("out")),
    "on a mesh": (lambda mesh: NamedSharding(mesh, P(None, None, None, "out")), P("out")),
    "outputs unnamed": (P("in"), P(None)),
}


@pytest.mark.parametrize("of_kernel, of_bias", SHARDINGS.values(), ids=SHARDINGS.keys())
def test_variables_of_nnx_keep_their_metadata(of_kernel, of_bias):
    mesh = jax.make_mesh((1, 1), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    of_mesh = callable(of_kernel)
    if of_mesh:
        of_kernel, of_bias = of_kernel(mesh), NamedSharding(mesh, of_bias)
    init = fnnx.with_metadata(fnnx.initializers.normal(), out_sharding=of_kernel)
    bias = fnnx.with_metadata(fnnx.initializers.zeros, note="mine")
    with contextlib.nullcontext() if of_mesh else jax.set_mesh(mesh):
        rngs = fnnx.Rngs(0)
        model = fnnx.Sequential(
            fnnx.Conv(3, 6, (1, 1), use_bias=False, kernel_init=init, rngs=rngs),
            nnx.BatchNorm(6, rngs=rngs),
            fnnx.Linear(6, 4, bias_init=bias, rngs=rngs),
            nnx.BatchNorm(4, rngs=rngs),
        )
    model = fnnx.view(model, use_running_average=True)
    folded = nnx.fold_norms(model, jnp.ones((2, 4, 4, 3)))
    assert [type(layer) for layer in folded.layers[1::2]] == [nnx.FoldedNorm] * 2
    conv, dense = folded.layers[::2]
    assert conv.kernel.get_metadata("out_sharding") == of_kernel
    assert conv.bias.get_metadata("out_sharding") == of_bias
    assert dense.bias.get_metadata("note") == "mine"
    assert "out_sharding" not in dense.kernel.get_metadata()
