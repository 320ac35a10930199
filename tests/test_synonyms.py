"""Words of other tools: each leads to a flag that some command has, or to a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitrail.cli import main
from vitrail.options import known_fields, task_flags
from vitrail.recipes import RECIPES
from vitrail.synonyms import BY_WORD, MEANT, meant

FIELDS = {f"--{name.replace('_', '-')}" for name in known_fields(RECIPES["folder"](100))}
OWN = {
    "--data",
    "--init",
    "--out",
    "--resume",
    "--device",
    "--nproc",
    "--shard",
    "--model",
    "--split",
    "--fast-dev-run",
}
OWN |= {"--to", "--sizes", "--engines", "--precision", "--host", "--port", "--api-keys", "--allow-origin", "--engine"}
OWN |= {"--queue", "--max-wait-ms", "--max-batch", "--resize"}
PLANNED = {"--patience", "--tensorboard"}
"""flags that are suggested as soon as a command has them"""


def test_every_suggestion_is_a_flag_of_a_command() -> None:
    segment = {f"--{name.replace('_', '-')}" for name in known_fields(RECIPES["segment"](100))}
    there = FIELDS | segment | OWN | PLANNED | set(task_flags())
    for texts in MEANT.values():
        assert texts and all(text.partition(",")[0] in there for text in texts if text.startswith("--")), texts


def test_no_word_has_two_meanings() -> None:
    assert len(BY_WORD) == sum(len(words.split()) for words in MEANT)


@pytest.mark.parametrize(
    "option, flags, text",
    [
        ("--learning-rate", ["--lr"], "--lr"),
        ("--Learning_Rate=3", ["--lr"], "--lr"),
        ("-e", ["--epochs"], "--epochs"),
        ("--no-amp", ["--precision"], "--precision"),
        ("--weights", ["--model"], "--model"),
        ("--weights", ["--init", "--model"], "--init"),
        ("--patience", ["--patience", "--epochs"], "--patience"),
        ("--learning-rate", ["--epochs"], None),
        ("--xyzzy", ["--lr"], None),
    ],
)
def test_what_is_meant_depends_on_the_command(option: str, flags: list[str], text: str | None) -> None:
    assert meant(option, flags) == text


@pytest.mark.parametrize(
    "args, line",
    [
        ("train digits --learning-rate 1", "unknown option --learning-rate: did you mean --lr?"),
        ("train digits --gpu 0", "unknown option --gpu: did you mean --device?"),
        ("train digits --steps=3", "unknown option --steps: did you mean --max-steps?"),
        ("train digits -e 3", "unknown option -e: did you mean --epochs?"),
        ("train digits --num_workers 3", "unknown option --num_workers: did you mean --workers?"),
        ("train digits epochs=3", "unknown argument 'epochs=3': did you mean --epochs 3?"),
        ("train folder pets", "unknown argument 'pets': did you mean --data pets?"),
        ("train pets", "pets is a folder, not a recipe: vitrail train folder --data pets"),
        ("eval --model classify --data digits", "unknown option --model: name the model as the first argument"),
        ("eval classify --data digits --gpu 0", "unknown option --gpu: did you mean --device?"),
        ("predict x.png --k 3", "unknown option --k: did you mean --top?"),
        ("export classify out --format onnx", "unknown option --format: did you mean --to?"),
        ("serve --bs 3", "unknown option --bs: did you mean --max-batch?"),
    ],
)
def test_a_flag_of_another_tool_gets_one_line_that_names_ours(
    args: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").mkdir()
    assert main(args.split()) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"vitrail: {line}\n")
