"""The program `benchmarks.batch_size`: its files, its options, and the effect that it shows."""

import csv
import json
import signal
import statistics
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import image
from scipy import stats

from benchmarks import batch_size, batch_size_report
from benchmarks.batch_size_report import Comparison
from benchmarks.cells import Cell, How, Key, Map
from benchmarks.datasets import load
from benchmarks.figures import dark
from benchmarks.norms import METHODS, TABLE, named
from benchmarks.residual import WIDTHS, ResidualNet
from benchmarks.results import interval
from benchmarks.serving import Serving
from benchmarks.splits import epoch, split

ONE_MAP = ["--maps", "1x1", "--seeds", "2", "--epochs", "2", "--train-images", "64"]
TWO_TRAININGS = [*ONE_MAP, "--batch-sizes", "16"]
FOUR_TRAININGS = [*ONE_MAP, "--batch-sizes", "2", "16"]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a small run: two trainings, one of which is that of two methods."""
    folder = tmp_path_factory.mktemp("batch_size")
    assert batch_size.main([*TWO_TRAININGS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def trainings(monkeypatch):
    """Replaces training by an outcome that differs from call to call; returns the list of keys."""
    keys = []

    def measured(plan, data, on_epoch):
        keys.append(plan.key)
        for done in range(plan.settings.epochs + 1):
            on_epoch(done)
        accuracies = [50.0 + len(keys) + seed for seed in range(plan.seeds)]
        return Cell(plan.key, plan.settings, "", plan.elements, Serving(accuracies), 1.0, 1.0, 1.0)

    monkeypatch.setattr(batch_size, "measured", measured)
    return keys


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        batch_size.main(arguments)
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def names(folder):
    return [f"{key.method}@{key.batch_size}" for key in Map.load(folder).cells]


def test_json_and_csv_agree(finished):
    saved = json.loads((finished / "cells.json").read_text())
    with open(finished / "cells.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    from_json = [
        (cell["key"]["method"], str(cell["key"]["batch_size"] or ""), str(seed), accuracy)
        for cell in saved["cells"]
        for seed, accuracy in enumerate(cell["accuracy"]["running"])
    ]
    from_csv = [
        (row["method"], row["batch_size"], row["seed"], float(row["test_accuracy"])) for row in rows
    ]
    assert from_csv == from_json and len(from_csv) == 4
    for key, value in (saved["versions"] | {"epochs": 2, "train_images": 64}).items():
        assert {row[key] for row in rows} == {str(value)}


def test_every_seed_is_measured(finished):
    assert names(finished) == ["batch@16", "group@None"]
    for cell in Map.load(finished).cells.values():
        assert len(cell.accuracy.running) == 2
        assert all(0 <= accuracy <= 100 for accuracy in cell.accuracy.running)


def test_batch_group_norm_of_16_images_shares_the_training_of_batch_norm(finished):
    batch = Map.load(finished).cells[Key("digits", "1x1", "batch", 16)]
    accuracy = interval(batch.accuracy.running)
    text = (finished / "batch_size.md").read_text()
    assert f"| digits | 1x1 | BatchNorm | {accuracy} |" in text
    assert f"| digits | 1x1 | BatchGroupNorm | ({accuracy}) |" in text


def test_draws_a_light_and_a_dark_figure(finished):
    light = finished / "batch_size.png"
    pixels = [image.imread(path)[..., :3] for path in (light, dark(light))]
    assert pixels[0].mean() > 0.9 and pixels[1].mean() < 0.2
    assert pixels[0].shape == pixels[1].shape


def comparison(accuracies):
    """A comparison of three methods with known accuracies, by method and batch size."""
    parser = batch_size.make_parser()
    args = parser.parse_args([*ONE_MAP, "--batch-sizes", "2", "4", "32"])
    points = batch_size.compared(parser, args, {"digits": load("digits")})
    result = Map({}, {})
    for point, plan in points.items():
        known = accuracies.get((point.method, point.batch_size), [90.0, 95.0])
        cell = Cell(plan.key, plan.settings, "", plan.elements, Serving(known), 1.0, 1.0, 1.0)
        result.cells.setdefault(plan.key, cell)
    return Comparison(points, result)


def test_differences_are_paired_by_seed():
    """Two seeds that differ by 40 points, and a difference that is nearly the same in both."""
    found = comparison({("batch", 2): [20.0, 60.0], ("batch_group", 2): [30.0, 71.0]})
    points = {(d.point[2:], d.baseline[2:]): d.interval for d in found.differences()}
    assert points[("batch_group", 2), ("batch", 2)] == pytest.approx((10.5, 6.353), rel=1e-3)
    assert points[("batch", 32), ("batch", 2)].mean == pytest.approx(52.5)
    assert (("batch_group", 32), ("batch", 32)) not in points  # the same training
    text = batch_size_report.markdown(found)
    assert "| BatchGroupNorm at 2 | BatchNorm at 2 | **+10.5 ± 6.4** |" in text
    assert "| BatchNorm at 32 | BatchNorm at 2 | +52.5 ± " in text


@pytest.mark.slow
def test_other_protocol_and_network(tmp_path):
    options = ["--protocol", "batch", "--maps", "2x2", "--methods", "layer", "--batch-sizes", "64"]
    small = ["--seeds", "2", "--epochs", "2", "--train-images", "64"]
    assert batch_size.main([*small, *options, "--output", str(tmp_path)]) == 0
    (key,) = Map.load(tmp_path).cells
    assert key == Key("digits", "2x2", "layer", None, How(step=64))
    assert "by images per step" in (tmp_path / "batch_size.md").read_text()


def test_refuses_to_overwrite(finished, capsys):
    before = (finished / "cells.json").read_bytes()
    message = error_of([*TWO_TRAININGS, "--output", str(finished)], capsys)
    assert "already holds cells" in message and "--resume" in message and "--overwrite" in message
    assert (finished / "cells.json").read_bytes() == before


def test_overwrites_when_asked(trainings, tmp_path):
    arguments = [*ONE_MAP, "--methods", "group", "--output", str(tmp_path)]
    batch_size.main(arguments)
    first = Map.load(tmp_path).cells
    batch_size.main([*arguments, "--overwrite"])
    assert len(trainings) == 2
    assert Map.load(tmp_path).cells != first


def test_interrupted_run_keeps_finished_cells_and_resumes(trainings, tmp_path, monkeypatch, capsys):
    arguments = [*FOUR_TRAININGS, "--output", str(tmp_path)]
    measured = batch_size.measured

    def until_interrupted(plan, data, on_epoch):
        if len(trainings) == 2:
            signal.raise_signal(signal.SIGINT)
        return measured(plan, data, on_epoch)

    with monkeypatch.context() as patch:
        patch.setattr(batch_size, "measured", until_interrupted)
        assert batch_size.main(arguments) == 130
    assert "--resume" in capsys.readouterr().out
    kept = Map.load(tmp_path).cells
    assert names(tmp_path) == ["batch@2", "batch@16"]
    assert "| BatchNorm |" in (tmp_path / "batch_size.md").read_text()

    assert batch_size.main([*arguments, "--resume"]) == 0
    assert list(Map.load(tmp_path).cells.items())[:2] == list(kept.items())
    assert names(tmp_path)[2:] == ["batch_group@2", "group@None"]
    # two before the interruption, one interrupted, two after it
    assert len(trainings) == 5


def test_resume_adds_methods_and_refuses_other_settings(trainings, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    batch_size.main([*ONE_MAP, "--methods", "group", *output])
    batch_size.main([*ONE_MAP, "--methods", "layer", *output, "--resume"])
    assert names(tmp_path) == ["group@None", "layer@None"]
    changed = [*ONE_MAP, "--seeds", "3", "--methods", "layer", *output, "--resume"]
    message = error_of(changed, capsys)
    assert "cannot resume" in message and "2 seeds, not" in message


def test_one_seed_has_no_interval(trainings, tmp_path):
    assert batch_size.main([*ONE_MAP, "--seeds", "1", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "batch_size.md").read_text()
    assert "| BatchNorm | 51.0 |" in text


def test_full_runs_the_table_at_all_batch_sizes(trainings, tmp_path):
    assert batch_size.main(["--full", "--epochs", "2", "--output", str(tmp_path)]) == 0
    cells = Map.load(tmp_path).cells
    assert list(dict.fromkeys(key.method for key in cells)) == list(TABLE)
    assert {key.batch_size for key in cells} == {2, 4, 8, 16, 32, None}
    assert {key.last for key in cells} == {"1x1", "4x4"}
    assert {len(cell.errors) for cell in cells.values()} == {8}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "bach"], "'bach' is no method"),
        (["--methods", "group_norm:5"], "does not split into 5 equal groups"),
        (["--methods", "domain_batch_norm:3"], "cannot tell it the domain"),
        (["--batch-sizes", "0"], "expected a positive whole number, got '0'"),
        (["--batch-sizes", "5"], "5 does not divide the 32 images of a step"),
        (["--epochs", "1"], "expected at least 2"),
        (["--seeds", "-1"], "expected a positive whole number, got '-1'"),
        (["--seeds", "two"], "expected a positive whole number, got 'two'"),
        (["--train-images", "100"], "100 is not a multiple of 32 images per step"),
        (["--train-images", "1800"], "digits has 1797 images"),
        (
            ["--protocol", "batch", "--batch-sizes", "3"],
            "1024 is not a multiple of 3 images per step",
        ),
        (["--maps", "3x3"], "invalid choice: '3x3'"),
        (["--maps", "7x7"], "no network for digits ends in maps of 7x7"),
        (["--resume", "--overwrite"], "not allowed with argument"),
    ],
)
def test_wrong_options_are_refused(arguments, message, tmp_path, capsys):
    assert message in error_of([*arguments, "--output", str(tmp_path)], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ("file", "file/below", "/proc/self"))
def test_output_must_be_a_folder_to_write_to(where, trainings, tmp_path, capsys):
    """Even for a superuser, whom permissions do not bind: /proc takes no files."""
    (tmp_path / "file").touch()
    error = error_of([*TWO_TRAININGS, "--output", str(tmp_path / where)], capsys)
    assert "not a folder to write to" in error
    assert not trainings


def test_two_runs_in_one_folder_do_not_lose_cells(monkeypatch, trainings, tmp_path, capsys):
    arguments = [*TWO_TRAININGS, "--output", str(tmp_path), "--resume"]
    measured, errors = batch_size.measured, []

    def while_another_starts(*args):
        errors.append(error_of(arguments, capsys))
        return measured(*args)

    monkeypatch.setattr(batch_size, "measured", while_another_starts)
    assert batch_size.main(arguments) == 0
    assert len(trainings) == 2 and all("another run is writing" in error for error in errors)
    assert names(tmp_path) == ["batch@16", "group@None"]
    assert batch_size.main(arguments) == 0  # once the first has ended


@pytest.mark.parametrize(
    "damage",
    (
        lambda text: text[:-100],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"elements"', '"element"'),
    ),
)
def test_a_damaged_result_is_refused_and_kept(damage, finished, trainings, tmp_path, capsys):
    file = tmp_path / "cells.json"
    file.write_text(damage((finished / "cells.json").read_text()))
    before = file.read_bytes()
    error = error_of([*FOUR_TRAININGS, "--output", str(tmp_path), "--resume"], capsys)
    assert str(file) in error and "was left as it is" in error and "--output" in error
    assert file.read_bytes() == before and not trainings


def test_split_uses_each_image_once():
    images = np.concatenate([part.pixels for part in split(load("digits"), 0, 1024)])
    whole = np.concatenate([part.pixels for part in split(load("digits"), 1, 512)])
    assert len(images) == 1797
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in whole)


def test_epoch_shifts_each_image_by_at_most_one_pixel():
    train = split(load("digits"), 0, 64).train
    images = epoch(train, seed=0, index=0)
    padded = np.pad(train.pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    shifts = {
        (padded[i, row : row + 8, column : column + 8].tobytes(), train.labels[i])
        for i in range(64)
        for row in range(3)
        for column in range(3)
    }
    assert sorted(images.labels) == sorted(train.labels)
    assert {(pixels.tobytes(), label) for pixels, label in zip(*images, strict=True)} <= shifts


def test_methods_start_from_the_same_kernels():
    def kernels(name):
        net = ResidualNet(tuple(METHODS[name].at(2, width) for width in WIDTHS))
        init = partial(net.init, train=False)
        params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
        return [
            jax.tree_util.keystr(path)
            for path, t in jax.tree_util.tree_leaves_with_path(params)
            if "'kernel'" in str(path)
        ]

    # a kernel's random numbers follow from its name
    names = {name: kernels(name) for name in METHODS}
    assert all(kernels == names["batch"] for kernels in names.values()), names
    assert len(names["batch"]) == 1 + 3 * 3 + 1


def test_interval_is_that_of_the_t_test():
    values = [1.0, 4.0, 2.0, 8.0]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((statistics.fmean(values), (high - low) / 2))


@pytest.mark.slow
def test_batch_norm_collapses_at_two_images_of_1x1_and_group_norm_does_not(tmp_path):
    small = ["--methods", "batch", "group", "--batch-sizes", "2", "--maps", "1x1", "--seeds", "2"]
    assert batch_size.main([*small, "--output", str(tmp_path)]) == 0
    cells = Map.load(tmp_path).cells.values()
    batch, group = (statistics.fmean(cell.accuracy.running) for cell in cells)
    assert batch < 70
    assert group > 90
    assert group - batch >= 20


def test_any_method_by_its_configuration():
    """It is the layer that stands under a name, and draws beside it."""
    for config, name in (
        ("group_norm:4", "group"),
        ("batch_norm:momentum=0.9", "batch"),
        ("evonorm_s0:4", "evonorm_s0"),
        ("proxy_norm:group_norm(4)", "proxy"),
        ("switchable_norm:momentum=0.9", "switchable"),
    ):
        layer = METHODS[name].at(2, 8)._replace(sets=None)
        assert named(config).at(2, 8) == layer and named(config).label == config
        assert named(name) is METHODS[name]
