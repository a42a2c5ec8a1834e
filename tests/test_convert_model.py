"""Whole models go from PyTorch and others into Flax and back: their logits, every array, and one
error for all that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flinen
from flax import nnx as fnnx
from helpers import data

from benchmarks.resnet import ResNet, torchvision_names
from jaxnorm import convert, linen, nnx

KEY = jax.random.key(0)


def torch_resnet(torch, stages, width, num_classes=10):
    """A residual network of plain torch.nn with torchvision's names of modules."""
    nn = torch.nn

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
            self.relu, self.downsample = nn.ReLU(), None
            if stride != 1 or inputs != 4 * width:
                self.downsample = nn.Sequential(
                    conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
                )

        def forward(self, x):
            y = self.relu(self.bn1(self.conv1(x)))
            y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
            return self.relu(y + (x if self.downsample is None else self.downsample(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
            self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)
            inputs = width
            for i, blocks in enumerate(stages):
                layers = []
                for block in range(blocks):
                    stride = 2 if i and not block else 1
                    layers.append(Bottleneck(inputs, width * 2**i, stride))
                    inputs = 4 * width * 2**i
                setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
            self.fc = nn.Linear(inputs, num_classes)

        def forward(self, x):
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            for i in range(len(stages)):
                x = getattr(self, f"layer{i + 1}")(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Network()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def flax_resnet(stages, width, num_classes=10):
    """The benchmarks' network, and the shapes of its variables."""

    def norm(**options):
        return linen.BatchNorm(momentum=0.9, correction=1, **options)

    model = ResNet(norm, stages=stages, width=width, num_classes=num_classes, symmetric=True)
    shape = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return model, jax.eval_shape(lambda x: model.init(KEY, x, train=False), shape)


@pytest.mark.parametrize(
    "stages, width, size",
    [((2, 1), 4, 32), pytest.param((3, 4, 6, 3), 64, 64, marks=pytest.mark.slow)],
    ids=["small", "ResNet-50"],
)
def test_a_resnet_of_torch_goes_to_flax_and_back(stages, width, size):
    """Logits to float32 rounding in inference and in a step of training, with its statistics."""
    torch = pytest.importorskip("torch")
    network = torch_resnet(torch, stages, width)
    model, tree = flax_resnet(stages, width)
    names = torchvision_names(stages)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    variables = convert.load_model(tree, before, names)
    x = data(2, size, size, 3, dtype="f4")
    images = torch.from_numpy(x.transpose(0, 3, 1, 2))

    def close(got, want, tolerance=2e-5):
        got, want = np.asarray(got), want.detach().numpy()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())

    with torch.no_grad():
        want = network.eval()(images)
    close(jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x), want)

    back = convert.dump_model(variables, names, like=before)
    assert back.keys() == before.keys()
    for name, t in before.items():
        np.testing.assert_array_equal(back[name], t.numpy(), strict=True)

    with torch.no_grad():
        want = network.train()(images)
    step = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))
    y, new = step(variables, x)
    close(y, want, 2e-3)
    after = convert.dump_model(dict(variables) | dict(new), names, like=network.state_dict())
    for name, t in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            close(after[name], t, 2e-4)
    fresh = torch_resnet(torch, stages, width)
    fresh.load_state_dict({name: torch.from_numpy(t) for name, t in after.items()})
    with torch.no_grad():
        close(fresh.eval()(images), network.eval()(images), 1e-3)


