"""Every kind of image comes in right, and bad bytes get one line."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, smooth
from PIL import Image
from torchvision.transforms.v2 import functional as V

from vitrail.data.decode import BadImage, EncodedImage, decode
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError

RGB = smooth()
TENSOR = torch.from_numpy(RGB).permute(2, 0, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless(kind: str) -> None:
    assert torch.equal(decode(encoded(RGB, kind)), TENSOR)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}])
def test_jpeg_is_pillows(options: dict[str, object]) -> None:
    data = encoded(RGB, "JPEG", quality=90, **options)
    pillow = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert difference(decode(data), pillow) < 0.1


def test_grey() -> None:
    grey = np.array(Image.fromarray(RGB).convert("L"))
    for kind in ("PNG", "JPEG"):
        image = decode(encoded(grey, kind))
        assert image.shape == (3, *grey.shape) and torch.equal(image[0], image[2])
        assert difference(decode(encoded(grey, kind), 1)[0], torch.from_numpy(grey)) < 1.5
    assert difference(decode(encoded(RGB), 1)[0], torch.from_numpy(grey)) < 1
    assert difference(decode(encoded(RGB, "JPEG"), 1)[0], torch.from_numpy(grey)) < 1.5
    black = Image.fromarray(np.eye(9, dtype=bool))
    assert torch.equal(decode(encoded(black), 1)[0], torch.eye(9).to(torch.uint8) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_upper_eight(kind: str) -> None:
    deep = np.arange(0, 65536, 7, dtype=np.uint16)[: 64 * 80].reshape(64, 80) * 3
    assert torch.equal(decode(encoded(deep, kind), 1)[0], torch.from_numpy((deep >> 8).astype(np.uint8)))


@pytest.mark.parametrize("most", [1, 255])
@pytest.mark.parametrize("odd, becomes", [(np.nan, 0), (np.inf, 255), (-np.inf, 0)])
def test_a_float_that_is_no_number_costs_its_own_pixel_alone(most: int, odd: float, becomes: int) -> None:
    pixels = np.linspace(0, most, 60, dtype=np.float32).reshape(6, 10)
    wanted = decode(encoded(Image.fromarray(pixels), "TIFF"), 1)
    assert wanted.max() == 255
    pixels[2, 3], wanted[0, 2, 3] = odd, becomes
    assert torch.equal(decode(encoded(Image.fromarray(pixels), "TIFF"), 1), wanted)


def test_cmyk() -> None:
    image = Image.fromarray(RGB).convert("CMYK")
    assert difference(decode(encoded(image, "TIFF")), TENSOR) < 1
    # Pillow writes CMYK JPEGs as Adobe does, inverted.
    assert b"Adobe" in encoded(image, "JPEG")
    assert difference(decode(encoded(image, "JPEG", quality=98, subsampling=0)), TENSOR) < 3


def test_palette() -> None:
    image = Image.fromarray(RGB).quantize(64)
    wanted = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode(encoded(image, "GIF")), wanted)
    assert torch.equal(decode(encoded(image, "PNG")), wanted)


def test_transparent_lies_on_white() -> None:
    red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode(encoded(red))[:, 0, 0].tolist() == [255, 127, 127]
    assert decode(encoded(Image.new("LA", (4, 4), (0, 0))), 1)[0, 0, 0] == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert decode(encoded(palette, transparency=1))[:, 0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, "JPEG", quality=95, subsampling=0, exif=exif)
    wanted = decode(encoded(RGB, "JPEG", quality=95, subsampling=0))
    undone = {2: (2,), 3: (1, 2), 4: (1,)}
    if orientation in undone:
        wanted = wanted.flip(undone[orientation])
    elif orientation >= 5:
        wanted = wanted.transpose(1, 2).flip({5: (), 6: (2,), 7: (1, 2), 8: (1,)}[orientation])
    assert torch.equal(decode(data), wanted)
    png = encoded(RGB, "PNG", exif=exif)
    assert difference(decode(png), wanted) < 3
    box = (3, 5, 20, 17)
    cropped = EncodedImage(data).crop(box, (20, 17))
    assert torch.equal(cropped, wanted[:, 3:23, 5:22])


def test_many_channels(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (5, 12, 10), dtype=np.uint8)
    wanted = torch.from_numpy(bands)
    for name, array in {"first": bands, "last": bands.transpose(1, 2, 0)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert torch.equal(decode(tmp_path / f"{name}.npy", 5), wanted)
    np.save(tmp_path / "float.npy", bands.transpose(1, 2, 0) / np.float32(255))
    assert torch.equal(decode(tmp_path / "float.npy", 5), wanted)
    np.save(tmp_path / "deep.npy", bands.astype(">u2") << 8)
    assert torch.equal(decode(tmp_path / "deep.npy", 5), wanted)
    pages = [Image.fromarray(band) for band in bands]
    assert torch.equal(decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), 5), wanted)
    assert torch.equal(decode(encoded(Image.fromarray(bands[:4].transpose(1, 2, 0), "RGBA")), 4), wanted[:4])
    with pytest.raises(BadImage, match="5 channels, not 3"):
        decode(tmp_path / "first.npy")


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "really.jpg").write_bytes(encoded(RGB))
    assert torch.equal(decode(tmp_path / "really.jpg"), TENSOR)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "no image"),
        (encoded(RGB, "JPEG")[:600], "cut off"),
        (encoded(RGB, "PNG")[:2000], "cut off"),
        (encoded(RGB, "JPEG")[:40], "cut off|no image"),
        (b"\x93NUMPY" + bytes(20), ""),
        (b"II*\0" + bytes(30), ""),
    ],
)
def test_bad_bytes(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(data)
    with pytest.raises(BadImage, match=rf"cat\.jpg: .*({reason})") as caught:
        decode(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"dog\.jpg"):
        decode(tmp_path / "dog.jpg")


def test_too_large_is_refused_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(BadImage, match="pixels"):
        decode(b"\x89PNG\r\n\x1a\n" + chunk + encoded(RGB)[33:])
    jpeg = bytearray(encoded(RGB, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 40_000, 40_000)
    with pytest.raises(BadImage, match="40000x40000"):
        decode(bytes(jpeg))


def test_large_below_the_limit_comes_without_a_warning() -> None:
    buffer = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), 1).shape == (1, 10_000, 10_000)  # warnings are errors here


def test_too_thin_is_refused_before_it_is_resized() -> None:
    with pytest.raises(BadImage, match="1000000x1: too long and thin"):
        Preprocess()(Image.new("RGB", (1_000_000, 1)))


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_crop_is_the_full_images(subsampling: int, progressive: bool) -> None:
    data = encoded(smooth(333, 410), "JPEG", quality=92, subsampling=subsampling, progressive=progressive)
    full = decode(data)
    for box in [(0, 0, 333, 410), (31, 17, 100, 120), (200, 100, 133, 310), (0, 0, 40, 60), (332, 409, 1, 1)]:
        top, left, height, width = box
        # At its own size the crop must not differ by a bit, though rows below it were never decoded.
        wanted = full[:, top : top + height, left : left + width]
        assert torch.equal(EncodedImage(data).crop(box, (height, width)), wanted)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_crop_of_a_scaled_image(scale: int) -> None:
    data = encoded(smooth(640, 800), "JPEG", quality=95, subsampling=0)
    box = (64, 32, 40 * scale, 48 * scale)
    full = decode(data)[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    wanted = V.resize(full, [40, 48], interpolation=V.InterpolationMode.BICUBIC, antialias=True)
    assert difference(EncodedImage(data).crop(box, (40, 48)), wanted) < 2
    smaller = decode(data, at_least=(640 // scale, 700 // scale))
    assert smaller.shape == (3, 640 // scale, 800 // scale)
    assert decode(data, at_least=(640 // scale + 1, 10)).shape[1] > 640 // scale


def test_preprocess_is_torchvisions() -> None:
    image = Image.fromarray(smooth(50, 70))
    ours = Preprocess((32, 32), crop_fraction=0.875, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    resized = V.resize(V.pil_to_tensor(image), [36], interpolation=V.InterpolationMode.BICUBIC, antialias=True)
    cropped = V.center_crop(resized, [32, 32])
    wanted = V.normalize(V.to_dtype(cropped, torch.float32, scale=True), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert torch.allclose(ours(image), wanted, atol=1e-5)
    assert torch.allclose(ours(torch.from_numpy(smooth(50, 70)).permute(2, 0, 1)), wanted, atol=1e-5)


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (7, 7), (1, 90)])
@pytest.mark.parametrize("how", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_preprocess_gives_the_size(size: tuple[int, int], how: str, interpolation: str) -> None:
    ours = Preprocess((16, 24), resize=how, crop_fraction=0.9, interpolation=interpolation)  # type: ignore[arg-type]
    assert ours(Image.fromarray(smooth(*size))).shape == (3, 16, 24)
    assert ours.prepare(torch.zeros(5, 3, *size, dtype=torch.uint8)).shape == (5, 3, 16, 24)


def test_preprocess_tensors_and_channels() -> None:
    ours = Preprocess((40, 56))
    grey = Preprocess((40, 56), channels=1)
    assert torch.equal(ours.prepare(TENSOR.float() / 255), TENSOR)
    assert torch.equal(ours.prepare(TENSOR.to(torch.int32).to(torch.uint16) * 256), TENSOR)
    assert torch.equal(ours.prepare(TENSOR[:1]), TENSOR[:1].expand(3, -1, -1))
    assert grey(TENSOR).shape == (1, 40, 56)
    with pytest.raises(UserError, match="5 channels, not 3"):
        ours(torch.zeros(5, 8, 8))
    assert ours.normalise(torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2))[0, 0].tolist() == [-1, 1]


def test_preprocess_travels_as_plain_data() -> None:
    import json

    ours = Preprocess((16, 24), "squash", channels=4)
    assert Preprocess.from_dict(json.loads(json.dumps(ours.as_dict()))) == ours
    with pytest.raises(UserError, match="colour"):
        Preprocess.from_dict({"colour": 3})
    with pytest.raises(ValueError, match="one per channel"):
        Preprocess(mean=(0.5,))
