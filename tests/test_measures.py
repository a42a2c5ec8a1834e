"""What claims measure and train beside the map of failure: domains, example weighing, orders of
images, noise, networks without residual paths and weight decay of norms."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import measures, shifts, training
from benchmarks.cells import How, Key
from benchmarks.datasets import Images, load
from benchmarks.norms import METHODS
from benchmarks.residual import WIDTHS, ResidualNet, Unit
from benchmarks.serving import running
from benchmarks.splits import split
from benchmarks.training import State, Trained


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def untrained(order="mixed", seeds=2):
    """Networks with statistics that differ from device to device, and few images to test on."""
    net = ResidualNet(tuple(METHODS["batch"].at(8, width) for width in WIDTHS))
    optimizer = optax.sgd(0.1)
    state = training.initialize(net, optimizer, 4, (8, 8, 1), range(seeds))
    rng = np.random.default_rng(0)
    on_devices = jax.tree.map(
        lambda s: s + jnp.asarray(rng.uniform(0, 1, s.shape), s.dtype), state.on_devices
    )
    splits = [split(load("digits"), seed, 1024, 100) for seed in range(seeds)]
    trained = Trained(net, state._replace(on_devices=on_devices), splits, 0.0, 0.0)
    return trained, Key("digits", "1x1", "batch", 8, How(order=order))


def test_a_known_domain_is_served_by_the_statistics_of_its_device():
    trained, key = untrained("domains_apart")
    found = measures.domains(trained, key)
    each = []
    for device, name in enumerate(shifts.DOMAINS):
        alone = jax.tree.map(lambda s, d=device: s[:, d : d + 1], trained.state.on_devices)
        test = [s.test._replace(pixels=shifts.SHIFTS[name](s.test.pixels)) for s in trained.splits]
        if name == "noisy":  # drawn for both seeds at once
            pixels = np.stack([s.test.pixels for s in trained.splits])
            drawn = shifts.SHIFTS[name](pixels)
            test = [t._replace(pixels=p) for t, p in zip(test, drawn, strict=True)]
        splits = [s._replace(test=t) for s, t in zip(trained.splits, test, strict=True)]
        state = trained.state._replace(on_devices=alone)
        each.append(running(trained._replace(state=state, splits=splits)))
    np.testing.assert_allclose(found["known"], 100 - np.mean(each, axis=0), atol=1e-4)
    assert all(len(found[name]) == 2 for name in found) and shifts.UNKNOWN in found


@pytest.mark.slow
def test_the_weight_of_an_example_is_that_of_validation():
    trained, key = untrained()
    found = measures.weighed(trained, key)
    alphas = [i / 16 for i in range(10)]
    validation = trained._replace(splits=[s._replace(test=s.validation) for s in trained.splits])
    scores = np.array([running(validation, example_weight=alpha) for alpha in alphas])
    chosen = scores.argmax(axis=0)
    assert found["alpha"] == [alphas[i] for i in chosen]
    tested = np.array([running(trained, example_weight=alphas[i]) for i in chosen])
    np.testing.assert_allclose(found["error"], 100 - tested.diagonal(), atol=1e-4)


def test_orders_of_images_over_devices():
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 3, 4, 8, 2, 2, 1)).astype(np.float32)
    images = Images(pixels, rng.integers(0, 10, (2, 3, 4, 8)))
    found = shifts.ORDERS["by_class"](images)
    flat = found.labels.reshape(2, 3, 32)
    assert (np.diff(flat, axis=-1) >= 0).all()
    places = {
        p.tobytes(): label
        for p, label in zip(pixels.reshape(-1, 2, 2), images.labels.ravel(), strict=True)
    }
    assert all(
        places[p.tobytes()] == label
        for p, label in zip(found.pixels.reshape(-1, 2, 2), found.labels.ravel(), strict=True)
    )
    apart, mixed = (shifts.ORDERS[name](images).pixels for name in ("domains_apart", "domains"))
    inverted = shifts.DOMAINS.index("inverted")
    assert (apart[:, :, inverted] == -pixels[:, :, inverted]).all()
    assert (mixed[:, :, :, [inverted, inverted + 4]] == -pixels[:, :, :, [2, 6]]).all()
    assert (apart[:, :, 0] == pixels[:, :, 0]).all() and (images.pixels == pixels).all()
    upper_left = apart[:, :, 1, :, 0, 0]
    assert (upper_left == pixels[:, :, 1, :, 0, 1]).all()  # a quarter turn to the left


def test_mnist_in_the_size_of_digits():
    images = shifts.mnist_like_digits()
    assert images.pixels.shape == (5000, 8, 8, 1)
    assert images.pixels.min() == -1 and 0.8 < images.pixels.max() <= 1


def test_noise_is_that_of_an_image_and_a_group_and_in_training_alone():
    layer = METHODS["group"].at(2, 8)
    x = jax.random.normal(jax.random.key(0), (64, 4, 4, 3))
    now = {"done": jnp.array(1.0)}
    quiet, noisy = (Unit(layer, 8, activate=False, noise=noise) for noise in (0.0, 0.5))
    variables = quiet.init(jax.random.key(1), x, train=False, **now)
    y = quiet.apply(variables, x, train=True, **now)
    added = noisy.apply(variables, x, train=True, rngs={"noise": jax.random.key(2)}, **now) - y
    np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1], added.shape), atol=1e-5)
    of_groups = added[:, 0, 0].reshape(64, 4, 2)
    np.testing.assert_allclose(of_groups[..., 0], of_groups[..., 1], atol=1e-5)
    assert abs(float(of_groups.std()) - 0.5) < 0.1
    assert (noisy.apply(variables, x, train=False, **now) == y).all()


def test_networks_without_residual_paths():
    layers = tuple(METHODS["group"].at(2, width) for width in WIDTHS)
    names = []
    for residual in (True, False):
        net = ResidualNet(layers, residual=residual)
        init = partial(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
        names.append(set(jax.eval_shape(init)["params"]["Block_1"]))
    assert names == [{"unit_1", "unit_2", "shortcut"}, {"unit_1", "unit_2"}]


def test_decay_of_norms_goes_toward_one_and_zero():
    params = {"norm": {"scale": jnp.array([3.0]), "bias": jnp.array([2.0])}}
    optimizer = training.make_optimizer(0.5, 1, 2, 0.1)
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first step warms up
        updates, state = optimizer.update(zeros, state, params)
    assert float(updates["norm"]["scale"][0]) < 0 and float(updates["norm"]["bias"][0]) < 0
    ratio = updates["norm"]["scale"] / updates["norm"]["bias"]
    np.testing.assert_allclose(ratio, (3 - 1) / 2, rtol=1e-6)


def test_noise_of_a_training_differs_between_steps_and_devices(monkeypatch):
    """The keys that the loss gets."""
    seen = []

    def loss(params, taps, on_devices, batch, net, done, keys=None):
        seen.append(keys)
        return params["w"].sum(), on_devices

    monkeypatch.setattr(training, "mean_loss", loss)
    net = ResidualNet(tuple(METHODS["group"].at(2, width) for width in WIDTHS), noise=1.0)
    optimizer = optax.sgd(0.1)
    params = {"w": jnp.ones(1)}
    drawn = []
    for step in range(2):
        state = State(params, {}, optimizer.init(params), jnp.array(step), jax.random.key(3))
        batch = Images(jnp.zeros((1, 4, 2, 8, 8, 1)), jnp.zeros((1, 4, 2), int))
        with jax.disable_jit():
            training._train_epoch(net, optimizer, 2, state, batch)
        drawn.append(jax.random.key_data(seen[-1]))
    values = {tuple(map(int, row)) for row in np.concatenate(drawn)}
    assert len(values) == 8 and math.isfinite(float(params["w"][0]))


def test_cosines_of_known_vectors():
    """Three unit vectors with right angles, the same three times, and two opposite ones."""
    assert float(measures.cosines(jnp.eye(3))) == pytest.approx(0)
    assert float(measures.cosines(jnp.ones((3, 4)) / 2)) == pytest.approx(1)
    assert float(measures.cosines(jnp.array([[1.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(-1)


def test_gradients_of_the_same_images_agree(monkeypatch):
    """Two steps with one batch have one gradient; those of other images do not."""
    monkeypatch.setattr(measures, "AGREEMENT_STEPS", 2)
    trained, key = untrained()
    found = measures.gradient_agreement(trained, key)
    assert all(-1 < value < 0.99 for value in found["start"] + found["end"])
    np.testing.assert_allclose(found["start"], found["end"], atol=1e-4)  # nothing was trained
    twice = [
        s._replace(train=jax.tree.map(lambda t: np.concatenate([t[:32], t[:32]]), s.train))
        for s in trained.splits
    ]
    same = measures.gradient_agreement(trained._replace(splits=twice), key)
    assert same["start"] == pytest.approx([1.0, 1.0], abs=1e-4)
