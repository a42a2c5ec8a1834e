"""Data sets by name and path, from files as they are published, and their splits."""

import gzip
import pickle
import shutil
import struct

import numpy as np
import pytest
from scipy.io import savemat

from benchmarks.datasets import SOURCES, Data, Images, load
from benchmarks.splits import epoch, split

RNG = np.random.default_rng(0)


def write_idx(file, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def make_idx(folder):
    """Returns what was written: training pixels and labels, test pixels and labels."""
    made = []
    for name, number in (("train", 6), ("t10k", 4)):
        pixels, labels = RNG.integers(0, 256, (number, 28, 28)), np.arange(number)
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
        made += [pixels[..., None], labels]
    return made


def planes(pixels):
    """A row of 3072 bytes for each image: all red, then all green, then all blue."""
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1).astype(np.uint8)


def make_cifar(folder, files, classes, write):
    pixels = RNG.integers(0, 256, (2 * len(files), 32, 32, 3))
    labels = RNG.integers(0, classes, len(pixels))
    for index, file in enumerate(files):
        part = slice(2 * index, 2 * index + 2)
        write(folder / file, planes(pixels[part]), labels[part])
    return [pixels[:-2], labels[:-2], pixels[-2:], labels[-2:]]


CIFAR10 = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def make_cifar10(folder):
    def binary(file, rows, labels):
        records = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1)
        file.with_name(f"{file.name}.bin").write_bytes(records.tobytes())

    return make_cifar(folder, CIFAR10, 10, binary)


def make_cifar10_python(folder):
    def pickled(file, rows, labels):
        found = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"training"}
        file.write_bytes(pickle.dumps(found, protocol=2))

    return make_cifar(folder, CIFAR10, 10, pickled)


def make_cifar100(folder):
    def binary(file, rows, labels):
        both = np.stack([labels // 5, labels], axis=1).astype(np.uint8)
        records = np.concatenate([both, rows], axis=1)
        file.with_name(f"{file.name}.bin").write_bytes(records.tobytes())

    return make_cifar(folder, ["train", "test"], 100, binary)


def make_cifar100_python(folder):
    def pickled(file, rows, labels):
        found = {b"data": rows, b"fine_labels": labels.tolist(), b"coarse_labels": [0] * 2}
        file.write_bytes(pickle.dumps(found, protocol=2))

    return make_cifar(folder, ["train", "test"], 100, pickled)


def make_svhn(folder):
    made = []
    for name, number in (("train", 5), ("test", 3)):
        pixels = RNG.integers(0, 256, (number, 32, 32, 3)).astype(np.uint8)
        labels = np.array([10, 1, 9, 2, 10][:number], np.uint8)
        found = {"X": pixels.transpose(1, 2, 3, 0), "y": labels[:, None]}
        savemat(folder / f"{name}_32x32.mat", found)
        made += [pixels, labels % 10]
    return made


MADE = {
    "fashion_mnist": make_idx,
    "mnist": make_idx,
    "cifar10": make_cifar10,
    "cifar10 python": make_cifar10_python,
    "cifar100": make_cifar100,
    "cifar100 python": make_cifar100_python,
    "svhn": make_svhn,
}


@pytest.mark.parametrize("case", MADE)
def test_files_give_what_was_written(case, tmp_path):
    made = MADE[case](tmp_path)
    data = load(case.split()[0], tmp_path)
    assert data.test is not None
    for found, expected in zip((*data.train, *data.test), made, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert data.train.pixels.dtype == np.uint8 and data.train.labels.dtype == np.int32
    assert data.shape == made[0].shape[1:]


def test_installed_data_sets():
    digits = load("digits")
    assert digits.shape == (8, 8, 1) and len(digits.train.labels) == 1797 and digits.test is None
    assert digits.train.pixels.max() == digits.white == 16
    mnist = load("mnist_5000")
    assert mnist.shape == (28, 28, 1) and mnist.train.pixels.max() == mnist.white
    assert np.bincount(mnist.train.labels).tolist() == [500] * 10


def repack(file, change):
    file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()))))


