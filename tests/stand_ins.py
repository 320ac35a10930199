"""Small data, photos and models under the names that the docs use for what a reader has."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_captioners
from PIL import Image

from vitrail.data.imagenet import synsets

WORDS = ("dog", "cat", "man", "child", "bird", "horse")


def pixels(seed: int, size: tuple[int, ...] = (40, 48, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)


def data_sets(root: Path) -> None:
    """For `$VITRAIL_DATA`: folders with one folder per class, one of captions, and two of masks."""
    for name in ("camvid", "streets"):
        for split in ("train", "val"):
            for i in range(8):
                save(root / name / split / "images" / f"{i}.jpg", pixels(i, (48, 64, 3)))
                save(
                    root / name / split / "masks" / f"{i}.png", np.arange(64, dtype=np.uint8)[None].repeat(48, 0) // 32
                )
    for name, classes in {"pets": ("cat", "dog"), "pictures": ("left", "right"), "images": ("left", "right")}.items():
        for k, label in enumerate(classes):
            for i in range(12):
                save(root / name / label / f"{i}.jpg", pixels(100 * k + i))
    tables: dict[str, tuple[str, Callable[[int], str]]] = {
        "pets": ("label", lambda i: ("cat", "dog")[i % 2]),
        "tags": ("label", lambda i: ("cat|outdoors", "dog|outdoors", "cat|dog")[i % 3]),
        "ages": ("age,height", lambda i: f"{20 + i},1.{i:02}"),
    }
    for name, (columns, cells) in tables.items():
        rows = [f"pets/{('cat', 'dog')[i % 2]}/{i // 2}.jpg,{cells(i)}" for i in range(24)]
        (root / f"{name}.csv").write_text("\n".join([f"image,{columns}", *rows]) + "\n")
    for k, label in enumerate(("old", "new")):
        for i in range(12):
            save(root / "plates" / label / f"{i}.png", pixels(100 * k + i, (40, 48)))
            place = root / "fields" / label / f"{i}.npy"
            place.parent.mkdir(parents=True, exist_ok=True)
            np.save(place, pixels(100 * k + i, (40, 48, 5)))
    for name, side in {"cifar10": (32, 32, 3), "mnist": (28, 28), "fashion-mnist": (28, 28)}.items():
        for split, count in (("train", 4), ("test", 2)):
            for k in range(10):
                for i in range(count):
                    save(root / name / split / str(k) / f"{i}.png", pixels(100 * k + 10 * count + i, side))
    for split in ("train", "val"):
        photos = [encoded(pixels(i, (40, 40, 3))) for i in range(8)]
        for k in range(1000):
            place = root / "imagenet" / split / synsets()[k].wnid
            place.mkdir(parents=True)
            (place / "0.jpg").write_bytes(photos[(k + (split == "val")) % 8])
    for split, count in (("train", 24), ("val", 12)):
        lines = ["image,caption"]
        for i in range(count):
            save(root / "flickr8k" / split / "images" / f"{split}{i}.jpg", pixels(i + 100 * count, (120, 128, 3)))
            lines += [f"{split}{i}.jpg,A {WORDS[(i + k) % 6]} runs on the {WORDS[k]} ." for k in range(5)]
        (root / "flickr8k" / split / "captions.txt").write_text("\n".join(lines))


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG")
    return buffer.getvalue()


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def photos(folder: Path) -> None:
    """What stands in a reader's own folder."""
    for i, name in enumerate(("holiday.jpg", "photo.jpg", "more-images/1.jpg", "more-images/2.png", "my-photos/3.jpg")):
        save(folder / name, pixels(i, (60, 80, 3)))
    (folder / "keys.txt").write_text("a-key-of-many-characters\n")


def hub(root: Path) -> dict[str, Path]:
    """Repositories of the Hub by id, with small models of their kinds and random weights."""
    import timm
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {**tiny_captioners.EYES, "image_size": 32, "patch_size": 16}
    names = {k: ", ".join(synset.synonyms) for k, synset in enumerate(synsets())}
    classifier = ViTForImageClassification(
        ViTConfig(**small, id2label=names, label2id={v: k for k, v in names.items()})
    )
    torch.nn.init.normal_(classifier.get_parameter("classifier.weight"))
    classifier.save_pretrained(root / "vit")
    (root / "vit" / "preprocessor_config.json").write_text(tiny_captioners.PIXELS.replace("16", "32"))
    for kind in ("dinov2", "clip"):
        tiny_captioners.encoder(root / kind, kind)
    for kind, make in tiny_captioners.CAPTIONERS.items():
        make(root / kind)
    tiny_captioners.language_model(root / "gpt2")
    less: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
    peer = timm.create_model("vit_base_patch16_224", num_classes=1000, **less)
    torch.nn.init.normal_(peer.get_parameter("head.weight"))
    timm.models.save_for_hf(peer, str(root / "timm"), model_args=less)
    return {
        "google/vit-base-patch16-224": root / "vit",
        "facebook/deit-tiny-patch16-224": root / "vit",
        "facebook/dinov2-small": root / "dinov2",
        "openai/clip-vit-base-patch32": root / "clip",
        "openai-community/gpt2": root / "gpt2",
        "nlpconnect/vit-gpt2-image-captioning": root / "vision-encoder-decoder",
        "Salesforce/blip-image-captioning-base": root / "blip",
        "microsoft/git-base-coco": root / "git",
        "timm/vit_base_patch16_224.augreg_in21k": root / "timm",
        "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k": root / "timm",
        "timm/vit_small_patch16_224.augreg_in21k": root / "timm",
    }
