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
from scipy import stats

from benchmarks import batch_size, training
from benchmarks.datasets import load
from benchmarks.norms import METHODS, TABLE, named
from benchmarks.residual import WIDTHS, ResidualNet
from benchmarks.results import Result, interval
from benchmarks.splits import epoch, split

SMALL = ["--seeds", "2", "--epochs", "2", "--train-images", "64"]
THREE_METHODS = [*SMALL, "--methods", "batch", "batch_group", "group", "--batch-sizes"]
TWO_TRAININGS = [*THREE_METHODS, "16"]
FOUR_TRAININGS = [*THREE_METHODS, "2", "16"]


@pytest.fixture(scope="module", autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The output folder of a small run: two trainings, and a cell that shares one of them."""
    folder = tmp_path_factory.mktemp("batch_size")
    assert batch_size.main([*TWO_TRAININGS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def trainings(monkeypatch):
    """Replaces training by an outcome that differs from call to call; returns the list of calls."""
    calls = []

    def train(net, seeds, *, epochs, on_epoch, **options):
        calls.append(net.layers)
        for done in range(epochs + 1):
            on_epoch(done)
        accuracies = [50.0 + len(calls) + seed for seed in seeds]
        return training.Outcome(accuracies, accuracies, 1.0, 1.0)

    monkeypatch.setattr(training, "train", train)
    return calls


def error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        batch_size.main(arguments)
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_json_and_csv_agree(finished):
    saved = json.loads((finished / "results.json").read_text())
    with open(finished / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    cells = [(cell["method"], cell["batch_size"]) for cell in saved["cells"]]
    assert cells == [("batch", 16), ("batch_group", 16), ("group", None)]
    from_json = [
        (
            cell["method"],
            str(cell["batch_size"] or ""),
            str(seed),
            cell["validation"][seed],
            cell["test"][seed],
        )
        for cell in saved["cells"]
        for seed in range(2)
    ]
    from_csv = [
        (
            row["method"],
            row["batch_size"],
            row["seed"],
            float(row["validation"]),
            float(row["test"]),
        )
        for row in rows
    ]
    assert from_csv == from_json
    for key, value in (saved["settings"] | saved["versions"]).items():
        assert {row[key] for row in rows} == {str(value)}


def test_every_seed_is_measured(finished):
    for cell in Result.load(finished).cells:
        assert len(cell.validation) == len(cell.test) == 2
        assert all(0 <= accuracy <= 100 for accuracy in cell.validation + cell.test)


def test_batch_group_norm_of_16_images_shares_the_training_of_batch_norm(finished):
    result = Result.load(finished)
    shared, source = result.get("batch_group", 16), result.get("batch", 16)
    assert shared.same_run_as == source.name
    assert shared.test == source.test


def test_differences_are_paired_by_seed(finished):
    saved = json.loads((finished / "results.json").read_text())
    tests = {
        cell["method"] + (f"@{cell['batch_size']}" if cell["batch_size"] else ""): cell["test"]
        for cell in saved["cells"]
    }
    assert saved["differences"]
    for difference in saved["differences"]:
        by_seed = np.subtract(tests[difference["cell"]], tests[difference["baseline"]])
        assert difference["mean"] == pytest.approx(by_seed.mean())


def test_draws_a_figure(finished):
    assert (finished / "batch_size.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_protocol_and_network(tmp_path):
    options = [
        "--protocol",
        "batch",
        "--network",
        "2x2",
        "--methods",
        "layer",
        "--batch-sizes",
        "64",
    ]
    assert batch_size.main([*SMALL, *options, "--output", str(tmp_path)]) == 0
    (cell,) = Result.load(tmp_path).cells
    assert cell.name == "layer@64"


def test_refuses_to_overwrite(finished, capsys):
    before = (finished / "results.json").read_bytes()
    message = error_of([*TWO_TRAININGS, "--output", str(finished)], capsys)
    assert (
        "already holds a result" in message and "--resume" in message and "--overwrite" in message
    )
    assert (finished / "results.json").read_bytes() == before


def test_overwrites_when_asked(trainings, tmp_path):
    arguments = [*SMALL, "--methods", "group", "--output", str(tmp_path)]
    batch_size.main(arguments)
    first = Result.load(tmp_path).cells
    batch_size.main([*arguments, "--overwrite"])
    assert len(trainings) == 2
    assert Result.load(tmp_path).cells != first


def test_interrupted_run_keeps_finished_cells_and_resumes(trainings, tmp_path, monkeypatch, capsys):
    arguments = [*FOUR_TRAININGS, "--output", str(tmp_path)]
    train = training.train

    def train_until_interrupted(*args, **kwargs):
        if len(trainings) == 2:
            signal.raise_signal(signal.SIGINT)
        return train(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", train_until_interrupted)
        assert batch_size.main(arguments) == 130
    assert "--resume" in capsys.readouterr().out
    kept = Result.load(tmp_path).cells
    assert [cell.name for cell in kept] == ["batch@2", "batch@16"]

    assert batch_size.main([*arguments, "--resume"]) == 0
    cells = Result.load(tmp_path).cells
    assert cells[:2] == kept
    assert [cell.name for cell in cells[2:]] == ["batch_group@2", "batch_group@16", "group"]
    # two before the interruption, one interrupted, two after it; one cell is shared
    assert len(trainings) == 5


def test_resume_adds_methods_and_refuses_other_settings(trainings, tmp_path, capsys):
    output = ["--output", str(tmp_path)]
    batch_size.main([*SMALL, "--methods", "group", *output])
    batch_size.main([*SMALL, "--methods", "layer", *output, "--resume"])
    assert Result.load(tmp_path).methods == ["group", "layer"]
    other = ["--seeds", "3", "--epochs", "2", "--train-images", "64"]
    message = error_of([*other, "--methods", "rms", *output, "--resume"], capsys)
    assert "cannot resume" in message and "seeds 2, not 3" in message


def test_one_seed_has_no_interval(trainings, tmp_path):
    one = ["--seeds", "1", "--epochs", "2", "--train-images", "64", "--output", str(tmp_path)]
    assert batch_size.main(one) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert {cell["test_interval"]["half_width"] for cell in saved["cells"]} == {None}


def test_full_runs_the_table_at_all_batch_sizes(trainings, tmp_path):
    assert batch_size.main(["--full", "--epochs", "2", "--output", str(tmp_path)]) == 0
    result = Result.load(tmp_path)
    assert result.methods == list(TABLE)
    assert result.batch_sizes == [2, 4, 8, 16, 32]
    assert {len(cell.test) for cell in result.cells} == {8}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "bach"], "'bach' is no method"),
        (["--methods", "group_norm:5"], "does not split into 5 equal groups"),
        (["--batch-sizes", "0"], "expected a positive whole number, got '0'"),
        (["--batch-sizes", "5"], "5 does not divide the 32 images of a step"),
        (["--epochs", "1"], "expected at least 2"),
        (["--seeds", "-1"], "expected a positive whole number, got '-1'"),
        (["--seeds", "two"], "expected a positive whole number, got 'two'"),
        (["--train-images", "100"], "100 is not a multiple of 32 images per step"),
        (["--train-images", "1800"], "there are 1797 images"),
        (
            ["--protocol", "batch", "--batch-sizes", "3"],
            "1024 is not a multiple of 3 images per step",
        ),
        (["--network", "3x3"], "invalid choice: '3x3'"),
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
    train, errors = training.train, []

    def while_another_starts(*args, **options):
        errors.append(error_of(arguments, capsys))
        return train(*args, **options)

    monkeypatch.setattr(training, "train", while_another_starts)
    assert batch_size.main(arguments) == 0
    assert len(trainings) == 2 and all("another run is writing" in error for error in errors)
    assert [cell.name for cell in Result.load(tmp_path).cells] == [
        "batch@16",
        "batch_group@16",
        "group",
    ]
    assert batch_size.main(arguments) == 0  # once the first has ended


@pytest.mark.parametrize(
    "damage",
    (
        lambda text: text[:-100],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"seeds": 2', '"seeds": 3'),
        lambda text: text.replace('"same_run_as"', '"same"'),
    ),
)
def test_a_damaged_result_is_refused_and_kept(damage, finished, trainings, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(damage((finished / "results.json").read_text()))
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
def test_batch_norm_collapses_at_two_images_and_group_norm_does_not(tmp_path):
    small = ["--methods", "batch", "group", "--batch-sizes", "2", "--seeds", "2"]
    assert batch_size.main([*small, "--output", str(tmp_path)]) == 0
    result = Result.load(tmp_path)
    batch, group = (statistics.fmean(result.find(method, 2).test) for method in ("batch", "group"))
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
