"""Built-in sets by name, and sets in the file formats of torchvision and of MNIST's authors."""

from __future__ import annotations

import gzip
import json
import socket
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.sources import cache_folder
from vitrail.errors import UserError

SILENCE = 30.0
"""seconds without data after which a download fails"""

NAMES = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "kmnist", "svhn", "stl10")

# torchvision's class, and the arguments that choose its two splits.
_BY_TRAIN = ({"train": True}, {"train": False})
_BY_SPLIT = ({"split": "train"}, {"split": "test"})
_TORCHVISION: dict[str, tuple[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "cifar10": ("CIFAR10", _BY_TRAIN),
    "cifar100": ("CIFAR100", _BY_TRAIN),
    "mnist": ("MNIST", _BY_TRAIN),
    "fashion-mnist": ("FashionMNIST", _BY_TRAIN),
    "kmnist": ("KMNIST", _BY_TRAIN),
    "svhn": ("SVHN", _BY_SPLIT),
    "stl10": ("STL10", _BY_SPLIT),
}
# What a folder that torchvision has written contains, by which its set is recognised.
_MARKS = {
    "cifar-10-batches-py": "cifar10",
    "cifar-100-python": "cifar100",
    "MNIST": "mnist",
    "FashionMNIST": "fashion-mnist",
    "KMNIST": "kmnist",
    "train_32x32.mat": "svhn",
    "stl10_binary": "stl10",
}
_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass
class Arrays:
    """A whole set in memory: for each split images uint8 [N, C, H, W] and labels int64 [N]."""

    classes: list[str]
    splits: dict[str, tuple[Tensor, Tensor]]


def digits() -> Arrays:
    """1,797 handwritten digits of 8 x 8 grey pixels (UCI optical digits); 360, stratified, are the test split."""
    folder = files("vitrail.data")
    with folder.joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    # The files hold 17 shades.
    images = torch.from_numpy(((images.astype(np.int32) * 255 + 8) // 16).astype(np.uint8))[:, None]
    labels = torch.from_numpy(labels.astype(np.int64))
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[torch.tensor(json.loads(folder.joinpath("digits_test.json").read_text()))] = True
    return Arrays(
        [str(i) for i in range(10)], {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}
    )


def find(root: Path, name: str | None = None) -> Arrays | None:
    """The set (or the one called `name`) whose files are in a folder, in torchvision's or MNIST's layout."""
    for folder in (root, root / "raw"):
        if name is None and _idx_file(folder, _IDX["train"][0]) is not None:
            return _read_idx_set(folder)
    for mark, known in _MARKS.items():
        if name in (None, known) and (root / mark).exists():
            if (folder := root / mark / "raw").is_dir():
                return _read_idx_set(folder, known)
            return _torchvision(known, root, download=False)
    return None


def download(name: str) -> Arrays:
    """A set from torchvision's source for it, verified and kept in `~/.cache/vitrail`."""
    root = cache_folder() / name
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)  # torchvision would wait forever
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _torchvision(name, root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name} could not be downloaded ({reason}): give its folder with --data, or put it in $VITRAIL_DATA/{name}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)


def _torchvision(name: str, root: Path, download: bool) -> Arrays:
    from torchvision import datasets

    kind, arguments = _TORCHVISION[name]
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    classes: list[str] = []
    for split, chosen in zip(("train", "test"), arguments, strict=True):
        try:
            images = getattr(datasets, kind)(str(root), download=download, **chosen)
        except ImportError as error:
            raise UserError(f"{name} needs {error.name}: pip install 'vitrail[data]'") from None
        except RuntimeError as error:
            if download:
                raise
            raise UserError(f"{name} in {root} is not complete: {' '.join(str(error).split())}") from None
        labels = torch.as_tensor(
            np.asarray(images.targets if hasattr(images, "targets") else images.labels), dtype=torch.int64
        )
        splits[split] = (_first_channels(torch.as_tensor(images.data)), labels)
        classes = [str(c) for c in getattr(images, "classes", [])] or [str(i) for i in range(int(labels.max()) + 1)]
    return Arrays(classes, splits)


def _first_channels(images: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, 3] or [N, 3, H, W] to [N, C, H, W]."""
    if images.ndim == 3:
        return images[:, None].contiguous()
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[-1] == 3 else images.contiguous()


def _idx_file(folder: Path, name: str) -> Path | None:
    names = (name, f"{name}.gz", name.replace("-idx", ".idx"), f"{name.replace('-idx', '.idx')}.gz")
    return next((folder / each for each in names if (folder / each).is_file()), None)


def _read_idx_set(folder: Path, name: str | None = None) -> Arrays:
    """A set of MNIST's layout, plain or gzipped."""
    splits: dict[str, tuple[Tensor, Tensor]] = {}
    for split, names in _IDX.items():
        found = [_idx_file(folder, each) for each in names]
        if found[0] is None and split == "test":
            continue
        if None in found:
            missing = names[found.index(None)]
            raise UserError(f"{folder} lacks {missing} (or {missing}.gz)")
        images, labels = (_read_idx(each) for each in found if each is not None)
        if len(images) != len(labels) or images.ndim != 3:
            raise UserError(
                f"{found[0]} and {found[1]} do not belong together: {len(images)} images, {len(labels)} labels"
            )
        splits[split] = (images[:, None], labels.long())
    count = max(int(labels.max()) for _, labels in splits.values()) + 1
    is_clothes = name == "fashion-mnist" or (name is None and "fashion" in str(folder).lower())
    return Arrays(_CLOTHES if is_clothes and count == 10 else [str(i) for i in range(count)], splits)


def _read_idx(path: Path) -> Tensor:
    """MNIST's own format: two zeros, the type (8 for bytes), the axes, their sizes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read()
        axes = data[3]
        if data[:3] != b"\0\0\x08":
            raise ValueError("its first bytes are not those of an idx file of bytes")
        sizes = np.frombuffer(data, ">u4", axes, offset=4).tolist()
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes).copy())
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
