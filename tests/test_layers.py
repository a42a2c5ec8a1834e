"""What `Norm` of linen and of nnx is for every method: its `apply` with variables, the options that
it takes, and methods of the user's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit
from flax import linen as fnn
from flax import nnx as fnnx
from flax.errors import ScopeParamShapeError

from jaxnorm import EACH, Groups, Method, Row, linen, methods, nnx

SHAPE = (4, 4, 6, 6)
KEY = jax.random.key(0)
TRAIN, EVAL = {"use_running_average": False}, {"use_running_average": True}


def data(shape=SHAPE, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(1, 2, shape), jnp.float32)


def of_nnx(method, channels=6, **options):
    return nnx.Norm(channels, method, rngs=fnnx.Rngs(0), **options)


def same(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-5, atol=1e-5), a, b)


@dataclasses.dataclass(frozen=True)
class Centered(Method):
    """A method of the user's own: x less a running mean, times a learned power of two."""

    momentum: float = 0.5

    def first_state(self, num_channels):
        return {"mean": jnp.zeros(num_channels)}

    def parameters(self, num_channels):
        return {"exponent": np.ones(num_channels, np.float32)}

    def rule(self, x, state, *, train, momentum, exponent, shift=0.0, scale=None, **options):
        places = (1,) * (x.ndim - 1)
        batch = x.mean(tuple(range(x.ndim - 1)))
        mean = batch if train else state["mean"].astype(x.dtype)
        gain = 2**exponent if scale is None else 2**exponent * scale
        y = (x - mean.reshape(*places, -1) + shift) * gain.reshape(*places, -1)
        new = momentum * state["mean"] + (1 - momentum) * batch
        return y, {"mean": jax.lax.stop_gradient(new)} if train else state

    def observe(self, x, state, **axes):
        return {"largest": jnp.abs(x).max()}


@dataclasses.dataclass(frozen=True)
class Halved(Method):
    """One that remembers and learns nothing."""

    def rule(self, x, state, *, train, **options):
        return x / 2, state


METHODS = [
    (methods.batch_and_group_norm(ghost_size=2, num_groups=3), {}),
    (methods.batch_group_norm(9), {}),
    (methods.batch_renorm(), {"rmax": 1.5, "dmax": 0.5}),
    (methods.domain_batch_norm(3), {"domain": np.array([0, 2, 2, 0])}),
    (methods.filter_response_norm(use_slope=True, use_learned_epsilon=True), {}),
    (methods.moving_average_norm(2), {}),
    (Centered(), {"shift": 0.5}),
    (Halved(), {}),
]
MORE = [
    (methods.ghost_batch_norm(2), {}),
    (methods.batch_group_norm(3, debias=True), {}),
    (methods.group_norm(3), {}),
    (methods.momentum_batch_norm(), {"train_momentum": 0.5}),
    (methods.memorized_batch_norm((1, 2, 3)), {}),
    (methods.switchable_norm(), {}),
    (methods.evonorm_b0(), {}),
    (methods.evonorm_s0(3), {}),
    (methods.group_norm_plus(3), {}),
    (methods.proxy_norm(methods.layer_norm()), {}),
]


