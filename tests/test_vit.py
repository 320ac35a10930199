"""The model against the paper's equations, timm and the published sizes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from checked import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrail.baselines.convolution import BasicBlock
from vitrail.errors import UserError
from vitrail.ops import stochastic_depth
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.encoder import encoder_for
from vitrail.variants import VariantViT, as_variant, simplest
from vitrail.variants.mimetic import mimetic_init
from vitrail.vit import Attention, Block, Head, PatchEmbedding, ViT, ViTConfig, attention_weights

TINY = ViTConfig(width=32, depth=2, heads=4, patch=4, image_size=(8, 12))


def randomise(module: torch.nn.Module) -> None:
    """Give every weight a value that matters, also those that start at zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2


def test_patch_embedding_is_the_linear_projection_of_flattened_patches() -> None:
    embedding = PatchEmbedding(3, 32, 4).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    patches = F.unfold(images, kernel_size=4, stride=4).transpose(1, 2)  # x_p of section 3.1: [B, N, P * P * C]
    projection = embedding.projection
    assert projection.bias is not None
    expected = patches @ projection.weight.flatten(1).T + projection.bias
    torch.testing.assert_close(embedding(images).flatten(2).transpose(1, 2), expected)


def reference(model: ViT, head: Head, images: Tensor) -> Tensor:
    """Equations 1 to 8, head by head, with nothing fused."""
    c = model.config
    weight, bias = model.patches.projection.weight, model.patches.projection.bias
    patches = F.unfold(images, c.patch, stride=c.patch).transpose(1, 2)
    assert model.class_token is not None and bias is not None
    z = torch.cat([model.class_token.expand(len(images), -1, -1), patches @ weight.flatten(1).T + bias], 1)
    z = z + model.positions
    for block in model.blocks:
        assert isinstance(block, Block)
        y = F.layer_norm(z, (c.width,), block.norm1.weight, block.norm1.bias, c.norm_eps)
        q, k, v = (y @ block.attention.qkv.weight.T + block.attention.qkv.bias).chunk(3, dim=-1)
        size = c.width // c.heads
        heads = []
        for i in range(c.heads):
            columns = slice(i * size, (i + 1) * size)
            a = (q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(size)).softmax(-1)
            heads.append(a @ v[..., columns])
        z = z + torch.cat(heads, -1) @ block.attention.out.weight.T + block.attention.out.bias
        y = F.layer_norm(z, (c.width,), block.norm2.weight, block.norm2.bias, c.norm_eps)
        y = y @ block.mlp.up.weight.T + block.mlp.up.bias
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        z = z + y @ block.mlp.down.weight.T + block.mlp.down.bias
    y = checked(nn.LayerNorm, model.norm)(z[:, 0])
    return y @ head.linear.weight.T + head.linear.bias


