"""Write the images of a set to tar files in WebDataset's layout, with an index: the work of `vitrail data shard`.

train-000000.tar    000000000.jpg, 000000000.cls (the class, from 0), 000000000.json, 000000001.jpg, ...
_info.json          classes, tar files, and of each image its name, class, offset and size (see `vitrail.data.shards`)
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import Image
from torch import Tensor

from vitrail.data.content import content_hash
from vitrail.data.decode import PNG, BadImage, EncodedImage, resize
from vitrail.data.kinds import OtherKind
from vitrail.data.memory import progress
from vitrail.data.pixels import NUMPY, to_bytes
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet, Splits
from vitrail.data.shards import INDEX
from vitrail.data.sources import ENDINGS
from vitrail.data.tally import Tally
from vitrail.data.targets import Labels
from vitrail.data.threads import in_order
from vitrail.errors import UserError
from vitrail.files import atomic_folder, refuse_existing, refuse_file_name
from vitrail.process import cores

T = TypeVar("T")
log = logging.getLogger("vitrail")

QUALITY = 95
"""of JPEGs that are made, from 1 to 100"""
TAR_BYTES = 500 * 10**6
"""A new tar file begins before one has more bytes than this."""
KINDS = {b"\xff\xd8\xff": "jpg", PNG: "png", b"GIF8": "gif", b"RIFF": "webp", b"II": "tif", b"MM": "tif", NUMPY: "npy"}
"""endings by the first bytes of a file"""


class Stored(NamedTuple):
    """An image to write."""

    data: bytes
    ending: str
    hash: int
    """of the image from which it was made"""


class Packed(NamedTuple):
    """What was written of a split."""

    images: int
    bad: int
    tars: int
    bytes: int


def pack_data(
    data: str, out: Path, resize: int | None, quality: int, tar_mb: int, max_bad: float, group: str | None
) -> Iterator[str]:
    """Pack the set at a path, or a built-in one, and say what was written of each split."""
    source, target = Path(data).expanduser().resolve(), out.resolve()
    if source.is_dir() and target.is_relative_to(source):
        raise UserError(f"{out} is inside {data}, and would be read as data next time: choose another --out")
    refuse_existing(out)  # before the data is opened, which may take minutes
    try:
        splits = Labels.open(data, group=group)
    except OtherKind as error:
        raise UserError(
            f"{data} looks like {error.kind} ({error.sign}), and shards hold images with one class each: train on it "
            "without shards"
        ) from None
    for split, own in pack(splits, out, resize, quality, tar_mb * 10**6, max_bad).items():
        left_out = f"; left out: {own.bad:,}" if own.bad else ""
        tars = "1 tar file" if own.tars == 1 else f"{own.tars:,} tar files"
        yield f"{split}: {own.images:,} images in {tars}, {own.bytes / 1e6:,.1f} MB{left_out}"
    yield str(out)


def pack(
    splits: Splits,
    out: Path,
    shorter_side: int | None = None,
    quality: int = QUALITY,
    tar_bytes: int = TAR_BYTES,
    max_bad: float = 0.01,
) -> dict[str, Packed]:
    """Write a set with classes to the new folder `out`, and return what was written of each split.

    Files are copied unchanged. With `shorter_side`, larger images become JPEGs of that size, upright, with the pixels
    that vitrail reads from them; others are copied. Bad images are left out and logged. Raises UserError if `out`
    exists, if an image does not fit into a JPEG, or if more than the fraction `max_bad` of a split is bad.
    """
    refuse_existing(out)
    refuse_file_name(out, "give --out a folder")
    for name, value, most in (
        ("--resize", shorter_side, 1 << 16),
        ("--quality", quality, 100),
        ("--tar-mb", tar_bytes, 1 << 40),
    ):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name} must be at least 1" + f" and at most {most}" * (most < 1 << 40))
    if not 0 <= max_bad <= 1:
        raise UserError(f"--max-bad must be a fraction from 0 to 1, got {max_bad}")
    there = {"train": splits.train, "val": splits.val, "test": splits.test}
    rows, packed = {}, {}
    with atomic_folder(out) as folder:
        for split, images in there.items():
            if images is not None and len(images):
                rows[split], packed[split] = _pack_split(
                    images, folder, split, shorter_side, quality, tar_bytes, max_bad
                )
        index = {"classes": splits.train.classes, "splits": rows}
        (folder / INDEX).write_text(json.dumps(index))
    return packed


def _pack_split(
    images: ImageSet, folder: Path, split: str, shorter_side: int | None, quality: int, tar_bytes: int, max_bad: float
) -> tuple[dict[str, Any], Packed]:
    def make(i: int) -> Stored | str:
        try:
            return stored(images, i, shorter_side, quality)
        except BadImage as error:
            return str(error)

    tally = Tally(len(images))
    labels, classes = images.labels.tolist(), images.classes
    with Writer(folder, split, tar_bytes) as writer:
        packed = in_order(make, range(len(images)), cores(), 4 * cores())
        for i, result in enumerate(progress(packed, len(images), f"packing {split}")):
            if isinstance(result, str):
                tally.add([result], images.name, max_bad)
            else:
                writer.add(result, images.keys[i], labels[i], classes[labels[i]])
    if not writer.columns["keys"]:
        raise UserError(f"no image of {images.name} can be read")
    return writer.row(), Packed(len(writer.columns["keys"]), tally.bad, len(writer.names), sum(writer.bytes))


def stored(images: ImageSet, i: int, shorter_side: int | None, quality: int) -> Stored:
    """What is written of an image: its file, or a JPEG of its pixels. Raises BadImage, also for damage inside it."""
    item, key = images.read(i), images.keys[i]
    opened = item if isinstance(item, Tensor) else EncodedImage(item, key)
    if isinstance(opened, EncodedImage):
        channels = opened.readable_as()[0]
        height, width = opened.measure(channels)
    else:
        channels, height, width = opened.shape
    if shorter_side is None or min(height, width) <= shorter_side:
        if isinstance(opened, EncodedImage):
            opened.pixels(channels)  # finds damage
            return Stored(opened.data, _ending(opened.data, key), content_hash(item))
        return Stored(_as_png(to_bytes(opened)), "png", content_hash(item))
    if channels not in (1, 3):
        raise UserError(
            f"{key} has {channels} channels, and a JPEG holds 1 or 3: leave out --resize, to copy the files"
        )
    p = Preprocess((shorter_side, shorter_side), channels=channels)
    pixels = p.decode(opened) if isinstance(opened, EncodedImage) else to_bytes(opened)
    small = resize(pixels, p.resized(height, width), p.interpolation).permute(1, 2, 0).contiguous().numpy()
    colours = {"colorspace": "GRAY", "colorsubsampling": "Gray"} if channels == 1 else {"colorsubsampling": "420"}
    return Stored(simplejpeg.encode_jpeg(small, quality, **colours), "jpg", content_hash(item))


def _as_png(image: Tensor) -> bytes:
    """An image of a built-in set, whose pixels no JPEG has seen."""
    array, file = image.permute(1, 2, 0).numpy(), io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)).save(file, "PNG")
    return file.getvalue()


def _ending(data: bytes, key: str) -> str:
    """The ending for a file: by its content, since other tools decode by the ending."""
    own = Path(key).suffix.lower()
    return next((kind for start, kind in KINDS.items() if data.startswith(start)), own[1:] if own in ENDINGS else "img")


class Writer:
    """The tar files of a split, and what the index says about them. Equal images give equal files."""

    def __init__(self, folder: Path, split: str, tar_bytes: int) -> None:
        self.folder, self.split, self.tar_bytes = folder, split, tar_bytes
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.bytes: list[int] = []
        self.columns: dict[str, list[Any]] = {"keys": [], "labels": [], "offsets": [], "sizes": [], "hashes": []}
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:
            if self.file is not None:
                stack.callback(self.file.close)
                self._end(self.file)

    def add(self, image: Stored, key: str, label: int, name: str) -> None:
        if self.file is None or (self.lengths[-1] and self.file.tell() + len(image.data) > self.tar_bytes):
            self.file = self._begin()
        number = f"{len(self.columns['keys']):09d}"
        row = {"filename": key, "label": label, "class": name, "hash": image.hash}
        offset = _add(self.file, f"{number}.{image.ending}", image.data)
        _add(self.file, f"{number}.cls", str(label).encode())
        _add(self.file, f"{number}.json", json.dumps(row).encode())
        self.lengths[-1] += 1
        for column, value in zip(self.columns.values(), (key, label, offset, len(image.data), image.hash), strict=True):
            column.append(value)

    def _begin(self) -> IO[bytes]:
        if self.file is not None:
            self._end(self.file)
            self.file.close()
        self.names.append(f"{self.split}-{len(self.names):06d}.tar")
        self.lengths.append(0)
        return (self.folder / self.names[-1]).open("wb")

    def _end(self, file: IO[bytes]) -> None:
        """Two empty blocks end a tar file, and whole records have been its size since tapes."""
        used = file.tell() + 2 * tarfile.BLOCKSIZE
        file.write(bytes(2 * tarfile.BLOCKSIZE + -used % tarfile.RECORDSIZE))
        self.bytes.append(file.tell())

    def row(self) -> dict[str, Any]:
        """The split's entry in the index; the first four fields are those of timm."""
        count = len(self.columns["keys"])
        own = {"name": self.split, "num_samples": count, "filenames": self.names, "shard_lengths": self.lengths}
        return {**own, "bytes": self.bytes, **self.columns}


def _add(file: IO[bytes], name: str, data: bytes) -> int:
    """Append a file, and return the offset of its data."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    file.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset
