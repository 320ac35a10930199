"""torchvision's state dicts against torchvision's own models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models import VisionTransformer, ViT_B_16_Weights
from torchvision.models.vision_transformer import interpolate_embeddings

import vitrail
from vitrail.errors import UserError
from vitrail.zoo import torchvision as source
from vitrail.zoo.files import open_files


def model(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    values = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 128, "mlp_dim": 192}
    made = VisionTransformer(**{**values, "num_classes": 7, **changes}).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens_of(made: VisionTransformer, images: Tensor) -> Tensor:
    x = made._process_input(images)
    return made.encoder(torch.cat([made.class_token.expand(len(x), -1, -1), x], dim=1))


@pytest.mark.parametrize("hidden", [None, 48])
def test_tokens_and_logits_are_torchvisions(hidden: int | None, tmp_path: Path) -> None:
    theirs = model(representation_size=hidden)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "vit.pth")
    ours = vitrail.load(tmp_path / "vit.pth", verify=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = ours.features(images)
        torch.testing.assert_close(torch.cat(tokens[:2], 1), tokens_of(theirs, images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert ours.classes == [str(i) for i in range(7)]


def test_other_sizes_are_interpolated_as_torchvision_does(tmp_path: Path) -> None:
    theirs = model()
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    larger = model(image_size=56)
    larger.load_state_dict(interpolate_embeddings(56, 8, theirs.state_dict()))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = larger(images)
        torch.testing.assert_close(vitrail.load(tmp_path / "vit.pth")(images), expected, rtol=1e-4, atol=1e-5)


def test_the_names_of_before_2022(tmp_path: Path) -> None:
    theirs = model()
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    old = theirs.state_dict()
    for new, before in names.items():
        old = {name.replace(new, before): value for name, value in old.items()}
    torch.save(old, tmp_path / "vit.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vitrail.load(tmp_path / "vit.pth")(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_thousand_classes_are_imagenets_and_images_are_prepared_as_for_the_published_weights(tmp_path: Path) -> None:
    torch.save(model(num_classes=1000, image_size=224, patch_size=16).state_dict(), tmp_path / "vit.pth")
    found = source.read(open_files(tmp_path / "vit.pth"))
    assert found.classes == ViT_B_16_Weights.DEFAULT.meta["categories"]
    theirs = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    image = torch.linspace(0, 255, 3 * 300 * 280).reshape(3, 300, 280).to(torch.uint8)
    assert found.preprocess.resized(300, 280) == (274, 256)
    assert float((found.preprocess(image) - theirs(image)).abs().max()) < 1.5 / 255 / 0.224


def test_positions_that_are_no_square_are_one_line(tmp_path: Path) -> None:
    weights = model().state_dict()
    weights["encoder.pos_embedding"] = weights["encoder.pos_embedding"][:, :-1].clone()
    torch.save(weights, tmp_path / "vit.pth")
    with pytest.raises(UserError, match="15 patches"):
        vitrail.load(tmp_path / "vit.pth")