@pytest.mark.parametrize(
    "method, options",
    [*METHODS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)],
    ids=lambda v: type(v).__name__,
)
def test_a_layer_is_its_method_with_variables(method, options):
    """In both frameworks: a step of training, and inference with what it left."""
    x, inference = data(), {name: t for name, t in options.items() if name in ("domain", "shift")}
    first, learned = method.init(SHAPE), method.parameters(6)
    affine = {"scale": jnp.full(6, 2.0), "bias": jnp.full(6, 3.0)}
    learned |= {n: 0.5 + jnp.abs(data(t.shape, i)) for i, (n, t) in enumerate(learned.items())}

    @jit
    def alone(x):
        y, state = method.apply(x, first, train=True, **affine, **learned, **options)
        evaluated, _ = method.apply(x + 1, state, train=False, **affine, **learned, **inference)
        return y, state, evaluated

    layer, other = linen.Norm(method), of_nnx(method, x_shape=(1, *SHAPE[1:]))
    tap = {name: learned[name] for name in method.overwritten_by_gradient}
    params = affine | {name: t for name, t in learned.items() if name not in tap}
    variables = {"params": params, "_overwrite_with_gradient": tap, "batch_stats": dict(first)}
    made = jax.eval_shape(lambda x: layer.init(KEY, x, **TRAIN, **options), x)
    assert jax.tree.map(jnp.shape, dict(made)) == jax.tree.map(
        jnp.shape, {name: t for name, t in variables.items() if t}
    )

    @jit
    def in_linen(variables, x):
        y, new = layer.apply(variables, x, **TRAIN, **options, mutable=["batch_stats"])
        evaluated = layer.apply(variables | new, x + 1, **EVAL, **inference)
        return y, dict(new.get("batch_stats", {})), evaluated

    expected = alone(x)
    same(in_linen(variables, x), expected)
    for name, value in (affine | learned).items():
        getattr(other, name)[...] = value
    kinds = {name: type(getattr(other, name)) for name in {*first, *learned}}
    assert kinds == (
        {name: fnnx.BatchStat for name in first}
        | {name: nnx.Tap if name in tap else fnnx.Param for name in learned}
    )

    @fnnx.jit
    def in_nnx(layer, x):
        return layer(x, **options), layer(x + 1, use_running_average=True, **inference)

    y, evaluated = in_nnx(other, x)
    same((y, {name: getattr(other, name)[...] for name in first}, evaluated), expected)


@pytest.mark.parametrize("make", [linen.Norm, of_nnx], ids=["linen", "nnx"])
def test_arguments_that_a_method_has_no_use_for_are_refused(make):
    def use(method, *, x=None, called=None, **options):
        layer, x = make(method, **options), data() if x is None else x
        if make is of_nnx:
            return layer(x, **TRAIN, **(called or {}))
        return layer.init(KEY, x, **TRAIN, **(called or {}))

    ones = fnn.initializers.ones
    for method, names in ((methods.evonorm_b0(), "v"), (methods.batch_norm(), "nothing")):
        for wrong in ({"w": ones}, {"scale": ones}):
            with pytest.raises(
                ValueError, match=f"inits has {[*wrong][0]}, which .* Expected some of {names};"
            ):
                use(method, inits=wrong)

    called = "mask, update_running_average, scale, bias, activation, "
    for method, wrong, names in (
        (methods.batch_renorm(), {"rmin": 1.0}, "rmax, dmax, momentum"),
        (methods.batch_renorm(), {"epsilon": 1.0}, "rmax, dmax, momentum"),
        (methods.batch_norm(), {"domain": 0}, "momentum, example_weight"),
        (methods.evonorm_b0(), {"v": jnp.ones(6)}, "momentum"),  # which is the layer's
        (Centered(), {"shfit": 0.5}, "momentum, shift"),
    ):
        with pytest.raises(
            TypeError, match=f"got an unexpected option {[*wrong][0]}. .*some of {called}{names}"
        ):
            use(method, called=wrong)
    with pytest.raises(TypeError, match="domain_batch_norm needs domain"):
        use(methods.domain_batch_norm(2))
    for wrong in ("batch_norm", methods.batch_norm, None):
        with pytest.raises(TypeError, match="method is a value of jaxnorm.methods or a Groups"):
            use(wrong)
    for name in ("epsilon", "momentum"):  # the method's
        with pytest.raises(TypeError, match=name):
            make(methods.batch_norm(), **{name: 0.5})


