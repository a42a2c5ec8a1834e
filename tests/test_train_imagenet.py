"""`benchmarks.train_imagenet`: an interrupted run resumes to the bit, and jit, pmap and several
processes agree."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from benchmarks import files, train_imagenet
from benchmarks.imagenet import checkpoints, data, steps
from benchmarks.imagenet.placement import Jit, Pmap

ROOT = Path(__file__).parent.parent
SECONDS = 240
"""After which every process ends itself, and is killed."""

PROGRAM = """
import os, signal, sys, time
signal.alarm(int(sys.argv[1]))
from benchmarks import train_imagenet
from benchmarks.imagenet import placement

def dying(kind):
    batch, seen = kind.batch, []
    def counted(self, rows):
        seen.append("weight" not in rows)
        if sum(seen) == -int(sys.argv[2]):
            raise RuntimeError("as asked for")
        if sum(seen) == int(sys.argv[2]):
            while not os.path.exists(sys.argv[3]):
                time.sleep(0.01)
            os.killpg(0, signal.SIGKILL)
        return batch(self, rows)
    kind.batch = counted

if sys.argv[2] != "0":
    dying(placement.Jit), dying(placement.Pmap)
raise SystemExit(train_imagenet.main(sys.argv[4:]))
"""
"""The program in a process that ends in time; killed at the batch of that number, as soon as that
checkpoint is there, or at the batch of the negative number ended by an error."""

SMALL = [
    "--stages",
    "1",
    "--width",
    "8",
    "--image-size",
    "32",
    "--dtype",
    "float32",
    "--norm",
    "batch",
    "--num-groups",
    "4",
]
TRAINING = [
    "--batch",
    "16",
    "--epochs",
    "3",
    "--warmup-epochs",
    "0.5",
    "--learning-rate",
    "1",
    "--save-every",
    "3",
]
STEPS, EPOCH = 12, 4


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedules compare integer steps with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of 48x40 pixels with more red, green or blue in it: 22 images of a class to train, 10
    to evaluate."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 22), ("val", 10)):
        for label, color in enumerate(("blue", "green", "red")):
            (folder / split / color).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3), np.uint8) + 100 * (
                    np.arange(3) == 2 - label
                ).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / color / f"{index}.JPEG")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def launch(
    cache, *arguments, devices=2, processes=1, dies_at=0, waits_for="", one_dies_at=0, one_with=()
):
    """Exit statuses and output of the program on `devices` devices in all, with a hard limit on its
    time. The last process may die alone, and have options of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower()
    } | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": (
            f"--xla_force_host_platform_device_count={devices // processes} "
            "--xla_backend_optimization_level=0"
        ),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if processes > 1:
        environment["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
    running = []
    try:
        for process in range(processes):
            several = [
                "--coordinator",
                f"127.0.0.1:{port}",
                "--num-processes",
                str(processes),
                "--process-id",
                str(process),
            ]
            last = process == processes - 1
            dies = one_dies_at if last and one_dies_at else dies_at
            command = [sys.executable, "-c", PROGRAM, SECONDS, dies, waits_for, *arguments]
            command += [*(several if processes > 1 else []), *(one_with if last else [])]
            command = list(map(str, command))
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, start_new_session=True, **pipes
                )
            )
        output = "".join(process.communicate(timeout=SECONDS)[0] for process in running)
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
            process.wait()
    return [process.returncode for process in running], output


def finish(*arguments, **options):
    statuses, output = launch(*arguments, **options)
    assert set(statuses) == {0}, output
    return output


