"""timm's checkpoints read and written, against timm: one architecture per family here, all in bench/parity.py."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from checked import checked
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor

import vitrail
from vitrail.data import imagenet
from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.variants import VariantConfig
from vitrail.vit import ViT
from vitrail.zoo import timm as source
from vitrail.zoo.timm.arguments import encoder_config, table
from vitrail.zoo.timm.closest import closest_architecture

ROOT = Path(__file__).resolve().parents[2]
TINY: dict[str, Any] = {"embed_dim": 48, "num_heads": 3}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The comparison with timm of bench/parity.py."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("peers.timm")


FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": TINY,
    "vit_base_patch16_clip_quickgelu_224": TINY,
    "vit_giant_patch14_reg4_dinov2": TINY,
    "vit_base_patch16_siglip_224": TINY,
    "vit_base_patch16_xp_224": TINY,
    "vit_dpwee_patch16_reg1_gap_256": TINY | {"num_heads": 2},
    "vit_dwee_patch16_reg1_gap_256": TINY | {"num_heads": 2},
    "vit_small_patch16_18x2_224": TINY,
    "vit_base_patch16_rpn_224": TINY,
    "aimv2_large_patch14_224": TINY,
    "beit3_base_patch16_224": TINY,
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": TINY,
    "deit3_small_patch16_224": TINY,
    "beit_base_patch16_224": TINY,
    "vit_base_mci_224": {},
    "vit_tiny_r_s16_p8_224": TINY,
    "vit_small_r26_s32_224": TINY,
    "vit_small_resnet26d_224": TINY,
    "samvit_base_patch16": TINY | {"window_size": 3},
    "samvit_base_patch16_224": TINY | {"window_size": 3},
    "eva02_tiny_patch14_224": TINY | {"num_heads": 4},
    "eva02_base_patch14_224": TINY,
    "eva02_enormous_patch14_clip_224": TINY,
    "vit_small_patch16_rope_mixed_ape_224": TINY,
    "vit_pe_core_tiny_patch16_384": TINY | {"attn_pool_num_heads": 4},
    "vit_large_patch16_sapiens2": TINY | {"num_heads": 4, "num_kv_heads": [4, 2]},
    "vit_small_plus_patch16_dinov3_qkvb": TINY,
}
"""a name for each component of timm's architectures"""


# timm's own resizing of BEiT's tables warns.
@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_equal_timms_at_three_sizes(name: str, peer: ModuleType) -> None:
    patch = encoder_config(table()[name], (448, 448)).patch
    others = (6 * patch, 6 * patch), (5 * patch, 9 * patch)
    row = peer.compare(name, others, img_size=(4 * patch, 4 * patch), **FAMILIES[name])
    assert len(row["sizes"]) >= 3
    assert all(value < 1e-5 for size in row["sizes"].values() for value in size.values()), row


def test_every_name_is_understood() -> None:
    assert len(table()) == 269
    for values in table().values():
        config = encoder_config(values, (448, 448))
        assert config.width % config.heads == 0


def save_timm(model: Any, folder: Path, name: str, **config: Any) -> Path:
    """A folder as timm writes them."""
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name, **config}))
    return folder


def tiny(name: str = "vit_tiny_patch16_224", classes: int = 3, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{"depth": 2, "img_size": 32, "num_classes": classes, **TINY, **arguments}).eval()


@torch.inference_mode()
def test_a_folder_brings_arguments_classes_and_preprocessing(tmp_path: Path) -> None:
    model = tiny(patch_size=8, img_size=(32, 48), in_chans=4)
    given = {**TINY, "depth": 2, "patch_size": 8, "img_size": [32, 48]}
    settings = {
        "input_size": [4, 32, 48],
        "mean": [0.1, 0.2, 0.3, 0.4],
        "std": [0.5] * 4,
        "crop_pct": 0.8,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "label_names": ["n1", "n2", "n3"],
        "label_descriptions": {"n1": "cat", "n3": "dog"},
    }
    folder = save_timm(model, tmp_path / "m", "vit_tiny_patch16_224", model_args=given, pretrained_cfg=settings)
    task = vitrail.load(folder)
    images = torch.randn(2, 4, 32, 48)
    torch.testing.assert_close(task(images), model(images))
    assert task.classes == ["cat", "n2", "dog"]
    kept = task.preprocess
    assert (kept.size, kept.resize, kept.interpolation) == ((32, 48), "squash", "bilinear")
    assert (kept.mean, kept.crop_fraction, kept.channels) == ((0.1, 0.2, 0.3, 0.4), 0.8, 4)