def test_layers_in_front_are_for_methods_that_work_on_them():
    x, cross = data(), methods.cross_iteration_norm()
    for method in (methods.batch_norm(), methods.evonorm_b0(), Centered()):
        with pytest.raises(ValueError, match="which does nothing with the layer in front of it"):
            linen.Norm(method, layer=fnn.Dense(6, use_bias=False)).init(KEY, x, **TRAIN)
        with pytest.raises(ValueError, match="which does nothing with the layer in front of it"):
            of_nnx(method, layer=fnnx.Linear(6, 6, use_bias=False, rngs=fnnx.Rngs(0)))
    match = "without a bias. Got .* expected for example"
    for wrong in (fnn.Dense(6), fnn.LayerNorm(use_bias=False)):
        with pytest.raises(ValueError, match=f"(?s){match}"):
            linen.Norm(cross, layer=wrong).init(KEY, x, **TRAIN)
    for wrong in (fnnx.Linear(6, 6, rngs=fnnx.Rngs(0)), fnnx.LayerNorm(6, rngs=fnnx.Rngs(0))):
        with pytest.raises(ValueError, match=match):
            of_nnx(cross, layer=wrong)
    with pytest.raises(ValueError, match="a layer knows them by Norm\\(method, layer="):
        linen.Norm(cross).init(KEY, x, **TRAIN)
    with pytest.raises(ValueError, match="a layer knows them by Norm\\(method, layer="):
        of_nnx(cross)


def test_the_number_of_features_is_that_of_the_layer_in_front():
    for method in (methods.cross_iteration_norm(), methods.moving_average_norm()):
        front = fnnx.Linear(6, 8, use_bias=False, rngs=fnnx.Rngs(0))
        with pytest.raises(ValueError, match="num_features=6 and a layer in front with 8 outputs"):
            of_nnx(method, layer=front)
        layer = of_nnx(method, channels=8, layer=front)
        assert layer.scale.shape == layer.bias.shape == (8,)
        dense = linen.Norm(method, layer=fnn.Dense(8, use_bias=False))
        variables = jax.eval_shape(lambda x, of=dense: of.init(KEY, x, **TRAIN), data())
        assert variables["params"]["scale"].shape == (8,)
        assert variables["params"]["layer"]["kernel"].shape == (6, 8)


def test_another_number_of_channels_is_an_error_that_names_both():
    """In linen for parameters by Flax's error, which is that of its own layers."""
    x = data((2, 4, 5))
    for layer in (
        linen.Norm(methods.batch_norm()),
        linen.Norm(methods.group_norm(1)),
        linen.LayerNorm(),
    ):
        flags = TRAIN if isinstance(layer, linen.Norm) else {}

        def shapes(function, *args, flags=flags, **options):
            return jax.eval_shape(lambda *args: function(*args, **flags, **options), *args)

        variables = shapes(layer.init, KEY, data((2, 4, 6)))
        remembers = layer == linen.Norm(methods.batch_norm())
        error = ValueError if remembers else ScopeParamShapeError
        with pytest.raises(error, match=r"\(5,\).*\(6,\)|\(6,\).*\(5,\)"):
            shapes(layer.apply, variables, x, mutable="batch_stats")
    for method in (methods.batch_norm(), methods.evonorm_b0(), methods.group_norm(1)):
        with pytest.raises(ValueError, match=r"shape \(6,\).*\(2, 4, 5\)"):
            of_nnx(method)(x)


def test_groups_are_their_row():
    groups = Groups(batch=1, spatial=1, channel=2)
    assert of_nnx(groups).method == Row(groups)
    x = data()
    variables = linen.Norm(groups).init(KEY, x, **TRAIN)
    assert variables["batch_stats"]["mean"].shape == (2,)
    y, _ = linen.Norm(groups).apply(variables, x, **TRAIN, mutable="batch_stats")
    same(of_nnx(groups)(x), y)
    same(Row(groups).apply(x, Row(groups).init(SHAPE), train=True)[0], y)


