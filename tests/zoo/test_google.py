"""Google's and big_vision's `.npz`, against their formulas written in NumPy from the layout of their arrays."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitrail
from vitrail.errors import UserError
from vitrail.tasks.task import Task
from vitrail.zoo import convert, load_certified

Arrays = dict[str, np.ndarray]
WIDTH, HEADS, HIDDEN, PATCH, DEPTH, SIDE = 16, 2, 24, 4, 2, 3


def drawn(seed: int) -> Any:
    random = np.random.default_rng(seed)
    return lambda *shape: np.asarray(random.normal(0, 0.5, shape), np.float32)


def block(draw: Any, at: str, second: str, attention: str, mlp: str) -> Arrays:
    arrays = {f"{at}/LayerNorm_0/scale": draw(WIDTH), f"{at}/LayerNorm_0/bias": draw(WIDTH)}
    arrays |= {f"{at}/{second}/scale": draw(WIDTH), f"{at}/{second}/bias": draw(WIDTH)}
    return arrays | attention_arrays(draw, f"{at}/{attention}") | mlp_arrays(draw, f"{at}/{mlp}")


def attention_arrays(draw: Any, at: str) -> Arrays:
    arrays = {f"{at}/out/kernel": draw(HEADS, WIDTH // HEADS, WIDTH), f"{at}/out/bias": draw(WIDTH)}
    for name in ("query", "key", "value"):
        arrays[f"{at}/{name}/kernel"] = draw(WIDTH, HEADS, WIDTH // HEADS)
        arrays[f"{at}/{name}/bias"] = draw(HEADS, WIDTH // HEADS)
    return arrays


def mlp_arrays(draw: Any, at: str) -> Arrays:
    arrays = {f"{at}/Dense_0/kernel": draw(WIDTH, HIDDEN), f"{at}/Dense_0/bias": draw(HIDDEN)}
    return arrays | {f"{at}/Dense_1/kernel": draw(HIDDEN, WIDTH), f"{at}/Dense_1/bias": draw(WIDTH)}


def paper(token: bool = True, hidden: int | None = None, classes: int | None = 5) -> Arrays:
    draw = drawn(0)
    arrays = {"embedding/kernel": draw(PATCH, PATCH, 3, WIDTH), "embedding/bias": draw(WIDTH)}
    arrays["Transformer/posembed_input/pos_embedding"] = draw(1, SIDE * SIDE + token, WIDTH)
    if token:
        arrays["cls"] = draw(1, 1, WIDTH)
    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}"
        arrays |= block(draw, at, "LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
    arrays |= {"Transformer/encoder_norm/scale": draw(WIDTH), "Transformer/encoder_norm/bias": draw(WIDTH)}
    if hidden:
        arrays |= {"pre_logits/kernel": draw(WIDTH, hidden), "pre_logits/bias": draw(hidden)}
    if classes:
        arrays |= {"head/kernel": draw(hidden or WIDTH, classes), "head/bias": draw(classes)}
    return arrays


def big_vision(pool: str, learned: bool = True, classes: int | None = 5, stacked: bool = False) -> Arrays:
    draw = drawn(1)
    arrays = {"embedding/kernel": draw(PATCH, PATCH, 3, WIDTH), "embedding/bias": draw(WIDTH)}
    if learned:
        arrays["pos_embedding"] = draw(1, SIDE * SIDE, WIDTH)
    if pool == "tok":
        arrays["cls"] = draw(1, 1, WIDTH)
    blocks = [
        block(draw, "Transformer/encoderblock", "LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
        for _ in range(DEPTH)
    ]
    for name in blocks[0]:
        if stacked:
            arrays[name] = np.stack([b[name] for b in blocks])
        else:
            arrays |= {name.replace("block/", f"block_{i}/"): b[name] for i, b in enumerate(blocks)}
    arrays |= {"Transformer/encoder_norm/scale": draw(WIDTH), "Transformer/encoder_norm/bias": draw(WIDTH)}
    if pool == "map":
        arrays["MAPHead_0/probe"] = draw(1, 1, WIDTH)
        arrays |= {"MAPHead_0/LayerNorm_0/scale": draw(WIDTH), "MAPHead_0/LayerNorm_0/bias": draw(WIDTH)}
        arrays |= attention_arrays(draw, "MAPHead_0/MultiHeadDotProductAttention_0")
        arrays |= mlp_arrays(draw, "MAPHead_0/MlpBlock_0")
    if classes:
        arrays |= {"head/kernel": draw(WIDTH, classes), "head/bias": draw(classes)}
    return arrays


# The reference: float64, one formula a function, nothing shared with the package


def norm(x: np.ndarray, p: Arrays, at: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{at}/scale"] + p[f"{at}/bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(x: np.ndarray, y: np.ndarray, p: Arrays, at: str) -> np.ndarray:
    q = np.einsum("bnw,whd->bnhd", x, p[f"{at}/query/kernel"]) + p[f"{at}/query/bias"]
    k, v = (
        np.einsum("bnw,whd->bnhd", y, p[f"{at}/{name}/kernel"]) + p[f"{at}/{name}/bias"] for name in ("key", "value")
    )
    weights = softmax(np.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1]))
    mixed = np.einsum("bhnm,bmhd->bnhd", weights, v)
    return np.einsum("bnhd,hdw->bnw", mixed, p[f"{at}/out/kernel"]) + p[f"{at}/out/bias"]


def mlp(x: np.ndarray, p: Arrays, at: str) -> np.ndarray:
    x = x @ p[f"{at}/Dense_0/kernel"] + p[f"{at}/Dense_0/bias"]
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x @ p[f"{at}/Dense_1/kernel"] + p[f"{at}/Dense_1/bias"]


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """[B, H, W, C] with a kernel [h, w, C, K], padded as TensorFlow's SAME."""
    h, w = kernel.shape[:2]
    padded = np.pad(x, [(0, 0), same(x.shape[1], h, stride), same(x.shape[2], w, stride), (0, 0)])
    rows, columns = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
    out = np.zeros((len(x), rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[:, i * stride : i * stride + h, j * stride : j * stride + w]
            out[:, i, j] = np.einsum("bhwc,hwck->bk", patch, kernel)
    return out


def same(n: int, size: int, stride: int) -> tuple[int, int]:
    pad = max((-(-n // stride) - 1) * stride + size - n, 0)
    return pad // 2, pad - pad // 2


def standardised(kernel: np.ndarray) -> np.ndarray:
    kernel = kernel - kernel.mean((0, 1, 2))
    return kernel / (kernel.std((0, 1, 2)) + 1e-5)


def group_norm(x: np.ndarray, p: Arrays, at: str) -> np.ndarray:
    groups = x.reshape(*x.shape[:3], 32, -1)
    centred = groups - groups.mean((1, 2, 4), keepdims=True)
    groups = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    return groups.reshape(x.shape) * p[f"{at}/scale"].reshape(-1) + p[f"{at}/bias"].reshape(-1)


def resnet(x: np.ndarray, p: Arrays, units: tuple[int, ...]) -> np.ndarray:
    x = np.maximum(group_norm(convolve(x, standardised(p["conv_root/kernel"]), 2), p, "gn_root"), 0)
    padded = np.pad(x, [(0, 0), same(x.shape[1], 3, 2), same(x.shape[2], 3, 2), (0, 0)], constant_values=-np.inf)
    n = x.shape[1] // 2
    x = np.array(
        [[padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(n)] for i in range(n)]
    ).transpose(2, 0, 1, 3)
    for i, count in enumerate(units):
        for j in range(count):
            at, stride = f"block{i + 1}/unit{j + 1}", 2 if i > 0 and j == 0 else 1
            y = x
            for k, step in ((1, 1), (2, stride), (3, 1)):
                y = group_norm(convolve(y, standardised(p[f"{at}/conv{k}/kernel"]), step), p, f"{at}/gn{k}")
                y = np.maximum(y, 0) if k < 3 else y
            if j == 0:
                x = group_norm(convolve(x, standardised(p[f"{at}/conv_proj/kernel"]), stride), p, f"{at}/gn_proj")
            x = np.maximum(x + y, 0)
    return x


def sines(side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    omega = 1 / 10_000 ** (np.arange(WIDTH // 4) / (WIDTH // 4 - 1))
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)


def forward(arrays: Arrays, images: np.ndarray, units: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Final tokens and logits (or the pooled vector) for images [B, H, W, C]."""
    p = {name: value.astype(np.float64) for name, value in arrays.items()}
    x = resnet(images, p, units) if units is not None else images
    kernel = p["embedding/kernel"]
    size = kernel.shape[0]
    b, n = len(x), x.shape[1] // size
    cut = x.reshape(b, n, size, n, size, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, n * n, -1)
    x = cut @ kernel.reshape(-1, kernel.shape[3]) + p["embedding/bias"]
    older = "Transformer/posembed_input/pos_embedding" in p
    if not older:
        x = x + p.get("pos_embedding", sines(n))
    if "cls" in p:
        x = np.concatenate([np.tile(p["cls"], (b, 1, 1)), x], 1)
    if older:
        x = x + p["Transformer/posembed_input/pos_embedding"]
    second, attention, dense = (
        ("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3")
        if any("/LayerNorm_2/" in name for name in p)
        else ("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0")
    )
    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}"
        y = norm(x, p, f"{at}/LayerNorm_0")
        x = x + attend(y, y, p, f"{at}/{attention}")
        x = x + mlp(norm(x, p, f"{at}/{second}"), p, f"{at}/{dense}")
    tokens = norm(x, p, "Transformer/encoder_norm")
    if "MAPHead_0/probe" in p:
        x = attend(np.tile(p["MAPHead_0/probe"], (b, 1, 1)), tokens, p, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = (x + mlp(norm(x, p, "MAPHead_0/LayerNorm_0"), p, "MAPHead_0/MlpBlock_0"))[:, 0]
    else:
        x = tokens[:, 0] if "cls" in p else tokens.mean(1)
    if "pre_logits/kernel" in p:
        x = np.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    if "head/kernel" in p:
        x = x @ p["head/kernel"] + p["head/bias"]
    return tokens, x


def check(task: Task, arrays: Arrays, units: tuple[int, ...] | None = None) -> None:
    height, width = task.preprocess.size
    images = drawn(9)(2, height, width, 3)
    tokens, out = forward(arrays, images, units)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        ours = torch.cat(task.features(given)[:2], 1).numpy()
        np.testing.assert_allclose(ours, tokens, atol=1e-4 * np.abs(tokens).max())
        np.testing.assert_allclose(task(given).numpy(), out, atol=1e-4 * np.abs(out).max())


def saved(path: Path, arrays: Arrays, prefix: str = "", **more: np.ndarray) -> Path:
    np.savez(path, **{prefix + name: value for name, value in arrays.items()}, **more)  # type: ignore[arg-type]
    return path


def linen(arrays: Arrays) -> Arrays:
    """The same under the names that the paper's code writes since it uses flax's linen."""
    renamed = {}
    for name, value in arrays.items():
        for old, new in (("LayerNorm_2", "LayerNorm_1"), ("Attention_1", "Attention_0"), ("MlpBlock_3", "MlpBlock_0")):
            name = name.replace(old, new)
        group = re.search(r"(^|/)gn(\d|_\w+)/", name)  # its group norms have one dimension
        renamed[name] = value.reshape(-1) if group else value
    return renamed


PAPERS = [paper(), paper(hidden=7), paper(token=False), paper(classes=None)]
BIG = [
    big_vision("tok"),
    big_vision("gap"),
    big_vision("gap", learned=False),
    big_vision("map", classes=None),
    big_vision("map", learned=False),
]


@pytest.mark.parametrize("arrays", PAPERS)
def test_the_papers_models(tmp_path: Path, arrays: Arrays) -> None:
    check(vitrail.load(saved(tmp_path / "a.npz", arrays)), arrays)


@pytest.mark.parametrize("arrays", PAPERS)
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/", "0/", "params/params/"])
def test_what_the_papers_code_writes_today(tmp_path: Path, arrays: Arrays, prefix: str) -> None:
    """The optimizer's moments have the same names; the files are not taken for big_vision's."""
    moments = {f"opt/state/0/mu/{name}": np.zeros_like(value) for name, value in arrays.items()} if prefix else {}
    path = saved(tmp_path / "a.npz", linen(arrays), prefix, **linen(moments))
    check(vitrail.load(path), arrays)
    assert load_certified(path)[1].source == "Google's .npz"


def test_an_average_comes_before_what_it_averages(tmp_path: Path) -> None:
    arrays = linen(paper())
    other = {f"params/{name}": np.zeros_like(value) for name, value in arrays.items()}
    path = saved(tmp_path / "a.npz", arrays, "ema_params/", **other)
    check(vitrail.load(path), arrays)
    assert "'ema_params/' are used" in load_certified(path)[1].left["params/embedding/bias"]


@pytest.mark.parametrize("today", [False, True])
def test_the_papers_code_without_positions(tmp_path: Path, today: bool) -> None:
    """`add_position_embedding=False`: no positions, where big_vision's files have fixed ones."""
    arrays = hybrid((1,)) if today else paper(token=False)
    del arrays["Transformer/posembed_input/pos_embedding"]
    task = vitrail.load(saved(tmp_path / "a.npz", linen(arrays) if today else arrays))
    assert task.encoder.config.positions == "none"


@pytest.mark.parametrize("arrays", BIG)
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_big_visions_models(tmp_path: Path, arrays: Arrays, prefix: str) -> None:
    more = {"opt/0/mu": np.zeros(3, np.float32)} if prefix else {}
    # Fixed positions name no size: 224 pixels are too many for a reference in loops.
    task = vitrail.load(saved(tmp_path / "a.npz", arrays, prefix, **more), image_size=SIDE * PATCH)
    check(task, arrays)


def test_layers_that_stand_stacked(tmp_path: Path) -> None:
    flat, stacked = big_vision("map"), big_vision("map", stacked=True)
    check(vitrail.load(saved(tmp_path / "a.npz", stacked, "params/")), flat)


def test_the_image_tower_of_two_without_and_with_a_projection(tmp_path: Path) -> None:
    texts = {"params/txt/Embed_0/embedding": np.zeros((9, 4), np.float32), "params/t": np.ones(1, np.float32)}
    arrays = big_vision("map", classes=None)
    check(vitrail.load(saved(tmp_path / "siglip.npz", arrays, "params/img/", **texts)), arrays)
    arrays = big_vision("tok", classes=6)
    task = vitrail.load(saved(tmp_path / "lit.npz", arrays, "params/img/", **texts))
    assert task.name == "embed"
    check(task, arrays)


def hybrid(units: tuple[int, ...]) -> Arrays:
    draw, channels = drawn(2), 64
    arrays = paper()
    arrays |= {"conv_root/kernel": draw(7, 7, 3, 64), "gn_root/scale": draw(1, 1, 1, 64), "gn_root/bias": draw(64)}
    for i, count in enumerate(units):
        out = 256 * 2**i
        for j in range(count):
            at = f"block{i + 1}/unit{j + 1}"
            shapes = {
                "conv1": (1, 1, channels, out // 4),
                "conv2": (3, 3, out // 4, out // 4),
                "conv3": (1, 1, out // 4, out),
            }
            if j == 0:
                shapes["conv_proj"] = (1, 1, channels, out)
            for name, shape in shapes.items():
                arrays[f"{at}/{name}/kernel"] = draw(*shape)
                gn = f"{at}/{name.replace('conv', 'gn')}"
                arrays |= {f"{gn}/scale": draw(shape[3]), f"{gn}/bias": draw(shape[3])}
            channels = out
    arrays["embedding/kernel"] = draw(1, 1, channels, WIDTH)
    return arrays


@pytest.mark.parametrize("units", [(), (2,), (1, 2)])
@pytest.mark.parametrize("today", [False, True])
def test_hybrids(tmp_path: Path, units: tuple[int, ...], today: bool) -> None:
    arrays = linen(hybrid(units)) if today else hybrid(units)
    task = vitrail.load(saved(tmp_path / "a.npz", arrays))
    stride = 4 * 2 ** max(0, len(units) - 1)
    assert task.preprocess.size == (SIDE * stride, SIDE * stride)
    check(task, arrays, units)


@pytest.mark.parametrize("arrays", [*PAPERS, *BIG])
def test_there_and_back_to_the_same_bits(tmp_path: Path, arrays: Arrays) -> None:
    source = saved(tmp_path / "a.npz", arrays)
    convert(source, tmp_path / "v")
    certificate = convert(tmp_path / "v", tmp_path / "b.npz", "google")
    assert len(certificate.weights) == len(vitrail.load(source).state_dict())
    with np.load(tmp_path / "b.npz") as again:
        names = {name.removeprefix("params/"): name for name in again.files}
        # Both code bases have averages over learned positions; such a model is written under the paper's names.
        if arrays is not BIG[1]:
            assert names.keys() == arrays.keys()
            for name, value in arrays.items():
                np.testing.assert_array_equal(again[names[name]], value)
    first, second = vitrail.load(tmp_path / "v").state_dict(), vitrail.load(tmp_path / "b.npz").state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_hybrid_there_and_back(tmp_path: Path) -> None:
    variant: dict[str, Any] = {
        "backbone": "resnetv2",
        "backbone_layers": (1, 1),
        "backbone_eps": 1e-6,
        "backbone_weight": "deviation",
        "backbone_weight_eps": 1e-5,
    }
    task = vitrail.create("nano/2", classes=3, patch=8, image_size=(16, 16), activation="gelu_tanh", **variant).eval()
    task.save(tmp_path / "v")
    convert(tmp_path / "v", tmp_path / "out", "google")
    again = vitrail.load(tmp_path / "out")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in task.state_dict().items())
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(again(images), task(images))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "activation='gelu'"),
        ({"registers": 2}, "registers=2"),
        ({"layer_scale": 1e-4}, "layer_scale"),
        ({"norm_eps": 1e-5}, "norm_eps=1e-05"),
        ({"image_size": (8, 16)}, "image_size"),
        ({"stem": (4,)}, "stem"),
        ({"norm": "rms"}, "norm='rms'"),
        ({"rotary": "axial"}, "rotary='axial'"),
    ],
)
def test_what_google_cannot_express_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    if changes:
        changes = {"activation": "gelu_tanh", **changes}
    vitrail.create("nano/2", classes=2, **changes).save(tmp_path / "v")
    with pytest.raises(UserError, match=reason):
        convert(tmp_path / "v", tmp_path / "b.npz", "google")
    assert not (tmp_path / "b.npz").exists()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    arrays = paper()
    with pytest.raises(UserError, match="do not form a square"):
        vitrail.load(
            saved(tmp_path / "a.npz", {**arrays, "Transformer/posembed_input/pos_embedding": np.zeros((1, 6, WIDTH))})
        )
    with pytest.raises(UserError, match="holds surprise"):
        vitrail.load(saved(tmp_path / "b.npz", arrays, surprise=np.zeros(3)))
    del arrays["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"]
    with pytest.raises(UserError, match="lacks Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"):
        vitrail.load(saved(tmp_path / "c.npz", arrays))


def test_bfloat16_from_jax_is_read(tmp_path: Path) -> None:
    arrays = paper()
    short = {name: torch.from_numpy(value).bfloat16() for name, value in arrays.items()}
    stored = {name: value.view(torch.int16).numpy().view("V2") for name, value in short.items()}
    check(
        vitrail.load(saved(tmp_path / "a.npz", stored)), {name: value.float().numpy() for name, value in short.items()}
    )