def lines(output):
    """Steps and evaluations of a run, without its speed."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("images_per_second", None)
    return found


def saved(output, step=STEPS):
    here = ocp.args.StandardRestore(
        fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    folder = output / "checkpoints" / str(step) / "state"
    return jax.tree.map(
        np.asarray,
        ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(folder.absolute(), args=here),
    )


def kill_and_resume(cache, output, *arguments, **options):
    """A run that dies in the middle of its second epoch, after its first checkpoint, and is
    resumed."""
    arguments = [*arguments, "--output", output, "--resume"]
    first = output / "checkpoints" / "3"
    statuses, text = launch(cache, *arguments, dies_at=6, waits_for=first, **options)
    assert set(statuses) == {-signal.SIGKILL}, text
    assert max(line["step"] for line in lines(output)) >= 4
    assert os.listdir(first.parent) == ["3"]
    finish(cache, *arguments, **options)


def assert_same_run(output, expected):
    assert lines(output) == lines(expected)
    chex.assert_trees_all_equal(saved(output), saved(expected))


@pytest.fixture(scope="module")
def finished(folder, cache, tmp_path_factory):
    """A run by jit in one process with two devices that nothing disturbed: options, output folder
    and what it printed."""
    options = ["--data", folder, *SMALL, *TRAINING]
    output = tmp_path_factory.mktemp("finished") / "run"
    return options, output, finish(cache, *options, "--output", output)


def test_learns_and_says_so(finished):
    _, output, text = finished
    steps_, evaluations = (
        [line for line in lines(output) if ("epoch" in line) == which] for which in (False, True)
    )
    assert [line["step"] for line in steps_] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 100 for line in steps_)
    assert np.mean([line["loss"] for line in steps_[-3:]]) < 0.8 * steps_[0]["loss"]
    assert evaluations[-1]["val_top1"] > 90 and evaluations[-1]["val_top5"] == 100
    assert {line["val_images"] for line in evaluations} == {30}
    assert "epoch 3 of 3" in text and f"{STEPS}/{STEPS}" in text
    assert sorted(os.listdir(output / "checkpoints")) == ["12", "6", "9"]


def test_goes_on_after_a_kill_as_if_nothing_had_happened(finished, cache, tmp_path):
    options, expected, _ = finished
    kill_and_resume(cache, tmp_path, *options)
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
def test_pmap_goes_on_after_a_kill_and_agrees_with_jit(finished, cache, tmp_path):
    options, expected, _ = finished
    finish(cache, *options, "--pmap", "--output", tmp_path / "whole")
    kill_and_resume(cache, tmp_path / "killed", *options, "--pmap")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    for ours, theirs in zip(lines(tmp_path / "whole")[:EPOCH], lines(expected), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param([], marks=pytest.mark.slow, id="jit"),
        pytest.param(["--pmap"], marks=pytest.mark.rest, id="pmap"),
    ],
)
def test_two_processes_go_on_after_a_kill_and_agree_with_one(how, finished, cache, tmp_path):
    options, expected, _ = finished
    finish(cache, *options, *how, "--output", tmp_path / "whole", processes=2)
    kill_and_resume(cache, tmp_path / "killed", *options, *how, processes=2)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    for ours, theirs in zip(lines(tmp_path / "whole")[:EPOCH], lines(expected), strict=False):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
def test_processes_that_decode_change_nothing(finished, cache, tmp_path):
    options, expected, _ = finished
    kill_and_resume(cache, tmp_path, *options, "--workers", "2")
    assert_same_run(tmp_path, expected)


@pytest.fixture
def processes(monkeypatch):
    """Makes this process one of several, for what only asks which."""

    def become(index, count):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return become


def test_a_batch_is_the_same_however_many_processes_share_it(folder, processes):
    images = data.find(str(folder), None)

    def read(index, count):
        processes(index, count)
        train = data.training_batches(
            images.train, batch=16, num_classes=3, size=32, seed=1, workers=0
        )
        val = data.evaluation_batches(images.val, batch=16, num_classes=3, size=32, workers=0)
        return [next(train) for _ in range(9)], list(val)

    whole, halves = read(0, 1), [read(index, 2) for index in range(2)]
    for batches, *parts in zip(whole, *halves, strict=True):
        for batch, *rows in zip(batches, *parts, strict=True):
            chex.assert_trees_all_equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *rows))
    counts = [
        len({pixels.tobytes() for batch in part for pixels in batch["image"]})
        for part in (whole[0][:4], whole[0][:8])
    ]
    assert counts == [64, 128]  # crops are drawn anew, for each epoch as well
    assert [batch["weight"].sum() for batch in whole[1]] == [16, 14]


def test_an_epoch_holds_every_image_once(folder):
    images = data.find(str(folder), None)
    batches = data.training_batches(
        images.train, batch=11, num_classes=3, size=32, seed=1, workers=0
    )
    for _ in range(2):
        labels = np.concatenate([next(batches)["label"] for _ in range(6)])
        np.testing.assert_array_equal(np.bincount(labels), 22)


def test_crops():
    rng = np.random.default_rng(0)
    boxes = np.array([data.random_box(rng, 500, 375) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / (500 * 375), width / height
    assert boxes.min() == 0 and boxes[:, 2].max() == 500 and boxes[:, 3].max() == 375
    assert 0.07 < area.min() < 0.1 and area.max() > 0.9
    assert 0.74 < ratio.min() < 0.77 and 1.31 < ratio.max() < 1.35
    assert data.random_box(rng, 1000, 10) == (495, 0, 505, 10)
    assert data.central_box(256, 512) == (16, 144, 240, 368)


def test_array_records_hold_the_same_images(folder, tmp_path):
    expected = data.find(str(folder), None)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        writer = ArrayRecordWriter(
            str(tmp_path / split / f"x-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        source = getattr(expected, split)
        for example in (source[i] for i in range(len(source))):
            message = data.example_class()()
            image, label = (
                message.features.feature.add(key="image"),
                message.features.feature.add(key="label"),
            )
            image.value.bytes_list.value.append(example["image"])
            label.value.int64_list.value.append(example["label"])
            writer.write(message.SerializeToString())
        writer.close()
    with pytest.raises(ValueError, match="--num-classes"):
        data.find(str(tmp_path), None)
    found = data.find(str(tmp_path), 3)
    assert len(found.train) == 66 and len(found.val) == 30
    for index in (0, 25, 65):
        assert {**found.train[index], "name": ""} == {**expected.train[index], "name": ""}


def test_reads_an_example_that_tensorflow_wrote():
    """`tf.train.Example` with image b"\\xff\\xd8" and label 300, and a feature that is left alone;
    bytes by hand."""

    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    features = {
        "image": field(1, field(1, b"\xff\xd8")),
        "label": field(3, field(1, b"\xac\x02")),
        "x": field(2, b""),
    }
    entries = b"".join(
        field(1, field(1, name.encode()) + field(2, value)) for name, value in features.items()
    )
    assert data.Records([field(1, entries)])[0] == {
        "image": b"\xff\xd8",
        "label": 300,
        "name": "record 0",
    }


def trainer(placement, method, devices_per_norm=1, dtype="float32"):
    model = steps.network(
        steps.row_named(method, 4, 1),
        devices=8,
        devices_per_norm=devices_per_norm,
        mapped=placement.axis is not None,
        stages=(1,),
        width=4,
        num_classes=7,
        dtype=dtype,
    )
    schedule = steps.learning_rate("cosine", peak=0.5, steps=4, warmup_steps=0)
    return steps.Trainer(
        model,
        steps.sgd(schedule, weight_decay=1e-3, decay_norm="zero"),
        schedule,
        0.1,
        placement.axis,
    )


def two_steps(placement, method, devices_per_norm):
    """Two steps on 16 images: metrics, then parameters and statistics, and an evaluation."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, (16, 16, 16, 3), np.uint8),
        "label": (np.arange(16) % 7).astype(np.int32),
    }
    one = trainer(placement, method, devices_per_norm)
    state = placement.load(jax.jit(one.initialize, static_argnums=1)(jax.random.key(0), 16))
    step = placement.compile(one.train, donate=(0,))
    metrics = []
    for _ in range(2):
        state, found = step(state, placement.batch(batch))
        metrics.append({name: placement.value(x) for name, x in found.items()})
    sums = placement.compile(one.evaluate)(
        state, placement.batch(batch | {"weight": np.ones(16, np.float32)})
    )
    return metrics, placement.unload(state), {name: placement.value(x) for name, x in sums.items()}


