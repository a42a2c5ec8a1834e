"""Labelled images from folders of files, ArrayRecord files or TFDS, as batches that grain reads,
decodes and remembers."""

import io
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image

from benchmarks.imagenet.processes import describe

Example = dict[str, Any]
"""`image`: bytes of a JPEG or PNG file, later pixels (H, W, 3) uint8; `label`: its class; `name`:
for errors, where known."""

THREADS = 16
"""Threads of a process that read and decode."""

READ_AHEAD = 512
"""Images that they decode in advance."""

CROP_MARGIN = 256 / 224
"""Shorter side of an evaluated image before its central square is cut out, over the side of that
square."""

Source = grain.sources.RandomAccessDataSource[Example]
"""Examples by number."""


class Images(NamedTuple):
    """Training and evaluation images of the same classes."""

    train: Source
    val: Source
    num_classes: int


def find(data: str, num_classes: int | None) -> Images:
    """The images under `data`.

    Args:
        data: a folder with train/ and val/, each with a folder of image files per class, or with
            ArrayRecord files of `tf.train.Example` as TFDS writes them; or tfds:NAME for a data set
            that TFDS has prepared as ArrayRecord.
        num_classes: needed for ArrayRecord files, which do not say it.

    Raises:
        ValueError: a folder is missing or empty, or train and val differ in their classes.
    """
    if data.startswith("tfds:"):
        return _from_tfds(data.removeprefix("tfds:"))
    folders = [Path(data) / split for split in ("train", "val")]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder. Expected {data} to hold train/ and val/.")
    records = [sorted(map(str, folder.glob("*array_record*"))) for folder in folders]
    if any(records):
        if num_classes is None or not all(records):
            raise ValueError(
                f"{data} holds ArrayRecord files. Expected them in train/ and val/ both, and their "
                f"--num-classes. Got {len(records[0])} in train/, {len(records[1])} in val/ and "
                f"--num-classes {num_classes}."
            )
        train, val = (Records(grain.sources.ArrayRecordDataSource(paths)) for paths in records)
        return Images(train, val, num_classes)
    train, val = Folder(folders[0]), Folder(folders[1])
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{folders[0]} has {len(train.classes)} classes, {folders[1]} {len(val.classes)}, and "
            "these stand in one of them only: "
            f"{', '.join(differing[:5])}{', ...' if differing[5:] else ''}. Expected the same "
            "folders in both."
        )
    if num_classes not in (None, len(train.classes)):
        raise ValueError(
            f"{folders[0]} has {len(train.classes)} classes, not the {num_classes} of "
            "--num-classes."
        )
    return Images(train, val, len(train.classes))


class Folder:
    """Image files in one folder per class. Classes are numbered in the order of their names."""

    def __init__(self, folder: Path):
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).iterdir())
            if path.suffix.lower() in (".jpeg", ".jpg", ".png")
        ]
        filled = {label for _, label in self.files}
        empty = [name for label, name in enumerate(self.classes) if label not in filled]
        if empty or not self.files:
            without = ", ".join(str(folder / name) for name in empty[:5]) or str(folder)
            raise ValueError(
                f"{without}{', ...' if empty[5:] else ''} has no images. Expected a folder for "
                "each class with .jpeg, .jpg or .png files in it, and no other folders."
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path, label = self.files[index]
        return {"image": path.read_bytes(), "label": label, "name": str(path)}


# tf.train.Example as it is on the wire, so that TensorFlow is not needed. A map is a repeated
# message of keys and values.
_SCHEMA = """
name: "example" package: "benchmarks" syntax: "proto3"
message_type { name: "Bytes"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type { name: "Ints"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
}
message_type { name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Bytes" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Ints" }
}
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Feature" }
}
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" }
}
message_type { name: "Example"
  field {
    name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "Features"
  }
}
"""


@cache
def example_class() -> Any:
    """The class of `tf.train.Example` messages, with `features.feature` as a list of entries."""
    pool = descriptor_pool.DescriptorPool()
    file = text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto())
    pool.Add(file)  # type: ignore[reportAttributeAccessIssue]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmarks.Example"))


class Records:
    """Serialized `tf.train.Example` messages with the features `image` (a JPEG or PNG file) and
    `label`."""

    def __init__(self, records: Any):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        try:
            message = example_class().FromString(self.records[index])
        except Exception as error:
            raise ValueError(f"record {index} cannot be read: {error}") from error
        features = {entry.key: entry.value for entry in message.features.feature}
        if not {"image", "label"} <= features.keys():
            raise ValueError(
                f"record {index} has the features {sorted(features)}. Expected image and label "
                "among them."
            )
        images, labels = features["image"].bytes_list.value, features["label"].int64_list.value
        if not (images and labels):
            raise ValueError(f"record {index} has an image or a label without a value.")
        return {"image": images[0], "label": labels[0], "name": f"record {index}"}


def _from_tfds(name: str) -> Images:
    try:
        import tensorflow_datasets as tfds  # type: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"tfds:{name} needs TensorFlow Datasets: pip install tensorflow-datasets. Its "
            "ArrayRecord files can be read without it, from a folder with train/ and val/."
        ) from error
    builder = tfds.builder(name)
    decoders = {"image": tfds.decode.SkipDecoding()}
    train, val = (
        builder.as_data_source(split, decoders=decoders) for split in ("train", "validation")
    )
    return Images(train, val, builder.info.features["label"].num_classes)


