"""The program `benchmarks.noisy_labels`: corrupted labels, curricula, and what weights enter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit

from benchmarks import noisy_labels, noisy_training, plan, residual, training
from benchmarks.cells import Map, Settings
from benchmarks.curricula import BURN_IN, Mentor, Seen, corrupted, learn, self_paced
from benchmarks.datasets import Images, load
from benchmarks.noisy_training import Weighing, losses, statistics_weights
from benchmarks.plan import ROWS
from benchmarks.residual import ResidualNet

WIDTH = 8


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A network of one stage."""
    strides = {8: {"2x2": (4,)}}
    for module in (residual, plan):
        monkeypatch.setattr(module, "WIDTHS", (WIDTH,))
        monkeypatch.setattr(module, "STRIDES", strides)


def net(method, images=4):
    return ResidualNet((ROWS[method].at(images, WIDTH),), (4,))


def how(images=4, on_epoch=lambda _: None):
    return {
        "data": load("digits"),
        "num_train": 64,
        "devices": 8 // images,
        "images_per_device": images,
        "epochs": 5,
        "on_epoch": on_epoch,
    }


@pytest.mark.parametrize("share", (0.0, 0.2, 0.4, 0.8))
def test_a_share_of_the_labels_is_wrong(share):
    true = np.arange(5000, dtype=np.int32) % 10
    given, kept = corrupted(Images(np.zeros(1), true), share, 10, seed=3).labels.T
    np.testing.assert_array_equal(kept, true)
    wrong = given != true
    assert wrong.sum() == round(share * 5000)
    assert given.min() == 0 and given.max() == 9
    if share:  # each other class as often: binomial, five standard deviations
        often = np.bincount((given - true)[wrong] % 10, minlength=10)[1:]
        mean = wrong.sum() / 9
        assert abs(often - mean).max() < 5 * (mean * 8 / 9) ** 0.5
        other = corrupted(Images(np.zeros(1), true), share, 10, seed=4).labels[:, 0]
        assert (other != given).any()


def test_a_larger_share_keeps_the_wrong_labels_of_a_smaller_one():
    true = np.arange(500, dtype=np.int32) % 10
    few, many = (corrupted(Images(true, true), share, 10, 0).labels[:, 0] for share in (0.2, 0.4))
    np.testing.assert_array_equal(few[few != true], many[few != true])


def test_self_paced_weights_of_known_losses():
    """0.9 * 2 + 0.1 * median(1, 2, 4) = 2 is the moving percentile."""
    values = jnp.array([1.0, 2.0, 4.0])
    level = noisy_training.moving_percentile(jnp.float32(2.0), values, jnp.float32(50.0))
    assert float(level) == 2.0
    seen = Seen(values, values - level, jnp.zeros(3, int), jnp.full(3, 0.5))
    assert self_paced(seen).tolist() == [1.0, 1.0, 0.0]
    weighing = Weighing("self_paced")
    assert weighing.weights(None, seen).tolist() == [1.0, 1.0, 0.0]
    early = seen._replace(done=jnp.full(3, BURN_IN / 2))
    assert weighing.weights(None, early).tolist() == [1.0, 1.0, 1.0]


def test_a_mentor_learns_which_labels_are_right():
    """Where losses of wrong labels are above 2 in one half of the training, and below in the other:
    no threshold of the loss alone tells them apart."""
    rng = np.random.default_rng(0)
    loss, done = rng.uniform(0, 4, 400), rng.uniform(size=400)
    right = (loss < 2) == (done < 0.5)
    seen = Seen(*map(jnp.float32, (loss, loss - 2)), jnp.zeros(400, "i4"), jnp.float32(done))
    mentor = Mentor(3)
    weights = mentor.weights(jit(partial(learn, mentor))(0, seen, jnp.array(right)), seen)
    assert ((weights > 0.5) == right).mean() > 0.9


@pytest.mark.parametrize("method", ("batch", "group"))
def test_weights_of_one_in_the_loss_change_no_bit(method, monkeypatch):
    monkeypatch.setattr(noisy_training, "BURN_IN", 2.0)  # all of the training
    seeds, now = (0, 1), how(images=4 if method == "batch" else 8)
    plain = training.fit(net(method), seeds, **now)
    ones = noisy_training.fit(net(method), seeds, Weighing("self_paced"), share=0.0, **now)
    assert (ones.steps.weights == 1).all()
    jax.tree.map(np.testing.assert_array_equal, ones.trained.state, plain.state)


