"""Every fault of data is found and named, and clean sets give no finding."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_sets import CLEAN, FAULTS, captioned, clean, masked

from vitrail.doctor import examine, examine_data
from vitrail.errors import UserError

LABELS = ("mislabelled",)
"""checks that need features, which take seconds"""


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_named(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    root = fault.base(tmp_path / "set")
    expected = fault.make(root)
    found = examine_data(str(root), images=500 if fault.check in LABELS else 0)
    own = [finding for finding in found.findings if finding.check == fault.check]
    assert own, [finding.check for finding in found.findings]
    named = " ".join(name for finding in own for name in finding.where)
    assert [text for text in expected if text not in named] == []
    assert all(finding.what and finding.remedy for finding in own)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_set_gives_no_finding(name: str, tmp_path: Path) -> None:
    found = examine_data(str(clean(tmp_path / "set", name)))
    assert [finding.row() for finding in found.findings] == []


@pytest.mark.parametrize("make", [captioned, masked], ids=["captions", "masks"])
def test_clean_set_of_another_kind_gives_no_finding(make: object, tmp_path: Path) -> None:
    found = examine_data(str(make(tmp_path / "set")))  # type: ignore[operator]
    assert [finding.row() for finding in found.findings] == []


def test_nothing_at_a_path_is_an_error_and_not_a_finding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data at"):
        examine(str(tmp_path / "nothing"))


def test_masks_that_cannot_be_opened_are_refused_as_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = masked(tmp_path / "set")
    (root / "train").mkdir()
    for kind in ("images", "masks"):
        (root / kind).rename(root / "train" / kind)
    assert not examine_data(str(root)).findings and "captions" not in caplog.text
    (root / "classes.txt").write_text("void\nshape\n")
    (found,) = [finding for finding in examine_data(str(root)).findings if finding.check == "not-a-data-set"]
    assert "the masks have the class shape only" in found.what


def test_data_that_no_task_opens_is_still_looked_at(tmp_path: Path) -> None:
    root = clean(tmp_path / "set")
    for folder in ("square", "triangle"):
        for split in ("train", "val"):
            for file in (root / split / folder).iterdir():
                file.unlink()
    (root / "train" / "circle" / "circle0.png").write_bytes(b"")
    checks = {finding.check for finding in examine_data(str(root)).findings}
    assert {"not-a-data-set", "broken-files"} <= checks


@pytest.mark.parametrize(
    "images, left, note",
    [
        (10, 60, "the labels are not judged: --images is 10, and at least 40 are needed"),
        (2000, 9, "the labels are not judged: the set has fewer than 40 images that can be read"),
        (0, 60, None),
    ],
)
def test_labels_that_are_not_judged_are_noted(images: int, left: int, note: str | None, tmp_path: Path) -> None:
    root = clean(tmp_path / "set")
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        if number % 60 >= left:
            file.unlink()
    notes = [text for text in examine_data(str(root), images).notes if "not judged" in text]
    assert notes == ([] if note is None else [note])


def test_images_are_not_an_option_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="--images is for data sets"):
        examine(str(tmp_path), images=5)
