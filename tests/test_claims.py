"""The program `benchmarks.claims`: verdicts, the cells of claims, what is measured, and files."""

import dataclasses
import json
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shifts, sweep
from benchmarks.cells import Cell, How, Map, Settings
from benchmarks.claims import CLAIMS, __main__, batches, domains, recipes
from benchmarks.claims.plan import QUICK_SEEDS, plans
from benchmarks.claims.record import Claim
from benchmarks.claims.report import markdown, tried
from benchmarks.claims.verdicts import (
    MISSING,
    MIXED,
    NOT_SEEN,
    SEEN,
    TOO_FEW,
    above,
    below,
    error,
    holm,
    judge,
    together,
    within,
)
from benchmarks.datasets import load
from benchmarks.measures import MEASURES
from benchmarks.norms import METHODS
from benchmarks.plan import ROWS
from benchmarks.residual import STRIDES, WIDTHS, ResidualNet
from benchmarks.serving import Serving

SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def cell(difference, errors, **more):
    """A made cell of the only term of a difference."""
    return Cell(
        difference.on("digits")[0].key,
        Settings(1024, None, 20),
        "",
        1,
        Serving([100 - value for value in errors]),
        1.0,
        1.0,
        1.0,
        more,
    )


def made(*cells):
    return {each.key: each for each in cells}


A, B = error("batch", 2), error("group")


@pytest.mark.parametrize(
    "differences, check, verdict",
    (
        ((3.0, 4.0, 5.0, 4.0), above, SEEN),
        ((-3.0, -4.0, -5.0, -4.0), above, NOT_SEEN),
        ((0.5, 0.6, 0.4, 0.5), above, NOT_SEEN),  # below the margin of 1
        ((0.0, 4.0, -2.0, 3.0), above, MIXED),
        ((1.0, 1.0, 1.0), above, MIXED),  # at the margin
        ((-3.0, -4.0, -5.0, -4.0), below, SEEN),
        ((3.0, 4.0, 5.0, 4.0), below, NOT_SEEN),
        ((0.1, -0.1, 0.2, -0.2), within, SEEN),
        ((3.0, 4.0, 5.0, 4.0), within, NOT_SEEN),
        ((-3.0, -4.0, -5.0, -4.0), within, NOT_SEEN),
        ((0.0, 3.0, -3.0, 0.5), within, MIXED),
        ((3.0, 4.0), above, TOO_FEW),
        ((3.0,), above, TOO_FEW),
    ),
)
def test_verdict_of_known_differences(differences, check, verdict):
    """By a margin of one point, on cells whose seeds differ by more than they do in pairs."""
    base = [10.0 * seed for seed in range(len(differences))]
    ours = [b + d for b, d in zip(base, differences, strict=True)]
    margin = -1.0 if check is below else 1.0
    found = judge(check(margin, A - B).on("digits"), made(cell(A, ours), cell(B, base)))
    assert found.verdict == verdict
    assert found.interval.mean == pytest.approx(np.mean(differences))
    assert found.seeds == len(differences)


def test_a_verdict_is_decided_where_the_test_is_significant():
    """The interval excludes the ends of the region exactly where p is below 5 %."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        ours = rng.normal(rng.uniform(-4, 4), 2, 6).tolist()
        for check in (above(1, A - B), below(-1, A - B), within(2, A - B)):
            found = judge(check.on("digits"), made(cell(A, ours), cell(B, [0.0] * 6)))
            assert (found.p < 0.05) == (found.verdict in (SEEN, NOT_SEEN))
            seen.add((check.region, found.verdict))
    assert len(seen) == 9


def test_a_true_claim_is_rarely_called_not_seen():
    """The interval holds the true difference in about 95 of 100 experiments."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        ours = rng.normal(1.0, 3, 8).tolist()  # at the end of the region
        found = judge(above(1, A - B).on("digits"), made(cell(A, ours), cell(B, [0.0] * 8)))
        wrong += found.verdict != MIXED
    assert 0.02 < wrong / 400 < 0.09


def test_missing_cells_and_missing_values():
    check = above(0, error("batch", 2, value="weighed.error") - B).on("digits")
    assert judge(check, {}).verdict == MISSING
    assert judge(check, made(cell(A, [1.0] * 3), cell(B, [0.0] * 3))).verdict == MISSING
    whole = made(cell(A, [0.0] * 3, weighed={"error": [2.0, 3.0, 4.0]}), cell(B, [0.0] * 3))
    found = judge(check, whole)
    assert found.interval.mean == pytest.approx(3) and found.seeds == 3


def test_a_difference_of_differences():
    noisy = partial(error, noise=1.0)
    difference = (noisy("group") - error("group")) - (noisy("batch", 32) - error("batch", 32))
    assert [term.sign for term in difference] == [1, -1, -1, 1]
    cells = made(
        cell(noisy("group"), [9.0, 10.0, 11.0]),
        cell(error("group"), [5.0] * 3),
        cell(noisy("batch", 32), [3.0] * 3),
        cell(error("batch", 32), [2.0] * 3),
    )
    assert difference.on("digits").by_seed(cells) == pytest.approx([3, 4, 5])


