"""Converted layers do what the layers of the other libraries do: in training, in inference and in
what they remember, from both sides. What is not installed is left out."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import data

from jaxnorm import convert
from jaxnorm.convert._registry import LAYERS
from jaxnorm.convert._settings import _is_no_method

TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}


def close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), **TOLERANCE)


def ours(method, **axes):
    """Training and inference as functions of x, state and parameters.

    Parameters of a whole image, which are flax.linen.LayerNorm's own kind, are applied here.
    """

    def function(train):
        def apply(x, state, params):
            whole = {key: t for key, t in params.items() if t.ndim > 1}
            rest = {key: t for key, t in params.items() if t.ndim == 1}
            y, state = method.apply(x, state, train=train, **axes, **rest)
            with jax.numpy_rank_promotion("allow"):
                return y * whole.get("scale", 1) + whole.get("bias", 0), state

        return jax.jit(apply)

    return function(True), function(False)


@pytest.fixture
def lenient():
    """Other libraries rely on JAX's default promotions."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


IMAGES, TOKENS = (6, 8, 4, 3), (4, 5, 8)
TORCH = {
    "rank 2": ("BatchNorm1d", (6, 8), {"num_features": 8}),
    "images": ("BatchNorm2d", IMAGES, {"num_features": 8, "momentum": 0.25, "eps": 1e-3}),
    "volumes": ("BatchNorm3d", (2, 3, 4, 3, 2), {"num_features": 3}),
    "cumulative": ("BatchNorm2d", IMAGES, {"num_features": 8, "momentum": None}),
    "no parameters": ("BatchNorm2d", IMAGES, {"num_features": 8, "affine": False}),
    "no bias": ("BatchNorm2d", IMAGES, {"num_features": 8, "bias": False}),
    "no statistics": ("BatchNorm2d", IMAGES, {"num_features": 8, "track_running_stats": False}),
    "instances": ("InstanceNorm2d", IMAGES, {"num_features": 8}),
    "instances, remembered": (
        "InstanceNorm2d",
        IMAGES,
        {"num_features": 8, "affine": True, "track_running_stats": True},
    ),
    "groups": ("GroupNorm", IMAGES, {"num_groups": 4, "num_channels": 8}),
    "tokens": ("LayerNorm", TOKENS, {"normalized_shape": 8}),
    "tokens, no bias": ("LayerNorm", TOKENS, {"normalized_shape": (8,), "bias": False}),
    "whole images": ("LayerNorm", IMAGES, {"normalized_shape": IMAGES[1:]}),
    "root mean square": ("RMSNorm", TOKENS, {"normalized_shape": 8}),
    "no scale": ("RMSNorm", TOKENS, {"normalized_shape": 8, "elementwise_affine": False}),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch(name):
    torch = pytest.importorskip("torch")
    kind, shape, arguments = TORCH[name]
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(**arguments)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 1.0)
    xs = [data(*shape, seed=i, dtype="f4") for i in range(6)]

    def torch_step(x):
        return module(torch.from_numpy(x)).detach().numpy()

    for x in xs[:2]:
        torch_step(x)
    settings = convert.settings(f"torch.nn.{kind}", **arguments)
    train, infer = ours(settings["method"], channel_axis=-1 if shape == TOKENS else 1)
    params, state = convert.from_torch(module.state_dict(), momentum=arguments.get("momentum", 0.1))
    assert {f"use_{name}": name in params for name in ("scale", "bias")} == {
        key: value for key, value in settings.items() if key != "method"
    }
    module.eval()
    close(infer(xs[2], state, params)[0], torch_step(xs[2]))
    module.train()
    for x in xs[2:4]:
        y, state = train(x, state, params)
        close(y, torch_step(x))
    module.eval()
    close(infer(xs[4], state, params)[0], torch_step(xs[4]))

    back, theirs = convert.to_torch(params, state), module.state_dict()
    for key, t in theirs.items():
        if kind != "InstanceNorm2d" or key != "num_batches_tracked":  # which stays 0 there
            close(back[key], t)
            assert back[key].dtype == t.numpy().dtype
    fresh = getattr(torch.nn, kind)(**arguments)
    fresh.load_state_dict({key: torch.from_numpy(t) for key, t in back.items()})
    for training in (False, True, False):
        module.train(training), fresh.train(training)
        x = torch.from_numpy(xs[5])
        close(fresh(x).detach(), module(x).detach())


def test_half_precision_tensors_of_torch():
    torch = pytest.importorskip("torch")
    for dtype, other in ((torch.bfloat16, jnp.bfloat16), (torch.float16, np.float16)):
        module = torch.nn.BatchNorm2d(3, dtype=dtype)
        torch.nn.init.normal_(module.weight)
        params, state = convert.from_torch(module.state_dict())
        assert params["scale"].dtype == state["var"].dtype == other
        np.testing.assert_array_equal(
            params["scale"].astype("f4"), module.weight.detach().float().numpy()
        )
        back = convert.to_torch(params, state)
        tensor = torch.from_dlpack(jnp.asarray(back["weight"]))
        assert tensor.dtype == dtype and torch.equal(tensor, module.weight.detach())