def test_names_of_the_whole_resnet_50():
    """161 parameters and 53 pairs of statistics, each with its place and shape."""
    model, tree = flax_resnet((3, 4, 6, 3), 64, 1000)
    names = torchvision_names()
    modules = {"/".join(path[1:-1]) for path in _paths(tree)}
    assert modules == names.keys() and len(set(names.values())) == len(names)
    ones = jax.tree.map(lambda t: np.broadcast_to(np.float32(1), t.shape), tree)
    arrays = convert.dump_model(ones, names)
    assert len(arrays) == 161 + 2 * 53
    assert sum(t.size for name, t in arrays.items() if "running" not in name) == 25_557_032
    assert arrays["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)


def _paths(tree):
    return [
        tuple(key.key for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


class Small(flinen.Module):
    """Of every kind of module that has a layout."""

    @flinen.compact
    def __call__(self, tokens, x):
        x = x + flinen.Embed(7, 4, name="embed")(tokens)
        x = flinen.Conv(6, (3,), feature_group_count=2, name="conv")(x)
        x = linen.BatchNorm(use_running_average=True, name="bn")(x)
        x = linen.GroupNorm(2, name="gn")(x)
        return flinen.Dense(3, name="dense")(linen.LayerNorm(name="ln")(x))


class SmallNnx(fnnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.embed = fnnx.Embed(7, 4, rngs=rngs)
        self.body = fnnx.List([
            fnnx.Conv(4, 6, (3,), feature_group_count=2, rngs=rngs),
            nnx.BatchNorm(6, use_running_average=True, rngs=rngs),
            nnx.GroupNorm(6, 2, rngs=rngs),
            nnx.LayerNorm(6, rngs=rngs),
        ])  # fmt: skip
        self.dense = fnnx.Linear(6, 3, rngs=rngs)

    def __call__(self, tokens, x):
        x = x + self.embed(tokens)
        for layer in self.body:
            x = layer(x)
        return self.dense(x)


TOKENS, X = np.arange(10).reshape(2, 5) % 7, data(2, 5, 4, dtype="f4")
NNX_NAMES = {
    "embed": "embed", "body/0": "conv", "body/1": "bn", "body/2": "gn", "body/3": "ln",
    "dense": "dense",
}  # fmt: skip


def small():
    """Its variables, none of them 0 or 1."""
    variables = Small().init(KEY, TOKENS, X)
    leaves, structure = jax.tree.flatten(variables)
    filled = [np.abs(data(*t.shape, seed=i, dtype="f4")) for i, t in enumerate(leaves)]
    return jax.tree.unflatten(structure, filled)


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)


def test_linen_goes_to_nnx_and_back():
    variables = small()
    model = SmallNnx(fnnx.Rngs(0))
    state = fnnx.state(model, (fnnx.Param, fnnx.BatchStat))
    new = convert.load_model(state, variables, NNX_NAMES, library="flax")
    assert isinstance(new, fnnx.State)
    fnnx.update(model, new)
    want = Small().apply(variables, TOKENS, X)
    np.testing.assert_allclose(model(TOKENS, X), want, rtol=1e-6, atol=1e-6)
    backwards = {theirs: ours for ours, theirs in NNX_NAMES.items()}
    state = fnnx.state(model, (fnnx.Param, fnnx.BatchStat))
    same(convert.load_model(variables, state, backwards.get, library="flax"), variables)


@pytest.mark.parametrize("library", ["torch", "keras", "haiku", "equinox", "flax"])
def test_every_library_there_and_back(library):
    """Layouts and names of all kinds of modules."""
    options = {"haiku": {"decay_rate": 0.9}, "equinox": {"momentum": 0.9}}.get(library, {})
    variables = small()
    names = {name: f"model.{name}" for name in NNX_NAMES.values()}
    arrays = convert.dump_model(variables, names, library=library, **options)
    assert all(name.startswith("model.") for name in arrays)
    new = convert.load_model(variables, arrays, names, library=library, **options)
    if library == "equinox":  # whose hidden averages are computed
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, variables)
    else:
        same(new, variables)


def test_layouts_of_torch():
    variables = small()
    arrays = convert.dump_model(variables, {name: name for name in NNX_NAMES.values()})
    params = variables["params"]
    assert arrays["conv.weight"].shape == (6, 2, 3)
    assert arrays["conv.weight"][4, 1, 2] == params["conv"]["kernel"][2, 1, 4]
    assert arrays["dense.weight"][2, 5] == params["dense"]["kernel"][5, 2]
    np.testing.assert_array_equal(arrays["embed.weight"], params["embed"]["embedding"])
    np.testing.assert_array_equal(arrays["bn.running_var"], variables["batch_stats"]["bn"]["var"])


def test_a_model_of_torch_with_every_kind_of_module():
    torch = pytest.importorskip("torch")
    nn = torch.nn
    modules = {
        "embed": nn.Embedding(7, 4), "conv": nn.Conv1d(4, 6, 3, padding=1, groups=2),
        "bn": nn.BatchNorm1d(6), "gn": nn.GroupNorm(2, 6, eps=1e-6),
        "ln": nn.LayerNorm(6, eps=1e-6), "dense": nn.Linear(6, 3),
    }  # fmt: skip
    model = nn.ModuleDict(modules).eval()
    variables = small()
    names = {name: name for name in modules}
    arrays = convert.dump_model(variables, names, like=model.state_dict())
    model.load_state_dict({name: torch.from_numpy(t) for name, t in arrays.items()})
    y = torch.from_numpy(X) + model["embed"](torch.from_numpy(TOKENS))
    y = model["gn"](model["bn"](model["conv"](y.mT))).mT
    y = model["dense"](model["ln"](y)).detach().numpy()
    np.testing.assert_allclose(Small().apply(variables, TOKENS, X), y, rtol=1e-4, atol=1e-4)
    same(convert.load_model(variables, model.state_dict(), names), variables)


def test_haiku_in_its_own_nesting():
    """Averages are modules of their own there, behind a tilde, and axes of size 1 are kept."""
    hk = pytest.importorskip("haiku")

    def function(x, train):
        x = hk.Conv2D(4, 3, name="conv")(x)
        x = hk.BatchNorm(True, True, 0.9, name="bn")(x, is_training=train)
        return hk.Linear(3, name="out")(x.mean((1, 2)))

    class Net(flinen.Module):
        @flinen.compact
        def __call__(self, x):
            x = flinen.Conv(4, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=True)(x)
            return flinen.Dense(3)(x.mean((1, 2)))

    pure, x = hk.transform_with_state(function), data(2, 6, 6, 3, dtype="f4")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, state = pure.init(KEY, x, True)
        for _ in range(2):
            _, state = pure.apply(params, state, None, x, True)
        want, _ = pure.apply(params, state, None, x, False)
    names = {"Conv_0": "conv", "BatchNorm_0": "bn", "Dense_0": "out"}
    tree = jax.eval_shape(Net().init, KEY, x)
    options = {"library": "haiku", "decay_rate": 0.9}
    variables = convert.load_model(tree, {**params, **state}, names, **options)
    np.testing.assert_allclose(Net().apply(variables, x), want, rtol=1e-4, atol=1e-5)
    like = {**params, **state}
    back = convert.dump_model(variables, names, like=like, **options)
    assert {name: t.shape for name, t in back.items()} == {
        name: t.shape for name, t in convert._arrays.flat(like).items()
    }
    np.testing.assert_array_equal(back["bn/~/mean_ema/average"], state["bn/~/mean_ema"]["average"])


def test_keras_by_the_paths_of_its_variables(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = keras.Sequential([
            keras.Input((6, 6, 3)), keras.layers.Conv2D(4, 3, padding="same", name="conv"),
            keras.layers.BatchNormalization(name="bn"), keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="out"),
        ])  # fmt: skip
        for i, variable in enumerate(model.variables):
            variable.assign(np.abs(data(*variable.shape, seed=i, dtype="f4")))
        x = data(2, 6, 6, 3, dtype="f4")
        want = np.asarray(model(x, training=False))

    class Net(flinen.Module):
        @flinen.compact
        def __call__(self, x):
            x = flinen.Conv(4, (3, 3))(x)
            x = linen.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
            return flinen.Dense(3)(x.mean((1, 2)))

    paths = {variable.path: variable for variable in model.variables}
    names = {"Conv_0": "conv", "BatchNorm_0": "bn", "Dense_0": "out"}
    prefix = next(iter(paths)).removesuffix("conv/kernel")
    names = {ours: prefix + theirs for ours, theirs in names.items()}
    tree = jax.eval_shape(Net().init, KEY, x)
    variables = convert.load_model(tree, paths, names, library="keras")
    np.testing.assert_allclose(Net().apply(variables, x), want, rtol=1e-4, atol=1e-4)
    back = convert.dump_model(variables, names, library="keras", like=paths)
    for path, variable in paths.items():
        np.testing.assert_array_equal(back[path], np.asarray(variable))


def test_boxed_parameters_stay_boxed():
    """As nn.with_partitioning makes them."""
    init = flinen.with_partitioning(flinen.initializers.lecun_normal(), (None, "model"))
    layer = flinen.Dense(3, kernel_init=init)
    tree = jax.eval_shape(layer.init, KEY, jnp.ones((1, 2)))
    arrays = {"weight": data(3, 2, dtype="f4"), "bias": data(3, dtype="f4")}
    new = convert.load_model(tree, arrays, {"": ""})
    assert isinstance(new["params"]["kernel"], flinen.Partitioned)
    np.testing.assert_array_equal(new["params"]["kernel"].value, arrays["weight"].T)


def test_one_error_names_all_that_does_not_fit():
    names = {name: name for name in NNX_NAMES.values()}
    variables = small()
    arrays = convert.dump_model(variables, names)
    del arrays["bn.running_var"], arrays["gn.weight"], arrays["ln.weight"], arrays["ln.bias"]
    arrays["conv.weight"] = arrays["conv.weight"][:4]
    arrays["head.weight"] = np.ones(3)
    arrays["dense.extra"] = np.ones(3)
    wrong = {name: name for name in names if name != "embed"} | {"blurb": "blurb"}
    with pytest.raises(ValueError) as error:
        convert.load_model(variables, arrays, wrong)
    message = str(error.value)
    for part in (
        "load_model found 9 mismatches",
        "embed has no name",
        "blurb is in names and not in the tree",
        "embed.weight is not used",
        "head.weight is not used",
        "bn: from_torch got running_mean without running_var",
        "gn/scale is missing: of 'gn' there are bias",
        "ln has no arrays: there are none of 'ln'",
        "conv/kernel has shape (3, 2, 6) here and (3, 2, 4) from 'conv'",
        "extra of 'dense' has no place in dense",
    ):
        assert part in message, part

    like = convert.dump_model(variables, names) | {"fc.bias": np.ones(1)}
    like["conv.bias"] = np.ones(2)
    del like["embed.weight"]
    with pytest.raises(ValueError) as error:
        convert.dump_model(variables, names, like=like)
    for part in (
        "dump_model found 3 mismatches",
        "embed.weight is not in like",
        "fc.bias of like is missing",
        "conv.bias has shape (2,) in like and (6,) from the tree",
    ):
        assert part in str(error.value), part


def test_two_modules_with_one_name():
    """Tied weights are one array there; others would overwrite each other."""
    tree = {"a": {"kernel": np.ones((2, 3))}, "b": {"kernel": np.ones((2, 3))}}
    names = {"a": "tied", "b": "tied"}
    assert list(convert.dump_model(tree, names)) == ["tied.weight"]
    same(convert.load_model(tree, {"tied.weight": np.ones((3, 2))}, names), tree)
    tree["b"]["kernel"] = np.zeros((2, 3))
    with pytest.raises(ValueError, match="tied.weight is written twice, with different values"):
        convert.dump_model(tree, names)
