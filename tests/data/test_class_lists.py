"""Class lists in the formats in common use give names and colours, and say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.data.class_lists import find_class_list, means_void, read_class_list
from vitrail.data.decode import BadImage
from vitrail.data.mask_files import VOID, Coding, Raw
from vitrail.errors import UserError

BOTH = ("road", "sky line"), ((128, 64, 128), (1, 2, 3))
NAMES = ("road", "sky line"), ()


@pytest.mark.parametrize(
    "name, text, wanted",
    [
        ("label_colors.txt", "128 64 128\troad\n1 2 3\t\tsky line\n", BOTH),
        ("label_colors.txt", "road 128 64 128\r\nsky line 1 2 3\r\n", BOTH),
        ("class_dict.csv", "name,r,g,b\nroad,128,64,128\nsky line,1,2,3\n", BOTH),
        ("class_dict.csv", "name, r, g, b\nroad, 128, 64, 128\nsky line, 1, 2, 3\n", BOTH),
        ("class_dict.csv", "r,g,b,class\n128,64,128,road\n1,2,3,sky line\n", BOTH),
        ("class_dict.csv", "id;name;red;green;blue\n1;sky line;1;2;3\n0;road;128;64;128\n", BOTH),
        ("classes.csv", "road,128,64,128\nsky line,1,2,3\n", BOTH),
        ("classes.csv", "0,road,128,64,128\n1,sky line,1,2,3\n", BOTH),
        ("class_dict.csv", "name,color\nroad,#804080\nsky line,#010203\n", BOTH),
        ("labelmap.txt", "# label:color_rgb\nroad:128,64,128::\nsky line:1,2,3::\n", BOTH),
        ("colors.txt", "#804080 road\n#010203 sky line\n", BOTH),
        ("colors.txt", "road #804080\nsky line #010203\n", BOTH),
        ("classes.json", '{"road": [128, 64, 128], "sky line": "#010203"}', BOTH),
        (
            "classes.json",
            '{"labels": [{"readable": "road", "color": [128, 64, 128]}, {"name": "sky line", "color": [1, 2, 3]}]}',
            BOTH,
        ),
        ("classes.txt", "road\n\nsky line\n", NAMES),
        ("classes.txt", "\ufeff0 road\n1 sky line\n", NAMES),
        ("classes.txt", "1: sky line\n0: road\n", NAMES),
        ("classes.txt", "sky line 1\nroad 0\n", NAMES),
        ("classes.csv", "sky line,1\nroad,0\n", NAMES),
        ("classes.csv", "name\nroad\nsky line\n", NAMES),
        ("classes.txt", "class 2\nclass 1\n", (("class 2", "class 1"), ())),
        ("labels.txt", "__ignore__\nroad\nsky line\n", NAMES),
        ("classes.json", '["road", "sky line"]', NAMES),
        ("classes.json", '{"0": "road", "1": "sky line"}', NAMES),
        ("classes.json", '{"sky line": 1, "road": 0}', NAMES),
        ("classes.txt", "1\n2\n3\n", (("1", "2", "3"), ())),
    ],
)
def test_formats(name: str, text: str, wanted: tuple[object, object], tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    found = find_class_list([tmp_path / "1.jpg", file])
    assert found is not None and (found.names, found.colours) == wanted


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "lists no classes"),
        ("road\nsky\nroad\n", "the class road is listed 2 times"),
        ("road 1 2 3\nsky 1 2 3\n", r"the colour \(1, 2, 3\) is listed 2 times"),
        ("road 1 2 300\nsky 1 2 3\n", r"'road' has the colour \(1, 2, 300\): values end at 255"),
        ("road 1 2 3\nsky\n", "line 2: 'sky' has no colour as other lines have"),
        ("0 road\n2 sky\n", "'sky' has the number 2: number the classes 0, 1, 2"),
        ("name,r,g,b\nroad,1,2\n", "line 2: it needs a value for each of name, r, g, b"),
    ],
)
def test_what_is_wrong_is_named(text: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=f"classes.txt.*{reason}") as error:
        read_class_list(file)
    assert "\n" not in str(error.value)


NO_LISTS = ["3", '{"x":', "[1, 2]", '{"a": [1, 2]}', '{"a": "#12"}', "null", '[{"id": 0}]', "[[1]]", "[" * 5000]


@pytest.mark.parametrize("value", NO_LISTS, ids=lambda value: value[:9])
def test_json_that_lists_no_classes(value: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(value)
    with pytest.raises(UserError, match="classes.json (is damaged|is no class list)"):
        read_class_list(file)


def test_other_tables_are_no_class_lists(tmp_path: Path) -> None:
    for name, text in (("labels.csv", "image,label\n1.jpg,cat\n"), ("README.txt", "x"), ("train.txt", "1\n2\n")):
        (tmp_path / name).write_text(text)
    assert find_class_list(sorted(tmp_path.iterdir())) is None


def test_colours_complete_a_list_of_the_same_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    (tmp_path / "label_colors.txt").write_text("road 1 2 3\nsky 4 5 6\n")
    found = find_class_list(sorted(tmp_path.iterdir()))
    assert found is not None and found.colours == ((1, 2, 3), (4, 5, 6))
    (tmp_path / "palette.txt").write_text("sky 1 2 3\nroad 4 5 6\n")
    with pytest.raises(UserError, match="list different classes: remove one"):
        find_class_list(sorted(tmp_path.iterdir()))


def test_names_that_mean_void() -> None:
    assert all(map(means_void, ["void", "Unlabelled", "un-labeled", "IGNORE", "_unknown_"]))
    assert not any(map(means_void, ["background", "avoid", "road", "other"]))


COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@given(st.lists(COLOURS, min_size=1, max_size=20, unique=True), st.data())
def test_every_colour_gets_its_class_and_others_are_found(
    colours: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    coding = Coding({255: VOID}, {colour: i - 1 for i, colour in enumerate(colours)})
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    chosen = data.draw(st.lists(st.integers(0, len(colours) - 1), min_size=height * width, max_size=height * width))
    pixels = np.array(colours, dtype=np.uint8)[chosen].reshape(height, width, 3)
    assert coding.classes_of(Raw(pixels), "m").reshape(-1).tolist() == [i - 1 for i in chosen]
    other = data.draw(COLOURS.filter(lambda colour: colour not in colours))
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    pixels[row, column] = other
    with pytest.raises(BadImage, match="^m: the colour {} {} {} is.* row {}, column {}".format(*other, row, column)):
        coding.classes_of(Raw(pixels), "m")


@given(st.dictionaries(st.integers(-3, 70_000), st.integers(0, 300), min_size=1, max_size=9), st.integers(-9, 80_000))
def test_every_number_gets_its_class(numbers: dict[int, int], other: int) -> None:
    coding = Coding(numbers)
    values = np.array([[*numbers]], dtype=np.int32)
    assert coding.classes_of(Raw(values), "m").tolist() == [[*numbers.values()]]
    if other not in numbers:
        with pytest.raises(BadImage, match=f"the number {other}"):
            coding.classes_of(Raw(np.append(values, [[other]], axis=1)), "m")


def test_json_of_names_survives_any_text(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    names = ["été", "a b", "x,y", "#1"]
    file.write_text(json.dumps(names))
    assert read_class_list(file).names == tuple(names)
