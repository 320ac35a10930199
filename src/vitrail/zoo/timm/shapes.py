"""What the names and shapes of timm's weights tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from vitrail.errors import UserError
from vitrail.zoo.source import Files
from vitrail.zoo.timm.arguments import Arguments, encoder_config

LEFT = (
    (r"\.relative_position_index$", "an index that follows from the size"),
    (r"^(mask_token|lm_head\.\w+)$", "of the pre-training"),
    (r"^pre_logits\.", "timm leaves the pre-training head's hidden layer out"),
    (r"\.k_bias$", "zero by construction"),
)
"""names that timm's own loading ignores, and why"""

OWN = re.compile(
    r"^(cls_token|dist_token|reg_token|pos_embed|rope\.freqs)$"
    r"|^(norm|norm_pre|fc_norm|head|head\.fc|head_dist|pre_logits\.fc)\.(weight|bias)$"
    r"|^(patch_embed|attn_pool|neck|rel_pos_bias)\."
    r"|^blocks\.\d+\.(norm[12]|attn|mlp|ls[12]?|gamma_[12]|in_norm|in_proj|mlp_bias|q_norm|k_norm|sub_norm|lambda_\w+"
    r"|attn_out_proj|mlp_out_proj|out_proj|attns|ffns)(\.|$)"
)
"""names of timm's bare state dicts"""

FIRST = (
    "patch_embed.backbone.stem.conv.weight",
    "patch_embed.backbone.conv.weight",
    "patch_embed.backbone.conv1.0.weight",
    "patch_embed.backbone.0.conv.weight",
    "patch_embed.proj.weight",
)
"""the first convolution: of a backbone, or the patch projection"""


def used_names(files: Files) -> Iterator[str]:
    """Names of the weights, without buffers and biases that are fixed."""
    return (name for name in files.weights if not any(re.search(pattern, name) for pattern, _ in LEFT[:1] + LEFT[3:]))


def channels_of(files: Files) -> int:
    """The number of image channels. UserError without a patch projection."""
    first = next((n for n in FIRST if n in files.shapes), None)
    if first is None or len(files.shapes[first]) != 4:
        raise UserError(
            f"{files.path} has no patch projection such as {FIRST[0]}: it is not a ViT of timm, or truncated"
        )
    return files.shapes[first][1]


def input_size(values: Arguments, given: Arguments, images: Arguments) -> tuple[int, int]:
    """(height, width) as in timm: from the arguments, or from the checkpoint if its size is fixed."""
    size = given.get("img_size") or values.get("img_size")
    if size is None or (images["fixed_input_size"] and "img_size" not in given):
        size = images["input_size"][-2:]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def fitted_size(files: Files, values: Arguments, size: tuple[int, int], notes: list[str]) -> tuple[int, int]:
    """`size`, or the size of the learned positions if the two differ."""
    shape = files.shapes.get("pos_embed")
    if shape is None:
        return size
    config = encoder_config(values, size)
    if len(shape) == 4:
        grid = (shape[1], shape[2])
    elif (count := shape[1] - config.placed_tokens) == math.prod(config.grid):
        return size
    elif (side := math.isqrt(max(count, 0))) ** 2 == count > 0:
        grid = (side, side)
    else:
        raise UserError(
            f"{files.path}: pos_embed is for {count} patches, which do not form a square, but images of "
            f"{size[0]}x{size[1]} have {math.prod(config.grid)}: give img_size in model_args"
        )
    found = (grid[0] * config.patch, grid[1] * config.patch)
    if grid != config.grid:
        notes.append(f"the positions are for {found[0]}x{found[1]} pixels, and so is the model")
    return found if grid != config.grid else size


def outputs_of(files: Files) -> int | None:
    """The number of the head's outputs; None without a head."""
    shape = files.shapes.get("head.weight") or files.shapes.get("head.fc.weight")
    return shape[0] if shape else None


def depth_of(files: Files) -> int:
    """The number of blocks."""
    blocks = [int(name.split(".")[1]) for name in files.weights if re.match(r"blocks\.\d+\.", name)]
    return max(blocks, default=-1) + 1
