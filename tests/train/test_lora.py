"""LoRA: the model begins as it was, only the factors move, and what is merged computes the same."""

from __future__ import annotations

import pytest
import torch
from checked import checked
from torch import Tensor, nn

from vitrail.sizes import config_for
from vitrail.tasks.encoder import encoder_for
from vitrail.train.lora import LoRALinear, add_lora, merge_lora, merged
from vitrail.vit import ViT

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def encoder(**changes: object) -> ViT:
    torch.manual_seed(0)
    return checked(ViT, encoder_for(config_for("nano/2", width=16, heads=2, depth=2, **changes))).double()


def moved(module: nn.Module) -> nn.Module:
    """As after some training: no factor is zero any more."""
    for name, parameter in module.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    return module


def test_it_begins_as_the_model_was() -> None:
    plain, tuned = encoder(), encoder()
    assert add_lora(tuned.blocks, rank=4, alpha=8) == 8  # qkv, out, up and down of two blocks
    assert torch.equal(plain(IMAGES).patches, tuned(IMAGES).patches)


@pytest.mark.parametrize("rank, alpha", [(1, 1.0), (4, 8.0), (16, 3.0)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_merged_equals_unmerged(rank: int, alpha: float, qkv_bias: bool) -> None:
    tuned = encoder(qkv_bias=qkv_bias)
    add_lora(tuned.blocks, rank, alpha)
    moved(tuned)
    before = tuned(IMAGES).patches
    assert not torch.allclose(before, encoder(qkv_bias=qkv_bias)(IMAGES).patches, atol=1e-3)

    plain = encoder(qkv_bias=qkv_bias)
    plain.load_state_dict(merged(tuned.state_dict()))  # strict: no trace of LoRA
    torch.testing.assert_close(plain(IMAGES).patches, before, rtol=0, atol=1e-12)

    merge_lora(tuned)
    assert tuned.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in tuned.modules())
    assert torch.equal(tuned(IMAGES).patches, plain(IMAGES).patches)


def test_merging_a_model_without_lora_changes_nothing() -> None:
    weights = encoder().state_dict()
    assert merged(weights).keys() == weights.keys()
    assert all(torch.equal(merged(weights)[name], value) for name, value in weights.items())


def test_the_update_is_the_papers() -> None:
    linear = nn.Linear(6, 5).double()
    tuned = LoRALinear(linear, rank=2, alpha=3.0)
    nn.init.normal_(tuned.lora_b)
    x = torch.randn(7, 6, dtype=torch.float64)
    w = linear.weight + 3.0 / 2 * tuned.lora_b @ tuned.lora_a
    torch.testing.assert_close(tuned(x), x @ w.T + linear.bias, rtol=0, atol=1e-12)


def test_only_the_factors_have_gradients_and_all_of_them_do() -> None:
    tuned = encoder()
    add_lora(tuned.blocks, 2, 4)
    moved(tuned)
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in name)
    tuned(IMAGES).patches.square().sum().backward()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        else:
            assert parameter.grad is None, name


def test_the_first_step_moves_b_alone() -> None:
    """With B at zero the gradient of A is zero, as in the paper."""
    tuned = LoRALinear(nn.Linear(4, 3), 2, 2.0)
    tuned(torch.randn(5, 4)).sum().backward()
    assert isinstance(tuned.lora_b.grad, Tensor) and bool(tuned.lora_b.grad.any())
    assert tuned.lora_a.grad is not None and not tuned.lora_a.grad.any()


def test_a_module_keeps_its_type_and_its_device() -> None:
    tuned = LoRALinear(nn.Linear(4, 3, dtype=torch.float16), 2, 2.0)
    assert isinstance(tuned, nn.Linear) and {p.dtype for p in tuned.parameters()} == {torch.float16}