THOUSAND = {**TINY, "depth": 1, "img_size": 32, "num_classes": 1000}


def test_a_thousand_classes_without_names_have_imagenets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """timm's configs of ImageNet-1k have no names; that they are for it is known, or else assumed and said."""
    model = timm.create_model("vit_tiny_patch16_224", **THOUSAND)
    timm.models.save_for_hf(model, str(tmp_path / "known"), model_args=THOUSAND)
    assert "in1k" in json.loads((tmp_path / "known" / "config.json").read_text())["pretrained_cfg"]["tag"]
    assert vitrail.load(tmp_path / "known").classes == imagenet.names() and not caplog.messages
    save_timm(model, tmp_path / "assumed", "vit_tiny_patch16_224", model_args=THOUSAND)
    assert vitrail.load(tmp_path / "assumed").classes == imagenet.names()
    assert "do not name the 1,000 classes: assuming ImageNet's" in caplog.text


def test_names_that_a_config_has_are_kept(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **THOUSAND)
    own = [f"thing {i}" for i in range(1000)]
    save_timm(model, tmp_path / "own", "vit_tiny_patch16_224", model_args=THOUSAND, label_names=own)
    assert vitrail.load(tmp_path / "own").classes == own
    ids = [synset.wnid for synset in imagenet.synsets()][::-1]
    save_timm(model, tmp_path / "ids", "vit_tiny_patch16_224", model_args=THOUSAND, label_names=ids)
    assert vitrail.load(tmp_path / "ids").classes == imagenet.names()[::-1]
    folder = save_timm(tiny(classes=21843), tmp_path / "more", "vit_tiny_patch16_224", model_args={**TINY, "depth": 2})
    assert vitrail.load(folder, image_size=32).classes[:2] == ["0", "1"]


@torch.inference_mode()
def test_bare_state_dicts_are_recognised_by_names_and_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randn(1, 3, 224, 224)
    for name in ("test_vit4", "eva02_tiny_patch14_224"):
        model = timm.create_model(name, num_classes=2, depth=12 if "eva" in name else 9).eval()
        image = images[..., :160, :160] if name == "test_vit4" else images
        path = tmp_path / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        torch.testing.assert_close(vitrail.load(path)(image), model(image), rtol=1e-4, atol=1e-5)
        assert f"the weights fit timm's {name}" in caplog.text


@pytest.mark.parametrize(
    "name", ["vit_small_plus_patch16_dinov3", "vit_small_patch16_rope_mixed_224", "deit3_small_patch16_224"]
)
def test_a_bare_state_dict_needs_only_names_and_shapes(name: str) -> None:
    from vitrail.zoo.source import Files

    with torch.device("meta"):
        weights = dict(timm.create_model(name, num_classes=3).state_dict())
    files = Files(Path(name), {}, weights, {key: tuple(value.shape) for key, value in weights.items()})
    assert source.recognise(files)
    found = source.read(files)
    values = table()[name]
    assert found.encoder == encoder_config(values, tuple(values["images"]["input_size"][-2:]))
    used = {key for weight in found.weights.values() for key in weight.names}
    assert used | found.left.keys() == weights.keys()


@torch.inference_mode()
def test_a_bare_state_dict_of_no_known_size_gets_defaults_and_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(embed_dim=128, num_heads=2, reg_tokens=2, no_embed_class=True, init_values=0.1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(vitrail.load(tmp_path / "model.safetensors")(images), model(images))
    assert "2 heads of 64 channels and timm's defaults" in caplog.text


def test_reading_needs_no_timm_and_copies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.zoo.files import open_files

    given = {**TINY, "depth": 2, "img_size": 32}
    folder = save_timm(tiny(), tmp_path / "m", "vit_tiny_patch16_224", model_args=given)
    monkeypatch.setitem(sys.modules, "timm", None)
    found = source.read(open_files(folder))
    assert all(weight.make is None for weight in found.weights.values())


@torch.inference_mode()
def test_positions_of_another_size_than_the_config_decide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_timm(tiny(img_size=64), tmp_path / "m", "vit_tiny_patch16_224", model_args={**TINY, "depth": 2})
    task = vitrail.load(folder)
    assert isinstance(task.encoder, ViT) and task.encoder.config.image_size == (64, 64)
    assert "the positions are for 64x64 pixels" in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"global_pool": "prr"}, "global_pool='prr' is not supported"),
        ({"norm_layer": "batchnorm"}, "norm_layer='batchnorm' is not supported"),
        ({"act_layer": "mish"}, "act_layer='mish' is not supported"),
        ({"attn_head_dim": 8}, "attn_head_dim=8 is not supported"),
        ({"depth": 3}, "contradict|lacks"),
        ({"num_heads": 5}, "does not divide into 5 heads"),
        ({"patch_size": [8, 16]}, "must be square"),
        ({"embed_dim": "wide"}, "does not describe a model"),
    ],
)
def test_what_is_not_known_or_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    values = {**TINY, "depth": 2, "img_size": 32, **given}
    folder = save_timm(tiny(), tmp_path / "m", "vit_tiny_patch16_224", model_args=values)
    with pytest.raises(UserError, match=words) as caught:
        vitrail.load(folder)
    assert "\n" not in str(caught.value)