def test_arrays_are_copies():
    """Torch updates running statistics in place."""
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(2)
    _, state = convert.from_torch(module.state_dict())
    module(torch.ones(4, 2))
    assert state["mean"].tolist() == [0, 0] and module.running_mean.tolist() != [0, 0]


def test_rms_norm_of_torch_in_half_precision():
    """Without an epsilon it takes that of the dtype in which it computes."""
    torch = pytest.importorskip("torch")
    x = np.full((1, 4), 1e-4, "f4")
    y = torch.nn.functional.rms_norm(torch.from_numpy(x).bfloat16(), (4,)).float()
    _, infer = ours(convert.settings("torch.nn.RMSNorm", normalized_shape=4)["method"])
    np.testing.assert_allclose(infer(x, {}, {})[0], y.numpy(), rtol=0.01)


HAIKU = {
    "BatchNorm": {"create_scale": True, "create_offset": True, "decay_rate": 0.8},
    "GroupNorm": {"groups": 4, "eps": 1e-3},
    "InstanceNorm": {"create_scale": True, "create_offset": False},
    "LayerNorm": {"axis": -1, "create_scale": True, "create_offset": True, "param_axis": -1},
    "RMSNorm": {"axis": -1, "param_axis": -1},
}


@pytest.mark.parametrize("kind", HAIKU)
def test_haiku(kind, lenient):
    hk = pytest.importorskip("haiku")
    arguments = HAIKU[kind]
    remembers = kind == "BatchNorm"

    def function(x, train):
        layer = getattr(hk, kind)(**arguments, name="norm")
        return layer(x, is_training=train) if remembers else layer(x)

    pure = hk.transform_with_state(function)
    theirs = [jax.jit(functools.partial(pure.apply, train=train)) for train in (True, False)]
    xs = [data(6, 4, 3, 8, seed=i, dtype="f4") for i in range(6)]
    params, state = pure.init(None, xs[0], True)
    params = jax.tree.map(lambda t: t + data(*t.shape, dtype="f4"), params)

    def arrays(params, state):
        if not remembers:
            return params["norm"]
        averages = {name: state[f"norm/~/{name}"] for name in ("mean_ema", "var_ema")}
        return params["norm"] | averages

    options = {"decay_rate": 0.8} if remembers else {}
    for x in xs[:2]:
        _, state = theirs[0](params, state, None, x)
    own, memory = convert.from_haiku(arrays(params, state), **options)
    train, infer = ours(convert.settings(f"haiku.{kind}", **arguments)["method"])
    close(infer(xs[2], memory, own)[0], theirs[1](params, state, None, xs[2])[0])
    for x in xs[2:4]:
        y, memory = train(x, memory, own)
        want, state = theirs[0](params, state, None, x)
        close(y, want)
    close(infer(xs[4], memory, own)[0], theirs[1](params, state, None, xs[4])[0])

    back = convert.to_haiku(own, memory, **options)
    want = convert._arrays.flat(arrays(params, state))
    assert {name: (t.shape, t.dtype) for name, t in back.items()} == {
        name: (t.shape, t.dtype) for name, t in want.items()
    }
    for name, t in want.items():
        close(back[name], t)


EQUINOX = {
    "mode batch": ("BatchNorm", {"momentum": 0.8, "mode": "batch"}),
    "mode ema": ("BatchNorm", {"momentum": 0.8, "mode": "ema"}),
    "groups": ("GroupNorm", {"groups": 4, "channels": 8}),
    "whole images": ("LayerNorm", {"shape": IMAGES[1:], "use_bias": False}),
    "root mean square": ("RMSNorm", {"shape": IMAGES[1:]}),
}


