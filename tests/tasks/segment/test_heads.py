"""Heads of segmentation against their published definitions, and what an encoder must have for queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitrail.data.decode import BadImage
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.segment import Segment, Segmentation, Segments
from vitrail.tasks.segment.heads import LinearHead, MaskTransformer, class_logits
from vitrail.tasks.segment.losses import check_matching
from vitrail.tasks.segment.settings import Inference
from vitrail.variants import VariantConfig
from vitrail.vit import Tokens

NANO, EIGHT = SIZES["nano/2"], Preprocess(size=(8, 8))


def segmenter(encoder: Any = NANO, **values: Any) -> Segment:
    torch.manual_seed(0)
    return Segment(encoder_for(encoder), ["a", "b", "c"], EIGHT, Segmentation(**values)).eval()


def test_a_linear_head_is_a_layer_per_patch_and_its_outputs_are_neighbours() -> None:
    head = LinearHead(5, 3, 2)
    patches = torch.randn(1, 6, 5)
    found = head(Tokens(patches[:, :0], patches, (2, 3)))
    assert found.shape == (1, 3, 4, 6)
    each = head.linear(patches[0, 4]).view(3, 2, 2)  # the patch in row 1, column 1
    torch.testing.assert_close(found[0, :, 2:4, 2:4], each)


def test_a_mask_transformer_compares_patches_and_classes_by_angle() -> None:
    """Equation 2 of Segmenter, on the tokens that leave its blocks."""
    head = MaskTransformer(8, 3, 1, 2, 1).eval()
    patches = torch.randn(2, 6, 8)
    x = torch.cat([head.class_tokens.expand(2, -1, -1), head.project(patches)], dim=1)
    x = head.norm(head.blocks[0](x))
    classes, places = head.of_classes(x[:, :3]), head.of_patches(x[:, 3:])
    cosine = F.cosine_similarity(places[:, :, None], classes[:, None], dim=-1)  # [B, N, K]
    expected = head.norm_masks(cosine).transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(head(Tokens(patches[:, :0], patches, (2, 3))), expected, atol=1e-5, rtol=1e-5)


def test_queries_give_what_transformers_eomt_gives() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.EomtConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_blocks=2,
        num_queries=5,
        num_upscale_blocks=1,
        num_register_tokens=2,
        layerscale_value=0.5,
        num_labels=3,
    )
    theirs = transformers.EomtForUniversalSegmentation(config).eval()
    theirs.attn_mask_probs.zero_()  # masked attention is for training
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.05 * torch.randn_like(value))
    ours = VariantConfig(
        width=32,
        depth=4,
        heads=2,
        patch=4,
        image_size=(16, 16),
        registers=2,
        prefix_positions="none",
        layer_scale=0.5,
    )
    values = Segmentation(head="queries", queries=5, head_blocks=2, upscale=2)
    task = Segment(encoder_for(ours), ["a", "b", "c"], Preprocess(size=(16, 16)), values).eval()
    task.load_state_dict(renamed(theirs.state_dict()))
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        wanted, found = theirs(pixel_values=images), task(images)
    torch.testing.assert_close(found["classes"], wanted.class_queries_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["masks"], wanted.masks_queries_logits, atol=1e-4, rtol=1e-4)


def renamed(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' EoMT under our names."""
    found = {
        "encoder.class_token": theirs["embeddings.cls_token"],
        "encoder.registers": theirs["embeddings.register_tokens"],
        "encoder.positions": theirs["embeddings.position_embeddings.weight"][None],
        "head.queries": theirs["query.weight"][None],
    }
    names = {
        "embeddings.patch_embeddings.projection": "encoder.patches.projection",
        "layernorm": "encoder.norm",
        "class_predictor": "head.classes",
        "mask_head.fc1": "head.masks.0",
        "mask_head.fc2": "head.masks.2",
        "mask_head.fc3": "head.masks.4",
        "upscale_block.block.0.conv1": "head.upscale.steps.0.up",
        "upscale_block.block.0.conv2": "head.upscale.steps.0.depthwise",
        "upscale_block.block.0.layernorm2d": "head.upscale.steps.0.norm",
    }
    for i in range(4):
        block, mine = f"layers.{i}", f"encoder.blocks.{i}"
        for kind in ("weight", "bias"):
            each = [theirs[f"{block}.attention.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{mine}.attention.qkv.{kind}"] = torch.cat(each)
        names |= {
            f"{block}.norm1": f"{mine}.norm1",
            f"{block}.norm2": f"{mine}.norm2",
            f"{block}.attention.out_proj": f"{mine}.attention.out",
            f"{block}.mlp.fc1": f"{mine}.mlp.up",
            f"{block}.mlp.fc2": f"{mine}.mlp.down",
        }
        found[f"{mine}.branch1.0.scale"] = theirs[f"{block}.layer_scale1.lambda1"]
        found[f"{mine}.branch2.0.scale"] = theirs[f"{block}.layer_scale2.lambda1"]
    for theirs_name, mine in names.items():
        found |= {
            f"{mine}.{k}": theirs[f"{theirs_name}.{k}"] for k in ("weight", "bias") if f"{theirs_name}.{k}" in theirs
        }
    return found


def test_classes_of_pixels_are_the_queries_weighted_by_their_masks() -> None:
    classes, masks = torch.randn(1, 4, 4), torch.randn(1, 4, 2, 3)
    found = class_logits({"classes": classes, "masks": masks}).exp()
    p, m = classes.softmax(dim=-1), masks.sigmoid()
    wanted = sum(p[0, q, 2] * m[0, q, 1, 0] for q in range(4))
    assert float(found[0, 2, 1, 0]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    "head",
    [
        {"head": "linear"},
        {"head": "mask-transformer", "head_blocks": 1},
        {"head": "queries", "head_blocks": 1, "queries": 3},
    ],
    ids=["linear", "mask-transformer", "queries"],
)
@pytest.mark.parametrize(
    "changes",
    [
        {"rotary": "axial", "class_token": False, "pool": "average", "positions": "none"},
        {"registers": 2, "rotary": "mixed"},
        {"window": 2, "global_blocks": (3,), "class_token": False, "pool": "average"},
        {"stem": (8,), "patch": 4},
    ],
)
def test_heads_work_on_encoders_of_other_kinds_at_any_size(head: dict[str, Any], changes: dict[str, Any]) -> None:
    config = config_for(NANO, **changes)
    task = segmenter(config, **head, upscale=2)
    for size in [(8, 8), (4, 20)]:
        grid = [side // config.patch for side in size]
        assert task.logits(torch.randn(2, 3, *size)).shape == (2, 3, 2 * grid[0], 2 * grid[1])


def test_queries_refuse_encoders_that_cannot_take_them() -> None:
    from vitrail.baselines import CNNConfig

    assert segmenter(CNNConfig()).head is not None
    with pytest.raises(UserError, match="choose --head linear"):
        segmenter(CNNConfig(), head="queries")
    plain = {"class_token": False, "pool": "average"}
    with pytest.raises(UserError, match="have windows"):
        segmenter(config_for(NANO, window=2, **plain), head="queries")
    with pytest.raises(UserError, match="relative positions"):
        segmenter(config_for(NANO, relative="table"), head="queries")
    with pytest.raises(UserError, match="has 4 blocks"):
        segmenter(head="queries", head_blocks=5)
    with pytest.raises(UserError, match="class_weights are of the cross-entropy"):
        segmenter(head="queries", class_weights="log")


def test_queries_are_trained_with_scipy_and_with_one_for_each_class_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    check_matching(3, 3)
    with pytest.raises(UserError, match="set --queries 3 or more"):
        check_matching(2, 3)
    monkeypatch.setattr("vitrail.tasks.segment.losses.find_spec", lambda name: None)
    with pytest.raises(UserError, match="trained with SciPy"):
        check_matching(3, 3)


def test_windows_refuse_images_that_are_squashed() -> None:
    model = segmenter()
    model.preprocess = replace(model.preprocess, resize="squash")
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    assert model.frames(image).images.shape[0] == 1
    model.option = Inference(inference="windows")
    with pytest.raises(UserError, match="windows keep the shape of an image"):
        model.frames(image)


def test_a_whole_image_that_is_too_long_and_thin_is_refused_and_windows_take_it() -> None:
    task = segmenter()
    assert task.frames(torch.zeros(3, 8, 64, dtype=torch.uint8)).images.shape == (1, 3, 8, 64)
    long = torch.zeros(3, 66, 8, dtype=torch.uint8)
    with pytest.raises(BadImage, match=r"8x66: too long and thin: .* 8x66 pixels: cut it into pieces"):
        task.predict([long])
    task.choose({"inference": "windows"})
    (found,) = task.predict([long])
    assert isinstance(found, Segments) and found.mask.shape == (66, 8)
