"""Each image has its own draw, the same in any batch; the operations are torchvision's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from images import smooth
from torch import Tensor
from torchvision.transforms import v2

from vitrail.data import policies
from vitrail.data.affine import Affine, rotate
from vitrail.data.augment import (
    CROP_DRAWS,
    Augment,
    Augmenter,
    aspect_roots,
    crop_boxes,
    crop_resized,
    erase,
    jitter_boxes,
    rotated,
    shift_flip,
    stream_keys,
)
from vitrail.data.mixing import mix, mix_pairs
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import seed_for, uniform
from vitrail.data.targets import Labels
from vitrail.errors import UserError

EACH = {
    "shift": Augment(crop="shift", shift=3),
    "resized": Augment(crop="resized"),
    "flip": Augment(flip=True),
    "rotation": Augment(rotation=30),
    "randaugment": Augment(policy="randaugment", policy_strength=15),
    "trivial": Augment(policy="trivial"),
    "three": Augment(policy="three"),
    "big-vision": Augment(policy="big-vision", policy_strength=10),
    "inception": Augment(crop="inception", scale=(0.05, 1.0)),
    "erase": Augment(erase=0.7),
    "all": Augment(crop="resized", flip=True, policy="randaugment", erase=0.25),
}

SIXTEEN = Labels(torch.arange(16), [str(i) for i in range(16)])


def inputs(count: int, size: tuple[int, int] = (19, 23), channels: int = 3) -> Tensor:
    """The same image `count` times, so that what differs comes from the draws."""
    image = torch.from_numpy(smooth(*size)).permute(2, 0, 1)
    image = image.repeat(-(-channels // 3), 1, 1)[:channels]
    return image.expand(count, -1, -1, -1).contiguous()


def augmented(images: Tensor, samples: Tensor, seed: int, epoch: int, augment: Augment) -> Tensor:
    height, width = images.shape[-2:]
    keys = stream_keys(seed, epoch).to(images.device)
    return Augmenter(augment, (height, width), images.device)(images, samples.to(images.device), keys)


def turned(images: Tensor, degrees: Tensor, fill: tuple[float, ...] = (policies.FILL,)) -> Tensor:
    height, width = images.shape[-2:]
    return rotated(images, rotate(-degrees, (height, width)).float(), torch.tensor(fill)[:, None, None])


@pytest.mark.parametrize("name", EACH)
def test_batch_sizes_1_and_64_give_the_same_images(name: str) -> None:
    images, samples = inputs(64), torch.arange(100, 164)
    together = augmented(images, samples, 1, 2, EACH[name])
    assert together.dtype == torch.uint8
    for i in range(64):
        one = slice(i, i + 1)
        alone = augmented(images[one], samples[one], 1, 2, EACH[name])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("name", EACH)
def test_two_images_of_a_batch_differ(name: str) -> None:
    made = augmented(inputs(64), torch.arange(64), 0, 0, EACH[name])
    kinds = {image.numpy().tobytes() for image in made}
    assert len(kinds) >= (2 if name == "flip" else 15)
    other = augmented(inputs(64), torch.arange(64), 0, 1, EACH[name])
    assert not torch.equal(made, other)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_channels(name: str, channels: int) -> None:
    images = inputs(8, channels=channels)
    made = augmented(images, torch.arange(8), 0, 0, EACH[name])
    assert made.shape == images.shape


def test_one_augmentation_leaves_the_draws_of_others() -> None:
    images, samples = inputs(16), torch.arange(16)
    flipped = augmented(images, samples, 0, 0, Augment(flip=True))
    both = augmented(images, samples, 0, 0, Augment(flip=True, erase=1.0))
    kept = both != 128
    assert torch.equal(both[kept], flipped[kept])


@given(st.integers(-9, 9), st.integers(-9, 9), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_shift_reflects(down: int, right: int, flip: bool) -> None:
    image = inputs(1, (11, 13))
    moved = shift_flip(image, torch.tensor([[down, right]]), torch.tensor([flip]))
    padded = np.pad(image[0].numpy(), ((0, 0), (9, 9), (9, 9)), mode="reflect")
    wanted = padded[:, 9 - down : 20 - down, 9 - right : 22 - right]
    assert np.array_equal(moved[0].numpy(), wanted[:, :, ::-1] if flip else wanted)


@given(st.integers(0, 10**9), st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_crop_boxes_lie_within(seed: int, height: int, width: int) -> None:
    draws = uniform(seed_for(seed, 0), torch.arange(20), CROP_DRAWS)
    boxes = crop_boxes(
        draws, torch.full((20,), height), torch.full((20,), width), (0.08, 1.0), (32, 48), aspect_roots()
    )
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


def test_crop_boxes_are_spread_as_torchvisions() -> None:
    draws = uniform(seed_for(0, 0), torch.arange(4000), CROP_DRAWS)
    many = torch.ones(4000, dtype=torch.int64)
    ours = crop_boxes(draws, many * 150, many * 200, (0.08, 1.0), (224, 224), aspect_roots()).float()
    torch.manual_seed(0)
    blank = torch.empty(3, 150, 200)
    choose = v2.RandomResizedCrop(224).make_params
    chosen = [choose([blank]) for _ in range(4000)]
    theirs = torch.tensor([[p[side] for side in ("top", "left", "height", "width")] for p in chosen]).float()
    for ours_one, theirs_one in zip(ours.unbind(1), theirs.unbind(1), strict=True):
        for share in (0.1, 0.5, 0.9):
            assert abs(float(ours_one.quantile(share) - theirs_one.quantile(share))) < 6


def test_crop_boxes_lie_on_the_grid_of_their_scale() -> None:
    draws = uniform(seed_for(0, 0), torch.arange(500), CROP_DRAWS)
    many = torch.ones(500, dtype=torch.int64)
    boxes = crop_boxes(draws, many * 2000, many * 3000, (0.08, 1.0), (224, 224), aspect_roots())
    for box in boxes.tolist():
        ratio = min(box[2], box[3]) / 224
        step = max(s for s in (1, 2, 4, 8) if s <= max(ratio, 1))
        assert all(side % step == 0 for side in box)
        assert min(box[2], box[3]) // step >= 224 or step == 1


def test_crop_resized_is_interpolation() -> None:
    image = inputs(2, (30, 40))
    boxes = torch.tensor([[3, 5, 12, 10], [0, 0, 30, 40]])
    made = crop_resized(image, boxes, (30, 40))
    inside = image[:1, :, 3:15, 5:15].float()
    wanted = torch.nn.functional.interpolate(inside, size=(30, 40), mode="bilinear")
    # At the border of the box the neighbours beyond it count too, which a crop that is cut out first has lost.
    assert (made[:1, :, 3:-3, 3:-3] - wanted[:, :, 3:-3, 3:-3]).abs().max() <= 1
    assert torch.equal(made[1], image[1])


@given(
    st.integers(0, 10**9),
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.sampled_from([(0.5, 2.0), (1.0, 1.0), (0.01, 0.02), (3.0, 40.0)]),
    st.sampled_from(["crop", "squash", "letterbox"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_jitter_shows_a_place_of_the_scaled_image_or_all_of_it(
    seed: int, height: int, width: int, jitter: tuple[float, float], resize: Any
) -> None:
    way = Preprocess((32, 48), resize)
    boxes, places = jitter_boxes(
        uniform(seed_for(seed, 0), torch.arange(20), 3), torch.tensor([[height, width]] * 20), jitter, way
    )
    resized = way.resized(height, width)
    for axis, (side, scaled, input_side) in enumerate(zip((height, width), resized, way.size, strict=True)):
        start, length = boxes[:, axis], boxes[:, axis + 2]
        first, shown = places[:, axis], places[:, axis + 2]
        assert (start >= 0).all() and (length >= 1).all() and (start + length <= side).all()
        assert (first >= 0).all() and (shown >= 1).all() and (first + shown <= input_side).all()
        padded = shown < input_side
        assert (length[padded] > side - 8).all() and (start[padded] == 0).all(), "all of it, but for its last pixels"
        assert (padded | (scaled * jitter[1] >= input_side - 0.5)).all() and (
            ~padded | (scaled * jitter[0] < input_side)
        ).all()
        off = 8 / length + 0.5 / shown  # whole pixels of the original and of the input
        scale = shown / length * side / scaled
        assert (scale * (1 + off) >= jitter[0] * (1 - off) - 0.5 / scaled).all()
        assert (scale <= jitter[1] * (1 + off) * (1 + off) + 0.5 / scaled + off * scale).all()


def test_scales_of_a_jitter_are_spread_evenly_between_their_logarithms() -> None:
    sizes = torch.tensor([[4000, 6000]]).expand(4000, -1)
    boxes, places = jitter_boxes(
        uniform(seed_for(1, 2), torch.arange(4000), 3), sizes, (0.5, 2.0), Preprocess((100, 100))
    )
    scale = (places[:, 2] / boxes[:, 2] * 40).log2()
    assert scale.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist() == pytest.approx(
        [-1, -0.5, 0, 0.5, 1], abs=0.05
    )
    large = places[:, 2] == 100
    assert 0.45 < float(large.float().mean()) < 0.55
    along = (boxes[large, 0] / (4000 - boxes[large, 2]).clamp(min=1))[boxes[large, 2] < 3000]
    assert along.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.04)


def test_a_rotation_by_right_angles_moves_whole_pixels() -> None:
    images = inputs(4, (21, 21))
    made = turned(images, torch.tensor([0.0, 90, 180, -90]).double())
    for turns, image in zip((0, -1, 2, 1), made, strict=True):
        assert torch.equal(image, images[0].rot90(turns, (1, 2)))
    corner = turned(inputs(1, (21, 31)), torch.tensor([45.0]), (1.0, 2.0, 3.0))
    assert corner[0, :, 0, 0].tolist() == [1, 2, 3]


@given(st.floats(-180, 180), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_rotation_takes_pixels_where_its_affine_says(degrees: float, height: int, width: int) -> None:
    """Between pixels, rows and columns are interpolated: they are linear."""
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(torch.uint8)
    angles = torch.tensor([degrees], dtype=torch.float64)
    seen = turned(places[None], angles)[0]
    map_ = Affine.crop(torch.tensor([[0, 0, height, width]]), torch.tensor([[height, width]]), (height, width))
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    back = map_.then(rotate(angles, (height, width))).points_back(torch.stack([x, y], dim=-1).double())
    inner = ((back >= 0.5) & (back <= torch.tensor([width, height]) - 0.5)).all(dim=-1)
    for wanted, found in ((back[..., 1] - 0.5, seen[0]), (back[..., 0] - 0.5, seen[1])):
        assert bool(((wanted - found).abs()[inner] < 0.501).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"jitter": (0.0, 1.0)},
        {"jitter": (2.0, 1.0)},
        {"jitter": (1.0, float("inf"))},
        {"rotation": -1},
        {"rotation": 181},
        {"mixup": 2.0},
        {"scale": (0.5, 0.1)},
        {"scale": (0.5,)},
        {"policy_strength": 31},
        {"shift": -1},
    ],
    ids=str,
)
def test_settings_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} must"):
        Augment(**wrong)


def test_magnitudes_are_torchvisions() -> None:
    for policy, theirs in (("randaugment", v2.RandAugment), ("trivial", v2.TrivialAugmentWide)):
        ours = policies.magnitudes(policy, 50, 70)
        space = theirs._AUGMENTATION_SPACE
        assert set(ours) == set(space)
        for name, (values, signed) in space.items():
            wanted = values(31, 50, 70)
            assert ours[name][1] == signed
            assert ours[name][0] == pytest.approx([0.0] * 31 if wanted is None else wanted.tolist())


def operation_of(name: str, magnitude: float, count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The arguments of `policies.operate` for one operation on `count` images."""
    numbers = policies.matrix(name, magnitude, *size) if name in policies.MOVING else (magnitude, *[0.0] * 5)
    return torch.full((count,), policies.NAMES.index(name)), torch.tensor([numbers] * count)


@pytest.mark.parametrize("operation", policies.NAMES)
def test_operations_are_torchvisions(operation: str) -> None:
    images = inputs(2)
    theirs = v2.RandAugment(fill=policies.FILL)
    for magnitude in (0.25, -0.25) if operation not in ("Posterize", "Solarize") else (0.5, 4.0):
        if operation in ("TranslateX", "TranslateY", "Rotate"):
            magnitude *= 20
        fill = {Tensor: [policies.FILL] * 3, "others": [policies.FILL] * 3}
        if operation == "Solarize" and magnitude > 1:
            continue
        wanted = theirs._apply_image_or_video_transform(
            images, operation, magnitude, v2.InterpolationMode.NEAREST, fill
        )
        made = policies.operate(images, *operation_of(operation, magnitude, 2, (19, 23)))
        assert made.dtype == torch.uint8
        off = (made.int() - wanted.int()).abs()
        if operation.startswith(("Shear", "Rotate")):
            assert (off > 0).float().mean() < 0.02  # where a place lies halfway between two pixels
        else:
            assert off.max() <= (operation in ("Color", "Contrast", "Sharpness"))


def test_blur_and_jitter() -> None:
    images = inputs(3, (25, 25))
    sigmas = torch.tensor([0.1, 1.0, 2.0])
    made = policies.blur(images, sigmas)
    assert torch.equal(made[0], images[0])
    wanted = v2.functional.gaussian_blur(images[1:2], [13, 13], [1.0, 1.0])
    assert (made[1:2, :, 6:-6, 6:-6].int() - wanted[:, :, 6:-6, 6:-6].int()).abs().max() <= 1
    same = policies.colour_jitter(images, torch.full((3, 3), 0.5))
    assert (same.int() - images.int()).abs().max() <= 1
    draws = torch.tensor([[0.9, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.9]])
    changed = policies.colour_jitter(images, draws)
    for i, function in enumerate(
        (v2.functional.adjust_brightness, v2.functional.adjust_contrast, v2.functional.adjust_saturation)
    ):
        wanted = function(images[i], 1 + 0.3 * 0.8)
        assert (changed[i].int() - wanted.int()).abs().max() <= 2


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a GPU of Apple's, which has no float64")
@pytest.mark.parametrize("policy", ["three", "randaugment"])
def test_policies_run_on_apples_gpus(policy: Any) -> None:
    images, samples = torch.randint(0, 256, (8, 3, 9, 9), dtype=torch.uint8), torch.arange(8)
    augment = Augment(policy=policy)
    made = augmented(images.to("mps"), samples, 0, 0, augment).cpu()
    expected = augmented(images, samples, 0, 0, augment)
    assert (made.int() - expected.int()).abs().max() <= 1


def test_erase() -> None:
    draws = uniform(seed_for(0, 0), torch.arange(3000), 5)
    images = torch.zeros(3000, 1, 40, 40, dtype=torch.uint8)
    share = (erase(images, draws, 0.25) == 128).float().mean(dim=(1, 2, 3))
    assert 0.22 < float((share > 0).float().mean()) < 0.28
    assert float(share[share > 0].min()) > 0.01 and float(share.max()) < 0.35


@pytest.mark.parametrize("augment", [Augment(mixup=0.8), Augment(cutmix=1.0), Augment(mixup=0.2, cutmix=1.0)])
def test_mixing_targets_are_the_shares_of_pixels(augment: Augment) -> None:
    # Image i is flat, of its own shade: a mixed one's mean tells the share of each.
    shades = torch.arange(16, dtype=torch.uint8) * 16
    images = shades[:, None, None, None].expand(-1, 3, 20, 20).contiguous()
    made, partner, share = mix_pairs(images, torch.arange(16), stream_keys(3, 0), augment)
    assert partner.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14]
    targets = SIXTEEN.mix({"label": torch.arange(16)}, partner, share)["label"]
    assert targets.dtype == torch.float32 and torch.allclose(targets.sum(1), torch.ones(16))
    assert torch.allclose(made.float().mean(dim=(1, 2, 3)), targets @ shades.float(), atol=0.6)
    assert ((targets > 0).sum(1) <= 2).all() and (targets.max(1).values < 1).sum() > 8
    for pair in range(8):  # alone, and the other way round
        members = torch.tensor([2 * pair + 1, 2 * pair])
        alone, _, shares = mix_pairs(images[members], members, stream_keys(3, 0), augment)
        assert torch.equal(alone, made[members]) and torch.equal(shares, share[members])