def test_layers_of_equal_methods_are_the_same_program():
    graphs = [
        fnnx.graphdef(of_nnx(methods.batch_norm(momentum=m, debias=True))) for m in (0.9, 0.9, 0.5)
    ]
    assert graphs[0] == graphs[1] != graphs[2]
    assert linen.Norm(methods.batch_renorm()) == linen.Norm(methods.batch_renorm())
    hashes = {
        hash(linen.Norm(methods.evonorm_b0(), inits={"v": fnn.initializers.ones})) for _ in range(2)
    }
    assert len(hashes) == 1


def test_an_option_of_the_call_wins_over_the_method():
    x = data()
    mean = x.mean((0, 1, 2))
    for method in (methods.batch_norm(), methods.batch_renorm(), Centered()):
        layer, other = linen.Norm(method), of_nnx(method)
        variables = layer.init(KEY, x, **TRAIN)
        _, new = layer.apply(variables, x, **TRAIN, momentum=0.0, mutable="batch_stats")
        other(x, momentum=0.0)
        same([new["batch_stats"]["mean"], other.mean[...]], [mean, mean])


def test_initializers_of_what_a_method_learns():
    method = methods.filter_response_norm(use_slope=True, use_learned_epsilon=True)
    inits = {
        "threshold": fnn.initializers.normal(),
        "learned_epsilon": fnn.initializers.constant(0.5),
    }
    params = linen.Norm(method, inits=inits).init(KEY, data())["params"]
    layer = of_nnx(method, inits=inits, param_dtype=jnp.bfloat16)
    for of in (params, {name: getattr(layer, name)[...] for name in params}):
        assert of["threshold"].shape == (6,) and np.unique(of["threshold"]).size == 6
        assert of["learned_epsilon"] == 0.5 and of["slope"].tolist() == [0.0] * 6
    assert layer.threshold.dtype == layer.slope.dtype == jnp.bfloat16
    other = linen.Norm(method, inits=inits, param_dtype=jnp.bfloat16).init(KEY, data())["params"]
    assert {t.dtype for t in other.values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_method_of_ones_own_trains_in_both_frameworks():
    """It learns, remembers, takes its option, and is left alone where it has no part."""
    x, method = data(), Centered(momentum=0.75)
    target = data(seed=1)

    class Model(fnn.Module):
        @fnn.compact
        def __call__(self, x, train):
            x = linen.Norm(method, name="norm")(x, not train, shift=1.0)
            return linen.Norm(Halved(), name="half", use_bias=False, use_scale=False)(x)

    variables = Model().init(KEY, x, False)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"norm": {"scale": (6,), "bias": (6,), "exponent": (6,)}},
        "batch_stats": {"norm": {"mean": (6,)}},
    }

    @jax.jit
    def step(params, stats):
        def loss(params):
            v = {"params": params, "batch_stats": stats}
            y, new = Model().apply(v, x, True, mutable=["batch_stats"])
            return jnp.square(y - target).mean(), new["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    gradients, stats = step(variables["params"], variables["batch_stats"])
    assert jnp.abs(gradients["norm"]["exponent"]).min() > 0
    same(stats["norm"]["mean"], x.mean((0, 1, 2)) / 4)
    forward, folded, pairs = linen.fold_norms(lambda v, x: Model().apply(v, x, False), variables, x)
    assert pairs == {} and folded.keys() == variables.keys()

    layer = of_nnx(method)
    by_layer = fnnx.grad(lambda layer: jnp.square(layer(x, shift=1.0) / 2 - target).mean())(layer)
    same(by_layer.exponent[...], gradients["norm"]["exponent"])
    same(layer.mean[...], x.mean((0, 1, 2)) / 4)
    same(of_nnx(Halved(), use_bias=False, use_scale=False)(x), x / 2)


def test_observations_are_stored_where_they_are_asked_for():
    x = data()
    domains = methods.domain_batch_norm(2)
    for method, options, name in (
        (Centered(), {}, "largest"),
        (domains, {"domain": 1}, "distance"),
    ):
        layer, other = linen.Norm(method), of_nnx(method)
        variables = layer.init(KEY, x, **EVAL, **options)
        assert "observations" not in variables
        state = dict(variables["batch_stats"])
        expected = method.observe(x, state, **options)[name]
        _, stored = layer.apply(variables, x, **EVAL, **options, mutable=["observations"])
        assert stored.keys() == {"observations"} and stored["observations"].keys() == {name}
        same(stored["observations"][name], (expected,))
        assert not hasattr(layer.apply(variables, x, **EVAL, **options), "keys")
        _, stored = fnnx.capture(other, nnx.Observation)(x, **EVAL, **options)
        assert len(jax.tree.leaves(stored)) == 1
        same(jax.tree.leaves(stored)[0], expected)
        before = fnnx.graphdef(other)
        other(x, **EVAL, **options)
        assert fnnx.graphdef(other) == before  # nothing is stored


@pytest.mark.parametrize("reducer", ["pooled", "averaged"])
def test_a_debiased_norm_is_measured_anew_and_trains_on(reducer):
    """Beside `mean` and `var` the state then has a count of its own, of what is measured."""
    method = methods.batch_norm(momentum=0.5, debias=True)
    batches = [data((n, 6), seed) for seed, n in enumerate((4, 4, 4))]
    layer, other = linen.Norm(method), of_nnx(method)
    variables = layer.init(KEY, batches[0], **TRAIN)

    def forward(variables, x):
        return layer.apply(variables, x, **TRAIN, mutable="batch_stats")

    new = linen.population_statistics(forward, variables, batches, reducer=reducer)
    nnx.population_statistics(lambda layer, x: layer(x), other, batches, reducer=reducer)
    stats = new["batch_stats"]
    assert stats.keys() == {"count", "mean", "var"} and stats["count"].tolist() == [1.0] * 6
    x = np.concatenate(batches)
    var = x.var(0) if reducer == "pooled" else np.mean([t.var(0, ddof=1) for t in batches], 0)
    same([stats["mean"], stats["var"]], [x.mean(0), var])
    same({name: getattr(other, name)[...] for name in stats}, dict(stats))
    assert fnnx.graphdef(other) == fnnx.graphdef(of_nnx(method))
    _, after = forward(new, batches[0])
    other(batches[0])
    same(after["batch_stats"]["mean"], (x.mean(0) + batches[0].mean(0)) / 2)
    same(other.mean[...], after["batch_stats"]["mean"])


PROMOTED = [
    (methods.batch_renorm(), {}),
    (methods.evonorm_s0(3), {}),
    (methods.batch_group_norm(9), {"x_shape": SHAPE}),
]


@pytest.mark.parametrize("method, size", PROMOTED, ids=lambda v: type(v).__name__)
def test_every_method_of_nnx_takes_a_promote_dtype(method, size):
    x, seen = data(), []

    def promote(values, *, dtype):
        seen.append([None if t is None else t.shape for t in values])
        return tuple(None if t is None else t.astype(jnp.bfloat16) for t in values)

    promoted = of_nnx(method, promote_dtype=promote, **size)
    plain = of_nnx(method, **size)
    y, expected = promoted(x), plain(x)
    state = [t.shape for t in method.init(SHAPE).values()]
    assert seen == [[SHAPE, *state, (6,), (6,)]] and y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0.05, atol=0.05)
    for name in method.init(SHAPE):  # what is remembered keeps its dtype
        value, usual = getattr(promoted, name)[...], getattr(plain, name)[...]
        assert value.dtype == usual.dtype
        np.testing.assert_allclose(value, usual, rtol=0.05, atol=0.05)


