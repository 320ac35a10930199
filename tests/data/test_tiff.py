"""TIFFs come in by what their tags declare, whatever their layout; what is not read gets one line."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, smooth, tiff
from PIL import Image

from vitrail.data import tiff as reader
from vitrail.data.decode import BadImage, decode
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import open_data
from vitrail.errors import UserError

DRAW = np.random.default_rng(0)
BANDS = DRAW.integers(0, 256, (37, 53, 5), dtype=np.uint8)
WANTED = torch.from_numpy(BANDS).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["u1", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True), (">", True)])
def test_samples_are_those_that_were_written(
    kind: str, tile: tuple[int, int] | None, planar: bool, order: str, big: bool
) -> None:
    samples = (DRAW.normal(0, 1e4, (37, 53, 5)) if kind[0] == "f" else DRAW.integers(0, 1 << 16, (37, 53, 5))).astype(
        kind
    )
    layout = {"planar": planar, "tile": tile, "order": order, "big": big}
    predictors = (1, 3) if kind[0] == "f" else (1, 2)
    for packed, predictor in ((False, 1), *((True, predictor) for predictor in predictors)):
        data = tiff(samples, packed=packed, predictor=predictor, **layout)  # type: ignore[arg-type]
        read = reader.read(data, reader.pages(data)[0])
        assert read.dtype == samples.dtype and np.array_equal(read, samples)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma"])
def test_every_compression_that_keeps_bytes(compression: str) -> None:
    """Pillow writes 16-bit grey with them all."""
    deep = DRAW.integers(0, 1 << 16, (37, 53), dtype=np.uint16)
    try:
        data = encoded(deep, "TIFF", compression=compression)
    except OSError:
        pytest.skip(f"this build of Pillow has no {compression}")
    assert np.array_equal(reader.read(data, reader.pages(data)[0])[..., 0], deep)
    assert torch.equal(decode(data, 1)[0], torch.from_numpy((deep >> 8).astype(np.uint8)))


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
def test_bands_are_channels(bands: int) -> None:
    for photometric in (1, 2) if bands > 2 else (1,):
        for planar in (False, True):
            data = tiff(BANDS[..., :bands], photometric, (0,) * (bands - (3 if photometric == 2 else 1)), planar=planar)
            assert torch.equal(decode(data, bands), WANTED[:bands])
            deep = tiff(BANDS[..., :bands].astype(np.uint16) * 256 + 7, photometric, planar=planar)
            assert torch.equal(decode(deep, bands), WANTED[:bands])
    if bands not in (1, 3):
        with pytest.raises(BadImage, match=f"it has {bands} channels, not 3"):
            decode(tiff(BANDS[..., :bands], 1))


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("deep", [False, True])
def test_a_mask_lies_on_white_and_other_bands_are_refused(colours: int, extra: int, deep: bool) -> None:
    samples = np.full((6, 8, colours + 1), 100, np.uint8)
    samples[..., -1] = np.where(np.arange(8) < 2, 0, 255)
    kind = np.uint16 if deep else np.uint8
    stored = samples.astype(kind) * (257 if deep else 1)
    image = decode(tiff(stored, 2 if colours == 3 else 1, (extra,)))
    assert image[:, 0].tolist() == [[255] * 2 + [100] * 6] * 3
    stored[..., -1] = stored[..., 0]
    with pytest.raises(BadImage, match=f"last of its {colours + 1} bands is declared as transparency and holds many"):
        decode(tiff(stored, 2 if colours == 3 else 1, (extra,)))
    assert decode(tiff(stored, 2 if colours == 3 else 1, (extra,)), colours + 1)[-1].unique().tolist() == [100]


def test_white_is_zero() -> None:
    for samples in (BANDS[..., :1], BANDS[..., :1].astype(np.uint16) << 8):
        highest = np.iinfo(samples.dtype).max
        assert torch.equal(decode(tiff(highest - samples, 0), 1), WANTED[:1])
    with pytest.raises(BadImage, match="MinIsWhite"):
        decode(tiff(BANDS, 0), 5)


def test_turned_by_the_tag() -> None:
    data = tiff(BANDS, more={274: [6]})
    assert torch.equal(decode(data, 5), WANTED.transpose(1, 2).flip(2))


def test_no_data_is_black() -> None:
    samples = np.array([[-9999, 0.25, 1, np.nan]], np.float32)[..., None]
    assert decode(tiff(samples, more={42113: b"-9999\0"}), 1).tolist() == [[[0, 64, 255, 0]]]
    with pytest.raises(BadImage, match="float32 values from -9999 to 1 have no known range"):
        decode(tiff(samples), 1)


def test_colours_are_pillows() -> None:
    image = Image.fromarray(smooth())
    for other in (image, image.convert("CMYK"), image.quantize(20), image.convert("L"), image.convert("1")):
        wanted = torch.from_numpy(np.array(other.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(decode(encoded(other, "TIFF")), wanted)
    with pytest.raises(BadImage, match="it has 3 channels, not 4"):
        decode(encoded(image.convert("CMYK"), "TIFF"), 4)


@pytest.mark.parametrize(
    "data, reason",
    [
        (tiff(BANDS.astype(np.complex64)), "complex"),
        (tiff(BANDS, more={258: [8, 8, 8, 8, 16]}), "different types"),
        (tiff(BANDS, more={258: [12] * 5}), "12 bits per band"),
        (tiff(BANDS, more={259: [34887]}), "compression 34887"),
        (tiff(BANDS, 5), "photometric interpretation 5"),
        (tiff(BANDS, more={256: [1 << 30]}), "pixels"),
        (tiff(BANDS[..., :1].repeat(900, -1).astype("f8"), more={256: [13_000], 257: [13_000]}), "MB of samples"),
        (tiff(BANDS)[:4000], "cut off"),
        (tiff(BANDS, more={273: [0, 8, 16, 24, 32, 40]}), "sparse"),
        (tiff(BANDS, packed=True, more={273: [1 << 20] * 6}), "bands.tif: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_gets_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data, 5, name="bands.tif")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("bands.tif: ")


def test_images_opened_by_pil_are_not_misread() -> None:
    """PIL drops an unspecified fourth band and takes one declared to be transparency for that."""
    samples = BANDS[..., :4].copy()
    for extra in (0, 2):
        data = tiff(samples, 2, (extra,))
        four = Preprocess((37, 53), channels=4)
        assert torch.equal(four.prepare(Image.open(io.BytesIO(data))), WANTED[:4])
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        for opened in (loaded, Image.open(io.BytesIO(data))):
            with pytest.raises(UserError, match=r"(the file has|last of its|it has) 4 (bands|channels)"):
                Preprocess((37, 53)).prepare(opened)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("scale", [1, 257])
def test_premultiplied_colours_are_not_multiplied_again(colours: int, planar: bool, scale: int) -> None:
    stored = np.full((6, 8, colours + 1), 255, np.uint16)
    stored[0, 0] = [*[119, 96, 43][:colours], 128]
    stored[0, 1] = 0
    samples = (stored * scale).astype(np.uint16 if scale > 1 else np.uint8)
    data = tiff(samples, 2 if colours == 3 else 1, (1,), planar=planar)
    image = decode(data, colours)
    assert image[:, 0, 0].tolist() == [246, 223, 170][:colours] and image[:, 0, 1:].unique().tolist() == [255]
    bands = decode(data, colours + 1)
    assert bands[:, 0, 0].tolist() == stored[0, 0].tolist()
    if not planar and colours == 3:  # grey ones are not loaded by every release of Pillow
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        assert torch.equal(Preprocess((6, 8), channels=colours).prepare(loaded), image)
        with pytest.raises(UserError):
            Preprocess((6, 8), channels=colours + 1).prepare(loaded)


def test_a_band_of_zeros_is_no_mask() -> None:
    samples = BANDS[..., :4].copy()
    samples[..., 3] = 0
    data = tiff(samples, 2, (2,))
    with pytest.raises(BadImage, match="is 0 everywhere, which would hide the image: use a model of 4 channels"):
        decode(data)
    assert torch.equal(decode(data, 4)[:3], WANTED[:3])


def test_a_band_that_is_left_out_as_a_mask_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Near infrared may be 0 in one class and 255 in another: the set decides, and never in silence."""
    for name, infrared in {"water": [255, 255, 255], "wood": [255, 255, 0]}.items():
        (tmp_path / name).mkdir()
        for i, value in enumerate(infrared):
            samples = BANDS[..., :4].copy()
            samples[..., 3] = value
            (tmp_path / name / f"{i}.tif").write_bytes(tiff(samples, 2, (2,)))
    assert open_data(tmp_path).train.channels == 4 and not caplog.records
    (tmp_path / "wood" / "2.tif").unlink()
    assert open_data(tmp_path).train.channels == 3
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the last band of water/0.tif (4 bands) and 4 more of 5 images is used as transparency" in line
    assert "to keep it as a channel" in line
