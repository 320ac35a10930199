"""An affine says where pixels come from, on their real paths in training and evaluation, and on the way back."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encoded, smooth
from PIL import Image
from shapes import Scene, apart, around, iou, red, scene
from torch import Tensor

from vitrail.data.affine import Affine, flip, rotate, shift, tiles
from vitrail.data.augment import Augment, training_affine
from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess, Resize
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Labels
from vitrail.errors import UserError

VOID = 255
SIDES = st.integers(1, 250)
SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))
FITS: list[tuple[Resize, float]] = [
    *(("crop", fraction) for fraction in (1.0, 0.875, 0.9, 0.5, 0.333)),
    *(("squash", fraction) for fraction in (1.0, 0.875, 0.9, 0.5, 0.333)),
    ("letterbox", 1.0),
    ("letterbox", 1.0),
]
WAYS = st.builds(
    lambda size, fit: Preprocess(size, fit[0], fit[1], "nearest", channels=2), SIZES, st.sampled_from(FITS)
)
AUGMENTS = st.sampled_from(
    [
        Augment(),
        Augment(flip=True),
        Augment(crop="shift", shift=3),
        Augment(crop="shift", shift=70, flip=True),
        Augment(crop="resized"),
        Augment(crop="resized", scale=(0.01, 0.2), flip=True),
        Augment(crop="jitter"),
        Augment(crop="jitter", jitter=(0.05, 9.0), flip=True),
    ]
)


@st.composite
def some_affines(draw: st.DrawFn, images: int = 3) -> Affine:
    """Boxes inside images and beyond them, then moved, flipped and rotated."""
    sources = torch.tensor([[draw(st.integers(1, 9000)), draw(st.integers(1, 9000))] for _ in range(images)])
    numbers = torch.tensor([[draw(st.floats(-0.5, 1.5)) for _ in range(2)] for _ in range(images)])
    shares = torch.tensor([[draw(st.floats(0.01, 2.0)) for _ in range(2)] for _ in range(images)])
    boxes = torch.cat([numbers * sources, shares * sources], dim=1)
    size = draw(SIZES)
    moves = torch.tensor([[draw(st.integers(-9, 9)) for _ in range(2)] for _ in range(images)])
    flips = torch.tensor([draw(st.booleans()) for _ in range(images)])
    turned = rotate(torch.tensor([draw(st.floats(-180, 180)) for _ in range(images)]), size)
    return Affine.crop(boxes, sources, size).then(shift(moves)).then(flip(flips, size[1])).then(turned)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(some_affines(), st.lists(st.floats(-100, 10_000), min_size=6, max_size=6))
def test_an_affine_and_its_inverse(affine: Affine, numbers: list[float]) -> None:
    xy = torch.tensor(numbers, dtype=torch.float64).view(3, 2)
    for frame in range(3):
        assert torch.allclose(affine.points_back(affine.points(xy, frame), frame), xy, atol=1e-5)
        assert torch.allclose(affine.points(affine.points_back(xy, frame), frame), xy, atol=1e-5)
    each = torch.arange(3)
    one_by_one = torch.stack([affine.points(xy[i], i) for i in range(3)])
    assert torch.equal(affine.points(xy, each), one_by_one)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(some_affines(), st.floats(-180, 180), st.integers(-20, 20))
def test_composition(affine: Affine, degrees: float, move: int) -> None:
    xy = torch.rand(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1000
    turn, moved = rotate(torch.tensor([degrees]), affine.size)[0], shift(torch.tensor([[move, -3]] * 3))
    together = affine.then(turn).then(moved)
    for frame in range(3):
        after = affine.points(xy, frame) @ turn[:, :2].T + turn[:, 2]
        after = after @ moved[frame, :, :2].T + moved[frame, :, 2]
        assert torch.allclose(together.points(xy, frame), after, atol=1e-6)


def test_a_crop_takes_its_corners_to_the_inputs() -> None:
    affine = Affine.crop(torch.tensor([[10.0, 20, 30, 80]]), torch.tensor([[50, 90]]), (60, 40))
    corners = torch.tensor([[20.0, 10], [100, 40]])
    assert affine.points(corners).tolist() == [[0, 0], [40, 60]]
    assert affine.window.tolist() == [[20, 10, 90, 40]]  # the box ends beyond the image
    flipped = affine.then(flip(torch.tensor([True]), 40))
    assert flipped.points(corners).tolist() == [[40, 0], [0, 60]]
    assert affine.then(shift(torch.tensor([[3, -5]]))).points(corners).tolist() == [[-5, 3], [35, 63]]


def test_joined_affines_keep_their_images_apart() -> None:
    wide, high = tiles((10, 35), (8, 8)), tiles((29, 9), (8, 8))
    joined = Affine.join([wide, high.with_flips()])
    assert joined.images == 2 and len(joined) == len(wide) + 2 * len(high)
    assert joined.frames(0).tolist() == list(range(len(wide)))
    again = joined.subset([1])
    assert torch.equal(again.matrix, high.with_flips().matrix) and again.images == 1
    swapped = joined.subset([1, 0])
    assert torch.equal(swapped.sources[swapped.frames(0)], again.sources)
    assert torch.equal(swapped.window[swapped.frames(1)], wide.window)
    with pytest.raises(ValueError, match="one size"):
        Affine.join([wide, tiles((10, 35), (8, 9))])


def places(height: int, width: int) -> Tensor:
    """uint8 [2, H, W]: each pixel holds its row and column."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(torch.uint8)


