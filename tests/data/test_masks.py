"""Index masks are read as numbers, follow their images, and say by name what is wrong with them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded
from PIL import Image
from torch import Tensor

from vitrail.data import jpeg
from vitrail.data.affine import Affine, shift, tiles
from vitrail.data.augment import Augment, refuse_spatial, training_affine
from vitrail.data.decode import BadImage
from vitrail.data.mask_files import read_mask
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError


def numbers_in(data: bytes | Path) -> Tensor:
    return torch.from_numpy(read_mask(data, "m").values.astype(np.int32))


CLASSES = [f"class {i}" for i in range(5)]
NUMBERS = np.arange(12, dtype=np.uint8).reshape(3, 4) % 5


def masks_of(*items: bytes | Path | torch.Tensor, void: int = 255, classes: list[str] = CLASSES) -> Masks:
    return Masks(items, [f"{i}.png" for i in range(len(items))], classes, void)


def test_palettes_grey_and_deep_files_are_read_as_numbers(tmp_path: Path) -> None:
    palette = Image.fromarray(NUMBERS).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0] * 128)  # two classes of one colour stay two classes
    wanted = torch.from_numpy(NUMBERS).int()
    for image in (Image.fromarray(NUMBERS), palette):
        assert torch.equal(numbers_in(encoded(image)), wanted)
    deep = NUMBERS.astype(np.uint16) * 300
    assert torch.equal(numbers_in(encoded(Image.fromarray(deep))), wanted * 300)
    path = tmp_path / "mask.tif"
    path.write_bytes(encoded(Image.fromarray(NUMBERS), "TIFF"))
    assert torch.equal(numbers_in(path), wanted)
    ones = encoded(Image.fromarray(NUMBERS > 2))
    assert torch.equal(numbers_in(ones), (wanted > 2).int())


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_any_depth_holds_the_numbers_that_were_written(bits: int) -> None:
    """Pillow reads 3 of 2 bits as 255, and 1 of 4 bits as 17."""
    numbers = np.arange(12).reshape(3, 4) % (1 << bits)
    row = ["".join(f"{number:0{bits}b}" for number in line) for line in numbers]
    packed = b"".join(
        b"\0" + int(line.ljust(-(-len(line) // 8) * 8, "0"), 2).to_bytes(-(-len(line) // 8)) for line in row
    )
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 4, 3, bits, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(packed)),
        (b"IEND", b""),
    ):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    assert numbers_in(file).tolist() == numbers.tolist()
    if bits < 16:
        strips = b"".join(int(line.ljust(-(-len(line) // 8) * 8, "0"), 2).to_bytes(-(-len(line) // 8)) for line in row)
        head = [(256, 4), (257, 3), (258, bits), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 3)]
        head.append((279, len(strips)))
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in head)
        deep = b"II*\0" + struct.pack("<IH", 8, len(head)) + entries + bytes(4) + strips
        assert numbers_in(deep).tolist() == numbers.tolist()


def test_masks_are_upright_as_their_images_are() -> None:
    for held in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = held
        wanted = jpeg.turn(torch.from_numpy(NUMBERS).int(), held)
        assert torch.equal(numbers_in(encoded(NUMBERS, exif=exif)), wanted)


@pytest.mark.parametrize(
    "data, reason",
    [
        (encoded(np.stack([NUMBERS] * 3, -1)), "one whole number per pixel.*this is RGB"),
        (encoded(np.stack([NUMBERS] * 2, -1)), "one whole number per pixel.*this is LA"),
        (encoded(NUMBERS, "JPEG"), "lossless format such as PNG; JPEG changes"),
        (encoded(NUMBERS)[:50], "cut off"),
        (b"no image", "no image in a lossless"),
        (b"", "no image in a lossless"),
        (Path("/nowhere/mask.png"), "No such file"),
        (encoded(NUMBERS + 1), "the number 5, but there are 5 classes, from 0, and void is 255"),
        (torch.tensor([[0, -1]]), "the number -1, but there are 5 classes"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(data: bytes | Path | torch.Tensor, reason: str) -> None:
    with pytest.raises(BadImage, match=f"^0.png: .*{reason}") as error:
        masks_of(data).read(0)
    assert "\n" not in str(error.value)


def test_a_mask_follows_its_image_and_is_void_elsewhere() -> None:
    numbers = torch.from_numpy(NUMBERS)
    masks = masks_of(encoded(NUMBERS), numbers)
    affine = Preprocess((6, 8), "squash").affine(torch.tensor([[3, 4]])).then(shift(torch.tensor([[2, 0]])))
    values = [masks.warp(masks.read(i), affine) for i in range(2)]
    batch = masks.collate(values, torch.tensor([0, 1]), True)
    assert list(batch) == ["mask"] and batch["mask"].dtype == torch.int64 and batch["mask"].shape == (2, 6, 8)
    twice = numbers.long().repeat_interleave(2, 0).repeat_interleave(2, 1)
    for mask in batch["mask"]:
        assert (mask[:2] == 255).all() and torch.equal(mask[2:], twice[:4])
    frames = tiles((3, 4), (3, 3))
    assert masks.warp(masks.read(0), frames).shape == (2, 3, 3)


def test_another_size_than_the_images_is_refused_by_name() -> None:
    masks, affine = masks_of(encoded(NUMBERS)), Preprocess((6, 8)).affine(torch.tensor([[4, 3]]))
    with pytest.raises(BadImage, match=r"^0.png: the mask is 4x3 pixels, its image 3x4 \(upright\)"):
        masks.warp(masks.read(0), affine)


@pytest.mark.parametrize("void, classes", [(-1, 5), (65_535, 5), (255, 5), (300, 300), (999, 300)])
def test_any_number_may_be_void(void: int, classes: int) -> None:
    numbers = torch.tensor([[0, void], [classes - 1, 1]])
    masks = masks_of(numbers, void=void, classes=[str(i) for i in range(classes)])
    beyond = Affine.crop(torch.tensor([[0.0, 0, 3, 3]]), torch.tensor([[2, 2]]), (3, 3))
    mask = masks.collate([masks.warp(masks.read(0), beyond)], torch.tensor([0]), True)["mask"][0]
    assert mask.tolist() == [[0, void, void], [classes - 1, 1, void], [void] * 3]


def test_void_is_no_class() -> None:
    with pytest.raises(UserError, match="void is 3, the number of the class class 3"):
        masks_of(void=3)


def test_subsets_and_marks() -> None:
    numbers = torch.arange(3)[:, None, None].expand(-1, 2, 2)
    masks = Masks(numbers, ["a", "b", "c"], CLASSES)
    some = masks.subset(torch.tensor([2, 0]))
    assert len(some) == 2 and some.read(0).indices.unique().tolist() == [2] and some.names == ["c", "a"]
    both = some.joined(masks)
    assert [int(both.read(i).indices[0, 0]) for i in range(len(both))] == [2, 0, 0, 1, 2]
    assert masks.strata().tolist() == [0, 0, 0]
    files = masks_of(Path("a"), Path("b"))
    assert len({m.fingerprint() for m in (masks, some, both, Masks(numbers, ["a", "b", "c"], CLASSES, 9), files)}) == 5
    assert files.fingerprint() == masks_of(Path("a"), Path("b")).fingerprint()


def test_rescale_takes_the_nearest() -> None:
    masks, mask = masks_of(), torch.tensor([[[0, 1, 2, 3], [4, 0, 1, 255]]])
    assert masks.rescale({"mask": mask}, (1, 2))["mask"].tolist() == [[[0, 255]]]
    assert masks.rescale({"mask": mask}, (2, 8))["mask"][0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert masks.rescale({"mask": mask, "x": 1}, (2, 4))["x"] == 1


def test_mixing_is_refused() -> None:
    with pytest.raises(UserError, match="masks cannot follow mixup or cutmix.*--mixup 0"):
        masks_of().mix({"mask": torch.zeros(2, 2, 2)}, torch.tensor([1, 0]), torch.ones(2))


def test_policies_that_move_pixels_are_refused_for_spatial_targets() -> None:
    way, one = Preprocess((8, 8)), torch.tensor([[9, 9]])
    for policy in ("randaugment", "trivial"):
        with pytest.raises(UserError, match=f"^masks cannot follow the policy {policy}.*ShearX.*Rotate.*--policy none"):
            refuse_spatial(Augment(policy=policy), "masks")
        with pytest.raises(UserError, match="no affine map describes"):
            training_affine(Augment(policy=policy), way, 0, 0, torch.tensor([0]), one)
    with pytest.raises(UserError, match=r"^boxes cannot follow mixup.*--mixup 0"):
        refuse_spatial(Augment(mixup=0.2), "boxes")
    with pytest.raises(UserError, match=r"^boxes cannot follow cutmix.*--cutmix 0"):
        refuse_spatial(Augment(cutmix=1.0), "boxes")
    refuse_spatial(Augment(crop="resized", flip=True, policy="three", erase=0.2), "masks")