def step_of(method):
    """Losses and new statistics by pixels and weights, of two devices with four images each."""
    network = net(method)
    state = training.initialize(network, training.make_optimizer(0.1, 8, 2), 2, (8, 8, 1), [0])
    state = jax.tree.map(lambda t: t[0], state)

    @jit
    def step(pixels, weights):
        labels = jnp.zeros((2, 4, 2), "i4")
        images = Images(pixels, labels)
        return losses(network, state.params, state.on_devices, images, weights)

    return step, jax.random.normal(jax.random.key(1), (2, 4, 8, 8, 1))


@pytest.mark.parametrize("method", ("batch", "batch_group", "group"))
def test_statistics_get_the_weights(method):
    """An example of weight 0 touches nothing, whatever its pixels; without weights it does."""
    step, pixels = step_of(method)
    absurd = pixels.at[0, 3].set(1e4 * pixels[0, 3] + 1e5)
    weights = jnp.ones((2, 4)).at[0, 3].set(0.0)
    others = np.s_[[0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 0, 1, 2, 3]]
    (usual, statistics), (given, new) = step(pixels, weights), step(absurd, weights)
    np.testing.assert_array_equal(given[others], usual[others])
    jax.tree.map(np.testing.assert_array_equal, new, statistics)
    assert np.isfinite(given).all()
    unlike = (step(absurd, None)[0] != step(pixels, None)[0])[others]
    assert unlike.tolist() == [method != "group"] * 3 + [False] * 4
    ones = step(pixels, jnp.ones((2, 4)))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ones, step(pixels, None)
    )


def test_weights_cancel_in_group_norm_alone():
    weights = jnp.array([[1.0, 0.5, 0.2, 0.0]] * 2)
    for method in ("group", "batch"):
        step, pixels = step_of(method)
        weighed, plain = step(pixels, weights)[0], step(pixels, None)[0]
        assert np.allclose(weighed, plain, rtol=1e-4, atol=1e-5) == (method == "group")


def test_a_set_without_any_weight_counts_alike():
    none, some = jnp.zeros(2), jnp.array([0.0, 0.5])
    assert statistics_weights(none, True).ravel().tolist() == [1, 1]
    assert statistics_weights(some, True).ravel().tolist() == [0, 0.5]
    assert statistics_weights(some, False).ravel().tolist() == [1, 0.5]


def test_group_norm_is_not_trained_with_weighted_statistics():
    planned = noisy_labels.plans({"digits": (8, 8, 1)})
    assert len({one.key for one in planned}) == len(planned) == 4 * (7 + 7 + 3)
    quick = noisy_labels.plans({"digits": (8, 8, 1)}, quick=True)
    assert {one.key for one in quick} < {one.key for one in planned}
    assert all(one.key.how.enters == "loss" for one in planned if one.key.method == "group")


@pytest.mark.slow
def test_the_whole_program(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(noisy_labels, "METHODS", ("batch",))
    monkeypatch.setattr(noisy_labels, "QUICK", {8: Settings(128, None, 5)})
    run = ["--quick", "--seeds", "3", "--output", str(tmp_path)]
    assert noisy_labels.main([*run, "--plan"]) == 0 and not list(tmp_path.iterdir())
    assert noisy_labels.main(run) == 0
    result = Map.load(tmp_path)
    assert len(result.cells) == 5
    for key, cell in result.cells.items():
        assert len(cell.errors) == 3 and key.how.corrupted == 0.4
        means = cell.more["weights"]["right"]
        assert all(0 < mean < 100 for mean in means) == (key.how.curriculum != "none"), key
    assert len({tuple(cell.errors) for cell in result.cells.values()}) == 5
    text = (tmp_path / "noisy_labels.md").read_text()
    assert "| 40% | BatchNorm@8 |" in text and "of the 4 differences" in text
    before = (tmp_path / "cells.json").read_bytes()
    capsys.readouterr()
    assert noisy_labels.main([*run, "--resume"]) == 0
    assert "0 of 5 cells to measure" in capsys.readouterr().out
    assert (tmp_path / "cells.json").read_bytes() == before
    with pytest.raises(SystemExit):
        noisy_labels.main(run)  # without --resume
