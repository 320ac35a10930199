"""The list of recipes, the short help of one with the values that the data gets, and the whole help."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from images import folder_of

from vitrail.cli import main
from vitrail.commands.recipes import LAST, MAIN
from vitrail.commands.task_help import task_named
from vitrail.data.augment import Augment
from vitrail.help import meanings, value_text
from vitrail.options import known_fields
from vitrail.recipes import RECIPES
from vitrail.tasks import OPTIONS, TASKS, options_class, task_class
from vitrail.train.optim import Optim
from vitrail.vit import ViTConfig


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main([*args]) == 0
    return capsys.readouterr().out


def value_of(text: str, flag: str) -> str:
    """The text beside a flag."""
    found = re.search(rf"^  {flag}\b *(.*)$", text, re.MULTILINE)
    assert found is not None, flag
    return found[1]


def test_train_lists_the_recipes_and_nothing_else_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == list(RECIPES)
    assert said.err.startswith("vitrail: ") and said.err.count("\n") == 1


@pytest.mark.parametrize("name", RECIPES)
def test_short_help_fits_sixty_lines_of_eighty_columns(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "train", name, "--help").splitlines()
    assert len(lines) <= 60
    assert max(len(line) for line in lines if not line.startswith("Command: ")) <= 80
    assert lines[-1].startswith("--help-all shows all ")


def test_values_are_those_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder_of(tmp_path / "pets", {"cat": 30, "dog": 30}))
    text = printed(capsys, "train", "folder", "--help", "--data", data)
    assert f"for {data} (60 training images)" in " ".join(text.split())
    assert value_of(text, "--epochs").startswith("100 ") and value_of(text, "--eval-every").startswith("10 ")
    assert value_of(text, "--batch-size").startswith("32 ") and "--method" not in text
    tuned = printed(capsys, "train", "folder", "--data", data, "--init", "classify", "--help")
    assert value_of(tuned, "--method").startswith("full ") and value_of(tuned, "--image-size").startswith("64 64 ")
    assert value_of(tuned, "--epochs").startswith("50 ")


def test_values_that_depend_on_the_data_are_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "train", "folder", "--help")
    assert value_of(text, "--epochs").startswith("100 for few images, 10 for many")
    assert "add --data D" in text
    fixed = printed(capsys, "train", "digits", "--help")
    assert value_of(fixed, "--epochs").startswith("60 ") and "add --data D" not in fixed
    assert value_of(printed(capsys, "train", "finetune", "--help"), "--lr").startswith("chosen by the data")


def test_the_whole_help_has_every_field_of_the_recipe_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "train", "digits", "--help-all")
    for name, entry in known_fields(RECIPES["digits"](1000)).items():
        flag = f"--{name.replace('_', '-')}"
        if entry.kind is bool:
            assert value_of(text, flag).startswith("on" if entry.value else "off")
        else:
            assert f"\n  {flag} {value_text(entry.value)}" in text
    assert "--grid " in text and "--nproc N" in text


def test_help_of_data_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "folder", "--help", "--data", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("vitrail: no data at nowhere")


def test_texts_come_from_below_a_field_or_beside_it() -> None:
    assert "beta2" not in meanings(Optim) and meanings(Optim)["warmup"] == "warm-up, as a fraction of the steps"
    assert meanings(Augment)["flip"] == "left to right, with probability 0.5"
    assert meanings(ViTConfig)["image_size"].startswith("height and width in pixels")


def test_fields_of_the_short_help_exist_and_say_what_they_are() -> None:
    own = known_fields(RECIPES["folder"](100))
    run = RECIPES["folder"](100)
    texts = meanings(type(run)) | meanings(type(run.model)) | meanings(type(run.task))
    assert all(texts.get(name) for name in (*MAIN, *LAST) if name in own)
    for name in TASKS:
        settings = task_class(name).settings
        assert set(settings.main) <= {entry.name for entry in fields(settings)}


def test_options_of_tasks_are_found_without_their_code() -> None:
    for name in TASKS:
        assert options_class(name) is task_class(name).options
    assert set(OPTIONS) <= set(TASKS)
    code = (
        "import sys; from vitrail.cli import main\n"
        "for words in (['predict'], ['predict', '--model', 'caption'], ['eval', 'segment'], ['serve']):\n"
        "    main([*words, '--help'])\n"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.endswith("False\n") and "--beam" in said and "--overlap" in said


def test_the_task_of_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    assert task_named("segment") == "segment" and task_named("facebook/dinov2-small") is None
    (tmp_path / "best").mkdir()
    config = tmp_path / "best" / "config.json"
    for text, name in (('{"task": "caption"}', "caption"), ('{"task": 3}', None), ("[]", None), ("{", None)):
        config.write_text(text)
        assert task_named(str(tmp_path)) == name