@pytest.mark.parametrize(
    ("method", "devices_per_norm"),
    [
        pytest.param("batch", 2, marks=pytest.mark.slow),
        pytest.param("batch", 8, marks=pytest.mark.rest),
        pytest.param("ghost_batch", 1, marks=pytest.mark.rest),
    ],
)
@pytest.mark.usefixtures("compiled_quickly")
def test_jit_and_pmap_agree(method, devices_per_norm):
    """Means are averages of the devices' either way; jit pools variances over all images, pmap
    averages those of parts."""
    (metrics, state, sums), (expected, expected_state, expected_sums) = (
        two_steps(placement, method, devices_per_norm) for placement in (Jit(), Pmap())
    )
    for ours, theirs in zip(metrics, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    chex.assert_trees_all_close(state.params, expected_state.params, rtol=1e-3, atol=1e-4)
    if devices_per_norm == 8 or method == "group":
        chex.assert_trees_all_close(
            state.batch_stats, expected_state.batch_stats, rtol=1e-3, atol=1e-4
        )
        assert sums == pytest.approx(expected_sums, rel=1e-3)
    assert sums["images"] == expected_sums["images"] == 16


@pytest.mark.parametrize("method", steps.METHODS)
def test_every_method_makes_a_network_in_bfloat16(method):
    one = trainer(Jit(), method, dtype="bfloat16")
    state = jax.eval_shape(lambda: one.initialize(jax.random.key(0), 16))
    batch = {"image": jnp.zeros((16, 16, 16, 3), jnp.uint8), "label": jnp.zeros(16, jnp.int32)}
    after, metrics = jax.eval_shape(one.train, state, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    assert metrics["loss"].dtype == jnp.float32
    assert bool(state.batch_stats) == ("batch" in method)


def test_evaluation_counts_only_images_with_weight():
    one = trainer(Jit(), "group")

    class Known:
        """Gives the class of an image, which is its first pixel, the first or the third place."""

        def apply(self, variables, pixels, train):
            label = jnp.round(pixels[:, 0, 0, 0] * steps.STD[0] + steps.MEAN[0]).astype(int)
            own = jnp.where(label[:, None] < 4, 10.0, 2.5)
            return jnp.where(
                jnp.arange(7)[None] == label[:, None], own, jnp.array([[0.0, 9, 3, 2, 1, 0, 0]])
            )

    labels = np.array([0, 1, 4, 6, 0, 5], np.int32)
    images = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (6, 4, 4, 3))
    batch = {"image": images, "label": labels, "weight": np.array([1, 1, 1, 1, 0, 0], np.float32)}
    sums = one._replace(model=Known()).evaluate(
        steps.State(0, {}, {}, ()), jax.tree.map(jnp.asarray, batch)
    )
    assert {name: float(sums[name]) for name in ("images", "top1", "top5")} == {
        "images": 4,
        "top1": 2,
        "top5": 4,
    }
    assert np.isfinite(sums["loss"])


def test_schedules():
    steps_ = steps.learning_rate("steps", peak=2.0, steps=100, warmup_steps=10)
    found = [float(steps_(step)) for step in (0, 5, 10, 29, 31, 61, 91, 99)]
    assert found == pytest.approx([0, 1, 2, 2, 0.2, 0.02, 0.002, 0.002])
    cosine = steps.learning_rate("cosine", peak=2.0, steps=100, warmup_steps=20)
    assert [float(cosine(step)) for step in (0, 10, 20, 60, 100)] == pytest.approx(
        [0, 1, 2, 1, 0], abs=1e-6
    )


@pytest.mark.parametrize(("decay_norm", "bias"), (("zero", 0.9), ("none", 1.0)))
def test_decay_of_scales_and_biases(decay_norm, bias):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    # 1.9: Nesterov's first step
    optimizer = steps.sgd(lambda step: 1.0, weight_decay=0.1 / 1.9, decay_norm=decay_norm)
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["kernel"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-6)


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        train_imagenet.main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "12"], "--batch 12 is not a multiple of the 8 devices"),
        (["--batch", "128"], "more than the 66 training images"),
        (["--warmup-epochs", "3"], "--warmup-epochs 3 is not from 0 to less than --epochs 3"),
        (["--norm", "group", "--num-groups", "3"], "does not split into 3 equal groups"),
        (
            ["--norm", "ghost_batch", "--ghost-size", "4"],
            "--ghost-size 4 does not divide the 2 images of a device",
        ),
        (["--devices-per-norm", "3"], "--devices-per-norm 3 does not divide the 8 devices"),
        (["--devices-per-norm", "2", "--norm", "group"], "not for --norm group"),
        (["--num-classes", "5"], "has 3 classes, not the 5"),
        (["--seed", "-1"], "expected a whole number"),
        (["--seed", str(2**32)], "expected a whole number below 2^32"),
        (["--learning-rate", "nan"], "--learning-rate: expected a finite number, above 0"),
        (["--learning-rate", "inf"], "--learning-rate: expected a finite number, above 0"),
        (["--learning-rate", "-1"], "--learning-rate: expected a finite number, above 0"),
        (["--learning-rate", "fast"], "--learning-rate: expected a finite number, above 0"),
        (["--weight-decay", "-1"], "--weight-decay: expected a finite number, at least 0"),
        (["--weight-decay", "nan"], "--weight-decay: expected a finite number, at least 0"),
        (["--label-smoothing", "7"], "--label-smoothing: expected a finite number, at least 0,"),
        (["--label-smoothing", "1"], "below 1, got '1'"),
        (["--label-smoothing", "-0.1"], "below 1, got '-0.1'"),
        (["--warmup-epochs", "nan"], "--warmup-epochs: expected a finite number, at least 0"),
        (["--coordinator", "host:1"], "--coordinator needs --num-processes and --process-id"),
        (["--coordinator", "host:1", "--process-id", "0"], "--coordinator needs --num-processes"),
        (["--process-id", "0"], "--num-processes and --process-id belong to --coordinator"),
        (
            ["--coordinator", "host", "--num-processes", "2", "--process-id", "1"],
            "expected HOST:PORT, got 'host'",
        ),
        (
            ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id: expected 0 to 1, got 2",
        ),
        (["--norm", "none"], "'none' is no method"),
        (["--norm", "group_norm:3"], "does not split into 3 equal groups"),
        (
            ["--norm", "ghost_batch_norm:ghost_size=4"],
            "--ghost-size 4 does not divide the 2 images of a device",
        ),
        (["--norm", "batch_renorm"], "--norm batch_renorm is no row of the table"),
    ],
)
def test_options_that_do_not_fit(arguments, message, folder, tmp_path, capsys):
    error = error_of(
        capsys, "--data", folder, *SMALL, *TRAINING, "--output", tmp_path / "run", *arguments
    )
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ("train", "val"))
def test_a_class_without_images_is_named(split, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "images")
    for file in (tmp_path / "images" / split / "green").iterdir():
        file.rename(file.with_suffix(".webp"))
    error = error_of(capsys, "--data", tmp_path / "images", "--output", tmp_path / "run")
    assert f"{tmp_path}/images/{split}/green has no images" in error


