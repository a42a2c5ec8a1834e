"""The program `benchmarks.failure`: what shares a statistic, the threshold, its cells and files."""

import json
import math
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import failure, failure_report, serving
from benchmarks.cells import Cell, Key, Map, Settings
from benchmarks.datasets import load
from benchmarks.failure_plan import BATCH_SIZES, EXTRAS, plans
from benchmarks.norms import METHODS
from benchmarks.plan import ROWS
from benchmarks.residual import STRIDES, WIDTHS, ResidualNet
from benchmarks.serving import Others, Serving
from benchmarks.threshold import crossing, threshold
from benchmarks.training import State

DIGITS = {"digits": (8, 8, 1)}


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    "method, elements",
    (
        ("batch", 2 * 16),
        ("group", 16 * 48 // 4),
        ("batch_group", 2 * 16 * 48 // 6),  # 6 groups of 48 channels for two images
        ("batch_group_12", 2 * 16 * 48 // 12),
        ("layer", 16 * 48),
        ("instance", 16),
        ("positional", 48),
        ("ghost_batch", 16),
        ("weighed", 2 * 16 * 48 // 4),
        ("batch_renorm", 2 * 16),
        ("evonorm_s0", 16 * 48 // 4),
        ("frn", 16),
        ("proxy", 16 * 48 // 4),
        ("frozen", 1),
    ),
)
def test_elements_that_share_a_statistic(method, elements):
    """Two images of 4x4 positions and 48 channels."""
    assert ROWS[method].at(2, 48).elements((2, 4, 4, 48)) == elements


@pytest.mark.parametrize("size", STRIDES)
def test_strides_lead_to_the_map_of_their_name(size):
    layers = tuple(METHODS["group"].at(2, width) for width in WIDTHS)
    for last, strides in STRIDES[size].items():
        net = ResidualNet(layers, strides)

        def shapes(net=net):
            x = jnp.zeros((1, size, size, 3))
            return net.init_with_output(
                jax.random.key(0), x, train=False, capture_intermediates=True
            )[1]["intermediates"]["Block_2"]["__call__"][0]

        height, width = map(int, last.split("x"))
        assert jax.eval_shape(shapes).shape == (1, height, width, WIDTHS[-1])


def test_plans_have_each_cell_once_and_the_most_telling_first():
    shapes = DIGITS | {"fashion_mnist": (28, 28, 1)}
    found = plans(shapes, quick=False, seeds=5, extra_seeds=3)
    keys = [plan.key for plan in found]
    assert len(set(keys)) == len(keys)
    assert {str(key) for key in keys[:4]} == {
        f"digits 1x1 {name}" for name in ("batch@2", "batch@32", "group", "batch_group@2")
    }
    maps = {("digits", last) for last in ("1x1", "2x2", "4x4")}
    maps |= {("fashion_mnist", last) for last in ("1x1", "2x2", "4x4", "7x7")}
    assert {(key.data, key.last) for key in keys} == maps
    for name, sizes in {
        "batch": BATCH_SIZES,
        "batch_renorm": BATCH_SIZES,
        "batch_group": (2, 4, 8),  # with 32 images it is batch norm
        "group": (None,),
    }.items():
        expected = {Key(*where, name, size) for where in maps for size in sizes}
        assert {key for key in keys if key.method == name} == expected
    extras = [plan for plan in found if plan.key.method in EXTRAS]
    assert len(extras) == len(EXTRAS) * len(maps) and {plan.seeds for plan in extras} == {3}
    assert not any(
        plan.key.method in EXTRAS for plan in plans(shapes, quick=False, seeds=5, extra_seeds=0)
    )
    assert set(keys) > {plan.key for plan in plans(shapes, quick=True, seeds=2, extra_seeds=0)}


def test_crossing_of_a_known_curve():
    """The loss 100 / n is 5 at n = 20; between sizes it is a line over log n."""
    sizes = [2.0**power for power in range(1, 10)]
    assert crossing(sizes, [100 / n for n in sizes], 6.25) == pytest.approx(16)
    between = crossing(sizes, [100 / n for n in sizes], 5.0)
    assert between == pytest.approx(16 * 2 ** ((6.25 - 5) / (6.25 - 3.125)))
    shuffled = np.random.default_rng(0).permutation(sizes)
    assert crossing(shuffled, 100 / shuffled, 5.0) == pytest.approx(between)


def test_crossing_of_losses_that_do_not_fall():
    """Neighbours that rise are averaged, those of one size too."""
    assert crossing([1, 2, 4, 8], [10, 4, 6, 0], 5.0) == pytest.approx(4)
    assert crossing([1, 4, 4, 16], [8, 6, 2, 0], 4.0) == pytest.approx(4)
    assert crossing([1, 2], [1, 0], 5.0) == 0
    assert crossing([1, 2], [9, 8], 5.0) == math.inf


def test_the_interval_of_a_threshold_holds_the_truth():
    """In at least 80 of 100 experiments of 8 seeds, and mostly not when it is somewhere else."""
    rng = np.random.default_rng(0)
    sizes = [4, 8, 16, 32, 64]
    hits, wrong = 0, 0
    for _ in range(100):
        shift = rng.normal(0, 0.3, 8)  # of a seed, at all sizes
        points = [(n, 5 - math.log2(n) + shift + rng.normal(0, 0.2, 8)) for n in sizes]
        found = threshold(points, 1.5, resamples=200)
        assert found.low <= found.size <= found.high
        hits += found.low <= 2**3.5 <= found.high
        wrong += found.low <= 2**4.5 <= found.high
    assert hits >= 80 and wrong <= 5


def test_a_threshold_outside_of_the_sizes_is_unbounded():
    above = threshold([(2, [9.0, 8.0]), (4, [7.0, 6.5])], 1.0)
    assert above == (*(math.inf,) * 3, 4, math.inf)
    below = threshold([(2, [0.5, 0.2]), (4, [0.0, 0.1])], 1.0)
    assert below == (*(0.0,) * 3, 0, 2)
    inside = threshold([(2, [9.0, 0.0]), (4, [0.0, 0.0])], 1.0)
    assert inside.low == 0 and (inside.below, inside.above) == (2, 4)
    assert str(inside).endswith(", between 2 and 4") and "between" not in f"{above} {below}"


def cell(data="digits", last="1x1", method="batch", batch_size=2, errors=(3.0, 5.0), why=False):
    accuracies = [100 - error for error in errors]
    others = Others(accuracies, accuracies, [0.5] * len(errors), [1.0] * len(errors))
    layer = ROWS[method].at(batch_size or 2, WIDTHS[-1])
    return Cell(
        Key(data, last, method, batch_size),
        Settings(1024, None, 20),
        str(layer),
        layer.elements((batch_size or 2, *map(int, last.split("x")), WIDTHS[-1])),
        Serving(accuracies, others if why else None),
        1.0,
        2.0,
        3.0,
    )


def made(*cells):
    return Map({"jax": "1"}, {"device": "cpu"}, {each.key: each for each in cells})


def test_tables_of_a_known_map(tmp_path):
    """Batch norm loses 9, 3 and 0 points to group norm at n = 2, 8 and 16."""
    found = made(
        cell("digits", "1x1", "group", None, (5.0, 7.0)),
        cell("digits", "2x2", "group", None, (4.0, 4.0)),
        cell("digits", "1x1", "batch", 2, (14.0, 16.0), why=True),
        cell("digits", "1x1", "batch", 8, (8.0, 10.0)),
        cell("digits", "2x2", "batch", 2, (7.0, 7.0)),
        cell("digits", "2x2", "batch", 4, (4.0, 4.0)),
        cell("digits", "2x2", "layer", None, (6.0, 6.0)),
    )
    limit = failure_report.batch_norm_threshold(found, "digits", 1.0)
    assert limit.size == pytest.approx(8 * 2 ** (2 / 3))
    text = failure_report.markdown(found)
    assert "| 1x1 | 2 | 2 | 15.0 ± 12.7 | 6.0 ± 12.7 |" in text
    assert (
        "| 8 | 1x1, b = 8 | 2x2, b = 2 | 9.0 ± 12.7 | 7.0 ± 0.0 | 2.0 ± 12.7 | 0.0 ± 0.0 |" in text
    )
    assert "| LayerNorm | – | 6.0 ± 0.0 |" in text
    assert "| BatchNorm | 1x1 | 2 | 2 | 2 | 0.50 | 15.0 ± 12.7 |" in text
    failure.draw(found, 1.0, tmp_path / "failure.png")
    assert (tmp_path / "failure.png").read_bytes().startswith(b"\x89PNG")


def test_cells_come_back_from_their_file(tmp_path):
    found = made(cell(), cell(method="group", batch_size=None, why=True))
    found.save(tmp_path)
    assert Map.load(tmp_path) == found
    file = tmp_path / "cells.json"
    whole = file.read_text()
    for damaged in (whole[:-50], "[]", "{}", whole.replace('"epochs"', '"epoch"')):
        file.write_text(damaged)
        with pytest.raises(ValueError, match="was left as it is"):
            Map.load(tmp_path)
        assert file.read_text() == damaged


@pytest.fixture
def trainings(monkeypatch):
    """Replaces the measurement of a cell; returns the keys that were asked for."""
    keys = []

    def measured(plan, data, on_epoch):
        keys.append(plan.key)
        on_epoch(0)
        errors = [float(len(keys) + seed) for seed in range(plan.seeds)]
        return Cell(plan.key, plan.settings, "", plan.elements, Serving(errors), 1.0, 1.0, 1.0)

    monkeypatch.setattr(failure, "measured", measured)
    return keys


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        failure.main(arguments)
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_an_interrupted_run_resumes(trainings, tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    measured = failure.measured

    def until_interrupted(plan, data, on_epoch):
        if len(trainings) == 3:
            signal.raise_signal(signal.SIGINT)
        return measured(plan, data, on_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(failure, "measured", until_interrupted)
        assert failure.main(arguments) == 130
    assert "Go on with --resume" in capsys.readouterr().out
    kept = Map.load(tmp_path).cells
    assert len(kept) == 3 and (tmp_path / "failure.png").exists()

    assert "already holds cells" in error_of(arguments, capsys)
    trainings.clear()
    assert failure.main([*arguments, "--resume"]) == 0
    found = Map.load(tmp_path).cells
    assert list(found.items())[:3] == list(kept.items())
    assert len(found) == 8 and trainings == list(found)[3:]
    assert "BatchNorm" in (tmp_path / "failure.md").read_text()

    message = error_of([*arguments, "--resume", "--seeds", "2"], capsys)
    assert "cannot resume" in message and "3 seeds, not" in message


def test_a_budget_ends_between_cells(trainings, tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path), "--budget", "0.01"]
    assert failure.main(arguments) == 130 and not trainings
    assert "8 cells are left" in capsys.readouterr().out


def test_a_plan_measures_and_writes_nothing(trainings, tmp_path, capsys):
    assert failure.main(["--plan", "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "digits 1x1 batch@2" in text and "cells to measure, about" in text
    assert not trainings and not (tmp_path / "new").exists()


def test_wrong_data_is_refused_at_the_door(trainings, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    assert "no data set 'mist'" in error_of(["--data", "mist", *output], capsys)
    assert "got no folder" in error_of(["--data", "digits", "mnist", *output], capsys)
    assert "is not there" in error_of(["--data", f"mnist={tmp_path}", *output], capsys)
    assert not trainings


def test_a_cell_from_end_to_end(tmp_path):
    """Batch norm of few images; every value is there for every seed, and comes back from JSON."""
    plan = plans(DIGITS, quick=False, seeds=2, extra_seeds=0)[0]
    plan = plan._replace(settings=Settings(64, 64, 2))
    done = []
    found = failure.measured(plan, load("digits"), done.append)
    assert done == [0, 1, 2] and found.key == Key("digits", "1x1", "batch", 2)
    others = found.accuracy.others
    for values in (found.accuracy.running, others.batch, others.population):
        assert len(values) == 2 and all(0 <= value <= 100 for value in values)
    assert others.effective_positions == pytest.approx([1.0, 1.0], rel=1e-4)  # maps of 1x1
    assert all(ratio > 0 for ratio in others.variance_ratio)
    made(found).save(tmp_path)
    assert json.loads((tmp_path / "cells.json").read_text())["cells"][0]["elements"] == 2
    assert Map.load(tmp_path).cells[found.key] == found


def test_population_statistics_are_those_of_all_batches():
    """Of batches whose moments are known."""
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 5, 3)).astype(np.float32)
    moments = {"norm": {"mean": jnp.asarray(x.mean(axis=3)), "var": jnp.asarray(x.var(axis=3))}}
    pooled = serving._pooled(moments)["norm"]
    np.testing.assert_allclose(pooled["mean"], x.mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(pooled["var"], x.var(axis=(1, 2, 3)), rtol=1e-5)


def test_effective_positions_of_alike_and_of_independent_ones(monkeypatch):
    """Of images of one colour 1, since all positions are alike; of noise about as many as a map
    has."""
    layers = tuple(METHODS["group"].at(2, width) for width in WIDTHS)
    net = ResidualNet(layers, (1, 1, 1))

    def apply(self, variables, pixels, **options):
        return None, {"intermediates": {"Block_2": {"conv": {"__call__": (pixels,)}}}}

    monkeypatch.setattr(ResidualNet, "apply", apply)
    state = State({}, {}, None, jnp.array(0))
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=(4000, 4, 4, 2)))
    alike = jnp.broadcast_to(noise[:, :1, :1], noise.shape)
    measure = partial(serving._effective_positions, net, state)
    assert float(measure(alike)) == pytest.approx(1, rel=1e-4)
    assert float(measure(noise)) == pytest.approx(16, rel=0.1)
