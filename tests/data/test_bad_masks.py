"""A mask that cannot be used is left out and counted by the loader, with one line that names it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from images import encoded
from mask_data import SIZE, flat, numbers, put

from vitrail.data.loader import Loader
from vitrail.data.masks import Masks
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import Splits
from vitrail.errors import UserError


def through_the_loader(splits: Splits, train: bool, max_bad: float = 1.0, memory: bool = False) -> Loader:
    loader = Loader(splits.train, Preprocess(SIZE), batch_size=2, seed=0, train=train, memory=memory, max_bad=max_bad)
    batches = loader.batches() if train else loader.evaluation()
    for _ in range(8 if train else 1):
        for batch in [next(batches)] if train else batches:
            assert batch["mask"].shape[1:] == SIZE and ((batch["mask"] < 3) | (batch["mask"] == 255)).all()
    return loader


def spoil(root: Path, how: str) -> None:
    """Spoil the mask of image 1."""
    mask = numbers(1)
    if how == "missing":
        (root / "masks/1.png").unlink()
    elif how == "16-bit":
        put(root, mask.astype(np.uint16) * 257)
    else:
        spoiled: dict[str, np.ndarray | bytes] = {
            "size": mask[:-2],
            "number": mask + 1,
            "void": np.full(SIZE, 255, dtype=np.uint8),
            "RGB": np.stack([mask] * 3, -1),
            "JPEG": encoded(mask, "JPEG"),
            "cut": encoded(mask)[:60],
        }
        put(root, spoiled[how])


@pytest.mark.parametrize(
    "how, reason",
    [
        ("missing", "images/1.jpg: the image has no mask"),
        ("16-bit", r"masks/1.png: a pixel has the number \d+ \(a 16-bit mask\), but there are 3 classes"),
        ("size", r"masks/1.png: the mask is 16x10 pixels, its image 16x12"),
        ("number", "masks/1.png: a pixel has the number 3, but there are 3 classes, from 0, and void is 255"),
        ("void", "masks/1.png: every pixel of the mask is void"),
        ("RGB", "masks/1.png: .*this is RGB: put a class list with colours beside"),
        ("JPEG", "masks/1.png: a mask must be in a lossless format such as PNG; JPEG"),
        ("cut", "masks/1.png: "),
    ],
)
@pytest.mark.parametrize("train, memory", [(True, False), (False, False), (True, True)])
def test_bad_masks_are_left_out_and_counted(
    how: str, reason: str, train: bool, memory: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = flat(tmp_path)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    spoil(root, how)
    splits = Masks.open(root, val_fraction=0)
    loader = through_the_loader(splits, train, memory=memory)
    bad = splits.train.keys.index("images/1.jpg")
    assert [*loader.bad] == [bad] and caplog.text.count("left out") == 1
    with pytest.raises(UserError, match=f"1 of 4 images .*{reason}") as error:
        through_the_loader(splits, train, max_bad=0.01, memory=memory)
    assert "\n" not in str(error.value)


def test_a_set_of_masks_that_all_are_bad_is_refused_without_a_line_for_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = flat(tmp_path, 12)
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    for i in range(12):
        put(root, np.stack([numbers(i)] * 3, -1), f"masks/{i}.png")
    with pytest.raises(UserError, match="12 of 12 images .*this is RGB: put a class .*; and 7 more.: repair"):
        through_the_loader(Masks.open(root, val_fraction=0), train=True, max_bad=0.01)
    assert not caplog.messages