@pytest.mark.parametrize("name", EQUINOX)
def test_equinox(name, lenient):
    eqx = pytest.importorskip("equinox")
    kind, arguments = EQUINOX[name]
    remembers = kind == "BatchNorm"
    options = {"input_size": 8, "axis_name": "batch"} if remembers else {}
    layer, state = eqx.nn.make_with_state(getattr(eqx.nn, kind))(**arguments, **options)
    layer = jax.tree.map(lambda t: t + data(*t.shape, dtype="f4") if eqx.is_array(t) else t, layer)

    @functools.partial(jax.jit, static_argnums=2)
    def theirs(x, state, inference):
        if not remembers:
            return jax.vmap(layer)(x), state
        mapped = jax.vmap(
            functools.partial(layer, inference=inference),
            axis_name="batch", in_axes=(0, None), out_axes=(0, None),
        )  # fmt: skip
        return mapped(x, state)

    def arrays(state):
        found = {"weight": layer.weight, "bias": layer.bias}
        if name == "mode batch":
            found["counter"] = state.get(layer.batch_counter)
            found["hidden_mean"], found["hidden_var"] = state.get(layer.batch_state_index)
        elif name == "mode ema":
            found["first_time"] = state.get(layer.ema_first_time_index)
            found["mean"], found["var"] = state.get(layer.ema_state_index)
        return {key: t for key, t in found.items() if t is not None}

    xs = [data(*IMAGES, seed=i, dtype="f4") for i in range(6)]
    for x in xs[:2]:
        _, state = theirs(x, state, False)
    momentum = {"momentum": 0.8} if remembers else {}
    params, memory = convert.from_equinox(arrays(state), **momentum)
    method = convert.settings(f"equinox.nn.{kind}", **arguments)["method"]
    train, infer = ours(method, channel_axis=1)
    for x in xs[2:4]:
        y, memory = train(x, memory, params)
        want, state = theirs(x, state, False)
        close(y, want)
    back = convert.to_equinox(params, memory, **momentum)
    assert back.keys() == arrays(state).keys()
    for key, t in arrays(state).items():
        close(back[key], t)
        assert back[key].dtype == t.dtype

    y, want = infer(xs[4], memory, params)[0], theirs(xs[4], state, True)[0]
    if name != "mode batch":
        close(y, want)
        return
    # Equinox's variance has what is left of its first value, divided by what the batches have.
    left = 0.8**4
    wrong = memory | {"var": memory["var"] + left / (1 - left)}
    close(infer(xs[4], wrong, params)[0], want)
    assert np.abs(y - want).max() > 0.1


KERAS = {
    "BatchNormalization": {"momentum": 0.8},
    "BatchNormalization, renorm": {
        "renorm": True, "momentum": 0.8, "renorm_momentum": 0.8,
        "renorm_clipping": {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5},
    },
    "BatchNormalization, not clipped": {
        "renorm": True, "momentum": 0.8, "renorm_momentum": 0.8, "epsilon": 1e-4,
    },
    "GroupNormalization": {"groups": 4},
    "GroupNormalization, instances": {"groups": -1, "center": False},
    "LayerNormalization": {},
    "LayerNormalization, whole images": {"axis": (-3, -2, -1), "scale": False},
    "RMSNormalization": {},
}  # fmt: skip


@pytest.mark.parametrize("name", KERAS)
def test_keras(name, lenient, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    kind, arguments = name.split(",")[0], KERAS[name]
    layer = getattr(keras.layers, kind)(**arguments)
    xs = [data(6, 4, 3, 8, seed=i, dtype="f4") for i in range(6)]
    layer.build(xs[0].shape)
    for variable in layer.trainable_variables:
        variable.assign(data(*variable.shape, dtype="f4"))

    def theirs(x, train):
        return layer(x, training=train) if kind == "BatchNormalization" else layer(x)

    def arrays():
        return {variable.name: np.asarray(variable) for variable in layer.variables}

    for x in xs[:2]:
        theirs(x, True)
    params, state = convert.from_keras(arrays())
    method = convert.settings(f"keras.layers.{kind}", **arguments)["method"]
    train, infer = ours(method)
    close(infer(xs[2], state, params)[0], theirs(xs[2], False))
    for x in xs[2:4]:
        y, state = train(x, state, params)
        close(y, theirs(x, True))
    close(infer(xs[4], state, params)[0], theirs(xs[4], False))
    back = convert.to_keras(
        params, state, epsilon=arguments.get("epsilon", 1e-3), rms=kind == "RMSNormalization"
    )
    assert back.keys() == arrays().keys()
    for key, t in arrays().items():
        close(back[key], t)


def signatures(library):
    """The arguments of a library's layers with their defaults."""
    module = pytest.importorskip(library)
    home = {"torch": "nn", "equinox": "nn", "keras": "layers"}.get(library)
    module = getattr(module, home) if home else module
    names = [key.split(".")[1] for key in LAYERS if key.startswith(f"{library}.")]
    return {name: inspect.signature(getattr(module, name)).parameters for name in names}


@pytest.mark.parametrize("library", ["torch", "haiku", "equinox", "keras"])
def test_defaults_are_those_of_the_library(library, monkeypatch):
    """And every argument is known, or has no meaning here."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for name, theirs in signatures(library).items():
        known = inspect.signature(LAYERS[f"{library}.{name}"]).parameters
        assert known.keys() <= theirs.keys()
        sizes = {"normalized_shape", "shape"}  # of any other size it is the same
        for key in known.keys() - sizes:
            assert known[key].default == theirs[key].default, (name, key)
        rest = {key for key in theirs.keys() - known.keys() if not _is_no_method(key)}
        assert rest <= {"elementwise_affine", "kwargs"}, name  # the first is deprecated in Equinox