def random(task: Task) -> Task:
    """The task with a random value in each weight."""
    generator = torch.Generator().manual_seed(1)
    for value in task.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) - 0.3)
    return task.eval()


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


BASE: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 8, "image_size": (16, 24)}


@torch.inference_mode()
@pytest.mark.parametrize(
    "config",
    [
        VariantConfig(**BASE),
        VariantConfig(**BASE, mlp_ratio=2.7, layer_scale=0.1, qkv_bias=False, channels=2),
        VariantConfig(**BASE, pool="average", class_token=False, registers=2, prefix_positions="none"),
        VariantConfig(**BASE, pool="attention", class_token=False, activation="gelu_tanh"),
        VariantConfig(**BASE, activation="quick_gelu", norm_eps=1e-5, norm_before=True, patch_bias=False),
        VariantConfig(**BASE, pool="distilled", distillation=True),
        VariantConfig(**BASE, activation="silu", mlp="gated", mlp_hidden=48, prefix_positions="none"),
        VariantConfig(**BASE, relative="table", key_bias=False, layer_scale=0.2),
        VariantConfig(**BASE, rotary="axial", rotary_reference=(4, 4), norm_eps=1e-6),
        VariantConfig(
            **BASE,
            rotary="centred",
            key_bias=False,
            rotary_pairs="halves",
            mlp="gated",
            rotary_temperature=100,
            positions="none",
            activation="silu",
            norm_eps=1e-5,
        ),
        VariantConfig(**BASE, arrangement="joint", qk_norm=True, norm="rms", qkv_bias=False),
        VariantConfig(**BASE, arrangement="joint_fused", differential=True),
        VariantConfig(**BASE, arrangement="parallel"),
        VariantConfig(
            **BASE,
            window=2,
            global_blocks=(1,),
            relative="decomposed",
            neck=8,
            norm_after=False,
            class_token=False,
            pool="average",
            norm_eps=1e-5,
        ),
    ],
    ids=lambda config: (
        "-".join(f"{k}" for k, v in vars(config).items() if v != getattr(VariantConfig(**BASE), k))
        or f"{config.pool}{config.channels}"
    ),
)
def test_written_folders_are_timms_and_come_back_bit_equal(config: VariantConfig, tmp_path: Path) -> None:
    task = random(vitrail.create(config, classes=["a", "b", "c"]))
    source.write(task, tmp_path / "m")
    back = vitrail.load(tmp_path / "m")
    assert back.classes == ["a", "b", "c"]
    assert back.preprocess == task.preprocess
    assert same(back.state_dict(), task.state_dict())
    if config.relative == "table" and timm.__version__ == "1.0.30":
        pytest.skip("timm reads tables of relative positions for images that are no squares from its release 1.0.31 on")
    peer = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    images = torch.randn(2, config.channels, *config.image_size)
    torch.testing.assert_close(peer(images), task(images), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name", [*FAMILIES, "vit_so400m_patch14_siglip_384", "eva_giant_patch14_224", "flexivit_small"]
)
def test_what_a_name_means_is_written_under_that_name(name: str) -> None:
    values = table()[name]
    config = encoder_config(values, tuple(values["images"]["input_size"][-2:]))
    found, given = closest_architecture(config)
    assert given.keys() <= {"img_size", "init_values"}
    assert encoder_config(table()[found] | given, config.image_size) == config


