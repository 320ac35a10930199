"""The convolutional networks against torchvision's and the paper's counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet, vgg

from vitrail.baselines import CNN, CNNConfig, ResNet, ResNetConfig
from vitrail.baselines.convolution import BasicBlock, Convolution
from vitrail.errors import UserError
from vitrail.vit import Head


def randomise_norms(module: nn.Module) -> None:
    """Statistics and factors that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert values is not None
                values.data.uniform_(0.5, 1.5)


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    """Values of one's tensors into the other's, which stand in the same order."""
    for value, place in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        place.copy_(value)


def test_the_plain_network_equals_vggs_layers() -> None:
    torch.manual_seed(0)
    model = CNN(CNNConfig(widths=(4, 6), depth=2, strides=(2, 2))).eval()
    randomise_norms(model)
    peer = vgg.make_layers([4, 4, "M", 6, 6, "M"], batch_norm=True).eval()
    for layer in peer:
        if isinstance(layer, nn.Conv2d):
            layer.bias = None  # the norm behind it has its own
    copy(model, peer)
    images = torch.randn(2, 3, 12, 8)
    tokens = model(images)
    torch.testing.assert_close(tokens.patches, peer(images).flatten(2).transpose(1, 2))
    torch.testing.assert_close(model.pool(tokens), peer(images).mean(dim=(2, 3)))


def test_the_residual_block_equals_torchvisions_with_gradients() -> None:
    torch.manual_seed(0)
    ours, theirs = BasicBlock(6, 6).double(), resnet.BasicBlock(6, 6).double()
    randomise_norms(ours)
    copy(ours, theirs)
    x = torch.randn(2, 6, 7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(x)
    a = torch.autograd.grad((ours(x) * target).sum(), [x, *ours.parameters()])
    b = torch.autograd.grad((theirs(x) * target).sum(), [x, *theirs.parameters()])
    torch.testing.assert_close(a, b)


def test_a_shortcut_thins_the_map_and_adds_channels_of_zeros() -> None:
    x = torch.rand(2, 4, 7, 5)
    block = BasicBlock(4, 6, stride=2)
    assert torch.equal(block.shortcut(x)[:, :4], x[:, :, ::2, ::2])
    assert (block.shortcut(x)[:, 4:] == 0).all()
    nn.init.zeros_(block.second.norm.weight)  # a branch that changes nothing leaves the shortcut
    assert torch.equal(block(x), block.shortcut(x))


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # Table 6 of the paper prints 0.27M, 0.46M, 0.66M, 0.85M and 1.7M for ResNet-20 to ResNet-110.
    [(3, 0.27e6), (5, 0.46e6), (7, 0.66e6), (9, 0.85e6), (18, 1.7e6)],
)
def test_published_parameter_counts(depth: int, parameters: float) -> None:
    with torch.device("meta"):
        model, head = ResNet(ResNetConfig(depth=depth)), Head(64, 10)
    counted = sum(p.numel() for module in (model, head) for p in module.parameters())
    assert float(f"{counted:.2g}") == parameters
    layers = 1 + sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert layers == 6 * depth + 2


def test_a_shifted_image_gives_a_shifted_map() -> None:
    torch.manual_seed(0)
    layer = Convolution(3, 4).double().eval()
    image = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    shifted = image.roll((2, 1), dims=(2, 3))
    torch.testing.assert_close(layer(shifted)[..., 3:-1, 3:-1], layer(image)[..., 1:-3, 2:-2])


def test_the_first_maps_keep_the_size_of_the_signal() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32)
    for model in (CNN(CNNConfig(depth=4)), ResNet(ResNetConfig())):
        assert 0.3 < model(images).patches.square().mean().sqrt() < 3


@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (CNNConfig(), (4, 4)),
        (CNNConfig(widths=(8, 8, 8, 8), strides=(2, 2, 2, 2), image_size=(160, 160)), (10, 10)),
        (CNNConfig(widths=(8, 8, 8, 8), strides=(2, 2, 2, 2), stem_stride=2, image_size=(160, 160)), (5, 5)),
        (ResNetConfig(), (8, 8)),
        (ResNetConfig(strides=(2, 2, 2), stem_stride=2, image_size=(160, 160)), (10, 10)),
    ],
)
def test_feature_maps_for_captions(config: CNNConfig | ResNetConfig, grid: tuple[int, int]) -> None:
    model = (CNN if isinstance(config, CNNConfig) else ResNet)(config).eval()  # type: ignore[arg-type]
    assert grid == model(torch.zeros(1, 3, *config.image_size)).grid


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CNNConfig(widths=(8, 8)), "one stride per stage"),
        (lambda: CNNConfig(widths=(), strides=()), "one stride per stage"),
        (lambda: CNNConfig(strides=(2, 0, 2)), "at least 1"),
        (lambda: ResNetConfig(depth=0), "at least 1"),
        (lambda: ResNetConfig(widths=(32, 16, 64)), "widths .* must not decrease"),
    ],
)
def test_bad_configs_are_refused_in_one_line(make: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