def test_a_second_pass_always_where_it_is_asked_for():
    """By the field of a row and of Flax's layers. It changes rounding alone, so passes count."""
    x = data()

    def passes(f):
        return str(jax.make_jaxpr(f)(x)).count("name=mean_var")

    def of_row(two_pass):
        row = Row(methods.layer_norm().groups, two_pass=two_pass)
        return lambda x: row.apply(x, {}, train=True)[0]

    def in_linen(two_pass):
        layer = linen.BatchNorm(use_fast_variance=not two_pass)
        return lambda x: layer.init_with_output(KEY, x, **TRAIN)[0]

    def in_nnx(two_pass):
        options = {"use_fast_variance": not two_pass}
        return lambda x: nnx.BatchNorm(6, **options, rngs=fnnx.Rngs(0))(x)

    for make in (of_row, in_linen, in_nnx):
        assert passes(make(True)) == 2 * passes(make(False)) > 0


def test_a_tap_may_be_left_out_at_inference():
    layer, x = linen.Norm(methods.moving_average_norm(2)), data()
    variables = layer.init(KEY, x, **TRAIN)
    assert variables["_overwrite_with_gradient"]["tap"].shape == (6,)
    without = {name: t for name, t in variables.items() if not name.startswith("_")}
    same(layer.apply(without, x, **EVAL), layer.apply(variables, x, **EVAL))
    with pytest.raises(ValueError, match="tap has shape None"):
        layer.apply(without, x, **TRAIN, mutable="batch_stats")


