"""Compare every architecture of timm's ViT modules with vitrail: same random weights, three sizes.

    python bench/parity.py            all that results/parity-timm.json does not have for the installed timm
    python bench/parity.py vit_base*  all that match, again

A row is the largest difference divided by the largest value, in logits and in final tokens: at the model's own size;
created at another square size and at one that is not square, with the weights resized; and if timm can, with a size
that changes at run time. Models have two blocks: one if they are wide, and three if windowed and global attention
alternate. The exit code is 1 if a difference is above the limit or an architecture is missing. `--tiny` compares the
smallest ones of three modules.
"""

from __future__ import annotations

import fnmatch
import gc
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from harness import Parser, Row, record, recorded
from torch import Tensor, nn

from vitrail.tasks.task import Task
from vitrail.variants import resize
from vitrail.vit import ViT
from vitrail.zoo.assemble import assemble
from vitrail.zoo.source import Files
from vitrail.zoo.timm import flat, read
from vitrail.zoo.timm.arguments import table

log = logging.getLogger("vitrail")

MODULES = ("vision_transformer", "deit", "beit", "vision_transformer_hybrid", "vision_transformer_sam", "eva")
NAME = "parity-timm"
CLASSES = 11
LIMIT = 1e-4
WIDE = 1200
"""wider architectures have one block instead of two"""
Size = tuple[int, int]


def parser() -> Parser:
    parser = Parser(__doc__, patterns=["test_vit", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names of timm's architectures, as vit_base*")
    return parser


def main() -> int:
    asked = parser().parse_args()
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in asked.patterns)]
    expected = chosen if asked.tiny else names
    rows: Row = {} if asked.tiny else recorded(NAME, asked.results)
    wanted = (
        chosen if asked.patterns else [name for name in names if rows.get(name, {}).get("timm") != timm.__version__]
    )
    failed = 0
    for number, name in enumerate(wanted, 1):
        start = time.perf_counter()
        row = compare(name)
        worst = worst_of(row)
        failed += worst > LIMIT
        rows[name] = row
        record(NAME, {key: rows[key] for key in names if key in rows}, asked.results)
        took = time.perf_counter() - start
        print(f"{number}/{len(wanted)} {name}: {worst:.1e} in {took:.1f} s", file=sys.stderr, flush=True)
        gc.collect()
    missing = [name for name in expected if name not in rows]
    worst = max((worst_of(row) for row in rows.values()), default=0.0)
    print(f"{len(rows)} of {len(expected)} architectures, largest difference {worst:.1e}, {len(missing)} missing")
    return int(failed > 0 or bool(missing) or not expected)


def worst_of(row: dict[str, Any]) -> float:
    return max(max(found["logits"], found["tokens"]) for found in row["sizes"].values())


def compare(name: str, **smaller: Any) -> dict[str, Any]:
    """The differences of one architecture at each size; `smaller` are further arguments for timm."""
    arguments = {**shallow(name), **smaller}
    peer = timm_model(name, arguments)
    randomise(peer, seed=sum(map(ord, name)))
    weights = dict(peer.state_dict())
    task = ours(name, arguments, weights)
    encoder = task.encoder
    assert isinstance(encoder, ViT)
    own = encoder.config.image_size
    sizes = {_by(own): difference(task, peer, own)}
    if table()[name]["class"] == "VisionTransformerSAM":
        # timm's SAM accepts any size at run time, and cannot load weights of another size.
        for size in others(encoder, own):
            sizes[_by(size)] = difference(task, peer, size)
    else:
        for size in others(encoder, own):
            resized = timm_model(name, {**arguments, "img_size": size})
            resized.load_state_dict(filtered(name, resized, weights), assign=True)
            task_at_size = ours(name, arguments, weights)
            assert isinstance(task_at_size.encoder, ViT)
            resize(task_at_size.encoder, size)
            sizes[_by(size)] = difference(task_at_size, resized, size)
            del resized, task_at_size
        if table()[name]["class"] != "Beit":
            moving = timm_model(name, {**arguments, "dynamic_img_size": True, "img_size": own})
            moving.load_state_dict(weights, assign=True)
            size = others(encoder, own)[1]
            sizes[f"{_by(size)} at run time"] = difference(task, moving, size)
    return {"timm": timm.__version__, "arguments": arguments, "sizes": sizes}