def cut(file):
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize(
    "case, name, damage, expected",
    (
        ("mnist", "train-images-idx3-ubyte.gz", lambda f: f.unlink(), "is not there"),
        ("mnist", "train-images-idx3-ubyte.gz", cut, "a whole gzip file"),
        (
            "mnist",
            "train-images-idx3-ubyte.gz",
            lambda f: repack(f, lambda d: d[:-1]),
            "has 4703 elements. Expected 4704, of sizes (6, 28, 28)",
        ),
        (
            "mnist",
            "train-images-idx3-ubyte.gz",
            lambda f: shutil.copy(f.with_name("train-labels-idx1-ubyte.gz"), f),
            "starts with 00 00 08 01. Expected the magic number 00 00 08 03",
        ),
        (
            "mnist",
            "train-images-idx3-ubyte.gz",
            lambda f: repack(f, lambda d: d[:7]),
            "has 7 bytes",
        ),
        (
            "mnist",
            "train-labels-idx1-ubyte.gz",
            lambda f: write_idx(f, np.full(6, 10)),
            "labels from 10 to 10. Expected 0 to 9",
        ),
        (
            "mnist",
            "train-labels-idx1-ubyte.gz",
            lambda f: write_idx(f, np.zeros(5)),
            "6 images and 5 labels",
        ),
        ("cifar10", "data_batch_3.bin", cut, "has 6141 bytes. Expected a multiple of 3073"),
        ("cifar100", "test.bin", lambda f: f.unlink(), "is not there"),
        ("cifar10 python", "data_batch_3", cut, "a pickled dict of data and labels"),
        (
            "cifar10 python",
            "data_batch_3",
            lambda f: f.write_bytes(pickle.dumps({b"data": np.zeros((2, 3)), b"labels": [0, 0]})),
            "has data of shape (2, 3), float64",
        ),
        ("svhn", "train_32x32.mat", cut, "X and y in a MATLAB file"),
        (
            "svhn",
            "train_32x32.mat",
            lambda f: savemat(f, {"X": np.zeros((3, 2)), "y": [1]}),
            "has X of shape (3, 2) and dtype float64",
        ),
        (
            "svhn",
            "train_32x32.mat",
            lambda f: savemat(f, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[0], [1]]}),
            "labels from 0 to 1. Expected 1 to 10",
        ),
    ),
)
def test_wrong_files_are_refused(case, name, damage, expected, tmp_path):
    MADE[case](tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError) as error:
        load(case.split()[0], tmp_path)
    assert expected in str(error.value)
    assert name in str(error.value) or case in str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_calls_nothing_but_arrays(tmp_path, capsys):
    make_cifar10_python(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match="print is no part of an array"):
        load("cifar10", tmp_path)
    assert capsys.readouterr().out == ""


def test_names_and_paths_are_checked(tmp_path):
    with pytest.raises(ValueError, match=f"no data set 'mist'.*{', '.join(SOURCES)}"):
        load("mist")
    with pytest.raises(ValueError, match="Expected fashion_mnist=FOLDER, got no folder"):
        load("fashion_mnist")
    with pytest.raises(ValueError, match=f"Expected no path, got {tmp_path}"):
        load("digits", tmp_path)


def numbered(number, test=None):
    """Images whose pixels are their number."""

    def images(first, count):
        pixels = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
        return Images(np.broadcast_to(pixels, (count, 4, 6, 1)), np.arange(count, dtype=np.int32))

    return Data("Numbers", images(0, number), images(100, test) if test else None, white=255)


def numbers(images):
    return np.round((images.pixels[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_published_test_images_are_the_only_ones_to_test_on():
    parts = split(numbered(20, test=10), seed=0, num_train=12, num_held_out=5)
    train, validation, test = map(numbers, parts)
    assert (len(train), len(validation), len(test)) == (12, 5, 5)
    assert len({*train, *validation}) == 17 and max(train + validation) < 20
    assert len(set(test)) == 5 and min(test) >= 100
    again = split(numbered(20, test=10), seed=0, num_train=12, num_held_out=5)
    other = split(numbered(20, test=10), seed=1, num_train=12, num_held_out=5)
    assert list(map(numbers, again)) == [train, validation, test]
    assert all(numbers(a) != numbers(b) for a, b in zip(parts, other, strict=True))


def test_without_published_test_images_the_rest_is_halved():
    train, validation, test = map(numbers, split(numbered(20), seed=3, num_train=12))
    assert (len(train), len(validation), len(test)) == (12, 4, 4)
    assert sorted(train + validation + test) == list(range(20))


@pytest.mark.parametrize("test, most", ((None, 18), (10, 19)))
def test_images_are_left_to_validate_on(test, most):
    split(numbered(20, test), seed=0, num_train=most)
    for wrong in (0, most + 1):
        with pytest.raises(ValueError, match=f"Got {wrong} to train on; expected 1 to {most}"):
            split(numbered(20, test), seed=0, num_train=wrong)


def test_images_that_are_not_square_and_of_several_channels_are_shifted_by_a_pixel():
    pixels = RNG.uniform(-1, 1, (5, 4, 6, 3)).astype(np.float32)
    train = Images(pixels, np.arange(5, dtype=np.int32))
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    shifted = epoch(train, seed=0, index=1)
    assert sorted(shifted.labels) == list(range(5))
    for image, label in zip(*shifted, strict=True):
        candidates = [padded[label, i : i + 4, j : j + 6] for i in range(3) for j in range(3)]
        assert any((image == candidate).all() for candidate in candidates)
