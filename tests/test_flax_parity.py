"""The drop-in layers against installed Flax: same arguments, variables, outputs, derivatives,
updates and errors.

Where Flax and jaxnorm differ on purpose is in test_flax_differences.py.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.linen import initializers
from jax.sharding import PartitionSpec as P

import jaxnorm.linen
import jaxnorm.nnx

NAMES = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
BN, LN, RMS, GN, IN = NAMES
KEY = jax.random.key(0)
INTEGERS = (jnp.int32, jnp.bool_, jnp.uint8)


@contextlib.contextmanager
def as_in_flax(module):
    """Flax needs JAX's default promotions, which the tests switch off for our layers."""
    ours = module in (jaxnorm.linen, jaxnorm.nnx)
    with (
        jax.numpy_dtype_promotion("strict" if ours else "standard"),
        jax.numpy_rank_promotion("raise" if ours else "allow"),
    ):
        yield


def data(shape, dtype=jnp.float32, seed=1):
    """x away from zero mean, so that mean and variance both matter."""
    rng = np.random.default_rng(seed)
    if dtype in INTEGERS:
        return jnp.asarray(rng.integers(0, 2 if dtype == jnp.bool_ else 9, shape), dtype)
    x = rng.normal(1, 2, shape)
    return jnp.asarray(x + 1j * rng.normal(size=shape) if dtype == jnp.complex64 else x, dtype)


def close(ours, theirs, tolerance=2e-5):
    chex.assert_trees_all_equal_dtypes(ours, theirs)

    def wide(t):
        return np.asarray(t).astype(np.complex128 if jnp.iscomplexobj(t) else np.float64)

    chex.assert_trees_all_close(
        jax.tree.map(wide, ours), jax.tree.map(wide, theirs), rtol=tolerance, atol=tolerance
    )