def test_the_verdict_of_several_checks():
    assert together([SEEN, SEEN, MISSING, TOO_FEW]) == SEEN
    assert together([NOT_SEEN]) == NOT_SEEN
    assert together([SEEN, NOT_SEEN]) == together([SEEN, MIXED]) == MIXED
    assert together([MISSING, TOO_FEW]) == TOO_FEW
    assert together([MISSING]) == together([]) == MISSING


def test_holms_correction_of_a_known_family():
    """With five tests at 5 %: 0.009 <= 0.05 / 5, 0.012 <= 0.05 / 4, 0.02 > 0.05 / 3."""
    assert holm([0.02, 0.009, 0.9, 0.012, 0.021]) == [False, True, False, True, False]
    assert holm([]) == []


@pytest.mark.parametrize("name", CLAIMS)
def test_the_cells_of_a_claim_can_be_trained(name):
    claim = CLAIMS[name]
    assert claim.text.endswith(".") and ("arXiv:" in claim.source or "ECCV" in claim.source)
    assert 1 <= claim.quick <= len(claim.checks)
    for quick in (False, True):
        planned = plans([claim], SHAPES, quick=quick)
        asked = {
            term.key
            for data, shape in SHAPES.items()
            if shape[0] in claim.sizes
            for check in claim.tried(data, quick=quick)
            for term in check.difference
        }
        assert {plan.key for plan in planned} == asked and len(planned) == len(asked)
        for plan in planned:
            key, images = plan.key, plan.key.batch_size or plan.key.how.step
            assert key.how.step % images == 0
            assert plan.settings.train_images % key.how.step == 0
            assert plan.strides == STRIDES[SHAPES[key.data][0]][key.last]
            assert set(plan.measures) <= set(MEASURES) and plan.seeds >= 3
            if key.how.order.startswith("domains"):
                assert key.how.step // images == images // 2 == len(shifts.DOMAINS)
            if "weighed" in plan.measures or "recalibrated" in plan.measures:
                assert METHODS[key.method].at(images, 48) == METHODS["batch"].at(images, 48)


def test_names_are_unique_and_claims_share_cells():
    assert len(CLAIMS) == len(batches.CLAIMS) + len(recipes.CLAIMS) + len(domains.CLAIMS)
    digits = {"digits": SHAPES["digits"]}
    whole = plans(CLAIMS.values(), digits)
    assert len({plan.key for plan in whole}) == len(whole)
    assert len(whole) < sum(len(plans([claim], digits)) for claim in CLAIMS.values()) / 1.5
    quick = plans(CLAIMS.values(), digits, quick=True)
    assert {plan.key for plan in quick} <= {plan.key for plan in whole}
    assert {plan.seeds for plan in quick} == {QUICK_SEEDS}


@pytest.mark.parametrize("name", ("batch_group_halves", "ghost_16", "layer_proxy"))
@pytest.mark.parametrize("size", (8, 32))
def test_methods_of_claims_fit_their_maps(name, size):
    net = ResidualNet(tuple(ROWS[name].at(32, width) for width in WIDTHS), STRIDES[size]["2x2"])

    def train():
        variables = net.init(jax.random.key(0), jnp.zeros((1, size, size, 1)), train=False)
        return net.apply(variables, jnp.zeros((32, size, size, 1)), train=True, mutable=True)[0]

    assert jax.eval_shape(train).shape == (32, 10)


def test_steps_of_many_images():
    (plan,) = [
        plan
        for plan in plans([CLAIMS["ghost_batches_large"]], {"digits": SHAPES["digits"]})
        if plan.key.method == "ghost_16"
    ]
    assert plan.settings.epochs == 4 * 20  # as many steps as with 128 images
    assert How().rate is None and How(step=8).rate is None
    assert How(step=128).rate == pytest.approx(0.1 * 2)


def test_cells_come_back_and_those_of_the_map_of_failure_are_as_before(tmp_path):
    changed = cell(error("batch", 2, noise=1.0, residual=False), [1.0, 2.0], weighed={"a": [0.5]})
    usual = cell(A, [1.0, 2.0])
    found = Map({"jax": "1"}, {"device": "cpu"}, made(changed, usual))
    found.save(tmp_path)
    assert Map.load(tmp_path) == found
    first, second = json.loads((tmp_path / "cells.json").read_text())["cells"]
    assert first["key"]["how"] == {"noise": 1.0, "residual": False}
    assert str(changed.key) == "digits 1x1 batch@2 residual=False noise=1.0"
    assert set(second["key"]) == {"data", "last", "method", "batch_size"} and "more" not in second
    assert found.of("digits", "batch") == [usual]


WIDE = Claim("wide", "Text.", "Source, arXiv:0", (above(0, A - B), below(5, A - B)), "9 %; a note")
NONE = Claim("none", "Nothing.", "Source, arXiv:0", (above(0, error("layer") - B),))
WEAK = Claim("weak", "Weak.", "Source, arXiv:0", (above(0, error("batch", 4) - B),), limits="Few.")


