"""The program `benchmarks.fluctuations`: known exponents, surrogates, curves of a training."""

import json

import jax
import numpy as np
import pytest

from benchmarks import fluctuations, fractals, training
from benchmarks.cells import Key, Map
from benchmarks.datasets import load
from benchmarks.fractals import KINDS, KNOWN, Q, exponents, width
from benchmarks.plan import ROWS
from benchmarks.residual import WIDTHS, ResidualNet
from benchmarks.training import Curves, Trained


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.label)
def test_known_exponents_are_found(known):
    """h(q) of every order to 0.06 in the mean of 10 series of 4096 values, and closer than the
    exponents of any other of these series."""
    found = np.mean([exponents(known.draw(4096, seed)) for seed in range(10)], axis=0)
    np.testing.assert_allclose(found, known.h, atol=0.06)
    far = {other.label: np.abs(found - other.h).max() for other in KNOWN}
    assert min(far, key=far.__getitem__) == known.label


def test_exponents_of_the_cascade_are_those_of_its_moments():
    """A moment of order q of the masses of windows of s values grows as s^(q h(q)), up to the
    number of windows: Kantelhardt et al., section 2.3."""
    series = fractals.cascade(2**12, 0)
    for q, h in zip(Q, fractals.cascade_exponents(), strict=True):
        moments = [np.sum(series.reshape(-1, size).sum(axis=1) ** q) for size in (1, 64)]
        assert np.log2(moments[1] / moments[0]) / 6 == pytest.approx(q * h - 1)


def test_exponents_ignore_scale_and_offset():
    series = KNOWN[0].draw(1024, 0)
    np.testing.assert_allclose(exponents(5 - 3 * series), exponents(series), rtol=1e-6)


@pytest.mark.parametrize("length", (1024, 1023))
def test_surrogates_keep_what_they_must(length):
    series = fractals.cascade(length, 0) * 1000
    rng = np.random.default_rng(1)
    mixed, phases = fractals.shuffled(series, rng), fractals.phase_randomized(series, rng)
    np.testing.assert_array_equal(np.sort(mixed), np.sort(series))
    power = np.abs(np.fft.rfft(series))
    np.testing.assert_allclose(np.abs(np.fft.rfft(phases)), power, rtol=1e-6, atol=1e-8)
    assert not np.allclose(np.abs(np.fft.rfft(mixed)), power, rtol=0.1)
    assert not np.allclose(np.sort(phases), np.sort(series), rtol=0.1)
    assert len(phases) == length and np.corrcoef(phases, series)[0, 1] < 0.3


def test_surrogates_tell_a_cascade_from_noise():
    """All cascades of 2048 values are wider than 95 % of either kind, and at most 2 of 10 series
    of noise, long memory among them."""
    for known in (KNOWN[2], KNOWN[3]):
        check = fractals.check(known, 2048)
        assert check.holds
        for kind in KINDS:
            wider = sum(one.wider for one in check.excess[kind])
            assert wider == 10 if known.label == "binomial cascade" else wider <= 2


def test_a_check_of_other_exponents_fails():
    wrong = KNOWN[0]._replace(h=KNOWN[0].h + 0.1)
    assert not fractals.Check(wrong, fractals.check(KNOWN[0], 256).h, {}).holds


def test_the_global_random_state_is_left_alone():
    np.random.seed(5)
    expected = np.random.random(2)
    np.random.seed(5)
    first = np.random.random()
    a, b = (KNOWN[2].draw(300, 1) for _ in range(2))
    assert [first, np.random.random()] == expected.tolist()
    np.testing.assert_array_equal(a, b)


def test_series_without_exponents_are_refused():
    series = KNOWN[0].draw(512, 0)
    with pytest.raises(ValueError, match="at least 256"):
        exponents(series[:255])
    with pytest.raises(ValueError, match="1 values that are not finite"):
        exponents(np.where(np.arange(512) == 3, np.nan, series))
    with pytest.raises(ValueError, match="constant for 16"):
        exponents(np.where(np.arange(512) < 16, 1.0, series))
    exponents(np.where(np.arange(512) < 15, 1.0, series))