def training_batches(
    source: Source, *, batch: int, num_classes: int, size: int, seed: int, workers: int
) -> Iterator[Example]:
    """This process's part of every batch, without end: randomly cropped and flipped, in an order
    drawn for each epoch.

    An epoch leaves out what does not fill a batch, other images each time. Seed and step decide
    what a batch holds, however many processes share it.
    """
    images = grain.MapDataset.source(source).seed(seed)
    images = images.random_map(
        partial(_train_example, size=size, num_classes=num_classes)
    ).shuffle()
    return iter(_batches(images[: len(source) // batch * batch], batch, workers, epochs=None))


def evaluation_batches(
    source: Source, *, batch: int, num_classes: int, size: int, workers: int
) -> Iterable[Example]:
    """This process's part of every batch of one pass, the last one filled up with images of weight
    0."""
    images = grain.MapDataset.source(source).map(
        partial(_evaluation_example, size=size, num_classes=num_classes)
    )
    nothing = {
        "image": np.zeros((size, size, 3), np.uint8),
        "label": np.int32(0),
        "weight": np.float32(0),
    }
    if missing := -len(source) % batch:
        images = grain.MapDataset.concatenate(
            [images, grain.MapDataset.source([nothing] * missing)]
        )
    return _batches(images, batch, workers, epochs=1)


class Reader:
    """Batches of this process, without an end. Where one cannot be read, rows labelled -1 stand for
    it and for all that follow.

    So a process that cannot read still takes part in the step that the others have begun, which
    tells them: they would wait for it otherwise.

    Attributes:
        error: why a batch could not be read.
    """

    def __init__(self, batches: Iterator[Example], like: Example):
        self.batches, self.like = batches, like
        self.error: str | None = None

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> Example:
        if self.error is None:
            try:
                return next(self.batches)
            except Exception as error:
                self.error = describe(error)
        return self.like


def unread(batch: int, size: int, *, weighted: bool) -> Example:
    """This process's part of a batch that it could not read."""
    rows = batch // jax.process_count()
    example = {
        "image": np.zeros((rows, size, size, 3), np.uint8),
        "label": np.full(rows, -1, np.int32),
    }
    return example | ({"weight": np.zeros(rows, np.float32)} if weighted else {})


class Share(grain.transforms.DatasetSelectionMap):
    """The consecutive rows of every batch that belong to this process, so that all together read
    the batch in its order."""

    def __init__(self, length: int, batch: int):
        self.length, self.batch = length // jax.process_count(), batch
        self.rows, self.first = (
            batch // jax.process_count(),
            batch // jax.process_count() * jax.process_index(),
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, index // self.rows * self.batch + self.first + index % self.rows


def _batches(
    images: grain.MapDataset[Any], batch: int, workers: int, *, epochs: int | None
) -> grain.IterDataset[Any]:
    share = Share(len(images), batch)
    images = grain.MapDataset.select_from_datasets([images], share).repeat(epochs)
    if not workers:
        return images.to_iter_dataset(grain.ReadOptions(THREADS, READ_AHEAD)).batch(share.rows)
    # grain's worker processes read absl's flags, which this program leaves alone
    flags.FLAGS.mark_as_parsed()
    # Workers take turns with whole batches, so that a batch holds the same images whatever their
    # number.
    batches = images.batch(share.rows).to_iter_dataset(
        grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    )
    return batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=workers))


def _train_example(
    example: Example, rng: np.random.Generator, *, size: int, num_classes: int
) -> Example:
    image = decode(example)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(rng, *image.size))
    pixels = np.asarray(image)[:, :: rng.choice((1, -1))]
    return {"image": pixels, "label": _label(example, num_classes)}


def _evaluation_example(example: Example, *, size: int, num_classes: int) -> Example:
    image = decode(example)
    box = central_box(*image.size)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return {"image": pixels, "label": _label(example, num_classes), "weight": np.float32(1)}


def decode(example: Example) -> Image.Image:
    """The image in RGB, whatever its file holds."""
    try:
        return Image.open(io.BytesIO(example["image"])).convert("RGB")
    except Exception as error:  # Pillow's, of damaged files, are of many kinds
        raise ValueError(
            f"{example.get('name', 'an image')} cannot be decoded: {error}. Replace it, or "
            "remove it and start again."
        ) from error


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """A random part of an image: 8 to 100 % of its area with an aspect ratio from 3/4 to 4/3, or
    else the central square."""
    for _ in range(10):
        area, ratio = (
            width * height * rng.uniform(0.08, 1),
            np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))),
        )
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return x, y, x + w, y + h
    side = min(width, height)
    x, y = (width - side) // 2, (height - side) // 2
    return x, y, x + side, y + side


def central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The square that is left when an image is resized to a shorter side of 256 and its central
    224x224 are cut out."""
    side = min(width, height) / CROP_MARGIN
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def _label(example: Example, num_classes: int) -> np.int32:
    if not 0 <= example["label"] < num_classes:
        raise ValueError(
            f"{example.get('name', 'an image')} has the label {example['label']}. Expected 0 to "
            f"{num_classes - 1}."
        )
    return np.int32(example["label"])