def agree(affine: Affine, frame: int, image: Tensor, seen: Tensor) -> None:
    """What the pixels show (each its own row and column, by nearest neighbour) is what the affine says."""
    one = affine.subset([frame])
    rows, columns = (one.masks(channel.int(), -1)[0] for channel in image)
    assert torch.equal(rows < 0, columns < 0)
    valid = rows >= 0
    for wanted, found in ((rows, seen[0]), (columns, seen[1])):
        differs = (wanted - found.int()).abs()[valid]
        # Where a centre falls between two pixels, floats of 32 bits may take the other one.
        assert differs.numel() == 0 or int(differs.max()) <= 1
        assert differs.float().mean() < 0.2 if differs.numel() > 40 else True


@settings(max_examples=80, deadline=None, derandomize=True)
@given(SIDES, SIDES, WAYS)
def test_evaluation_takes_pixels_where_its_affine_says(height: int, width: int, way: Preprocess) -> None:
    image = places(height, width)
    affine = way.affine(torch.tensor([[height, width]]))
    seen = way.prepare(image)
    agree(affine, 0, image, seen)
    void = affine.masks(image[0].int(), -1)[0] < 0
    if way.resize == "letterbox":
        assert bool((seen[:, void] == 128).all()), "the bars have the mean colour"
        rows, columns = way.resized(height, width)
        assert (
            int((~void).sum()) == rows * columns and (rows, columns)[rows < way.size[0]] == way.size[rows < way.size[0]]
        )
        assert bool((affine.back(torch.ones(1, 1, *way.size)).seen == 1).all()), "the whole image is seen"
    else:
        assert not bool(void.any()), "no other evaluation has void"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), WAYS, AUGMENTS, st.integers(0, 99), st.booleans())
def test_training_takes_pixels_where_its_affine_says(
    sides: list[tuple[int, int]], way: Preprocess, augment: Augment, seed: int, memory: bool
) -> None:
    memory = memory and not augment.cuts  # from tables crops are bilinear, and shrunken images are no indices
    images = [places(*size) for size in sides]
    labels = Labels(torch.zeros(len(images)).long(), ["a"])
    dataset = ImageSet("places", [str(size) for size in sides], images, labels, 2)
    loader = Loader(dataset, way, batch_size=len(images), seed=seed, train=True, augment=augment, memory=memory)
    batches = loader.batches()
    for _ in range(2):
        batch = next(batches)
        samples = batch["sample"]
        found = training_affine(augment, way, seed, int(batch["epoch"]), samples, torch.tensor(sides)[samples])
        seen = (batch["image"] * 127.5 + 127.5).round()
        for frame, sample in enumerate(samples.tolist()):
            agree(found, frame, images[sample], seen[frame])


@functools.cache
def scenes(kind: str, size: tuple[int, int] | None) -> tuple[list[Scene], list[bytes]]:
    """Sixteen scenes of many odd sizes, or of one, and their files, stored turned in all ways."""
    sides = np.random.default_rng(7)
    found, files = [], []
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions from upright to what is stored
    for i in range(16):
        height, width = size or (int(side) for side in sides.integers(60, 700, 2))
        found.append(scene(height, width, i, round_shape=i % 2 == 0))
        image, exif = Image.fromarray(found[-1].image), Image.Exif()
        if (held := 1 + i % 8) > 1:
            image, exif[0x0112] = image.transpose(Image.Transpose(stored[held])), held
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
        files.append(encoded(image, kind, exif=exif, **options))
    return found, files