@pytest.mark.parametrize("method", ("batch", pytest.param("group", marks=pytest.mark.slow)))
@pytest.mark.slow
def test_curves_leave_the_training_as_it_is(method):
    """The parameters have the same bits; the first loss is that of ten classes by chance, and the
    loss falls with the gradient's norm above 0."""
    net = ResidualNet(tuple(ROWS[method].at(8, features) for features in WIDTHS))
    how = {"data": load("digits"), "num_train": 128, "devices": 2, "images_per_device": 8}
    how |= {"epochs": 3, "on_epoch": lambda done: None}
    without, with_curves = (training.fit(net, range(2), curves=c, **how) for c in (False, True))
    assert without.curves is None
    jax.tree.map(np.testing.assert_array_equal, without.state, with_curves.state)
    curves = with_curves.curves
    assert {part.shape for part in curves} == {(2, 3 * 128 // 16)}
    assert (curves.gradient_norm > 0).all()
    assert (curves.loss[:, -8:].mean(axis=1) < curves.loss[:, :8].mean(axis=1)).all()
    assert 1.5 < curves.loss[:, 0].mean() < 4


def test_what_is_analysed_comes_after_the_warm_up():
    """An epoch of two steps that would spoil the rest, and each part of what follows."""
    noise = np.stack([KNOWN[2].draw(1024, seed) for seed in range(2)])
    curve = np.exp(np.concatenate([np.full((2, 2), 50.0), noise], axis=1))

    class Split:
        class train:
            labels = np.zeros(2 * training.IMAGES_PER_STEP)

    trained = Trained(None, None, [Split] * 2, 0.0, 0.0, Curves(curve, curve))  # type: ignore
    key = Key("digits", "1x1", "batch", 2)
    for part, expected in {
        "whole": noise,
        "first half": noise[:, :512],
        "second half": noise[:, 512:],
    }.items():
        found = fluctuations.analysed(trained, key, curve="loss", part=part)
        for seed in range(2):
            h = exponents(expected[seed])
            got = [found[f"h({q})"][seed] for q in Q]
            np.testing.assert_allclose(got, h, rtol=1e-6)
            assert found["width"][seed] == pytest.approx(width(h))


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys, monkeypatch):
    """End to end, with one cell; it resumes, and ends where known exponents are not found."""
    monkeypatch.setattr(fluctuations, "FIRST", (("group", 32),))
    monkeypatch.setattr(fluctuations, "IMAGES", 256)
    monkeypatch.setattr(fractals, "SURROGATES", 3)
    monkeypatch.setattr(fractals, "KNOWN", (KNOWN[0]._replace(tolerance=0.2),))
    arguments = ["--quick", "--seeds", "2", "--steps", "512", "--output", str(tmp_path)]
    assert fluctuations.main(arguments) == 0
    out = capsys.readouterr().out
    assert "| GroupNorm(4) | second half |" in out and "| white noise | 0.50 /" in out
    cells = Map.load(tmp_path).cells
    assert list(cells) == [Key("digits", "1x1", "group", None)]
    more = next(iter(cells.values())).more
    assert set(more) == set(fluctuations.MEASURES)
    assert all(len(values) == 2 for part in more.values() for values in part.values())
    assert (tmp_path / "fluctuations_digits.png").read_bytes().startswith(b"\x89PNG")
    before = json.loads((tmp_path / "cells.json").read_text())
    assert fluctuations.main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "cells.json").read_text()) == before
    assert "0 of 1 cells" in capsys.readouterr().out

    monkeypatch.setattr(fractals, "KNOWN", (KNOWN[0]._replace(tolerance=0.0),))
    other = [*arguments[:-1], str(tmp_path / "other")]
    assert fluctuations.main(other) == 1
    assert not Map.exists(tmp_path / "other")


def test_too_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        fluctuations.main(["--steps", "400", "--plan"])
    message = " ".join(capsys.readouterr().err.split())
    assert "a half of 416 steps is too short" in message and "at least 256" in message