def shallow(name: str) -> dict[str, Any]:
    """Arguments for few blocks of each kind, and a head with few classes."""
    values = table()[name]
    arguments: dict[str, Any] = {"depth": 1 if values.get("embed_dim", 768) > WIDE else 2, "num_classes": CLASSES}
    if "global_attn_indexes" in values:
        arguments |= {"depth": 3, "global_attn_indexes": [1]}
    if kv_heads := values.get("num_kv_heads"):
        # The first blocks have all key and value heads, those in the middle fewer.
        arguments["num_kv_heads"] = [kv_heads[0], kv_heads[len(kv_heads) // 2]][-arguments["depth"] :]
    return arguments


def timm_model(name: str, arguments: dict[str, Any]) -> Any:
    """A model without initialised weights: timm's initialisation takes longer than the comparison."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, **arguments)
    model = model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        elif hasattr(module, "_init_buffers"):
            module._init_buffers()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every weight a random value, also those that are initialised to zero or one."""
    generator = torch.Generator().manual_seed(seed)
    pool, start = torch.randn(1_000_003, generator=generator), 0  # a prime: no two rows of a matrix are the same
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            value.zero_()
            continue
        count = value.numel()
        first = start % len(pool)
        repeated = pool.repeat(-(-(first + count) // len(pool)))[first : first + count]
        start += count
        value.copy_(repeated.view(value.shape) * scale(name, value))
        if name.endswith("running_var"):
            value.abs_().add_(0.5)
        elif value.ndim == 1 and name.endswith("weight"):
            value.add_(1.0)


def scale(name: str, value: Tensor) -> float:
    """Matrices and filters keep the scale of activations; other weights are of the order of one."""
    if value.ndim >= 2 and name.endswith("weight"):
        return float(value[0].numel() ** -0.5)
    if name.startswith("rope."):
        return 1.0
    return 0.3


def ours(name: str, arguments: dict[str, Any], weights: dict[str, Tensor]) -> Task:
    """The model that vitrail reads from these weights."""
    model_args = {key: value for key, value in arguments.items() if key != "num_classes"}
    config = {"architecture": name, "model_args": model_args, "pretrained_cfg": {"num_classes": CLASSES}}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    files = Files(Path(name), {"config.json": config}, weights, shapes)
    return assemble(files, read(files))


def filtered(name: str, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as timm's own loading adapts them to the model."""
    found: list[Any] = []
    module = sys.modules[timm.model_entrypoint(name).__module__]
    original = module.build_model_with_cfg
    module.build_model_with_cfg = lambda *args, **named: found.append(named["pretrained_filter_fn"])  # type: ignore[attr-defined]
    try:
        timm.model_entrypoint(name)()
    finally:
        module.build_model_with_cfg = original  # type: ignore[attr-defined]
    return found[0](dict(weights), model)


@torch.inference_mode()
def difference(task: Task, peer: Any, size: Size) -> dict[str, float]:
    """The largest difference divided by the largest value."""
    generator = torch.Generator().manual_seed(0)
    assert isinstance(task.encoder, ViT)
    images = torch.randn(1, task.encoder.config.channels, *size, generator=generator)
    theirs = peer.forward_features(images)
    logits = peer.forward_head(theirs)
    tokens = task.features(images)
    own = torch.cat([tokens.prefix, tokens.patches], dim=1)
    return {
        "logits": relative(task(images), logits),
        "tokens": relative(own, flat(theirs)),
    }


def relative(own: Tensor, theirs: Tensor) -> float:
    assert own.shape == theirs.shape, (own.shape, theirs.shape)
    found = float((own - theirs).abs().max() / theirs.abs().max())
    return found if found == found else float("inf")


def others(encoder: ViT, own: Size) -> list[Size]:
    """A square size and one that is not, both with another number of patches than the model's own size."""
    patch = encoder.config.patch
    side = 6 if own != (6 * patch, 6 * patch) else 8
    return [(side * patch, side * patch), (5 * patch, 9 * patch)]


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


if __name__ == "__main__":
    log.setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # from timm's interpolation
    sys.exit(main())