PATHS = {
    # the largest images are twelve times the input, so that JPEGs are decoded at every scale
    "evaluation": ("JPEG", None, None, False),
    "evaluation, PNG": ("PNG", None, None, False),
    "workers' crop": ("JPEG", None, Augment(crop="resized", flip=True), False),
    "workers' crop, small boxes": ("PNG", None, Augment(crop="resized", scale=(0.1, 0.4)), False),
    "crop from images kept smaller": ("PNG", None, Augment(crop="resized", flip=True), True),
    "crop on the device": ("PNG", (45, 37), Augment(crop="resized", scale=(0.5, 1.0), flip=True), True),
    "jitter": ("JPEG", None, Augment(crop="jitter", jitter=(0.6, 2.0), flip=True), False),
    "jitter of images kept smaller": ("PNG", None, Augment(crop="jitter", jitter=(0.6, 1.5)), True),
    "jitter of images of one size": ("PNG", (45, 37), Augment(crop="jitter", jitter=(0.6, 2.0), flip=True), True),
    "rotation": ("JPEG", None, Augment(rotation=30, flip=True), False),
    "rotation in a table": ("PNG", None, Augment(crop="shift", shift=5, rotation=180), True),
    "rotation after a jitter": ("JPEG", None, Augment(crop="jitter", jitter=(0.6, 1.5), rotation=20), False),
    "shift in a table": ("JPEG", None, Augment(crop="shift", shift=9, flip=True), True),
    "shift after the workers": ("JPEG", None, Augment(crop="shift", shift=9, flip=True), False),
}


@pytest.mark.parametrize(
    "way",
    [Preprocess((64, 48), crop_fraction=0.9), Preprocess((48, 64), "squash"), Preprocess((64, 80), "letterbox")],
    ids=lambda way: way.resize,
)
@pytest.mark.parametrize("path", PATHS)
def test_masks_and_boxes_stay_on_the_pixels_that_they_mark(path: str, way: Preprocess) -> None:
    kind, size, augment, memory = PATHS[path]
    marked, files = scenes(kind, size)
    masks = Masks([shape.mask for shape in marked], [str(i) for i in range(16)], ["ground", "shape"], VOID)
    dataset = ImageSet("scenes", [str(i) for i in range(16)], files, masks)
    loader = Loader(dataset, way, batch_size=16, seed=5, train=augment is not None, augment=augment, memory=memory)
    batch = next(loader.batches() if augment else loader.evaluation())
    samples, found = batch["sample"], batch["affine"]
    overlaps, edges, turned = [], [], augment is not None and augment.rotation > 0
    for frame, sample in enumerate(samples.tolist()):
        one, shape = found.subset([frame]), marked[sample]
        # The edges of what is magnified are smooth, and red ends somewhere on them.
        # A rotation interpolates once more.
        reach = max(1, math.ceil(float(one.matrix[0, :, :2].norm(dim=0).max()) / 2)) + turned
        mask = batch["mask"][frame]
        wanted, seen = mask == 1, red(batch["image"][frame]) & (mask != VOID)
        assert not bool(apart(wanted, seen, reach)[mask != VOID].any())
        box, share = one.boxes(shape.box)
        if int(wanted.sum()) >= 60:
            overlaps.append(iou(wanted, seen))
            assert 0 < float(share) <= 1
            # The tips of ellipses are thinner than a pixel, and a rotated box is larger than what is left of it.
            if sample % 2 and (float(share) > 0.999 or not turned):
                edges.append(float((around(seen) - box[0]).abs().max()) / reach)
    assert len(overlaps) >= 8 and sum(overlaps) / len(overlaps) > 0.94
    assert len(edges) >= 3 * (not turned) and max(edges, default=0) < 1.1


def test_void_where_a_shift_reflects() -> None:
    """What the crop cut off has a mask that the shift could bring in, but the image shows its reflection there."""
    affine = Preprocess((20, 20), crop_fraction=0.5).affine(torch.tensor([[40, 60]]))
    whole = torch.ones(40, 60, dtype=torch.uint8)
    moved = affine.then(shift(torch.tensor([[3, -4]]))).masks(whole, VOID)[0]
    wanted = torch.full((20, 20), VOID)
    wanted[3:, :16] = 1
    assert torch.equal(moved.long(), wanted)
    box, share = affine.then(shift(torch.tensor([[3, -4]]))).boxes(torch.tensor([[0.0, 0, 60, 40]]))
    assert box.tolist() == [[0, 3, 16, 20]] and share.item() == pytest.approx(17 * 16 / (40 * 60))