def learned(tree):
    """Variables as they might be after training: no scale of 1, bias of 0, or running mean of 0."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda t: jnp.asarray(rng.uniform(0.5, 1.5, t.shape), t.dtype), tree)


def weigh(y):
    """A loss in which every element counts differently."""
    weights = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    y = y.astype(jnp.complex64 if jnp.iscomplexobj(y) else jnp.float32)
    return ((jnp.square(y.real) + jnp.square(y.imag) + y.real) * weights).sum()


def differentiated(f, params, x):
    """Output, new state, and gradients of a loss of both, in params and in x where it has any."""

    def loss(params, x):
        y, new = f(params, x)
        return weigh(y) + sum(weigh(t) for t in jax.tree.leaves(new)), (y, new)

    argnums = 0 if x.dtype in INTEGERS else (0, 1)
    grads, (y, new) = jax.grad(loss, argnums, has_aux=True)(params, x)
    return {"y": y, "new": new, "grads": grads}


def in_linen(module, name, kwargs, variables, x, mask):
    """What a linen layer gives: as initialized, in training and in evaluation, with gradients."""
    using = [{"use_running_average": use} if name == BN else {} for use in (False, True)]
    with as_in_flax(module):
        layer = getattr(module, name)(**kwargs)
        initial = layer.init_with_output(KEY, x, mask=mask, **using[0])

    def trained(params, x):
        with as_in_flax(module):
            return layer.apply(
                variables | {"params": params}, x, mask=mask, mutable=["batch_stats"], **using[0]
            )

    result = differentiated(trained, variables.get("params", {}), x)
    with as_in_flax(module):
        return result | {
            "initial": initial,
            "evaluated": layer.apply(variables, x, mask=mask, **using[1]),
        }


def same_in_linen(name, kwargs, x, mask=None, tolerance=2e-5):
    """Compare Flax's layer and ours; the compiler's optimizations would only cost time here."""
    using = {"use_running_average": False} if name == BN else {}
    with as_in_flax(linen):
        variables = learned(
            jax.eval_shape(lambda: getattr(linen, name)(**kwargs).init(KEY, x, **using))
        )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(variables, x, mask):
        return [
            in_linen(module, name, kwargs, variables, x, mask) for module in (jaxnorm.linen, linen)
        ]

    close(*both(variables, x, mask), tolerance)


def cases(*rows):
    return [
        pytest.param(
            *row, id=f"{row[0]}-{'-'.join(f'{k}={v}' for k, v in row[1].items())}-{len(row[2])}d"
        )
        for row in rows
    ]


ARGUMENTS = cases(
    (BN, {}, (6, 5)),
    (BN, {"axis": 1, "momentum": 0.7, "epsilon": 0.1}, (3, 5, 4)),
    (BN, {"axis": (-1, 1), "use_fast_variance": False}, (3, 5, 4, 2)),
    (BN, {"use_bias": False, "axis": (1,)}, (2, 3, 2, 2, 2)),
    (BN, {"use_scale": False, "use_bias": False}, (4, 3, 2)),
    (LN, {}, (6, 5)),
    (LN, {"reduction_axes": (1, 2), "feature_axes": (-1, 2)}, (3, 5, 4)),
    (
        LN,
        {"reduction_axes": (-1, -2), "feature_axes": (3, 1), "use_fast_variance": False},
        (2, 5, 4, 3),
    ),
    (LN, {"reduction_axes": 0, "feature_axes": -1, "use_bias": False, "epsilon": 0.1}, (5, 4)),
    (LN, {"reduction_axes": (), "use_scale": False}, (3, 4)),
    (RMS, {}, (6, 5)),
    (RMS, {"reduction_axes": (1, -1), "feature_axes": (1, 2), "epsilon": 0.1}, (3, 5, 4)),
    (RMS, {"use_scale": False, "use_fast_variance": False}, (2, 3, 2, 4)),
    (GN, {"num_groups": 2}, (4, 8)),
    (GN, {"num_groups": 2}, (8,)),
    (GN, {"num_groups": None, "group_size": 2, "epsilon": 0.1}, (2, 5, 6)),
    (GN, {"num_groups": 3, "reduction_axes": (2, 3), "use_fast_variance": False}, (2, 3, 4, 6)),
    (GN, {"num_groups": 2, "reduction_axes": (-1, 0)}, (3, 2, 4)),
    (GN, {"num_groups": 2, "reduction_axes": -1, "use_bias": False}, (2, 2, 3, 2, 8)),
    (IN, {"use_bias": False}, (2, 5, 4)),
    (IN, {"feature_axes": 1, "use_fast_variance": False, "epsilon": 0.1}, (2, 3, 5, 4)),
    (IN, {"feature_axes": (-1, 2), "use_scale": False}, (2, 2, 3, 2, 4)),
    (IN, {}, (3, 4)),
)  # fmt: skip


@pytest.mark.parametrize("name, kwargs, shape", ARGUMENTS)
def test_linen_layers_compute_what_flax_computes(name, kwargs, shape):
    same_in_linen(name, kwargs, data(shape))


GRID = {
    BN: ((2, 3, 4, 5), {"axis": (-1, 1, (1, -1), (2, 3))}),
    LN: (
        (3, 4, 5, 2),
        {"reduction_axes": (-1, (1, 2), (1, -1), 2), "feature_axes": (-1, (1, 2), (-1, 1))},
    ),
    RMS: ((3, 4, 5, 2), {"reduction_axes": (-1, (1, 2)), "feature_axes": (-1, (1, 2))}),
    GN: (
        (3, 2, 4, 6),
        {"num_groups": (1, 2, 6), "reduction_axes": (None, (1, -1), (2, 3), (0, 1, 2, 3))},
    ),
    IN: ((2, 3, 4, 5), {"feature_axes": (-1, 1, (2, 3))}),
}


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_linen_layers_compute_what_flax_computes_over_the_grid(name, masked, fast):
    shape, options = GRID[name]
    x = data(shape)
    # no line of indices is masked as a whole: what an empty set gives is a deliberate difference
    mask = jnp.asarray(np.indices(shape).sum(0) % 4 != 0) if masked else None
    for values in itertools.product(*options.values()):
        same_in_linen(
            name,
            dict(zip(options, values, strict=True)) | {"use_fast_variance": fast, "epsilon": 0.1},
            x,
            mask,
        )


MASKS = [
    (BN, {}, (6, 5), (6, 1)),
    (BN, {"axis": 1}, (4, 2, 3), (4, 1, 3)),
    (BN, {}, (4, 2, 3), (4, 2, 3)),
    (BN, {}, (4, 2, 3), (2, 3)),
    (BN, {}, (2, 2, 3, 3), (2, 2, 3, 1)),
    (LN, {}, (4, 6), (6,)),
    (LN, {"reduction_axes": (1, 2)}, (3, 4, 2), (3, 4, 1)),
    (RMS, {}, (4, 3, 6), (1, 1, 6)),
    (RMS, {}, (4, 3, 6), (4, 3, 6)),
    (GN, {"num_groups": 2}, (3, 5, 4), (3, 5, 4)),
    (GN, {"num_groups": 2}, (3, 5, 4), (1, 5, 4)),
    (IN, {}, (3, 5, 4), (3, 5, 1)),
    (IN, {"feature_axes": 1}, (2, 3, 4, 2), (4, 1)),
]


@pytest.mark.parametrize(
    "name, kwargs, shape, mask_shape", MASKS, ids=lambda v: str(v).replace(" ", "")
)
def test_masks_that_flax_accepts_give_what_flax_gives(name, kwargs, shape, mask_shape):
    mask = jnp.asarray(np.random.default_rng(3).random(mask_shape) < 0.7)
    same_in_linen(name, kwargs, data(shape), mask)


EXTRA = {BN: {}, LN: {}, RMS: {}, GN: {"num_groups": 2}, IN: {}}
HALF = {jnp.bfloat16: 3e-2, jnp.float16: 4e-3}
VALUES = [
    (BN, jnp.bfloat16, None, jnp.float32),
    (BN, jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (BN, jnp.int32, None, jnp.float32),
    (LN, jnp.float16, jnp.float16, jnp.float32),
    (LN, jnp.complex64, None, jnp.float32),
    (RMS, jnp.bool_, None, jnp.float32),
    (GN, jnp.bfloat16, None, jnp.bfloat16),
    (GN, jnp.complex64, None, jnp.float32),
    (IN, jnp.int32, jnp.float16, jnp.float32),
]


def dtype_name(dtype):
    return dtype and jnp.dtype(dtype).name


@pytest.mark.parametrize(
    "name, x_dtype, dtype, param_dtype",
    VALUES,
    ids=lambda v: v if isinstance(v, str) else dtype_name(v),
)
def test_values_agree_in_other_dtypes(name, x_dtype, dtype, param_dtype):
    kwargs = EXTRA[name] | {"dtype": dtype, "param_dtype": param_dtype}
    tolerance = max(HALF.get(d, 2e-5) for d in (x_dtype, dtype, param_dtype))
    same_in_linen(name, kwargs, data((4, 3, 4), x_dtype), tolerance=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_variables_and_outputs_are_those_of_flax(name):
    """Every combination that Flax takes; traced only."""
    floats = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.float64)

    def traced(module, kwargs, dtype):
        def run(x):
            with as_in_flax(module):
                layer = getattr(module, name)(**EXTRA[name], **kwargs)
                return layer.init_with_output(
                    KEY, x, **({"use_running_average": False} if name == BN else {})
                )

        return jax.eval_shape(run, jax.ShapeDtypeStruct((4, 3, 4), dtype))

    compared = 0
    with jax.enable_x64(True):
        for dtype, param_dtype, of_x in itertools.product(
            (None, *floats), floats, (*floats, *INTEGERS)
        ):
            kwargs = {"dtype": dtype, "param_dtype": param_dtype}
            for forced in (True, False) if name == BN else (True,):
                kwargs["force_float32_reductions"] = forced
                try:
                    theirs = traced(linen, kwargs, of_x)
                except (TypeError, ValueError, Warning):
                    # Flax refuses it, or warns of complex x for real output
                    continue
                ours = traced(jaxnorm.linen, kwargs, of_x)
                if name == BN and jnp.complex64 in (of_x, dtype, param_dtype):
                    # see complex-input in test_flax_differences.py
                    del theirs[1]["batch_stats"], ours[1]["batch_stats"]
                assert ours == theirs, {k: str(v) for k, v in kwargs.items()} | {"x": of_x}
                compared += 1
    assert compared > 100


FLAGS = {"use_running_average": False}
MODULES = [(linen, jaxnorm.linen), (nnx, jaxnorm.nnx)]


@pytest.mark.parametrize("theirs, ours", MODULES, ids=["linen", "nnx"])
@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_flax_and_what_is_new_comes_after(name, theirs, ours):
    def constructor(cls):
        if issubclass(cls, linen.Module):
            return [
                (f.name, f.default, f.kw_only)
                for f in dataclasses.fields(cls)
                if f.name not in ("parent", "name")
            ]
        return [
            (p.name, p.default, p.kind)
            for p in list(inspect.signature(cls.__init__).parameters.values())[1:]
        ]

    def call(cls):
        return [
            (p.name, p.default, p.kind) for p in inspect.signature(cls.__call__).parameters.values()
        ]

    theirs, ours = getattr(theirs, name), getattr(ours, name)
    for arguments in (constructor, call):
        expected, got = arguments(theirs), arguments(ours)
        assert [a[0] for a in got[: len(expected)]] == [a[0] for a in expected]
        # initializers are made anew in each module of Flax
        for a, b in zip(got, expected, strict=False):
            assert a[1:] == b[1:] or (
                a[0].endswith("_init") and a[1].__qualname__ == b[1].__qualname__
            ), a[0]


def test_models_have_the_same_trees():
    """Names that Flax makes up come from the class, also when it is made by functools.partial."""

    class Model(linen.Module):
        norms: object

        @linen.compact
        def __call__(self, x):
            norm = functools.partial(self.norms.BatchNorm, use_running_average=False, momentum=0.9)
            for layer in (
                norm(),
                norm(),
                norm(name="last"),
                self.norms.LayerNorm(),
                self.norms.RMSNorm(),
            ):
                x = layer(x)
            return self.norms.InstanceNorm()(self.norms.GroupNorm(2)(x))

    def variables(module):
        with as_in_flax(module):
            return jax.eval_shape(lambda: Model(module).init(KEY, jnp.ones((2, 3, 4))))

    assert variables(jaxnorm.linen) == variables(linen)
    assert {"BatchNorm_0", "BatchNorm_1", "last", "LayerNorm_0"} < set(
        variables(jaxnorm.linen)["params"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_custom_initializers_draw_the_same_numbers(name):
    kwargs = EXTRA[name] | {"scale_init": initializers.normal(), "param_dtype": jnp.bfloat16}
    kwargs |= {} if name == RMS else {"bias_init": initializers.truncated_normal(2.0)}
    x = data((4, 3, 4))

    def variables(module):
        with as_in_flax(module):
            return getattr(module, name)(**kwargs).init(
                {"params": KEY}, x, **(FLAGS if name == BN else {})
            )

    chex.assert_trees_all_equal(variables(jaxnorm.linen), variables(linen))


def test_partitioned_parameters_stay_partitioned():
    def variables(module):
        with as_in_flax(module):
            init = linen.with_partitioning(initializers.ones, ("model",))
            return module.LayerNorm(scale_init=init).init_with_output(KEY, data((3, 4)))

    (y, ours), (expected, theirs) = variables(jaxnorm.linen), variables(linen)
    close(y, expected)
    assert linen.get_partition_spec(ours) == linen.get_partition_spec(theirs)
    assert linen.get_partition_spec(ours)["params"]["scale"] == P("model")


ERRORS = {
    "flag nowhere": (BN, {}, {}),
    "flag twice": (BN, FLAGS, FLAGS),
    "no such number of groups": (GN, {"num_groups": 3}, {}),
    "default number of groups": (GN, {}, {}),
    "zero groups": (GN, {"num_groups": 0}, {}),
    "groups and size": (GN, {"group_size": 2}, {}),
    "neither groups nor size": (GN, {"num_groups": None}, {}),
    "no such size of groups": (GN, {"num_groups": None, "group_size": 3}, {}),
    "reduction without channels": (GN, {"num_groups": 2, "reduction_axes": (0, 1)}, {}),
    "features of the batch": (IN, {"feature_axes": (0, -1)}, {}),
    "parameters missing": (LN, {}, {"variables": {}}),
}


def message_of(error):
    return " ".join(str(error).split())


@pytest.mark.parametrize("case", ERRORS)
def test_errors_open_with_the_sentence_of_flax(case):
    name, kwargs, flags = ERRORS[case]

    def fail(module):
        with as_in_flax(module), pytest.raises(Exception) as caught:  # noqa: B017, PT011
            layer = getattr(module, name)(**kwargs)
            if "variables" in flags:
                layer.apply(flags["variables"], data((2, 3, 4)))
            layer.init(KEY, data((2, 3, 4)), **flags)
        return caught.value

    ours, theirs = fail(jaxnorm.linen), fail(linen)
    assert type(ours) is type(theirs)
    assert message_of(ours).startswith(message_of(theirs))


def test_batch_stats_that_may_not_change_are_an_error_as_in_flax():
    x = data((4, 3))
    variables = jaxnorm.linen.BatchNorm().init(KEY, x, **FLAGS)
    for module in (linen, jaxnorm.linen):
        with as_in_flax(module), pytest.raises(flax.errors.ModifyScopeVariableError):
            module.BatchNorm().apply(variables, x, **FLAGS)


# nnx


def nnx_layer(module, name, channels, kwargs):
    with as_in_flax(module):
        return getattr(module, name)(channels, **kwargs, rngs=nnx.Rngs(3))


def in_nnx(module, name, channels, kwargs, state, x, mask):
    """What an nnx layer gives: as constructed, in training and in evaluation, with gradients."""
    layer = nnx_layer(module, name, channels, kwargs)
    initial = nnx.to_pure_dict(nnx.state(layer))
    nnx.update(layer, state)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def trained(params, x):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        with as_in_flax(module):
            y = layer(x, mask=mask)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    result = differentiated(trained, params, x)
    result["grads"] = jax.tree.leaves(result["grads"])
    layer.eval()
    with as_in_flax(module):
        return result | {"initial": initial, "evaluated": layer(x, mask=mask)}


def same_in_nnx(name, channels, kwargs, x, mask=None, tolerance=2e-5):
    state = learned(nnx.state(nnx_layer(nnx, name, channels, kwargs)))

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(state, x, mask):
        return [
            in_nnx(module, name, channels, kwargs, state, x, mask) for module in (jaxnorm.nnx, nnx)
        ]

    close(*both(state, x, mask), tolerance)


NNX_ARGUMENTS = [
    (BN, {}, (6, 5), None),
    (BN, {"axis": 1, "momentum": 0.7, "epsilon": 0.1, "use_bias": False}, (3, 5, 2, 2), None),
    (BN, {"use_fast_variance": False, "use_scale": False}, (4, 3, 2), (4, 3, 1)),
    (
        BN,
        {"scale_init": initializers.normal(), "bias_init": initializers.normal()},
        (4, 3, 2),
        (4, 3, 2),
    ),
    (LN, {}, (6, 5), None),
    (
        LN,
        {"reduction_axes": (1, 2), "feature_axes": (1, 2), "use_fast_variance": False},
        (2, 5, 4),
        (2, 1, 4),
    ),
    (LN, {"reduction_axes": (1, 2), "use_bias": False}, (2, 3, 4), None),
    (RMS, {"reduction_axes": (1, -1), "epsilon": 0.1}, (3, 5, 4), (3, 1, 4)),
    (RMS, {"use_scale": False}, (2, 2, 3, 2, 4), None),
    (GN, {"num_groups": 2}, (2, 5, 6), (2, 5, 6)),
    (
        GN,
        {"num_groups": None, "group_size": 2, "use_bias": False, "use_fast_variance": False},
        (2, 3, 4, 6),
        None,
    ),
    (IN, {}, (2, 5, 4), None),
    (IN, {"feature_axes": 1, "epsilon": 0.1, "use_scale": False}, (2, 3, 5, 4), (2, 1, 5, 4)),
]


@pytest.mark.parametrize("name, kwargs, shape, mask_shape", NNX_ARGUMENTS)
def test_nnx_layers_compute_what_flax_computes(name, kwargs, shape, mask_shape):
    axes = kwargs.get("feature_axes", kwargs.get("axis", -1))
    channels = int(np.prod([shape[i] for i in np.atleast_1d(axes)]))
    mask = (
        None
        if mask_shape is None
        else jnp.asarray(np.random.default_rng(3).random(mask_shape) < 0.7)
    )
    same_in_nnx(name, channels, kwargs, data(shape), mask)


@pytest.mark.parametrize(
    "name, of_x, dtype, param_dtype",
    [
        (BN, jnp.bfloat16, None, jnp.float32),
        (BN, jnp.int32, jnp.float32, jnp.bfloat16),
        (LN, jnp.float16, jnp.float16, jnp.float32),
        (RMS, jnp.complex64, None, jnp.float32),
        (GN, jnp.bfloat16, None, jnp.bfloat16),
        (IN, jnp.bool_, None, jnp.float32),
    ],
    ids=lambda v: v if isinstance(v, str) else dtype_name(v),
)
def test_nnx_values_agree_in_other_dtypes(name, of_x, dtype, param_dtype):
    tolerance = max(HALF.get(d, 2e-5) for d in (of_x, dtype, param_dtype))
    kwargs = EXTRA[name] | {"dtype": dtype, "param_dtype": param_dtype}
    same_in_nnx(name, 4, kwargs, data((4, 3, 4), of_x), tolerance=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_of_nnx_outputs_are_those_of_flax(name):
    floats = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64)

    def traced(module, kwargs, dtype):
        def run(x):
            layer = nnx_layer(module, name, 4, EXTRA[name] | kwargs)
            with as_in_flax(module):
                return [
                    layer(x, **flags)
                    for flags in (({}, {"use_running_average": True}) if name == BN else ({},))
                ]

        return jax.eval_shape(run, jax.ShapeDtypeStruct((4, 3, 4), dtype))

    for dtype, param_dtype, of_x in itertools.product(
        (None, *floats), floats, (*floats, *INTEGERS)
    ):
        kinds = {jnp.issubdtype(d, jnp.complexfloating) for d in (dtype or of_x, of_x, param_dtype)}
        if name == BN and True in kinds:
            continue  # running statistics are real: see test_flax_differences.py
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        try:
            theirs = traced(nnx, kwargs, of_x)
        except (TypeError, ValueError, Warning):
            continue
        assert traced(jaxnorm.nnx, kwargs, of_x) == theirs, (kwargs, of_x)


def variables_of(layer):
    return {
        "/".join(map(str, path)): (
            type(v),
            v.shape,
            v.dtype,
            {k: w for k, w in v.get_metadata().items()},
        )
        for path, v in nnx.to_flat_state(nnx.state(layer))
    }


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_nnx_variables_attributes_and_random_streams_are_those_of_flax(name, used):
    kwargs = EXTRA[name] | {
        "use_scale": used,
        "scale_metadata": {"sharding_hint": "a"},
        "param_dtype": jnp.float16,
    }
    kwargs |= {} if name == RMS else {"use_bias": used, "bias_metadata": {"sharding_hint": "b"}}
    made = []
    for module in (jaxnorm.nnx, nnx):
        rngs = nnx.Rngs(3)
        with as_in_flax(module):
            made.append((getattr(module, name)(4, **kwargs, rngs=rngs), rngs))
    (ours, our_rngs), (theirs, their_rngs) = made
    assert variables_of(ours) == variables_of(theirs)
    assert our_rngs.params.count[...] == their_rngs.params.count[...]
    public = {k for k in vars(theirs) if not k.startswith("_")}
    assert public <= set(vars(ours))
    plain = {k for k in public if isinstance(getattr(theirs, k), int | float | str | None)}
    assert {k: getattr(ours, k) for k in plain} == {k: getattr(theirs, k) for k in plain}


@pytest.mark.parametrize(
    "case", [case for case in ERRORS if case not in ("flag twice", "parameters missing")]
)
def test_nnx_errors_open_with_the_sentence_of_flax(case):
    name, kwargs, _ = ERRORS[case]
    kwargs = {"use_running_average": None} if case == "flag nowhere" else kwargs

    def fail(module):
        with as_in_flax(module):
            getattr(module, name)(4, **kwargs, rngs=nnx.Rngs(0))(data((2, 3, 4)))

    with pytest.raises(ValueError) as ours:
        fail(jaxnorm.nnx)
    if case == "reduction without channels":
        return  # Flax's nnx forgot the check and computes something else
    with pytest.raises(ValueError) as theirs:
        fail(nnx)
    first, _, _ = message_of(theirs.value).partition(".")
    assert message_of(ours.value).startswith(first)


def test_train_eval_and_view_switch_nnx_layers_as_in_flax():
    class Model(nnx.Module):
        def __init__(self, module):
            self.first = nnx_layer(module, BN, 4, {})
            self.second = nnx_layer(module, LN, 4, {})

        def __call__(self, x, **flags):
            return self.second(self.first(x, **flags))

    def history(module):
        x, model, out = data((4, 3, 4)), Model(module), []
        viewed = nnx.view(model, use_running_average=True)
        with as_in_flax(module):
            for switch in (model.train, model.eval, model.train):
                switch()
                out += [model(x), nnx.to_pure_dict(nnx.state(model))]
            out += [
                model(x, use_running_average=True),
                viewed(x),
                nnx.to_pure_dict(nnx.state(viewed)),
            ]
            # the view shares variables with the model
            model(x)
            out.append(nnx.to_pure_dict(nnx.state(viewed)))
        return out, [model.first.use_running_average, viewed.first.use_running_average]

    (ours, our_flags), (theirs, their_flags) = history(jaxnorm.nnx), history(nnx)
    close(ours, theirs)
    assert our_flags == their_flags == [False, True]


# checkpoints


def test_a_linen_checkpoint_of_flax_loads_unchanged():
    class Model(linen.Module):
        norms: object

        @linen.compact
        def __call__(self, x, train=False):
            x = self.norms.BatchNorm(use_running_average=not train, axis=(1, -1))(x)
            x = self.norms.GroupNorm(2)(self.norms.LayerNorm()(x))
            return self.norms.InstanceNorm()(self.norms.RMSNorm()(x))

    x = data((3, 5, 4))
    with as_in_flax(linen):
        saved = learned(Model(linen).init(KEY, x))
        expected = Model(linen).apply(saved, x)
    blank = Model(jaxnorm.linen).init(jax.random.key(1), x)
    loaded = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(saved))
    chex.assert_trees_all_equal(loaded, saved)
    close(Model(jaxnorm.linen).apply(loaded, x), expected)


def test_an_nnx_checkpoint_of_flax_loads_unchanged():
    def model(module):
        layers = [nnx_layer(module, name, 4, EXTRA[name]) for name in NAMES]
        return nnx.Sequential(*layers)

    x = data((3, 5, 4))
    theirs, ours = model(nnx), model(jaxnorm.nnx)
    nnx.update(theirs, learned(nnx.state(theirs)))
    theirs.eval(), ours.eval()
    nnx.update(ours, nnx.state(theirs))
    with as_in_flax(nnx):
        expected = theirs(x)
    close(ours(x), expected)
    saved = flax.serialization.to_bytes(nnx.to_pure_dict(nnx.state(theirs)))
    fresh = nnx.state(model(jaxnorm.nnx))
    nnx.replace_by_pure_dict(fresh, flax.serialization.from_bytes(nnx.to_pure_dict(fresh), saved))
    chex.assert_trees_all_equal(nnx.to_pure_dict(fresh), nnx.to_pure_dict(nnx.state(theirs)))


# named axes


def mapped(context, f):
    """f for the data of one device, over 4 of them."""
    if context == "vmap":
        return jax.jit(jax.vmap(f, axis_name="i"))
    if context == "pmap":
        return jax.pmap(f, axis_name="i", devices=jax.devices()[:4])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("i",))

    def of_part(x):
        return jax.tree.map(lambda t: t[None], f(x[0]))

    return jax.jit(jax.shard_map(of_part, mesh=mesh, in_specs=P("i"), out_specs=P("i")))


NAMED = [
    (BN, {}, None),
    (BN, {}, [[0, 1], [2, 3]]),
    (LN, {"reduction_axes": -1}, None),
    (RMS, {}, [[0, 2], [3, 1]]),
    (GN, {"num_groups": 2}, None),
    (IN, {}, None),
]


@pytest.mark.parametrize("context", ["pmap", "vmap", "shard_map"])
@pytest.mark.parametrize("name, kwargs, groups", NAMED)
def test_statistics_over_a_named_axis_are_those_of_flax(name, kwargs, groups, context):
    if groups and context != "pmap":
        pytest.skip("Flax has device groups in pmap only")
    x = data((4, 3, 2, 4))
    variables = (
        jaxnorm.linen.BatchNorm().init(KEY, x[0], **FLAGS)
        if name == BN
        else {"params": {"scale": jnp.ones(4)}}
    )
    variables = learned(
        variables if name in (BN, RMS) else {"params": {"scale": jnp.ones(4), "bias": jnp.ones(4)}}
    )

    def run(module):
        def of_part(x):
            def output(params, x):
                with as_in_flax(module):
                    layer = getattr(module, name)(**kwargs, axis_name="i", axis_index_groups=groups)
                    flags = FLAGS if name == BN else {}
                    return layer.apply(
                        variables | {"params": params}, x, mutable=["batch_stats"], **flags
                    )

            return differentiated(output, variables["params"], x)

        return mapped(context, of_part)(x)

    close(run(jaxnorm.linen), run(linen))


def test_initializing_needs_no_named_axis_and_updates_nothing():
    x = np.asarray(data((4, 3)))
    for module in (linen, jaxnorm.linen):
        with as_in_flax(module):
            layer = module.BatchNorm(axis_name="i", axis_index_groups=[[0], [1]])
            y, variables = layer.init_with_output(KEY, x, **FLAGS)
        np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), atol=1e-5)
        assert variables["batch_stats"]["mean"].tolist() == [0, 0, 0]


def test_nnx_over_a_named_axis_is_as_in_flax():
    x = data((4, 3, 4))

    def run(module):
        graphdef, state = nnx.split(nnx_layer(module, BN, 4, {"axis_name": "i"}))

        def of_part(x):
            layer = nnx.merge(graphdef, state, copy=True)
            with as_in_flax(module):
                y = layer(x)
            return y, nnx.to_pure_dict(nnx.state(layer))

        return mapped("vmap", of_part)(x)

    close(run(jaxnorm.nnx), run(nnx))


def test_axes_may_be_numpy_integers():
    x = data((2, 3, 4))
    for name, kwargs in ((BN, {"axis": np.int64(2)}), (LN, {"reduction_axes": np.array([1, 2])})):
        same_in_linen(name, kwargs, x)


@pytest.mark.parametrize("name", NAMES)
def test_a_custom_promote_dtype_sees_what_it_sees_in_flax(name):
    x, seen = data((4, 3, 4)), []

    def run(module):
        def promote(values, *, dtype):
            seen.append([None if v is None else v.shape for v in values])
            return tuple(None if v is None else v.astype(jnp.bfloat16) for v in values)

        layer = nnx_layer(
            module, name, 4, EXTRA[name] | {"promote_dtype": promote, "dtype": jnp.float32}
        )
        with as_in_flax(module):
            return layer(x)

    close(run(jaxnorm.nnx), run(nnx), 4e-2)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "name, kwargs", [(GN, {"num_groups": 3}), (GN, {"num_groups": None, "group_size": 2})]
)
def test_num_features_is_held_to(name, kwargs):
    """Without parameters nothing else would notice, and the groups would be those of another number
    of channels."""
    for module in (nnx, jaxnorm.nnx):
        layer = nnx_layer(module, name, 6, kwargs | {"use_scale": False, "use_bias": False})
        with as_in_flax(module), pytest.raises((TypeError, ValueError)):
            layer(data((2, 5, 12)))
