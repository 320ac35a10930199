"""Read TIFFs by their tags: any number of bands of 8 to 64 bits, integers or floats, in strips or tiles.

Pillow reads plain grey and colour. In other TIFFs it drops bands, or uses near infrared as transparency. Here the tags
decide. The data are still decompressed by Pillow's libtiff: each plane is passed to it as a grey image whose pixels are
the plane's bytes, which works for every lossless compression of bytes.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import TiffImagePlugin

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""the first bytes of a TIFF; the last two are BigTIFF"""
MAX_PAGES = 4096
MAX_BYTES = 2 << 30
"""limit of decompressed samples: a small file can declare a size that fills the memory"""

GREY = (0, 1)
RGB = 2
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}
"""samples per pixel, without extra ones, of each photometric interpretation (white is zero, black is zero, RGB,
palette, mask, CMYK, YCbCr, Lab)"""
JPEG = 7
PACKED = {1, 5, 8, JPEG, 32773, 32946, 34925, 50000}
"""compressions that are read: none, LZW, deflate (two numbers), JPEG, PackBits, LZMA and Zstandard"""
PREDICTED = {5, 8, 32946, 34925, 50000}
"""compressions that use a predictor tag"""
UNREADABLE = "save it with 8, 16 or 32 bits per band, uncompressed or with deflate, LZW or Zstandard, or as .npy"


@dataclass(frozen=True)
class Page:
    """The tags of one image in a TIFF."""

    width: int
    height: int
    bands: int
    """samples per pixel"""
    bits: tuple[int, ...]
    """of each band"""
    formats: tuple[int, ...]
    """of each band: 1 unsigned, 2 signed, 3 float, 4 unknown, 5 and 6 complex"""
    photometric: int
    extra: tuple[int, ...]
    """of each band beyond the colours: 0 unspecified, 1 premultiplied alpha, 2 alpha; shorter where tags are missing"""
    planar: bool
    """whether each band is stored separately"""
    compression: int
    predictor: int
    fill: int
    """order of the bits in a byte, for libtiff"""
    order: str
    """byte order: < or >"""
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    """offsets and compressed sizes of the strips or tiles in bytes"""
    rows: int
    """of a strip, or of a tile"""
    tile: int | None
    """width of a tile; None for strips"""
    tables: bytes | None
    """JPEG tables that the strips or tiles share"""
    nodata: float | None
    """the value of pixels without data, from GDAL's tag"""
    orientation: int
    reduced: bool
    """whether it is a smaller copy of another page, or a mask"""

    @property
    def colours(self) -> int:
        """The number of colour bands; the others are extra."""
        return min(COLOURS.get(self.photometric, 1), self.bands)

    @property
    def plain(self) -> bool:
        """Whether Pillow reads it completely: grey, RGB, a palette, CMYK, YCbCr or Lab of at most 8 bits."""
        if self.bands != self.colours or set(self.formats) != {1}:
            return False
        deepest = 16 if self.photometric == 5 else 8
        return max(self.bits) <= deepest

    @property
    def sparse(self) -> bool:
        """Whether strips or tiles are missing, as GDAL may omit those without data."""
        return 0 in self.starts or 0 in self.sizes

    @property
    def declares_alpha(self) -> bool:
        """Whether it is grey or RGB with a last band declared as transparency."""
        return self.bands == self.colours + 1 and self.photometric in (*GREY, RGB) and self.extra[:1] in ((1,), (2,))

    @property
    def premultiplied(self) -> bool:
        """Whether the stored colours are already multiplied by the declared transparency."""
        return self.declares_alpha and self.extra[0] == 1

    def dtype(self) -> np.dtype[Any]:
        """The type of a sample, as stored. Raises ValueError for unsupported types."""
        if len(set(self.bits)) > 1 or len(set(self.formats)) > 1:
            raise ValueError(f"its bands have different types ({self.bits} bits): {UNREADABLE}")
        bits, kind = self.bits[0], self.formats[0]
        if kind in (5, 6):
            raise ValueError(f"its values are complex: save their magnitude, with {UNREADABLE.split(' with ')[1]}")
        if bits not in ((16, 32, 64) if kind == 3 else (8, 16, 32, 64)) or kind not in (1, 2, 3, 4):
            raise ValueError(f"a TIFF of {bits} bits per band is not read: {UNREADABLE}")
        return np.dtype(f"{self.order}{'f' if kind == 3 else 'i' if kind == 2 else 'u'}{bits // 8}")