@pytest.mark.parametrize("where", ("file", "file/below", "/proc/self"))
def test_output_must_be_a_folder_to_write_to(where, folder, tmp_path, capsys):
    """Even for a superuser, whom permissions do not bind: /proc takes no files."""
    (tmp_path / "file").touch()
    error = error_of(
        capsys, "--data", folder, *SMALL, *TRAINING, "--output", tmp_path / where, "--resume"
    )
    assert "not a folder to write to" in error and where in error


def test_data_that_is_not_there(folder, tmp_path, capsys):
    assert "is not a folder" in error_of(capsys, "--data", tmp_path)
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "val" / "red").rename(tmp_path / "images" / "val" / "rot")
    assert "in one of them only: red, rot." in error_of(capsys, "--data", tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val")
    (tmp_path / "images" / "val" / "red").mkdir(parents=True)
    assert "has no images" in error_of(capsys, "--data", tmp_path / "images")


def test_tfds_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install tensorflow-datasets" in error_of(capsys, "--data", "tfds:imagenet2012")


def test_examples_that_are_wrong():
    broken = {"image": b"no image", "label": 0, "name": "a.jpg"}
    with pytest.raises(ValueError, match="a.jpg cannot be decoded"):
        data.decode(broken)
    with pytest.raises(ValueError, match="record 0 has the features"):
        data.Records([b""])[0]
    with pytest.raises(ValueError, match="record 0 cannot be read"):
        data.Records([b"\xff\xff"])[0]


@pytest.mark.parametrize("damage", ("cut", "bytes"))
def test_damaged_images_of_every_kind_are_named(damage, folder):
    """Of a PNG Pillow raises SyntaxError, struct.error and others."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.open(folder / "train" / "red" / "0.JPEG").save(file, kind)
        for _ in range(50):
            content = bytearray(file.getvalue())
            content[rng.integers(50)] ^= 1 << rng.integers(8)
            if damage == "cut":
                content = content[: rng.integers(len(content))]
            try:
                data.decode({"image": bytes(content), "label": 0, "name": "a.png"})
            except ValueError as error:
                assert "a.png cannot be decoded" in str(error)


def test_refuses_another_run(finished, capsys):
    options, output, _ = finished
    before = (output / "metrics.jsonl").read_bytes()
    assert "continue it with --resume" in error_of(capsys, *options, "--output", output)
    error = error_of(capsys, *options, "--output", output, "--resume", "--width", "16")
    assert (
        "width 8, not 16" in error and "devices 2, not 8" in error and "cannot be resumed" in error
    )
    assert (output / "metrics.jsonl").read_bytes() == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run_without(file, damage, finished, tmp_path):
    """A copy of the finished run in which one file is damaged."""
    options, output, _ = finished
    shutil.copytree(output, tmp_path / "run")
    damage(tmp_path / "run" / file)
    return [*options, "--output", tmp_path / "run"], tmp_path / "run"


@pytest.mark.parametrize(
    "damage", (cut, lambda path: path.write_text(""), lambda path: path.write_text("[]"))
)
def test_damaged_settings_are_refused_and_kept(damage, finished, tmp_path, capsys):
    options, run = run_without("settings.json", damage, finished, tmp_path)
    before = (run / "settings.json").read_bytes()
    error = error_of(capsys, *options, "--resume")
    assert f"{run}/settings.json is cut or damaged" in error and "another --output" in error
    assert (run / "settings.json").read_bytes() == before


def test_a_run_without_settings_is_refused(finished, tmp_path, capsys):
    options, run = run_without("settings.json", Path.unlink, finished, tmp_path)
    for resume in ([], ["--resume"]):
        assert "holds a run without its settings.json" in error_of(capsys, *options, *resume)
    assert sorted(os.listdir(run / "checkpoints")) == ["12", "6", "9"]


def test_two_runs_do_not_share_a_folder(folder, tmp_path, capsys):
    with files.locked(tmp_path):
        error = error_of(
            capsys, "--data", folder, *SMALL, *TRAINING, "--output", tmp_path, "--resume"
        )
    assert f"another run is writing to {tmp_path}" in error


def test_a_kill_at_any_time_leaves_the_log(tmp_path):
    """What the file holds when the first step has not ended, and when its replacement fails."""
    path = tmp_path / "metrics.jsonl"
    text = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(text) + '{"step": 5, "epo')
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(OSError, match="full"),
        train_imagenet._log(tmp_path, 3),
    ):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with train_imagenet._log(tmp_path, 2):
            pass
    assert path.read_text() == "".join(text[:3])
    with train_imagenet._log(tmp_path, 3) as log:
        assert path.read_text() == "".join(text[:3])
        log({"step": 4, "val_loss": float("nan")})
        assert path.read_text() == "".join(text[:3]) + '{"step": 4, "val_loss": null}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_line_that_cannot_be_read_is_not_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\0\0\n{"step": 3}\n')
    with train_imagenet._log(tmp_path, 2):
        assert path.read_text() == '{"step": 1}\n{"st\0\0\n'


def copied_checkpoints(finished, tmp_path):
    return Path(shutil.copytree(finished[1] / "checkpoints", tmp_path / "checkpoints"))


@pytest.mark.parametrize("damage", (cut, flip_a_byte, Path.unlink))
def test_damage_to_any_file_of_a_checkpoint_is_noticed(damage, finished, tmp_path):
    folder = copied_checkpoints(finished, tmp_path)
    names = [path.relative_to(folder / "12") for path in (folder / "12").rglob("*")]
    names = [name for name in names if (folder / "12" / name).is_file()]
    assert len(names) > 10
    for name in names:
        content = (folder / "12" / name).read_bytes()
        assert checkpoints.damage(folder / "12") is None
        if content:
            damage(folder / "12" / name)
            found = checkpoints.damage(folder / "12")
            assert found and (str(name) in found or name.name == "checksums.json"), name
        (folder / "12" / name).write_bytes(content)
    assert checkpoints.newest(folder, tmp_path / "damaged") == (12, [])
    assert not (tmp_path / "damaged").exists()


def test_the_newest_intact_checkpoint(finished, tmp_path):
    folder, aside = copied_checkpoints(finished, tmp_path), tmp_path / "damaged"
    flip_a_byte(folder / "12" / "batches" / "process_0-of-1.json")
    step, (told,) = checkpoints.newest(folder, aside)
    assert step == 9
    assert "Checkpoint 12 is damaged" in told and "resumes from checkpoint 9" in told
    assert "batches/process_0-of-1.json" in told and str(aside / "12") in told
    shutil.copytree(folder / "9", folder / "12")
    (folder / "12" / "checksums.json").unlink()  # as a kill leaves it
    step, (told,) = checkpoints.newest(folder, aside)
    assert step == 9 and str(aside / "12-1") in told
    assert sorted(os.listdir(folder)) == ["6", "9"]
    (folder / "9" / "checksums.json").unlink()
    cut(folder / "6" / "checksums.json")
    with pytest.raises(ValueError, match=r"no checkpoint .* is intact \(9: .*; 6: "):
        checkpoints.newest(folder, aside)
    assert sorted(os.listdir(folder)) == ["6", "9"]


def test_a_kill_in_the_first_checkpoint_starts_again(finished, tmp_path):
    folder, aside = copied_checkpoints(finished, tmp_path), tmp_path / "damaged"
    shutil.rmtree(folder / "6"), shutil.rmtree(folder / "9")
    cut(folder / "12" / "checksums.json")
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoints.newest(folder, aside)
    (folder / "12" / "checksums.json").unlink()
    step, (told,) = checkpoints.newest(folder, aside)
    assert step is None and "starts from the beginning" in told
    assert checkpoints.newest(folder, aside) == (None, [])
    assert checkpoints.newest(tmp_path / "none", aside) == (None, [])


def test_an_older_checkpoint_is_removed_only_when_a_newer_one_is_sealed(
    folder, tmp_path, monkeypatch
):
    images = data.find(str(folder), None)
    options = {"batch": 11, "num_classes": 3, "size": 8, "workers": 0}
    batches = data.training_batches(images.train, seed=0, **options)
    state, seal = {"x": jnp.arange(3.0)}, checkpoints.seal

    def dying(checkpoint):
        raise KeyboardInterrupt

    with checkpoints.Checkpoints(tmp_path / "checkpoints", keep=1) as kept:
        kept.save(1, state, batches)
        expected = next(batches)
        monkeypatch.setattr(checkpoints, "seal", dying)
        with pytest.raises(KeyboardInterrupt):
            kept.save(2, state, batches)
    assert checkpoints.newest(tmp_path / "checkpoints", tmp_path / "damaged")[0] == 1
    monkeypatch.setattr(checkpoints, "seal", seal)
    with checkpoints.Checkpoints(tmp_path / "checkpoints", keep=1) as kept:
        chex.assert_trees_all_equal(kept.restore(1, state, batches), state)
        chex.assert_trees_all_equal(next(batches), expected)
        kept.save(2, state, batches)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_goes_on_from_an_earlier_checkpoint_where_the_last_is_damaged(finished, cache, tmp_path):
    arrays = sorted(
        (finished[1] / "checkpoints" / "12" / "state").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    options, run = run_without(arrays[-1].relative_to(finished[1]), flip_a_byte, finished, tmp_path)
    text = finish(cache, *options, "--resume")
    assert "Checkpoint 12 is damaged" in text and "resumes from checkpoint 9" in " ".join(
        text.split()
    )
    assert_same_run(run, finished[1])
    assert os.listdir(run / "damaged") == ["12"]


@pytest.mark.slow
def test_what_is_not_finite_stops_the_run_and_is_not_saved(finished, cache, tmp_path):
    options = [*finished[0], "--learning-rate", "1e37", "--save-every", "1"]
    statuses, text = launch(cache, *options, "--output", tmp_path)
    text = " ".join(text.split())
    assert statuses == [1] and "Traceback" not in text, text
    last = max(map(int, os.listdir(tmp_path / "checkpoints")))
    assert f"The last checkpoint is that of step {last}, and nothing was saved since" in text
    assert "--learning-rate below 1e+37" in text
    for leaf in jax.tree.leaves(saved(tmp_path, last)):
        assert np.isfinite(leaf).all()
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path))


def test_finite():
    for value in (np.nan, np.inf, -np.inf):
        tree = {"a": jnp.ones(3), "b": jnp.array([1, value]), "c": jnp.int32(1)}
        assert not steps.all_finite(tree)
        assert steps.all_finite({"a": tree["a"], "c": tree["c"]})


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_both(finished, folder, cache, tmp_path):
    """Each would wait for the other for five minutes."""
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    for file in (images / "train" / "red").iterdir():
        cut(file)
    options = [*finished[0], "--data", images, "--output", tmp_path / "run"]
    started = time.monotonic()
    statuses, text = launch(cache, *options, processes=2)
    assert time.monotonic() - started < 100
    text = " ".join(text.split())
    assert statuses == [1, 1] and "Traceback" not in text, text
    assert f": {images}/train/red/" in text and "cannot be decoded" in text


@pytest.mark.rest
def test_an_evaluated_image_that_one_process_cannot_read_ends_both(
    finished, folder, cache, tmp_path
):
    """The last one, after which the other process has no batch left."""
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    cut(images / "val" / "red" / "9.JPEG")
    options = [*finished[0], "--data", images, "--output", tmp_path / "run"]
    statuses, text = launch(cache, *options, processes=2)
    assert statuses == [1, 1] and "Traceback" not in text, text
    assert f"process 1: {images}/val/red/9.JPEG" in " ".join(text.split())


@pytest.mark.parametrize(
    ("at", "status"),
    [
        pytest.param(6, -signal.SIGKILL, marks=pytest.mark.slow, id="kill"),
        pytest.param(-6, 1, marks=pytest.mark.rest, id="raise"),
    ],
)
def test_a_process_that_dies_ends_the_other(at, status, finished, cache, tmp_path):
    options = [*finished[0], "--output", tmp_path / "run"]
    first = tmp_path / "run" / "checkpoints" / "3"
    statuses, text = launch(cache, *options, processes=2, one_dies_at=at, waits_for=first)
    assert statuses == [1, status], text


@pytest.mark.slow
def test_processes_with_different_options_are_refused(finished, cache, tmp_path):
    options = [*finished[0], "--output", tmp_path / "run"]
    statuses, text = launch(cache, *options, processes=2, one_with=["--width", "16"])
    assert statuses == [2, 2] and "process 1 differs from process 0" in text, text
    assert "width 16, not 8" in " ".join(text.split())