def test_a_letterbox_is_void_beside_its_image() -> None:
    affine = Affine.crop(torch.tensor([[-10.0, 0, 40, 40]]), torch.tensor([[20, 40]]), (20, 20))
    mask = affine.masks(torch.ones(20, 40, dtype=torch.uint8), VOID)[0]
    assert (mask[5:15] == 1).all() and (mask[:5] == VOID).all() and (mask[15:] == VOID).all()
    back = affine.back(torch.ones(1, 2, 5, 5))
    assert back.logits.shape == (2, 20, 40) and bool((back.seen == 1).all())


def test_masks_of_a_batch_and_of_another_size() -> None:
    affine = Preprocess((8, 8)).affine(torch.tensor([[12, 16], [12, 16]]))
    masks = torch.arange(2 * 12 * 16).view(2, 12, 16)
    together = affine.masks(masks, -1)
    assert all(torch.equal(together[i], affine.subset([i]).masks(masks[i], -1)[0]) for i in range(2))
    with pytest.raises(ValueError, match="the mask is 12x16 pixels, its image 16x12"):
        affine.masks(masks.mT, -1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(some_affines(), st.integers(0, 99))
def test_boxes_there_and_back(affine: Affine, seed: int) -> None:
    draw = torch.rand(7, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort(dim=1).values
    height, width = affine.sources[1].tolist()
    boxes = (draw * torch.tensor([width, height])).flatten(1)
    moved, share = affine.boxes(boxes, 1)
    limit = torch.tensor([*affine.size[::-1], *affine.size[::-1]])
    assert bool(((moved >= 0) & (moved <= limit)).all()) and bool(((share >= 0) & (share <= 1 + 1e-9)).all())
    back = affine.boxes_back(moved, 1)
    whole = share > 1 - 1e-9
    # A box around a turned box is wider, never smaller.
    assert bool(
        (back[whole, :2] <= boxes[whole, :2] + 1e-4).all() and (back[whole, 2:] >= boxes[whole, 2:] - 1e-4).all()
    )
    every = affine.boxes_back(moved.expand(3, 7, 4), torch.arange(3)[:, None])
    assert torch.equal(every[1], back)


def test_shares_of_boxes() -> None:
    affine = Affine.crop(torch.tensor([[0.0, 10, 20, 20]]), torch.tensor([[20, 40]]), (40, 40))
    boxes = torch.tensor([[12.0, 2, 16, 6], [5, 0, 15, 10], [30, 0, 40, 10], [0, 0, 5, 5], [-10, 0, 12, 10]])
    moved, share = affine.boxes(boxes)
    assert moved[:2].tolist() == [[4, 4, 12, 12], [0, 0, 10, 20]]
    assert share.tolist() == pytest.approx([1, 0.5, 0, 0, 2 / 12])  # of the last, 12 columns lie in the image
    assert affine.boxes_back(moved[:2]).tolist() == [[12, 2, 16, 6], [10, 0, 15, 10]]
    assert affine.boxes(boxes.bfloat16())[0].dtype == torch.float32
    assert affine.boxes(torch.empty(0, 4))[0].shape == (0, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SIDES, SIDES, SIZES, st.floats(0, 0.8), st.floats(0, 4))
def test_tiles_cover_any_image(height: int, width: int, size: tuple[int, int], overlap: float, scale: float) -> None:
    found = tiles((height, width), size, overlap, scale)
    covered = torch.zeros(height, width)
    whole = torch.tensor([width, height, width, height])
    assert bool((found.window == found.window.round()).all())
    assert bool((found.window >= 0).all()) and bool((found.window <= whole).all())
    for left, top, right, bottom in found.window.long().tolist():
        covered[top:bottom, left:right] += 1
    assert bool((covered > 0).all()) and found.images == 1
    for axis in range(2):
        starts = found.window[:, axis].unique()
        side = float(found.window[0, axis + 2] - found.window[0, axis])
        if len(starts) > 1 and side > 1:
            assert float(starts.diff().max()) <= max(1, side * (1 - overlap)), "neighbours overlap"
    if len(found) > 1 and scale > 0:
        assert float(found.matrix[0, 0, 0]) == pytest.approx(size[1] / round(size[1] / float(found.matrix[0, 0, 0])))


def test_tiles_of_a_scale() -> None:
    assert len(tiles((100, 100), (100, 100))) == 1
    assert len(tiles((100, 400), (50, 50), overlap=0)) == 4
    native = tiles((100, 400), (50, 50), overlap=0, scale=1)
    assert len(native) == 16 and torch.equal(native.matrix[:, 0, 0], torch.ones(16).double())
    assert len(tiles((30, 60), (50, 50), overlap=0, scale=1)) == 2, "no window reaches beyond a small image"
    for wrong in ({"overlap": 1.0}, {"overlap": -0.1}, {"scale": -1.0}, {"scale": math.nan}):
        with pytest.raises(UserError, match="must be"):
            tiles((9, 9), (3, 3), **wrong)


def cut(image: Tensor, affine: Affine) -> Tensor:
    """The frames of an image float [K, H, W], which are whole pixels' windows, resized and flipped: [F, K, h, w]."""
    found = []
    for window, matrix in zip(affine.window.long().tolist(), affine.matrix, strict=True):
        left, top, right, bottom = window
        tile = F.interpolate(image[None, :, top:bottom, left:right], affine.size, mode="bilinear", align_corners=False)[
            0
        ]
        found.append(tile.flip(-1) if float(matrix[0, 0]) < 0 else tile)
    return torch.stack(found)


@pytest.mark.parametrize("height, width", [(64, 64), (71, 133), (133, 50), (40, 300)])
@pytest.mark.parametrize("scale, tolerance", [(1.0, 1e-4), (1.7, 0.02), (0.0, 0.2)])
def test_tiles_and_flips_merge_back(height: int, width: int, scale: float, tolerance: float) -> None:
    """The network is the identity: its logits are the image, and they come back in their places."""
    image = torch.from_numpy(smooth(height, width)).permute(2, 0, 1) / 255
    affine = tiles((height, width), (32, 40), scale=scale).with_flips()
    merged = affine.merge(cut(image, affine))
    assert len(merged) == 1 and merged[0].logits.shape == image.shape
    assert int(merged[0].seen.min()) >= 2, "a tile and its flip"
    inner = (slice(None), slice(1, -1), slice(1, -1))  # beyond the outermost centres there is nothing between
    assert float((merged[0].logits - image)[inner].abs().mean()) < tolerance / 4
    assert float((merged[0].logits - image)[inner].abs().max()) < tolerance


def test_merge_takes_each_images_frames() -> None:
    affine = Affine.join([tiles((20, 30), (10, 10)), tiles((15, 9), (10, 10)).with_flips()])
    logits = (affine.image_of + 1.0)[:, None, None, None].expand(-1, 3, 5, 5)
    merged = affine.merge(logits)
    assert [tuple(dense.logits.shape) for dense in merged] == [(3, 20, 30), (3, 15, 9)]
    assert all(bool(((dense.logits - i - 1).abs() < 1e-6).all()) for i, dense in enumerate(merged))
    with pytest.raises(ValueError, match="frames"):
        affine.merge(logits[1:])


def test_frames_of_an_image_are_averaged() -> None:
    affine = tiles((10, 15), (10, 10), overlap=0.5)
    assert affine.window[:, 0].tolist() == [0, 5]
    logits = torch.tensor([1.0, 3.0])[:, None, None, None].expand(-1, 1, 10, 10).half()
    dense = affine.back(logits)
    assert dense.logits[0, 0].tolist() == pytest.approx([1.0] * 5 + [2.0] * 5 + [3.0] * 5)
    assert dense.seen[0].tolist() == [1] * 5 + [2] * 5 + [1] * 5 and dense.logits.dtype == torch.float32


def test_what_a_centre_crop_leaves_out_is_not_seen() -> None:
    affine = Preprocess((10, 10)).affine(torch.tensor([[20, 60]]))
    dense = affine.back(torch.ones(1, 1, 10, 10))
    assert bool((dense.seen[:, 20:40] == 1).all())
    assert int(dense.seen.sum()) == 20 * 20 and bool(((dense.logits[0] - dense.seen).abs() < 1e-6).all())


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(st.integers(20, 60), st.integers(20, 60)),
    st.integers(1, 40_000),
    st.integers(0, 99),
)
def test_bands_give_the_same_as_the_whole(
    height: int, width: int, size: tuple[int, int], limit: int, seed: int
) -> None:
    affine = tiles((height, width), size).with_flips()
    affine = affine.then(rotate(torch.tensor([seed]), size)) if seed % 2 else affine
    logits = torch.randn(len(affine), 4, 7, 6, generator=torch.Generator().manual_seed(seed))
    whole = affine.back(logits)
    bands = list(affine.bands(logits, limit=limit))
    assert [band.top for band in bands] == [sum(len(b.seen) for b in bands[:i]) for i in range(len(bands))]
    assert all(4 * band.logits.numel() <= max(limit, 4 * 4 * width) for band in bands)
    assert torch.equal(torch.cat([band.seen for band in bands]), whole.seen)
    assert torch.allclose(torch.cat([band.logits for band in bands], dim=1), whole.logits, atol=1e-6)