def pages(data: bytes) -> list[Page]:
    """The images of a TIFF. Raises ValueError for invalid tags."""
    # Pillow detects BigTIFF by the third byte alone, but in big-endian files it is the fourth.
    big = b"+" in data[2:4]
    header = b"II+\0" + data[4:16] if big else data[:8]
    tags = TiffImagePlugin.ImageFileDirectory_v2(header, prefix=data[:2])
    file = io.BytesIO(data)
    found: list[Page] = []
    seen: set[int] = set()
    blocks = 0  # each needs two bytes or more, unless many pages share one list in order to fill the memory
    while tags.next and tags.next not in seen and len(found) < MAX_PAGES and 2 * blocks <= len(data):
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        try:
            found.append(_page(tags))
        except (ValueError, TypeError):
            if not found:
                raise
            break  # an invalid page after the first is not needed
        blocks += len(found[-1].starts)
    if not found:
        raise ValueError("the file is cut off")
    return found


def _page(tags: TiffImagePlugin.ImageFileDirectory_v2) -> Page:
    def numbers(tag: int, empty: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = tags.get(tag)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(isinstance(number, int) for number in values):
            raise ValueError(f"its tag {tag} is not an integer")
        return values or empty

    def number(tag: int, empty: int) -> int:
        return numbers(tag, (empty,))[0]

    if 256 not in tags or 257 not in tags:
        raise ValueError("the file is cut off")
    width, height, bands = number(256, 0), number(257, 0), number(277, 1)
    if width < 1 or height < 1 or not 1 <= bands <= MAX_PAGES:
        raise ValueError(f"it declares {width}x{height} pixels of {bands} bands")
    bits, formats = numbers(258, (1,)), numbers(339, (1,))
    photometric = number(262, RGB if bands == 3 else 1)
    if number(259, 1) == 6:  # old JPEG, which Pillow reads
        photometric, bands = 6, 3
    tiled = 324 in tags
    tables = tags.get(347)
    return Page(
        width=width,
        height=height,
        bands=bands,
        bits=_each(bits, bands),
        formats=_each(formats, bands),
        photometric=photometric,
        extra=numbers(338),
        planar=number(284, 1) == 2 and bands > 1,
        compression=number(259, 1),
        predictor=number(317, 1),
        fill=number(266, 1),
        order="<" if tags.prefix == b"II" else ">",
        starts=numbers(324 if tiled else 273),
        sizes=numbers(325 if tiled else 279),
        rows=number(323, 0) if tiled else min(number(278, height), height),
        tile=number(322, 0) if tiled else None,
        tables=tables if isinstance(tables, bytes) else None,
        nodata=_float(tags.get(42113)),
        orientation=number(274, 1),
        reduced=bool(number(254, 0) & 5) or photometric == 4,
    )


def _each(values: tuple[int, ...], bands: int) -> tuple[int, ...]:
    """One value per band: some writers store a single one for all."""
    return values[:bands] if len(values) >= bands else values[:1] * bands


def _float(text: object) -> float | None:
    try:
        return float(text.strip("\0 ")) if isinstance(text, str) else None
    except ValueError:
        return None


def read(data: bytes, page: Page) -> np.ndarray:
    """The samples of a page, [H, W, bands], in the machine's byte order; not rotated by the orientation tag.

    White is the highest value, and pixels without data are 0. Raises ValueError, with the reason, if unsupported.
    """
    dtype = page.dtype()
    if page.photometric not in (*GREY, RGB):
        raise ValueError(f"a TIFF of this colour (photometric interpretation {page.photometric}) is not read: save RGB")
    if page.compression not in PACKED or (page.compression == JPEG and dtype.itemsize > 1):
        raise ValueError(f"a TIFF of compression {page.compression} is not read: {UNREADABLE}")
    across, down = -(-page.width // (page.tile or page.width)) if page.tile != 0 else 0, page.rows
    if not across or not down:
        raise ValueError("the size of its strips or tiles is 0")
    width = page.tile * across if page.tile else page.width
    height = -(-page.height // down) * down if page.tile else page.height
    if width * height * page.bands * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"it declares more than {MAX_BYTES >> 20:,} MB of samples, the limit")
    planes, bands = (page.bands, 1) if page.planar else (1, page.bands)
    each = across * -(-page.height // down)
    if len(page.starts) != each * planes or len(page.sizes) not in (0, each * planes):
        raise ValueError("the file is cut off")
    found = []
    for plane in range(planes):
        blocks = slice(plane * each, (plane + 1) * each)
        raw = _unpack(data, page, blocks, width, height, bands, dtype.itemsize)
        raw = raw.reshape(height * across, -1)
        predictor = page.predictor if page.compression in PREDICTED else 1
        samples = _undo(raw, predictor, bands, dtype)
        found.append(samples.reshape(height, width, bands)[: page.height, : page.width])
    samples = found[0] if planes == 1 else np.concatenate(found, axis=-1)
    return _without_nodata(_white_is_high(samples.astype(dtype.newbyteorder("="), copy=False), page), page.nodata)


def _unpack(
    data: bytes, page: Page, blocks: slice, width: int, height: int, bands: int, itemsize: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decompress some strips or tiles with Pillow's libtiff: bytes [height, width * bands * itemsize]."""
    jpeg = page.compression == JPEG and bands > 1
    if jpeg and bands > 4:
        raise ValueError(f"a JPEG of {bands} bands is not read: {UNREADABLE}")
    # JPEG compresses pixels, not bytes. 4 samples are declared as CMYK, so that libtiff does not convert them.
    photometric, extra = {2: (1, (2,)), 3: (RGB, ()), 4: (5, ())}[bands] if jpeg else (1, ())
    samples, stretch = (bands, 1) if jpeg else (1, bands * itemsize)
    entries: dict[int, tuple[int, ...] | bytes] = {
        256: (width * stretch,),
        257: (height,),
        258: (8,) * samples,
        259: (page.compression,),
        262: (photometric,),
        266: (page.fill,),
        277: (samples,),
        284: (1,),
    }
    starts, sizes = page.starts[blocks], page.sizes[blocks]
    if page.tile:
        entries |= {322: (page.tile * stretch,), 323: (page.rows,), 324: starts, 325: sizes}
    else:
        entries |= {273: starts, 278: (page.rows,), 279: sizes}
    if extra:
        entries[338] = extra
    if page.tables is not None:
        entries[347] = page.tables
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_with_directory(data, entries))) as image:
        unpacked = np.array(image)
    return unpacked.reshape(height, width * bands * itemsize)


def _with_directory(data: bytes, entries: dict[int, tuple[int, ...] | bytes]) -> bytes:
    """The same file with another directory of tags, appended at its end."""
    if len(data) >= 1 << 32 or any(value >= 1 << 32 for values in entries.values() for value in values):
        raise ValueError("a file of 4 GB or more is not read: save the image as .npy, or as several images")
    body, place = bytearray(data), len(data) + len(data) % 2
    body += bytes(place - len(data))
    rows, beyond = b"", b""
    after = place + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        kind, packed = (7, values) if isinstance(values, bytes) else (4, struct.pack(f"<{len(values)}I", *values))
        if len(packed) > 4:
            rows += struct.pack("<HHII", tag, kind, len(values), after + len(beyond))
            beyond += packed + bytes(len(packed) % 2)
        else:
            rows += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    body[:8] = b"II*\0" + struct.pack("<I", place)
    return bytes(body + struct.pack("<H", len(entries)) + rows + bytes(4) + beyond)


def _undo(raw: np.ndarray, predictor: int, bands: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Undo a predictor, which stores differences: from bytes [rows, width * bands * itemsize] to numbers."""
    if predictor == 2:
        whole = raw.view(dtype.str.replace("f", "u").replace("i", "u"))
        whole = whole.reshape(len(raw), -1, bands)
        return np.cumsum(whole, axis=1, dtype=whole.dtype.newbyteorder("=")).view(dtype.newbyteorder("="))
    if predictor == 3:
        if dtype.kind != "f":
            raise ValueError("its predictor is for floats, but its values are integers")
        # A row stores the highest bytes of all numbers, then the next ones, and so on, as differences.
        differences = raw.reshape(len(raw), -1, bands)
        numbers = np.cumsum(differences, axis=1, dtype=np.uint8).reshape(len(raw), dtype.itemsize, -1)
        return np.ascontiguousarray(numbers.transpose(0, 2, 1)).view(f">f{dtype.itemsize}")
    if predictor != 1:
        raise ValueError(f"its predictor {predictor} is unknown: {UNREADABLE}")
    return raw.view(dtype)


def _white_is_high(samples: np.ndarray, page: Page) -> np.ndarray:
    if page.photometric != 0:
        return samples
    if page.bands > 1 or samples.dtype.kind != "u":
        raise ValueError(
            "white is declared as 0 (MinIsWhite), which is valid only for one band of unsigned integers: save RGB"
        )
    return np.iinfo(samples.dtype).max - samples


def _without_nodata(samples: np.ndarray, nodata: float | None) -> np.ndarray:
    """Black where there are no data. 8 and 16 bits stay unchanged: there the value may also be a colour."""
    if nodata is None or samples.dtype in (np.uint8, np.uint16):
        return samples
    return np.where(samples == np.asarray(nodata).astype(samples.dtype), np.zeros((), samples.dtype), samples)