@torch.inference_mode()
def test_flexivit_at_other_sizes(tmp_path: Path) -> None:
    """timm creates a pretrained FlexiViT for another size in its own way, and fits any model later in its common one.

    The two differ by 3e-3. A folder is read as what timm creates, a bare state dict as what it fits.
    """
    torch.manual_seed(0)
    peer = checked(VisionTransformer, timm.create_model("flexivit_small", num_classes=7)).eval()
    torch.nn.init.normal_(peer.get_parameter("head.weight"))
    timm.models.save_for_hf(peer, str(tmp_path / "folder"), model_args={})
    torch.save(peer.state_dict(), tmp_path / "bare.pth")
    for size in ((304, 304), (208, 336)):
        images = torch.randn(1, 3, *size)
        created = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, img_size=size).eval()
        assert relative(vitrail.load(tmp_path / "folder", image_size=size)(images), created(images)) < 1e-5
        peer.set_input_size(size)
        assert relative(vitrail.load(tmp_path / "bare.pth", image_size=size)(images), peer(images)) < 1e-5
        peer.set_input_size((240, 240))
        peer.load_state_dict(torch.load(tmp_path / "bare.pth"))
        moving = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, dynamic_img_size=True).eval()
        assert relative(vitrail.load(tmp_path / "folder")(images), moving(images)) < 1e-5


def relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def test_other_ways_to_interpolate_are_reported_when_they_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source.write(vitrail.create(VariantConfig(**BASE)), tmp_path / "same")
    assert not caplog.text
    source.write(vitrail.create(VariantConfig(**BASE, resampling="offset")), tmp_path / "other")
    assert "timm interpolates positions differently" in caplog.text


@torch.inference_mode()
def test_an_encoder_without_a_head_is_written(tmp_path: Path) -> None:
    task = random(vitrail.create(VariantConfig(**BASE)))
    source.write(task, tmp_path / "m")
    peer = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    images = torch.randn(1, 3, 16, 24)
    torch.testing.assert_close(peer(images), task(images), rtol=2e-5, atol=2e-5)
    assert same(vitrail.load(tmp_path / "m").state_dict(), task.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stem": (4, 8)}, "stem"),
        ({"positions": "sine"}, "positions"),
        ({"norm_eps": 1e-12}, "norm_eps"),
        ({"registers": 1}, "prefix_positions"),
        ({"projection": 8}, "projection"),
        ({"norm_pooled": True, "pool_prefix": True, "rotary": "axial", "pool": "average"}, "pool_prefix"),
        ({"pool": "token_average"}, "pool"),
    ],
)
def test_what_timm_cannot_express_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    task = vitrail.create(VariantConfig(**{**BASE, **changes}), classes=2)
    with pytest.raises(UserError, match=f"timm cannot store .*{words}.*--to vitrail") as caught:
        source.write(task, tmp_path / "m")
    assert "\n" not in str(caught.value) and not (tmp_path / "m").exists()


def test_a_pre_training_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hidden"):
        source.write(vitrail.create(VariantConfig(**BASE), classes=2, hidden=8), tmp_path / "m")


@torch.inference_mode()
def test_the_reference_of_a_written_folder_equals_the_model(tmp_path: Path) -> None:
    from vitrail.zoo.files import open_files

    # The architecture has layer scales by default, and the folder says that there are none.
    task = random(vitrail.create(VariantConfig(**BASE, arrangement="parallel"), classes=2))
    source.write(task, tmp_path / "m")
    answer = source.reference(open_files(tmp_path / "m"))
    assert answer is not None
    images = torch.randn(1, 3, 16, 24)
    torch.testing.assert_close(answer(images)["logits"], task(images), rtol=2e-5, atol=2e-5)


def test_the_reference_is_timms_own_model(tmp_path: Path) -> None:
    from vitrail.zoo.files import open_files

    model = tiny("deit_tiny_distilled_patch16_224")
    given = {**TINY, "depth": 2, "img_size": 32}
    folder = save_timm(model, tmp_path / "m", "deit_tiny_distilled_patch16_224", model_args=given)
    answer = source.reference(open_files(folder))
    assert answer is not None
    images = torch.randn(1, 3, 32, 32)
    found = answer(images)
    with torch.inference_mode():
        torch.testing.assert_close(found["logits"], model(images))
        torch.testing.assert_close(found["tokens"], model.forward_features(images))


def test_deep_hybrid_backbones_round_as_timms_do(peer: ModuleType) -> None:
    """50 layers with other rounding of the standardised filters change tokens by more than 1e-4."""
    small = {"embed_dim": 48, "num_heads": 3, "img_size": (64, 64)}
    row = peer.compare("vit_large_r50_s32_384", ((96, 96), (64, 96)), **small)
    assert all(value < 1e-5 for size in row["sizes"].values() for value in size.values()), row