def test_forward_and_gradients_equal_the_equations() -> None:
    model, head = ViT(TINY).double(), Head(32, 5).double()
    randomise(model)
    randomise(head)
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = head(model.pool(model(images))), reference(model, head, images)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    parameters = [images, *model.parameters(), *head.parameters()]
    target = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * target).sum(), parameters),
        torch.autograd.grad((theirs * target).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_logits_equal_timms() -> None:
    peer = timm.models.vision_transformer.VisionTransformer(
        img_size=(8, 12), patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5
    )
    randomise(peer)
    model, head = ViT(TINY), Head(32, 5)
    renamed = {
        "class_token": peer.cls_token,
        "positions": peer.pos_embed,
        "patches.projection.weight": peer.patch_embed.proj.weight,
        "patches.projection.bias": peer.patch_embed.proj.bias,
        "norm.weight": peer.norm.weight,
        "norm.bias": peer.norm.bias,
    }
    names = {"norm1": "norm1", "norm2": "norm2", "attention.qkv": "attn.qkv", "attention.out": "attn.proj"}
    names |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    for i in range(2):
        for ours, theirs in names.items():
            for end in ("weight", "bias"):
                renamed[f"blocks.{i}.{ours}.{end}"] = peer.get_parameter(f"blocks.{i}.{theirs}.{end}")
    model.load_state_dict(renamed)
    head.linear.load_state_dict(peer.head.state_dict())
    images = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(head(model.pool(model(images))), peer.eval()(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        # Counts of the models with 1,000 classes, as timm and the papers give them.
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        ("B/16", 86_567_656),
        ("B/32", 88_224_232),
        ("L/16", 304_326_632),
        ("H/14", 632_045_800),
    ],
)
def test_published_parameter_counts(size: str, parameters: int) -> None:
    with torch.device("meta"):
        config = SIZES[size]
        counted = [*ViT(config).parameters(), *Head(config.width, 1000).parameters()]
    assert sum(p.numel() for p in counted) == parameters


def test_cross_attention_and_mask_equal_pytorchs() -> None:
    attention = Attention(32, 4).double()
    peer = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    peer.load_state_dict(
        {
            "in_proj_weight": attention.qkv.weight,
            "in_proj_bias": attention.qkv.bias,
            "out_proj.weight": attention.out.weight,
            "out_proj.bias": attention.out.bias,
        }
    )
    x, context = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
    mask = torch.rand(5, 7) > 0.3
    mask[:, 0] = True
    expected, weights = peer(x, context, context, attn_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(attention(x, context, mask), expected)
    q, k, _ = attention.project(x, 0, 1) + attention.project(context, 1, 3)
    torch.testing.assert_close(attention_weights(q, k, mask), weights)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    channels=st.integers(1, 5),
    registers=st.integers(0, 2),
    class_token=st.booleans(),
    positions=st.sampled_from(["learned", "sine", "none"]),
    stem=st.sampled_from([(), (4,), (4, 6), (4, 6, 8)]),
)
def test_any_size_and_channel_count(
    rows: int, columns: int, channels: int, registers: int, class_token: bool, positions: str, stem: tuple[int, ...]
) -> None:
    config = config_for(
        TINY,
        channels=channels,
        registers=registers,
        class_token=class_token,
        pool="token" if class_token else "average",
        positions=positions,
        stem=stem,
    )
    model = encoder_for(config).eval()
    tokens = model(torch.randn(2, channels, 4 * rows, 4 * columns))
    assert tokens.grid == (rows, columns)
    assert tokens.patches.shape == (2, rows * columns, 32)
    assert tokens.prefix.shape == (2, registers + class_token, 32)
    assert model.pool(tokens).shape == (2, 32)


@pytest.mark.parametrize(
    ("patch", "stem", "sides"),
    [
        (4, (4, 6, 8, 9), [64, 32, 16, 16]),
        (2, (4,), [64]),
        (16, (4, 6, 8, 9), [32, 16, 8, 4]),
        (16, (4,), [32]),
        (8, (4, 6), [32, 16]),
    ],
)
def test_a_stem_halves_while_the_patches_allow(patch: int, stem: tuple[int, ...], sides: list[int]) -> None:
    model = encoder_for(config_for(TINY, patch=patch, stem=stem, image_size=(64, 64))).eval()
    found: list[int] = []
    for module in model.get_submodule("patches.stem").modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *call: found.append(call[2].shape[-1]))
    assert model(torch.randn(1, 3, 64, 64)).grid == (64 // patch, 64 // patch)
    assert found == sides


def test_a_stem_has_residual_blocks_where_its_map_is_small() -> None:
    """As many as configured after each convolution but the first, each with that convolution's channels."""
    stem = {"patch": 16, "stem": (4, 6, 8), "image_size": (64, 48)}
    model = encoder_for(config_for(TINY, stem_blocks=2, **stem)).eval()
    found: list[tuple[int, ...]] = []
    for module in model.get_submodule("patches.stem").modules():
        if isinstance(module, BasicBlock):
            module.register_forward_hook(lambda *call: found.append(tuple(call[2].shape[1:])))
    images = torch.randn(1, 3, 64, 48, requires_grad=True)
    tokens = model(images)
    assert tokens.grid == (4, 3)
    assert found == [(6, 16, 12), (6, 16, 12), (8, 8, 6), (8, 8, 6)]
    plain = encoder_for(config_for(TINY, **stem))
    assert not any(isinstance(module, BasicBlock) for module in plain.modules())
    with pytest.raises(UserError, match="stem_blocks must be at least 0, got -1"):
        config_for(TINY, **stem, stem_blocks=-1)
    with pytest.raises(UserError, match="stem_blocks come after the second"):
        config_for(TINY, stem=(4,), stem_blocks=1)


@pytest.mark.parametrize("positions", ["learned", "sine", "none"])
@pytest.mark.parametrize("pool", ["token", "average"])
def test_a_variant_with_default_settings_is_the_paper_bit_for_bit(positions: str, pool: str) -> None:
    """First values, outputs at two sizes, and gradients with respect to images and weights."""
    config = config_for(TINY, positions=positions, pool=pool, drop_path=0.1)
    torch.manual_seed(0)
    paper = ViT(config)
    torch.manual_seed(0)
    variant = VariantViT(as_variant(config))
    first, same = paper.state_dict(), variant.state_dict()
    assert list(first) == list(same) and all(torch.equal(value, same[name]) for name, value in first.items())
    randomise(paper)
    randomise(variant)
    for size in ((8, 12), (12, 20)):
        images = torch.randn(3, 3, *size)
        keep = stochastic_depth(0.5, torch.rand(3, 2, 2))
        grads = []
        for model in (paper, variant):
            x = images.clone().requires_grad_()
            pooled = model.pool(model(x, keep=keep))
            grads.append([pooled, *torch.autograd.grad(pooled.square().sum(), [x, *model.parameters()])])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert simplest(as_variant(config)) == config and type(simplest(as_variant(config))) is ViTConfig


def test_a_variant_stays_one_where_a_field_differs() -> None:
    """Also one whose size the paper's patches do not divide, as SigLIP's at 384 pixels."""
    for changes in ({"floor_grid": True, "image_size": (9, 12)}, {"registers": 1}, {"pool": "max"}):
        config = replace(as_variant(TINY), **changes)
        assert simplest(config) == config and type(simplest(config)) is type(config)


def test_without_positions_the_order_of_patches_does_not_matter() -> None:
    images = torch.randn(1, 3, 8, 12)
    swapped = torch.cat([images[..., 4:8], images[..., :4], images[..., 8:]], dim=-1)
    for positions, equal in (("none", True), ("learned", False), ("sine", False)):
        model = ViT(config_for(TINY, positions=positions))
        a, b = (model.pool(model(x)) for x in (images, swapped))
        assert torch.allclose(a, b, atol=1e-5) == equal, positions


def test_interpolated_positions_keep_a_linear_ramp() -> None:
    config = config_for(TINY, image_size=(16, 16))
    model = ViT(config)
    ramp = torch.arange(4.0).repeat(4, 1).flatten()
    model.positions.data[0, 1:] = ramp[:, None].expand(-1, 32)
    wide = model.positions_for((4, 8))
    assert wide is not None
    middle = wide[0, 1:, 0].view(4, 8)[:, 2:6]
    torch.testing.assert_close(middle, torch.tensor([0.75, 1.25, 1.75, 2.25]).expand(4, 4), atol=0.1, rtol=0)
    torch.testing.assert_close(wide[:, :1], model.positions[:, :1])


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    keep = stochastic_depth(0.5, torch.rand(4000, 3, 2))
    assert torch.equal(keep[:, 0], torch.ones(4000, 2))  # nothing is skipped in the first block
    assert keep[:, 2].unique().tolist() == [0, 2] and abs(keep[:, 2].mean() - 1) < 0.1
    assert keep[:, 1].unique().tolist() == pytest.approx([0, 1 / 0.75]) and abs(keep[:, 1].mean() - 1) < 0.1


def test_the_encoder_is_a_function_of_the_factors_that_it_is_given() -> None:
    model = ViT(config_for(TINY, drop_path=0.5)).train()
    images, keep = torch.randn(3, 3, 8, 12), torch.ones(3, 2, 2)
    keep[0, 1, 0] = 0  # the first image skips the attention of the second block
    given = model(images, keep=keep).patches
    assert torch.equal(given, model(images, keep=keep).patches)
    whole = ViT(config_for(TINY))
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(given[1:], whole(images).patches[1:])
    x, grid = whole.embed(images[:1])
    x, _ = whole.encode(x, grid, blocks=slice(0, 1))
    block = checked(Block, whole.blocks[1])
    torch.testing.assert_close(given[:1], whole.finish(x + block.mlp(block.norm2(x)), grid).patches)
    drawn = [model(images).patches for _ in range(8)]
    assert not all(torch.equal(one, drawn[0]) for one in drawn)  # without factors, training draws them
    assert torch.equal(model.eval()(images).patches, whole.eval()(images).patches)


def test_blocks_can_be_run_in_pieces_and_their_tokens_kept() -> None:
    model = ViT(config_for(TINY, depth=4)).eval()
    x, grid = model.embed(torch.randn(2, 3, 8, 12))
    whole, kept = model.encode(x, grid, layers=(0, 2))
    half, _ = model.encode(x, grid, blocks=slice(0, 3))
    assert torch.equal(kept[1], half) and len(kept) == 2
    rest, kept = model.encode(half, grid, blocks=slice(3, None), layers=(0, 3))
    assert torch.equal(rest, whole) and torch.equal(kept[0], whole) and len(kept) == 1


@pytest.mark.parametrize("kv_heads", [(), (1, 2)])
def test_queries_keys_and_values_start_as_three_matrices(kv_heads: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = VariantViT(as_variant(config_for(TINY, pool="attention", kv_heads=kv_heads)))
    found = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(found) == 3  # the blocks' and the pooling's
    for attention in found:
        for matrix in attention.qkv.weight.split(getattr(attention, "sizes", [32, 32, 32])):
            bound = math.sqrt(6 / sum(matrix.shape))
            assert 0.97 * bound < matrix.abs().max() <= bound


@pytest.mark.parametrize("arrangement", ["pre", "post", "parallel", "joint", "joint_fused"])
def test_dropout_follows_the_attention_of_every_block(arrangement: str) -> None:
    model = VariantViT(as_variant(config_for(TINY, dropout=0.5, arrangement=arrangement, registers=1)))
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_hook(lambda *call: outputs.append(call[2]))
    randomise(model)
    images = torch.randn(50, 3, 8, 12)
    model(images)
    assert len(outputs) == (4 if arrangement == "parallel" else 2)
    assert all(0.45 < (output == 0).float().mean() < 0.55 for output in outputs)
    outputs.clear()
    model.eval()(images)
    assert all((output != 0).all() for output in outputs)


def test_mimetic_start_looks_at_itself() -> None:
    torch.manual_seed(0)
    with pytest.raises(UserError, match="cannot be combined with kv_heads: add --attention-init xavier"):
        mimetic_init(VariantViT(as_variant(config_for(TINY, kv_heads=(2, 2)))))
    model = ViT(ViTConfig(width=64, depth=1, heads=4, patch=4, image_size=(16, 16)))
    mimetic_init(model)
    attention = checked(Block, model.blocks[0]).attention
    query, key, value = attention.qkv.weight.chunk(3)
    assert (query[:16].T @ key[:16]).diagonal().mean() > 0.2
    assert (attention.out.weight @ value).diagonal().mean() < -0.3


def test_first_logits_are_even_and_sigmoid_heads_start_low() -> None:
    assert torch.equal(Head(8, 4)(torch.randn(2, 8)), torch.zeros(2, 4))
    assert Head(8, 4, bias=-2.0)(torch.randn(2, 8)).unique().tolist() == [-2.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": (30, 32), "patch": 16}, "30x32 does not divide into patches of 16 pixels: choose multiples"),
        ({"width": 30, "heads": 4}, "width 30 does not divide into 4 heads"),
        ({"class_token": False}, "class_token"),
        ({"activation": "swish"}, "no activation 'swish'"),
        ({"positions": "sin"}, "no positions 'sin': choose from learned, sine, none"),
        ({"registers": -1}, "registers must be at least 0"),
        ({"mlp_ratio": 0.001}, "mlp_ratio must be at least 0.0013"),
        ({"mlp_ratio": math.nan}, "mlp_ratio must be at least 0.0013"),
        ({"mlp_ratio": -math.inf}, "mlp_ratio must be at least 0.0013"),
        ({"stem": (32, 0)}, "stem must be at least 1"),
        ({"num_classes": 5}, "no field 'num_classes' of a model: did you mean classes"),
        ({"img_size": 32}, "no field 'img_size' of a model: did you mean image_size"),
        ({"pretrained": True}, "no field 'pretrained' of a model: the fields are classes, width, depth"),
    ],
)
def test_bad_configs_are_refused_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        config_for("B/16", **changes)
    assert "\n" not in str(caught.value)


def test_bad_images_are_refused_in_one_line() -> None:
    model = ViT(TINY)
    with pytest.raises(UserError, match="10x12 do not divide into patches of 4"):
        model(torch.randn(1, 3, 10, 12))
    with pytest.raises(UserError, match="expected images"):
        model(torch.randn(1, 4, 8, 12))
