"""vitrail's attention maps against plain softmax by hand, on models of timm and transformers and on bundled weights.

    python bench/attention_maps.py

Each library's own model runs on two images, with fused attention and without. Hooks read the input of every attention,
and `softmax(q k / sqrt(d))` is computed one head and one image at a time from the module's own weights. vitrail reads
the same weights, and its maps (`vitrail.explain.attention.attention_maps`) are compared with those, also with and
without fused attention. Rows hold the largest absolute difference over all layers. Ends with 1 above 1e-5.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from harness import Parser, Row, code, record
from peers import huggingface
from peers import timm as peer_timm
from peers.comparison import random_images, randomise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitrail
from vitrail.explain.attention import attention_maps
from vitrail.vit import Attention

LIMIT = 1e-5
TIMM = (
    "test_vit",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
)
HUGGINGFACE = ("vit, classes", "deit, distilled", "dinov2", "dinov2_with_registers", "clip_vision_model", "vit_msn")
BUNDLED = ("classify", "caption")
"""the segmenter attends in windows with rotary positions, whose maps tests/explain/test_trace.py compares"""
SIZE = (112, 112)
Inputs = list[tuple[nn.Module, Tensor]]


def parser() -> Parser:
    return Parser(__doc__)


def softmax(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """A [B, heads, T, T] of queries and keys [B, T, D], one head and one image at a time, in double precision."""
    images, tokens, width = q.shape
    found, size = torch.empty(images, heads, tokens, tokens, dtype=torch.float64), width // heads
    for image in range(images):
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            scores = q[image, :, columns].double() @ k[image, :, columns].double().T / math.sqrt(size)
            powers = (scores - scores.max(dim=1, keepdim=True).values).exp()
            found[image, head] = powers / powers.sum(dim=1, keepdim=True)
    return found


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[Inputs]:
    """The tokens that each module reads, as it runs."""
    found: Inputs = []

    def read(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((module, args[0] if args else named["hidden_states"]))

    hooks = [module.register_forward_pre_hook(read, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def joint(module: Any, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Queries and keys [B, T, D] of one `qkv`, as in timm and vitrail, and the number of heads."""
    qkv = module.qkv(x)
    if getattr(module, "q_bias", None) is not None:
        qkv = qkv + torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    q, k, _ = qkv.chunk(3, dim=-1)
    heads = getattr(module, "num_heads", None) or module.heads
    q, k = (normed(module, name, rows, heads) for name, rows in (("q_norm", q), ("k_norm", k)))
    return q, k, heads


def normed(module: Any, name: str, rows: Tensor, heads: int) -> Tensor:
    """Queries or keys [B, T, D] after the module's layer norm of each head, if it has one."""
    norm = getattr(module, name, None)
    if norm is None or isinstance(norm, nn.Identity):
        return rows
    assert isinstance(norm, nn.LayerNorm), f"{type(norm).__name__} is not computed by hand here"
    each = rows.unflatten(-1, (heads, -1))
    centred = each - each.mean(dim=-1, keepdim=True)
    scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()
    return (scaled * norm.weight + (0 if norm.bias is None else norm.bias)).flatten(-2)


def separate(module: Any, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Queries and keys [B, T, D] of two linear layers, as in transformers."""
    names = ("query", "key") if hasattr(module, "query") else ("q_proj", "k_proj")
    heads = getattr(module, "num_attention_heads", None) or module.num_heads
    return getattr(module, names[0])(x), getattr(module, names[1])(x), heads


@torch.no_grad()
def by_hand(run: Callable[[], object], modules: list[nn.Module], project: Callable[..., Any]) -> list[Tensor]:
    with inputs_of(modules) as found:
        run()
    return [softmax(*project(module, x)) for module, x in found]


def compare(task: Any, images: Tensor, theirs: dict[str, list[Tensor]]) -> Row:
    """The largest differences: theirs fused and plain, each against vitrail's fused and plain."""
    row: Row = {"layers": 0, "tokens": 0}
    for kind, backends in (("fused", list(SDPBackend.__members__.values())), ("plain", [SDPBackend.MATH])):
        with sdpa_kernel([backend for backend in backends if backend != SDPBackend.ERROR]):
            ours = attention_maps(task, images)
        assert len(ours) == len(theirs[kind]) > 0, f"{len(ours)} layers, and {len(theirs[kind])} of theirs"
        row[kind] = max(float((a - b).abs().max()) for a, b in zip(ours, theirs[kind], strict=True))
        row["layers"], row["tokens"] = len(ours), ours.shape[-1]
    return row


def timm_row(name: str) -> Row:
    arguments = {**peer_timm.shallow(name), "img_size": 112 if "224" in name or "dinov2" in name else None}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    peer = peer_timm.timm_model(name, arguments)
    randomise(peer, seed=0)
    task = peer_timm.ours(name, arguments, dict(peer.state_dict()))
    images = random_images(task.encoder.config.image_size)
    modules = [block.attn for block in peer.blocks]
    theirs = {}
    for kind in ("fused", "plain"):
        for module in modules:
            module.fused_attn = kind == "fused"
        theirs[kind] = by_hand(lambda: peer(images), modules, joint)
    return compare(task, images, theirs)


def huggingface_row(name: str) -> Row:
    model = huggingface.randomised(huggingface.MODELS[name])
    images = random_images(huggingface.SIZE)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        task = vitrail.load(folder)
        theirs = {}
        for kind, implementation in (("fused", "sdpa"), ("plain", "eager")):
            loaded = type(model).from_pretrained(folder, attn_implementation=implementation).eval()
            pairs = (("query", "key"), ("q_proj", "k_proj"))
            modules = [
                module
                for module in loaded.modules()
                if any(isinstance(getattr(module, name, None), nn.Linear) for pair in pairs for name in pair)
            ]
            theirs[kind] = by_hand(lambda loaded=loaded: loaded(images), modules, separate)  # type: ignore[misc]
        return compare(task, images, theirs)


def bundled_row(name: str) -> Row:
    task = vitrail.load(name)
    images = random_images(task.preprocess.size)
    modules: list[nn.Module] = [module for module in task.encoder.blocks.modules() if isinstance(module, Attention)]
    theirs = {}
    for kind, backends in (("fused", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), ("plain", [SDPBackend.MATH])):
        with sdpa_kernel(backends):
            theirs[kind] = by_hand(lambda: task.features(images), modules, joint)
    return compare(task, images, theirs)


def main() -> int:
    args = parser().parse_args()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    rows: Row = {}
    timm, hugging_face, own = (TIMM, timm_row), (HUGGINGFACE, huggingface_row), (BUNDLED, bundled_row)
    for library, (names, measure) in {"timm": timm, "huggingface": hugging_face, "vitrail": own}.items():
        for name in names[: 1 if args.tiny else None]:
            row = measure(name) | code()
            rows[f"{library}/{name}"] = row
            print(f"{library}/{name}: fused {row['fused']:.1e}, plain {row['plain']:.1e}", flush=True)
    record("attention-maps", rows, args.results)
    return int(max(max(row["fused"], row["plain"]) for row in rows.values()) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