def test_state_of_one_image_size_is_made_by_the_shape_of_an_input():
    groups = Groups(batch=1, spatial=(EACH, 1), channel=EACH)
    for method, names in (
        (Row(groups), {"mean": (4, 6)}),
        (methods.batch_group_norm(9), {"mean": (9,), "positions": (4, 6)}),
        (methods.group_norm_plus(3), {"mean": (4, 6, 6)}),
    ):
        with pytest.raises(ValueError, match="x_shape=None; expected the shape of an input"):
            of_nnx(method)
        layer = of_nnx(method, x_shape=(1, *SHAPE[1:]))
        variables = linen.Norm(method).init(KEY, data((1, *SHAPE[1:])), **TRAIN)
        for name, shape in names.items():
            assert getattr(layer, name).shape == variables["batch_stats"][name].shape == shape
        assert layer(data()).shape == SHAPE


@pytest.mark.parametrize("method", [methods.moving_average_norm(), methods.cross_iteration_norm()])
def test_channels_of_a_layer_in_front_are_its_outputs(method):
    """The last axis, also where another has as many."""
    front = fnn.Dense(8, use_bias=False)
    layer = linen.Norm(method, layer=front, channel_axis=1)
    with pytest.raises(ValueError, match="Expected its outputs, the last axis, to be the channels"):
        layer.init(KEY, jnp.ones((2, 8, 3, 8)), **TRAIN)
    dense = fnnx.Linear(8, 8, use_bias=False, rngs=fnnx.Rngs(0))
    layer = nnx.Norm(8, method, layer=dense, channel_axis=1, rngs=fnnx.Rngs(0))
    with pytest.raises(ValueError, match="Expected its outputs, the last axis, to be the channels"):
        layer(jnp.ones((2, 8, 3, 8)))
    transposed = fnn.ConvTranspose(8, (1,), transpose_kernel=True, use_bias=False)
    with pytest.raises(ValueError, match="whose kernel has them there"):
        linen.Norm(method, layer=transposed).init(KEY, jnp.ones((2, 3, 8)), **TRAIN)


def test_populations_of_pieces_are_measured():
    """Also where groups do not divide the channels, in both frameworks."""
    x = jnp.arange(48.0).reshape(2, 3, 8)
    method = methods.batch_group_norm(12)
    layer = linen.Norm(method, use_running_average=False)
    variables = layer.init(KEY, x)

    def forward(variables, x):
        return layer.apply(variables, x, mutable="batch_stats")

    found = linen.population_statistics(forward, variables, [x])["batch_stats"]
    _, want = methods.batch_group_norm(12, momentum=0.0).apply(x, method.init(x.shape), train=True)
    theirs = nnx.Norm(8, method, x_shape=x.shape, rngs=fnnx.Rngs(0))
    nnx.population_statistics(lambda layer, x: layer(x), theirs, [x])
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)
        np.testing.assert_allclose(getattr(theirs, name)[...], want[name], rtol=1e-5)
