"""What a cluster predicts for: files, Parquet and buckets, each image with a name that stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vitrail.cluster import inputs
from vitrail.cluster.inputs import list_inputs, read
from vitrail.errors import RunError, UserError


def png(place: Path, value: int = 0) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(place)
    return place


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """Files of fsspec's file system in memory, as those of a bucket."""
    system = fsspec.filesystem("memory")
    content = png(tmp_path / "x.png").read_bytes()
    for name in ("a/1.png", "a/2.jpg", "a/notes.txt", ".hidden/3.png", "b/._1.png"):
        system.pipe(f"/photos/{name}", content)
    yield "memory://photos"
    system.rm("/photos", recursive=True)


def test_files_of_a_folder_have_the_names_that_predict_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.png", "b/2.png"):
        png(Path("data") / name)
    found = list_inputs("data")
    assert found.names() == ["data/a/1.png", "data/b/2.png"]
    [work] = found.work({"data/a/1.png"})
    assert work == {"name": "data/b/2.png", "path": str(tmp_path / "data/b/2.png")}
    assert [*read(work)] == [("data/b/2.png", tmp_path / "data/b/2.png")]


def test_a_bucket_is_listed_without_hidden_files(bucket: str) -> None:
    found = list_inputs(bucket)
    assert found.names() == ["memory:///photos/a/1.png", "memory:///photos/a/2.jpg"]
    contents = dict(item for work in found.work(set()) for item in read(work))
    assert [str(content)[:6] for content in contents.values()] == ["b'\\x89"] * 2
    assert [*read({"name": "gone", "path": "memory:///photos/gone.png"})] == [("gone", None)]


def test_a_bucket_that_does_not_answer_is_no_bad_image(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = []

    class Down:
        def cat_file(self, path: str) -> bytes:
            requests.append(path)
            raise OSError("slow down")

    monkeypatch.setattr(inputs, "_file_system", lambda url: (Down(), url))
    with pytest.raises(RunError, match="x.png cannot be read: OSError: slow down"):
        [*read({"name": "x", "path": "memory:///x.png"})]
    assert len(requests) == inputs.TRIES


@pytest.mark.parametrize(
    "data, said",
    [
        ("missing", "no data at missing: give a folder of images, Parquet, or a URL"),
        ("memory://nothing", "holds neither images nor Parquet files"),
        ("nosuch://x", "nosuch://x cannot be opened"),
    ],
)
def test_what_holds_no_images(data: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list_inputs(data)


def table(path: Path, images: list[Any], rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"label": [0] * len(images), "image": images}), path, row_group_size=rows_per_group)
    return path


def test_rows_of_parquet_have_their_own_names_if_these_differ(tmp_path: Path) -> None:
    content = png(tmp_path / "x.png").read_bytes()
    path = table(tmp_path / "t.parquet", [{"bytes": content, "path": f"{i}.png"} for i in range(5)])
    found = list_inputs(str(path))
    assert found.names() == [f"{i}.png" for i in range(5)]
    work = found.work({"0.png", "1.png", "3.png"})
    assert [(one["group"], one["rows"]) for one in work] == [(1, [0]), (2, [0])], "a group without work is not read"
    assert [item for one in work for item in read(one)] == [("2.png", content), ("4.png", content)]


def test_other_rows_are_numbered_within_their_file(tmp_path: Path) -> None:
    content = png(tmp_path / "images/x.png").read_bytes()
    first = table(tmp_path / "set/a.parquet", [{"bytes": content, "path": "same.png"}] * 3)
    second = table(tmp_path / "set/b.parquet", [{"bytes": None, "path": "same.png"}])
    found = list_inputs(str(tmp_path / "set"))
    assert found.names() == [f"{first}/0", f"{first}/1", f"{first}/2", f"{second}/0"]
    items = [item for one in found.work(set()) for item in read(one)]
    assert items[2] == (f"{first}/2", content)
    assert items[3] == (f"{second}/0", tmp_path / "set/same.png"), "a path beside the file, which may be missing"


def test_columns_of_bytes_and_empty_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", [b"abc", None])
    assert [item for one in list_inputs(str(path)).work(set()) for item in read(one)] == [
        (f"{path}/0", b"abc"),
        (f"{path}/1", None),
    ]
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(UserError, match="bad.parquet cannot be read as Parquet"):
        list_inputs(str(tmp_path / "bad.parquet")).names()
