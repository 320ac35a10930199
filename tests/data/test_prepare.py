"""An image is prepared in one way, whoever asks: evaluation, prediction, and what PIL has opened give the same bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, smooth
from PIL import Image

from vitrail.data.augment import Augment
from vitrail.data.decode import BadImage, EncodedImage, decode, resize
from vitrail.data.loader import Loader
from vitrail.data.prepare import prepare
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Labels
from vitrail.errors import UserError

WAYS = [
    Preprocess((32, 32)),
    Preprocess((24, 40), crop_fraction=0.875, interpolation="bilinear"),
    Preprocess((33, 47), "squash"),
    Preprocess((40, 40), "squash", 0.9, "bilinear", channels=1),
    Preprocess((16, 16), interpolation="nearest"),
    Preprocess((40, 33), "letterbox", mean=(0.2, 0.4, 0.6)),
]
TRAINING = {
    "jitter": Augment(crop="jitter", flip=True),
    "jitter to tiny and large": Augment(crop="jitter", jitter=(0.02, 8.0)),
    "rotation": Augment(rotation=20, flip=True, erase=0.5),
    "rotated jitter": Augment(crop="jitter", rotation=180, policy="three"),
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of many sizes and shapes, turned in every way; most JPEGs are decoded at a fraction of their size."""
    folder = tmp_path_factory.mktemp("mixed")
    draw = np.random.default_rng(0)
    found = []
    for i in range(40):
        height, width = (int(side) for side in draw.integers(20, 700, 2))
        noise = Image.fromarray(draw.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        image = noise.resize((width, height), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 1 + i % 8
        kind = ("JPEG", "JPEG", "JPEG", "PNG", "WEBP")[i % 5]
        options = {"subsampling": i % 3, "progressive": i % 4 == 0} if kind == "JPEG" else {}
        found.append(folder / f"{i:02}.{kind.lower()}")
        found[-1].write_bytes(encoded(image.convert("L") if i % 7 == 0 else image, kind, exif=exif, **options))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory", [True, False])
def test_evaluation_sees_what_prediction_sees(way: Preprocess, memory: bool, paths: list[Path]) -> None:
    wanted = [way(EncodedImage(path)) for path in paths]
    labels = Labels(torch.zeros(len(paths), dtype=torch.int64), ["a"])
    dataset = ImageSet("mixed", [str(p) for p in paths], paths, labels)
    loader = Loader(dataset, way, batch_size=7, seed=0, train=False, memory=memory, workers=0 if memory else 2)
    seen = [image for batch in loader.evaluation() for image in batch["image"]]
    assert len(seen) == len(wanted) and all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    for path, image in zip(paths, wanted, strict=True):
        opened = Image.open(path)
        place = opened.fp.tell()  # type: ignore[union-attr]
        assert torch.equal(way(opened), image)
        if path.suffix in (".jpeg", ".png"):
            assert opened.tile and opened.fp.tell() == place, "it stays unloaded"  # type: ignore[union-attr]
        assert torch.equal(way(path), image) and torch.equal(way(path.read_bytes()), image)


def test_the_size_follows_from_the_whole_image(paths: list[Path]) -> None:
    """And the pixels are near those of full decoding: within half a pixel, some grey levels on average."""
    reduced = 0
    for path in paths:
        for way in WAYS[:3]:
            full = decode(path)
            height, width = way.resized(full.shape[1], full.shape[2])
            top, left = round((height - way.size[0]) / 2), round((width - way.size[1]) / 2)
            whole = resize(full, (height, width), way.interpolation)
            wanted = whole[:, top : top + way.size[0], left : left + way.size[1]]
            made = way.prepare(path)
            reduced += way.decode(EncodedImage(path)).shape != full.shape
            assert made.shape == wanted.shape and (made.float() - wanted.float()).abs().mean() < 4
    assert reduced > 30


def test_what_was_chosen_of_an_opened_image_counts() -> None:
    """A drafted, loaded or sought image is the pixels that it stands for."""
    data = encoded(smooth(400, 560), "JPEG", quality=95)
    way = Preprocess((64, 64))
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("L", (140, 100))
    assert torch.equal(*way.prepare(drafted)[:2]), "the draft is grey"
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    assert torch.equal(way.prepare(loaded), way.prepare(torch.from_numpy(np.array(loaded)).permute(2, 0, 1)))
    frames = [Image.new("L", (9, 9), value) for value in (10, 200)]
    film = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    film.seek(1)
    assert way.prepare(film).unique().tolist() == [200]
    closed = Image.open(io.BytesIO(data))
    closed.fp.close()  # type: ignore[union-attr]
    with pytest.raises(ValueError):  # noqa: PT011
        way.prepare(closed)


def test_too_thin_files_are_named_before_they_are_decoded(tmp_path: Path) -> None:
    Image.new("L", (60_000, 1)).save(tmp_path / "thin.jpg")
    with pytest.raises(BadImage, match=r"thin\.jpg: the image is 60000x1: too long and thin"):
        Preprocess().prepare(tmp_path / "thin.jpg")


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("way", [WAYS[0], WAYS[2], WAYS[-1]], ids=lambda way: way.resize)
def test_training_sees_what_prepare_gives_for_its_draw(name: str, way: Preprocess, paths: list[Path]) -> None:
    labels = Labels(torch.zeros(len(paths), dtype=torch.int64), ["a"])
    dataset = ImageSet("mixed", [str(p) for p in paths], paths, labels)
    loader = Loader(dataset, way, batch_size=40, seed=4, train=True, augment=TRAINING[name], memory=False, workers=2)
    batch = next(loader.batches())
    for sample, image in zip(batch["sample"].tolist(), batch["image"], strict=True):
        alone = prepare(paths[sample], way, TRAINING[name], (4, 0, sample))
        assert torch.equal(way.normalise(alone.images[0]), image)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("sides", [[(9, 7), (1, 1), (40, 23), (1, 60)], [(12, 30)] * 4, [(500, 3)] * 4], ids=str)
def test_a_jitter_of_images_in_memory_has_the_pixels_of_streamed_ones(
    channels: int, sides: list[tuple[int, int]]
) -> None:
    """Where no image is larger than the largest scale needs, which would be shrunk before it is kept."""
    images = [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in sides]
    way, augment = Preprocess((16, 20), channels=channels), Augment(crop="jitter", jitter=(0.3, 60.0), rotation=9)
    dataset = ImageSet("noise", list("abcd"), images, Labels(torch.zeros(4).long(), ["a"]), channels)
    kept, streamed = (
        Loader(dataset, way, batch_size=4, seed=1, train=True, augment=augment, memory=memory).batches()
        for memory in (True, False)
    )
    for _ in range(3):
        a, b = next(kept), next(streamed)
        assert torch.equal(a["image"], b["image"]) and a["image"].shape == (4, channels, 16, 20)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (33, 47), (47, 33), (40, 40), (80, 80)], ids=str)
