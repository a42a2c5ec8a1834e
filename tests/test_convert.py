"""Conversion of layers by arrays made by hand: what other libraries compute is written out in
NumPy, in double precision, and none of them is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flinen
from flax import nnx as fnnx
from helpers import data

from jaxnorm import EACH, Groups, Row, convert, linen, methods, nnx

C = 3
XS = [data(5, 4, 2, C, seed=i) for i in range(4)]
OTHERS = (0, 1, 2)
SCALE, BIAS = data(C, seed=8), data(C, seed=9)
AFFINE = {"scale": SCALE.astype("f4"), "bias": BIAS.astype("f4")}


def moments_of(x):
    return x.mean(OTHERS), x.var(OTHERS)


def normalized(x, mean, var, epsilon=1e-5):
    return (x - mean) / np.sqrt(var + epsilon) * SCALE + BIAS


def averaged(momentum, mean=0.0, var=1.0, xs=XS, correction=0):
    """Running statistics after the batches, from those before."""
    mean, var = np.full(C, mean), np.full(C, var)
    for x in xs:
        m, v = moments_of(x)
        n = x.size // C
        mean = momentum * mean + (1 - momentum) * m
        var = momentum * var + (1 - momentum) * v * n / (n - correction)
    return mean, var


def close(got, want, rtol=2e-6, atol=2e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=rtol, atol=atol)


def steps(method, state, params=AFFINE, xs=XS, **options):
    for x in xs:
        y, state = method.apply(x.astype("f4"), state, train=True, **params, **options)
    return y, state


def test_torch_goes_on():
    """With the unbiased variance, and a count of its batches."""
    arrays = {
        "weight": SCALE.astype("f4"),
        "bias": BIAS.astype("f4"),
        "running_mean": np.full(C, 0.5, "f4"),
        "running_var": np.full(C, 2.0, "f4"),
        "num_batches_tracked": np.array(7),
    }
    method = convert.settings("torch.nn.BatchNorm2d")["method"]
    params, state = convert.from_torch(arrays)
    y, _ = method.apply(XS[0].astype("f4"), state, train=False, **params)
    close(y, normalized(XS[0], 0.5, 2.0))
    y, state = steps(method, state, params)
    close(y, normalized(XS[-1], *moments_of(XS[-1])))
    mean, var = averaged(0.9, 0.5, 2.0, correction=1)
    back = convert.to_torch(params, state)
    close(back["running_mean"], mean)
    close(back["running_var"], var)
    assert back["num_batches_tracked"] == 7 + len(XS)
    assert back["num_batches_tracked"].dtype == np.int64


def cumulative_of_torch():
    """The averages over XS, the first of which torch has seen."""
    seen = [(m, v * 40 / 39) for m, v in map(moments_of, XS)]
    first = {"running_mean": seen[0][0].astype("f4"), "running_var": seen[0][1].astype("f4")}
    means, variances = zip(*seen, strict=True)
    return first | {"num_batches_tracked": 1}, np.mean(means, 0), np.mean(variances, 0)


def test_a_cumulative_average_of_torch_goes_on():
    arrays, mean, var = cumulative_of_torch()
    method = convert.settings("torch.nn.BatchNorm2d", momentum=None)["method"]
    params, state = convert.from_torch(arrays, momentum=None)
    _, state = steps(method, state, params, XS[1:])
    close(state["mean"], mean)
    close(state["var"], var)
    assert convert.to_torch({}, state)["num_batches_tracked"] == len(XS)


def test_layers_count_and_average_cumulatively():
    """Flax's names too, once the counts are beside their statistics."""
    arrays, mean, var = cumulative_of_torch()
    _, state = convert.from_torch(arrays, momentum=None)
    layer = linen.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)
    variables = {"batch_stats": state}
    nnx_layer = nnx.BatchNorm(C, use_bias=False, use_scale=False, rngs=fnnx.Rngs(0))
    for name, t in state.items():
        setattr(nnx_layer, name, fnnx.BatchStat(jnp.asarray(t)))
    for x in XS[1:]:
        _, variables = layer.apply(variables, x.astype("f4"), mutable="batch_stats")
        nnx_layer(jnp.asarray(x, "f4"))
    new = variables["batch_stats"]
    for got in (new, {name: getattr(nnx_layer, name)[...] for name in state}):
        close(got["mean"], mean)
        close(got["var"], var)
        assert int(got["calls"]) == len(XS) and got["calls"].dtype == jnp.int32


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_batch_norm_with_a_correction_stores_what_torch_stores(library):
    mean, var = averaged(0.9, correction=1)
    if library == "linen":
        layer = linen.BatchNorm(use_running_average=False, momentum=0.9, correction=1)
        variables = layer.init(jax.random.key(0), XS[0].astype("f4"))
        for x in XS:
            _, new = layer.apply(variables, x.astype("f4"), mutable="batch_stats")
            variables = dict(variables) | dict(new)
        got = variables["batch_stats"]
    else:
        layer = nnx.BatchNorm(C, momentum=0.9, correction=1, rngs=fnnx.Rngs(0))
        for x in XS:
            layer(jnp.asarray(x, "f4"))
        got = {"mean": layer.mean[...], "var": layer.var[...]}
    close(got["mean"], mean)
    close(got["var"], var)


def of_haiku(momentum, xs):
    """Haiku's averages after the batches: hidden, average and counter, of shape (1, 1, 1, C)."""
    held = 1 - momentum ** len(xs)
    arrays = {}
    for name, hidden in zip(("mean_ema", "var_ema"), averaged(momentum, 0, 0, xs), strict=True):
        hidden = hidden.reshape(1, 1, 1, C).astype("f4")
        arrays[name] = {
            "hidden": hidden,
            "average": (hidden / held).astype("f4"),
            "counter": np.array(len(xs), "i4"),
        }
    return arrays


def test_haiku_goes_on():
    affine = {"scale": SCALE.reshape(1, 1, 1, C), "offset": BIAS.reshape(1, 1, 1, C)}
    method = convert.settings(
        "haiku.BatchNorm", create_scale=True, create_offset=True, decay_rate=0.75
    )["method"]
    params, state = convert.from_haiku(affine | of_haiku(0.75, XS[:2]), decay_rate=0.75)
    assert params["scale"].shape == state["mean"].shape == (C,)
    params = {name: t.astype("f4") for name, t in params.items()}
    want = of_haiku(0.75, XS[:2])
    y, _ = method.apply(XS[2].astype("f4"), state, train=False, **params)
    close(y, normalized(XS[2], want["mean_ema"]["average"], want["var_ema"]["average"]))
    _, state = steps(method, state, params, XS[2:])
    back = convert.to_haiku(params, state, decay_rate=0.75)
    for ema, parts in of_haiku(0.75, XS).items():
        for part, t in parts.items():
            close(back[f"{ema}/{part}"], t)
            assert back[f"{ema}/{part}"].dtype == t.dtype


def test_a_plain_average_becomes_a_debiased_one_that_goes_on_as_it_would():
    """Nothing is left in it of its first values, so that later batches weigh as in a plain one."""
    state = dict(zip(("mean", "var"), (t.astype("f4") for t in averaged(0.9)), strict=True))
    arrays = convert.to_haiku({}, state, decay_rate=0.9)
    _, again = convert.from_haiku(arrays, decay_rate=0.9)
    np.testing.assert_array_equal(again["count"], 1)
    plain, debiased = (
        methods.batch_norm(momentum=0.9),
        methods.batch_norm(momentum=0.9, debias=True),
    )
    want, got = steps(plain, state, {})[1], steps(debiased, again, {})[1]
    close(got["mean"], want["mean"])
    close(got["var"], want["var"])


