"""Groups stay on one side of the automatic split; names that look like groups get one warning."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import encoded, folder_of, smooth

from vitrail.data.captions import open_captions
from vitrail.data.groups import check_splits, groups_of
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.data.targets import Labels
from vitrail.errors import UserError


def made(*keys: str, name: str = "made") -> ImageSet:
    """Images of different contents, whose class is the first folder of the key."""
    classes = sorted({key.split("/")[0] for key in keys})
    labels = torch.tensor([classes.index(key.split("/")[0]) for key in keys])
    items = torch.arange(len(keys), dtype=torch.int32).view(torch.uint8).reshape(-1, 1, 1, 4)
    return ImageSet(name, list(keys), items, Labels(labels, classes), 1)


def tiles(slides: int, count: int = 6, classes: str = "normal tumour") -> list[str]:
    return [f"{c}/slide{s:02d}/{i}.png" for c in classes.split() for s in range(slides) for i in range(count)]


def held(dataset: ImageSet, group: str, fraction: float = 0.3) -> set[str]:
    """The groups that are held back; asserts that none is on both sides and that no image is lost."""
    train, val = split_val(dataset, fraction, group)
    sides = [set(groups_of(side, group)) for side in (train, val)]
    assert not sides[0] & sides[1] and sorted(train.keys + val.keys) == sorted(dataset.keys)
    assert set(train.labels.tolist()) == set(dataset.labels.tolist())
    return sides[1]


def test_a_slide_is_on_one_side_whatever_its_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = made(*tiles(20))
    by_parent = held(dataset, "parent")
    assert by_parent == held(dataset, r"slide\d+") == held(dataset, r"/(slide\d+)/") and 2 <= len(by_parent) <= 12
    table = tmp_path / "groups.csv"
    table.write_text("image,group\n" + "".join(f"{key},{key.split('/')[1]}\n" for key in dataset.keys))
    assert held(dataset, str(table)) == by_parent
    assert f"{len(by_parent)} of 20 groups are held back for validation, {len(by_parent) / 20:.0%}" in caplog.text
    plain = split_val(dataset, 0.3)
    assert {k.split("/")[1] for k in plain[0].keys} & {k.split("/")[1] for k in plain[1].keys}, (
        "without it they are torn"
    )


def test_the_side_of_a_group_stays_when_images_are_added() -> None:
    few, more = made(*tiles(12, 3)), made(*tiles(20, 8))
    before = held(few, "parent", 0.5)
    assert len(before) > 2 and before == held(more, "parent", 0.5) & set(groups_of(few, "parent"))


def test_a_class_of_one_group_stays_in_training(caplog: pytest.LogCaptureFixture) -> None:
    alone = [f"rare/slide{s:02d}/{i}.png" for s in (3,) for i in range(9)]
    for fraction in (0.3, 1.0):
        assert "slide03" not in held(made(*tiles(8), *alone), "parent", fraction)
    assert "one group, or fewer than 3 different images), so all train: rare (9)" in caplog.text


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60), st.sampled_from([0.1, 0.5, 1.0]))
def test_each_class_keeps_a_group(images: list[tuple[int, int]], fraction: float) -> None:
    keys = [f"c{c}/g{g}/{i}.png" for i, (c, g) in enumerate(images)]
    keys += [f"c9/{g}/{i}.png" for g in ("x", "y", "z") for i in range(3)]
    assert held(made(*keys), "parent", fraction)


@pytest.mark.parametrize(
    "group, message",
    [
        ("slide(", r"--group slide\(: not `parent`, not a CSV file, and not a valid regular expression: "),
        ("", "12 of 12 images of made do not match it"),
        ("x" * 5000, "12 of 12 images of made do not match it"),
        ("no.csv", "--group no.csv: there is no such file"),
        ("nothing", "--group nothing: 12 of 12 images of made do not match it, as cat/a_0.png"),
        ("a_", "--group a_: 6 of 12 images of made do not match it, as cat/b_0.png"),
        ("x?", "12 of 12 images of made do not match it"),
        ("parent", "--group parent: 12 of 12 images of made are directly in a class folder.*, as cat/a_0.png"),
        (r"\.png", "--group .*: all 12 images of made are in one group, '.png'"),
    ],
)
def test_groups_that_cannot_be_told(group: str, message: str) -> None:
    dataset = made(*(f"{c}/{g}_{i}.png" for c in ("cat", "dog") for g in "ab" for i in range(3)))
    with pytest.raises(UserError, match=message) as caught:
        split_val(dataset, 0.5, group)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("image;patient\ncat\\0.png;p1\nC:\\set\\cat\\1.PNG;p1\ndog/0.png;p2\n./dog/1.png ;p2\ncow/9.png;p3\n", None),
        ("\ufefffile_name\tgroup\n0.jpg\tx\n", r"4 of 4 images of made are not in the table.*, as cat/0.png"),
        ("name,side\n", "groups.csv, line 1: the columns are name, side, without image and group"),
        ("", "groups.csv is empty: its first line must name its columns"),
        ("image,group\ncat/0.png," + "x" * 200_000, "groups.csv, line 2: field larger than field limit"),
        (
            "image,group\ncat/0.png,a\ncat/1.png,b\ndog/0.png,b\n",
            "1 of 4 images of made are not in the table.*, as dog/1.png",
        ),
        ("image,group\n0.png,a\n", "line 2: '0.png' could be cat/0.png or dog/0.png"),
        (
            "image,group\ncat/0.png,a\ncat\\0.png,b\n",
            "line 3: cat/0.png is in group 'b' here and in 'a' in an earlier line",
        ),
    ],
)
def test_tables_of_groups(text: str, message: str | None, tmp_path: Path) -> None:
    dataset = made("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    file = tmp_path / "groups.csv"
    file.write_text(text, encoding="utf-8")
    if message is None:
        assert groups_of(dataset, str(file)) == ["p1", "p1", "p2", "p2"]
    else:
        with pytest.raises(UserError, match=message):
            groups_of(dataset, str(file))


def test_splits_that_a_set_brings_are_checked() -> None:
    train, val = made("a/s1/0.png", "b/s2/0.png"), made("a/s3/0.png", "b/s4/0.png")
    check_splits(Splits(train, val), "parent")
    with pytest.raises(
        UserError, match=r"the group 's2' is in the train split \(b/s2/0.png\) and in the test split \(a/s2"
    ):
        check_splits(Splits(train, val, made("a/s2/7.png", "b/s5/0.png")), "parent")


def test_folders_of_slides_that_recur_in_each_class_are_read_with_group(tmp_path: Path) -> None:
    folder_of(tmp_path, dict.fromkeys((f"{c}/s{s}" for c in ("normal", "tumour") for s in range(4)), 2))
    with pytest.raises(UserError, match="--group parent"):
        open_data(tmp_path)
    assert held(open_data(tmp_path, grouped=True).train, "parent")


def test_captions_are_split_by_group(tmp_path: Path) -> None:
    lines = ["image,caption"]
    for i in range(24):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"v{i % 6}_{i}.png").write_bytes(encoded(smooth(8, 8, seed=i)))
        lines.append(f"v{i % 6}_{i}.png,a dog")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    splits = open_captions(tmp_path, 0.3, group=r"v\d")
    assert splits.val is not None and len(splits.train) + len(splits.val) == 24
    assert not set(groups_of(splits.train, r"v\d")) & set(groups_of(splits.val, r"v\d"))


def warned(names: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    dataset = made(*(name.replace("CLASS", c) for c in ("cat", "dog") for name in (f"{c}/{n}" for n in names)))
    split_val(dataset, 0.3)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "name",
    [
        *("slide{g:02d}_{i:03d}.png", "patient{g}-slice{i}.png", "CLASS_p{g}_{i}.png", "P-{g:03d}-img{i:03d}.jpg"),
        *(
            "slide{g}_x{i}_y7.png",
            "TCGA-AA-{g}_tile_{i}_3.png",
            "video{g}_frame_{i:04d}.jpg",
            "2021-05-{g:02d}_{i}.jpg",
        ),
        *("case{L}_{i}.png", "{g:04d}_{i}.png", "plot {g} ({i}).jpg", "day{g}.{i}.jpg"),
    ],
)
def test_prefixes_that_look_like_groups_get_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    names = [name.format(g=i % 6 + 1, i=i, L="ABCDEF"[i % 6]) for i in range(60)]
    (line,) = warned(names, caplog)
    assert "look like images of one slide, patient or day" in line and line.endswith("give the groups with --group")
    kept, torn = re.findall(r"(?:cat|dog)/.*?\.\w+(?= \()", line)
    assert kept != torn and kept[:5] == torn[:5], "two files of one group"


@pytest.mark.parametrize(
    "name",
    [
        *("IMG_{i:04d}.jpg", "CLASS.{i}.jpg", "{i:04d}.png", "CLASS_{i}.png", "CLASS ({i}).jpg", "{h:08d}_{h:x}.jpg"),
        *("IMG_202105{g:02d}_1012{i:02d}.jpg", "PXL_202105{g:02d}_1012{i:02d}123.jpg", "202105{g:02d}_1012{i:02d}.jpg"),
        *("WhatsApp Image 2021-05-{g:02d} at 10.12.{i:02d}.jpeg", "IMG-202105{g:02d}-WA00{i:02d}.jpg"),
        *("{camera}_{i:04d}.JPG", "n0153282{g}_{i}.JPEG", "slide1_{i}.png", "{breed}_{i}.jpg", "IMG_{i:04d} (1).jpg"),
        *("{h:08x}-{h:04x}-4{h:03x}.jpg", "pair{i}_left.png", "{h:032x}.jpg", "photo-{h:x}-{i}.jpg"),
    ],
)
def test_ordinary_names_are_silent(name: str, caplog: pytest.LogCaptureFixture) -> None:
    draw = torch.Generator().manual_seed(0)
    names = [
        name.format(
            g=i % 6 + 10 if "2021" in name else i % 6,
            i=i,
            h=int(torch.randint(1 << 31, (1,), generator=draw)),
            camera=["IMG", "DSC", "DSCN"][i % 3],
            breed=["siamese", "persian", "sphynx"][i % 3],
        )
        for i in range(60)
    ]
    assert not warned(names, caplog)


@given(
    st.lists(st.from_regex(r"[a-z0-9]{6,12}(-[a-z0-9]{4,8})?", fullmatch=True), min_size=20, max_size=60, unique=True)
)
def test_made_up_names_are_silent(names: list[str]) -> None:
    dataset = made(*(f"{c}/{name}.jpg" for c in ("cat", "dog") for name in names))
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("vitrail.data.groups.log.warning", lines.append)
        split_val(dataset, 0.3)
    assert not lines