def test_a_letterbox_shows_the_whole_image_between_bars_of_the_mean(channels: int, size: tuple[int, int]) -> None:
    mean = tuple(0.1 + 0.2 * i for i in range(channels))
    way = Preprocess((40, 40), "letterbox", mean=mean, std=(0.25,) * channels, channels=channels)
    image = torch.full((channels, *size), 255, dtype=torch.uint8)
    made = way.normalise(way.prepare(image))
    shown = (made > 0.2).all(dim=0)
    rows, columns = shown.any(dim=1).nonzero()[:, 0], shown.any(dim=0).nonzero()[:, 0]
    height, width = max(1, round(40 * size[0] / max(size))), max(1, round(40 * size[1] / max(size)))
    assert (len(rows), len(columns)) == (height, width) == way.resized(*size)
    assert abs(int(rows[0]) - (39 - int(rows[-1]))) <= 1 and abs(int(columns[0]) - (39 - int(columns[-1]))) <= 1
    assert float(made[:, ~shown].abs().max() if not shown.all() else 0) < 0.5 / 255 / 0.25 + 1e-6
    batch = way.prepare(torch.stack([image, image]))
    assert torch.equal(way.normalise(batch)[1], made)


def test_preprocessing_of_checkpoints_without_a_letterbox_is_read_as_before() -> None:
    old = {"size": [8, 8], "resize": "crop", "crop_fraction": 0.9, "interpolation": "bicubic", "channels": 3}
    assert Preprocess.from_dict(old) == Preprocess((8, 8), crop_fraction=0.9)
    new = Preprocess((8, 9), "letterbox")
    assert Preprocess.from_dict(new.as_dict()) == new
    with pytest.raises(UserError, match="a letterbox shows the whole image, so crop_fraction must be 1, got 0.9"):
        Preprocess.from_dict({**old, "resize": "letterbox"})