@pytest.mark.parametrize("count", [0, 1, 2, 10, 50, 1000])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_a_count_says_how_many_calls_there_were(momentum, count):
    """As far as float32 can tell, so that the averages agree."""
    values = {"mean": np.ones(C, "f4"), "var": np.ones(C, "f4")}
    state = convert._debiased.counted(values, momentum, np.array(count))
    without = {name: t for name, t in state.items() if name != "calls"}
    again = convert._debiased.calls_of(without, momentum, "test")
    same = convert._debiased.counted(values, momentum, again)
    close(same["count"], state["count"], rtol=2e-7, atol=0)
    if count <= 10 and momentum:
        assert again == count


def test_equinox_goes_on_with_the_right_average():
    """Its hidden variance starts at 1, which its own division leaves in it."""
    hidden_mean, hidden_var = averaged(0.75, 0, 1, XS[:2])
    arrays = {"counter": 2, "hidden_mean": hidden_mean, "hidden_var": hidden_var}
    arrays = {
        name: np.asarray(t, "i4" if name == "counter" else "f4") for name, t in arrays.items()
    }
    affine = {"weight": AFFINE["scale"], "bias": AFFINE["bias"]}
    params, state = convert.from_equinox(affine | arrays, momentum=0.75)
    held = 1 - 0.75**2
    mean, var = (t / held for t in averaged(0.75, 0, 0, XS[:2]))
    close(state["mean"], mean)
    close(state["var"], var)
    method = convert.settings("equinox.nn.BatchNorm", mode="batch", momentum=0.75)["method"]
    y, _ = method.apply(XS[2].astype("f4"), state, train=False, **params)
    close(y, normalized(XS[2], mean, var))
    _, state = steps(method, state, params, XS[2:])
    back = convert.to_equinox(params, state, momentum=0.75)
    for name, t in zip(("hidden_mean", "hidden_var"), averaged(0.75, 0, 1), strict=True):
        close(back[name], t)
    assert back["counter"] == 4


def test_equinox_before_the_first_step():
    arrays = {
        "counter": np.zeros((), "i4"), "hidden_mean": np.zeros(C, "f4"),
        "hidden_var": np.ones(C, "f4"),
    }  # fmt: skip
    _, state = convert.from_equinox(arrays)
    assert state["mean"].tolist() == [0] * C and state["var"].tolist() == [1] * C
    back = convert.to_equinox({}, state)
    assert all(np.array_equal(back[name], t) for name, t in arrays.items())
    unset = {"first_time": np.array(True), "mean": np.full(C, np.nan), "var": np.full(C, np.nan)}
    _, state = convert.from_equinox(unset)
    assert state["mean"].tolist() == [0] * C and state["train_var"].tolist() == [1] * C
    assert bool(convert.to_equinox({}, state)["first_time"])


def test_keras_with_renorm_goes_on():
    std = np.array([2.0, 1.0, 0.5])
    arrays = {
        "gamma": SCALE, "beta": BIAS,
        "moving_mean": BIAS, "moving_variance": std**2 - 1e-3, "moving_stddev": std,
        "renorm_mean": BIAS, "renorm_stddev": std,
    }  # fmt: skip
    arrays = {name: t.astype("f4") for name, t in arrays.items()}
    settings = convert.settings("keras.layers.BatchNormalization", renorm=True, momentum=0.99)
    params, state = convert.from_keras(arrays)
    y, _ = settings["method"].apply(XS[0].astype("f4"), state, train=False, **params)
    close(y, normalized(XS[0], BIAS, std**2 - 1e-3, epsilon=1e-3))
    back = convert.to_keras(params, state, epsilon=1e-3)
    assert back.keys() == arrays.keys()
    for name, t in arrays.items():
        close(back[name], t)