@pytest.mark.parametrize("augment", [Augment(mixup=0.8), Augment(cutmix=1.0)])
def test_the_last_of_an_odd_count_stays_unchanged(augment: Augment) -> None:
    images = torch.stack([torch.full((3, 9, 9), shade, dtype=torch.uint8) for shade in (10, 100, 250)])
    made, partner, share = mix_pairs(images, torch.arange(3), stream_keys(0, 0), augment)
    assert torch.equal(made[2], images[2]) and not torch.equal(made[:2], images[:2])
    assert partner.tolist() == [1, 0, 2] and share[2] == 1
    targets = SIXTEEN.mix({"label": torch.tensor([4, 5, 6])}, partner, share)["label"]
    assert targets[2].tolist() == [float(i == 6) for i in range(16)]


def test_mixup_shares_are_beta() -> None:
    count = 20_000
    draws = uniform(seed_for(0, 0), torch.arange(count), 67)
    images, partner = torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count).roll(1)
    for alpha in (0.2, 0.8, 1.0):
        share = mix(images, partner, draws, Augment(mixup=alpha))[1].double()
        wanted = torch.distributions.Beta(alpha, alpha)
        assert abs(float(share.mean()) - 0.5) < 0.01
        assert abs(float(share.var()) - float(wanted.variance)) < 0.01


def test_no_operations_leave_the_image_unchanged() -> None:
    images, none = inputs(3), Augment(policy="randaugment", policy_count=0)
    made = augmented(images, torch.arange(3), 0, 0, none)
    assert torch.equal(made, images)