def test_the_report_of_known_cells():
    """One clear difference, one that is decided alone but not among four tests."""
    cells = made(
        cell(A, [4.0, 4.1, 3.9, 4.0]),
        cell(B, [1.0] * 4),
        cell(error("batch", 4), [1.3, 1.5, 1.2, 1.5]),
    )
    result = Map({"jax": "1"}, {"device": "cpu"}, cells)
    wide, none, weak = tried(result, (WIDE, NONE, WEAK))
    assert (wide.verdict, wide.verdict_together) == (SEEN, SEEN)
    assert (none.verdict, none.verdict_together) == (MISSING, MISSING)
    assert (weak.verdict, weak.verdict_together) == (SEEN, SEEN)
    many = dataclasses.replace(result, cells=cells | made(cell(error("layer"), [0.0, 3, 1, 2.0])))
    *_, weak = tried(many, (WIDE, *[NONE] * 9, WEAK))
    assert (weak.verdict, weak.verdict_together) == (SEEN, MIXED)

    text = markdown(result, (WIDE, NONE, WEAK))
    assert (
        "| Handwritten digits | 1x1 batch@2 4.0 - 1x1 group 1.0 | above 0 | +3.00 ± 0.13 |" in text
    )
    assert "| Nothing. | not measured | not measured |" in text and "## none" not in text
    assert "The paper: 9 %; a note." in text and "no figure of it was read" in text
    assert "Limits: Few." in text and "Holm's correction" in text
    assert "3 checks were tested, and 3 of them are decided" in text


@pytest.fixture
def trainings(monkeypatch):
    """Replaces the measurement of a cell; returns the keys that were asked for."""
    keys = []

    def measured(plan, data, on_epoch):
        keys.append(plan.key)
        on_epoch(0)
        values = [float(len(keys) + seed) for seed in range(plan.seeds)]
        names = ("error", "known", "faint", "mnist", "noisy", "faint_adapted", "noisy_adapted")
        more = {measure: dict.fromkeys(names, values) for measure in plan.measures}
        return Cell(plan.key, plan.settings, "", 1, Serving(values), 1.0, 1.0, 1.0, more)

    monkeypatch.setattr(__main__, "measured", measured)
    return keys


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        __main__.main(arguments)
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_interrupted_run_resumes(trainings, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    measured = __main__.measured

    def until_interrupted(plan, data, on_epoch):
        if len(trainings) == 3:
            signal.raise_signal(signal.SIGINT)
        return measured(plan, data, on_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(__main__, "measured", until_interrupted)
        assert __main__.main(arguments) == 130
    kept = Map.load(tmp_path).cells
    assert len(kept) == 3 and "batch_norm_small" in (tmp_path / "claims.md").read_text()
    assert "already holds cells" in error_of(arguments, capsys)

    trainings.clear()
    assert __main__.main([*arguments, "--resume"]) == 0
    found = Map.load(tmp_path).cells
    assert list(found.items())[:3] == list(kept.items()) and trainings == list(found)[3:]
    text = (tmp_path / "claims.md").read_text()
    assert "not measured |" not in text and all(f"## {name}" in text for name in CLAIMS)

    trainings.clear()
    assert __main__.main(["--quick", "--report", "--output", str(tmp_path)]) == 0
    assert not trainings and (tmp_path / "claims.md").read_text() == text


def test_a_claim_alone_and_one_that_asks_more_of_the_same_cell(trainings, tmp_path, capsys):
    run = ["--quick", "--output", str(tmp_path)]
    assert __main__.main(["batch_norm_small", *run]) == 0
    assert "Verdict: " in capsys.readouterr().out and len(trainings) == 2
    assert __main__.main(["recalibration", "--resume", *run]) == 0
    assert len(trainings) == 3  # again, with the other statistics
    output = capsys.readouterr().out
    assert "## recalibration" in output and "## batch_norm_small" not in output
    assert "## batch_norm_small" in (tmp_path / "claims.md").read_text()


def test_the_list_measures_nothing(trainings, tmp_path, capsys):
    assert __main__.main(["--list", "--output", str(tmp_path / "new")]) == 0
    output = capsys.readouterr().out
    assert all(f"{name}: " in output for name in CLAIMS) and "minutes" in output
    assert not trainings and not (tmp_path / "new").exists()
    assert "no claim 'batch'" in error_of(["batch"], capsys)


def test_a_claim_from_end_to_end(tmp_path):
    claim = CLAIMS["adaptation_to_shift"]
    (plan,) = plans([claim], {"digits": SHAPES["digits"]}, seeds=3)
    plan = plan._replace(settings=Settings(64, 64, 2))
    found = sweep.measured(plan, load("digits"), lambda _: None)
    assert plan.is_done(found) and len(found.errors) == 3
    result = Map({"jax": "1"}, {"device": "cpu"}, {found.key: found})
    result.save(tmp_path)
    (one,) = tried(Map.load(tmp_path), [claim])
    assert one.verdict in (SEEN, NOT_SEEN, MIXED)
    assert all(finding.interval.half_width >= 0 for finding in one.findings)