def test_batch_renorm_of_sbx_goes_on():
    """Where epsilon is small, a step after the warm-up is the same; the averages differ."""
    epsilon, running_mean, running_var = 1e-9, BIAS, np.array([4.0, 1.0, 0.25])
    arrays = {
        **AFFINE,
        "mean": running_mean.astype("f4"), "var": running_var.astype("f4"),
        "r_max": 3, "d_max": 5, "steps": 100_000,
    }  # fmt: skip
    method = convert.settings("sbx.BatchRenorm", epsilon=epsilon)["method"]
    assert convert.settings("sbx.BatchRenorm")["method"].epsilon == 1e-3
    params, state = convert.from_sbx(arrays, epsilon=epsilon)
    x = XS[0]
    y, _ = method.apply(x.astype("f4"), state, train=False, **params)
    close(y, normalized(x, running_mean, running_var, epsilon))
    mean, var = moments_of(x)
    std = np.sqrt(var + epsilon)
    r = np.clip(std / np.sqrt(running_var + epsilon), 1 / 3, 3)
    d = np.clip((mean - running_mean) / np.sqrt(running_var + epsilon), -5, 5)
    y, new = method.apply(x.astype("f4"), state, train=True, rmax=3.0, dmax=5.0, **params)
    close(y, normalized(x, mean - d * np.sqrt(var) / r, var / r**2, epsilon))
    close(new["mean"], 0.99 * running_mean + 0.01 * mean)
    back = convert.to_sbx(params, new, epsilon=epsilon, steps=100_001)
    close(back["var"], (0.99 * np.sqrt(running_var) + 0.01 * std) ** 2)
    assert int(back["steps"]) == 100_001 and int(back["r_max"]) == 3


STATES = {
    "torch": (("mean", "var", "calls"), {}, True),
    "keras": (("mean", "var"), {}, True),
    "keras, renorm": (("mean", "std"), {}, True),
    "haiku": (("mean", "var", "count", "calls"), {"decay_rate": 0.9}, True),
    "equinox": (("mean", "var", "count", "calls"), {"momentum": 0.9}, False),
    "equinox, ema": (("mean", "var", "train_mean", "train_var"), {"momentum": 0.9}, True),
    "sbx": (("mean", "std"), {"epsilon": 1e-3}, False),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", STATES)
def test_what_goes_there_and_comes_back_is_what_it_was(name, dtype):
    """Bit for bit, with its dtype; what is computed on the way, up to its rounding."""
    library = name.split(",")[0]
    names, options, exact = STATES[name]
    params = {key: t.astype(dtype) for key, t in AFFINE.items()}
    values = {key: np.abs(data(C, seed=i)).astype(dtype) for i, key in enumerate(names)}
    state = values
    if "count" in names:
        state = convert._debiased.counted(values, 0.9, np.array(5))
    if "calls" in names:
        state["calls"] = np.array(5, "i4")
    if "train_mean" in names:
        state |= {"train_mean": state["mean"], "train_var": state["var"]}
    there = getattr(convert, f"to_{library}")(params, state, **options)
    back = getattr(convert, f"from_{library}")(there, **({} if library == "keras" else options))
    eps = float(jnp.finfo(dtype).eps)
    for got, want in zip(back, (params, state), strict=True):
        assert got.keys() == want.keys()
        for key, t in want.items():
            assert got[key].dtype == t.dtype and got[key].shape == t.shape, key
            if exact or key in AFFINE:
                np.testing.assert_array_equal(got[key], t)
            else:
                close(got[key].astype("f8"), t.astype("f8"), rtol=20 * eps, atol=20 * eps)


def test_what_comes_from_torch_goes_back_as_it_was():
    arrays = {"weight": data(C), "running_mean": data(C), "running_var": data(C) ** 2}
    arrays |= {"num_batches_tracked": np.array(3)}
    back = convert.to_torch(*convert.from_torch(arrays))
    assert back.keys() == arrays.keys()
    for name, t in arrays.items():
        np.testing.assert_array_equal(back[name], t)
        assert back[name].dtype == t.dtype


def test_layers_without_arrays():
    """Such as a group norm with affine=False."""
    assert convert.from_torch({}) == convert.Layer({}, {})
    assert convert.to_torch({}, {}) == convert.to_haiku({}, {}) == convert.to_keras({}, {}) == {}


BATCH, TOKEN = Groups(1, 1, EACH), Groups(EACH, EACH, 1)
SETTINGS = {
    "torch.nn.BatchNorm2d": ({}, Row(BATCH, momentum=0.9, correction=1), True, True),
    "torch.nn.SyncBatchNorm": (
        {"num_features": 3, "process_group": None, "momentum": 0.5, "bias": False},
        Row(BATCH, momentum=0.5, correction=1), True, False,
    ),
    "torch.nn.BatchNorm1d": (
        {"track_running_stats": False, "affine": False},
        Row(BATCH, momentum=None, correction=1), False, False,
    ),
    "torch.nn.BatchNorm3d": (
        {"momentum": None, "eps": 0.1},
        Row(BATCH, momentum=1.0, correction=1, epsilon=0.1), True, True,
    ),
    "torch.nn.InstanceNorm2d": ({}, methods.instance_norm(), False, False),
    "torch.nn.GroupNorm": ({"num_groups": 2, "num_channels": 6}, methods.group_norm(2), True, True),
    "torch.nn.LayerNorm": (
        {"normalized_shape": (4, 4, 3), "elementwise_affine": False},
        methods.layer_norm(), False, False,
    ),
    "torch.nn.RMSNorm": (
        {"normalized_shape": 3, "dtype": "torch.float64"},
        methods.rms_norm(epsilon=2.0**-52), True, False,
    ),
    "haiku.BatchNorm": (
        {"create_scale": True, "create_offset": False, "decay_rate": 0.9},
        Row(BATCH, momentum=0.9, debias=True), True, False,
    ),
    "haiku.LayerNorm": (
        {"axis": slice(1, None), "create_scale": False, "create_offset": True},
        methods.layer_norm(), False, True,
    ),
    "equinox.nn.BatchNorm": (
        {"axis_name": "batch"}, methods.momentum_batch_norm(0.99, 0.99), True, True,
    ),
    "equinox.nn.LayerNorm": ({"shape": (3,)}, Row(TOKEN), True, True),
    "keras.layers.BatchNormalization": (
        {"gamma_initializer": "ones"}, Row(BATCH, epsilon=1e-3), True, True,
    ),
    "keras.layers.GroupNormalization": (
        {"groups": -1, "center": False}, methods.instance_norm(epsilon=1e-3), True, False,
    ),
    "keras.layers.RMSNormalization": ({}, methods.rms_norm(epsilon=1e-6), True, False),
    "flax.linen.BatchNorm": ({"use_running_average": True}, methods.batch_norm(), True, True),
    "flax.nnx.GroupNorm": (
        {"num_groups": None, "group_size": 2, "rngs": None},
        methods.group_norm(group_size=2, epsilon=1e-6), True, True,
    ),
    "flax.linen.LayerNorm": ({"use_bias": False}, Row(TOKEN, epsilon=1e-6), True, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    arguments, method, use_scale, use_bias = SETTINGS[name]
    expected = {"method": method, "use_scale": use_scale, "use_bias": use_bias}
    got = convert.settings(name, **arguments)
    assert got == expected
    layer = nnx.Norm(6, **got, rngs=fnnx.Rngs(0))
    assert (layer.use_scale, layer.use_bias) == (use_scale, use_bias)


@pytest.mark.parametrize("name", ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm"])
def test_defaults_of_flax(name):
    theirs = getattr(flinen, name)()
    got = convert.settings(f"flax.linen.{name}")
    assert got["method"].epsilon == theirs.epsilon
    if name == "BatchNorm":
        assert got["method"].momentum == theirs.momentum
    if name == "GroupNorm":
        assert got["method"].groups.channel == theirs.num_groups
    assert got["use_bias"] == getattr(theirs, "use_bias", False)
