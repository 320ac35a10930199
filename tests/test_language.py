"""The words that this project does not use, in code, errors and docs: each has a plain term of the field instead.

A line that means something else by such a word is allowed by a phrase below, which a person has read.
"""

from __future__ import annotations

import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = (
    *("src/**/*.py", "src/**/*.md", "tests/**/*.py", "bench/**/*.py", "docs/*.py", "docs/*.md", "docs/*.ipynb", "*.md"),
    *(
        "*.cff",
        "Makefile",
        "pyproject.toml",
        ".pre-commit-config.yaml",
        ".ci/run",
        "deploy/*",
        ".github/**/*.md",
        ".github/**/*.yml",
        "web/src/**/*.ts",
        "web/src/**/*.tsx",
        "web/src/**/*.css",
        "web/index.html",
        "web/*.py",
    ),
)
TEXTS = sorted(path for place in PLACES for path in ROOT.glob(place) if path != Path(__file__))
UNITS = (
    "image|class|caption|step|epoch|row|line|layer|head|channel|sample|file|word|block|pixel|patch|token|command|"
    "folder|split|set|box|key|run|recipe|architecture|model|task|batch|process|worker|device|query|position"
)

WORDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "picture": (
        r"pictures?",
        "image (a figure is something drawn for people)",
        (
            r'"pictures?"',  # names of folders and columns in other people's data
        ),
    ),
    "part": (
        r"parts?",
        "split, micro-batch, module or component, subset",
        (
            r"\bin part\b",
            r"\.parts\b",
            r'"part"',  # names of folders and columns in other people's data
            r'"on part (?:begin|data|end)"',  # of the library that parses forms
        ),
    ),
    "chance": (r"chances?", "probability", ()),
    "carried": (r"carried|package carries", "bundled (weights)", (r"carried out",)),
    "goes on": (r"go(?:es)? on|going on|went on", "resumes, continues from", ()),
    "hangs on": (r"hangs? on", "depends on", ()),
    "comes to": (r"what (?:it|they|that|all) comes? to", "score, result", ()),
    "stands at": (r"stands? at", "is", ()),
    "as near as": (r"as near as", "rounded to", ()),
    "is said": (r"says? so once|(?:is|are) said", "warns once, logs", ()),
    "reached": (r"reached", "the result, the score", (r"(?:not|cannot) be reached",)),  # a server
    "asked": (r"asked", "requested, given; the goal; args of a command", ()),
    "a line says so": (r"(?:a )?lines? says? so", "a message says so, vitrail warns", ()),
    "as it is": (
        r"as (?:it|they) (?:is|are|stands?)",
        "unchanged, as shown, as stored",
        (
            r"as soon as it is",
            r"[\"']as they are[\"']",  # a row of results/loading.json
        ),
    ),
    "by itself": (r"by (?:itself|themselves)", "separately, alone, automatically", ()),
    "a X a Y": (
        rf"(?:an?|one) \w+ an? (?:{UNITS})",
        "per: one X per Y",
        (r"(?:a|an|one) (?:is|as|of|in|by|for|to|with|has|and|or|was|gets|from|than|that|at|on) an? ",),
    ),
}
"""of each word a pattern, what to say instead, and the phrases in which it means something else"""

NAMES = {
    "Ahead": "Prefetcher", "Reading": "AsyncScalars", "Parts": "Components", "go_on": "resume", "goes_on": "continues",
    "settle": "resolve_auto", "longest": "max_length", "no_repeat": "no_repeat_ngram_size",
    "length_power": "length_penalty", "matrix_lr": "muon_lr",
    "caption_critic": "caption_scst", "caption_recall": "caption_rerank",
    "looked": "attention", "telling": "bag_of_words_loss", "learn_with": "configure", "TheirEncoder": "HFEncoder",
    "eyes_of": "vision_tower", "BadPicture": "BadImage",
    "write_whole": "write_atomic", "append_whole": "append_atomic", "whole_folder": "atomic_folder",
    "say_os_error": "print_os_error", "nobody_reads": "has_no_reader", "forget_output": "discard_output",
    "warn_of_strangers": "warn_if_public", "relieve": "run_waiting", "look_at": "measure",
}  # fmt: skip
"""identifiers that were replaced"""


def text_of(path: Path) -> str:
    """The text of a file; of a notebook that of its cells, without outputs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


def lines_with(pattern: str, allowed: tuple[str, ...]) -> list[str]:
    """The lines where a match begins that lies in no allowed phrase, as `path:line: text`.

    A space of a pattern also stands for the end of a line, with the mark of a comment on the next one, and for the `_`
    of an identifier.
    """

    def spaced(phrase: str) -> str:
        return phrase.replace(" ", r"[ \t]*(?:[ \t]|\n[ \t#>*]*)")

    word = re.compile(rf"\b(?:{spaced(pattern)})\b", re.IGNORECASE)
    found = []
    for path in TEXTS:
        text = text_of(path).replace("_", " ")
        fine = [match.span() for phrase in allowed for match in re.finditer(spaced(phrase), text, re.IGNORECASE)]
        for match in word.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in fine):
                number = text.count("\n", 0, match.start())
                found.append(f"{path.relative_to(ROOT)}:{number + 1}: {text_of(path).splitlines()[number].strip()}")
    return found


@pytest.mark.parametrize("word", WORDS)
def test_the_glossarys_words(word: str) -> None:
    pattern, instead, allowed = WORDS[word]
    found = lines_with(pattern, allowed)
    assert not found, f"{len(found)} lines say {word!r}; say {instead}:\n" + "\n".join(found[:40])


def test_the_glossarys_names() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string} is {NAMES[token.string]}"
        for path in TEXTS
        if path.suffix == ".py"
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.NAME and token.string in NAMES
    ]
    assert not found, "\n".join(found[:40])


def test_the_glossarys_recipes_and_flags() -> None:
    old = "caption-critic|caption-recall|--matrix-lr|--longest|--no-repeat(?!-ngram)|--length-power"
    assert not lines_with_text(old)


def lines_with_text(pattern: str) -> list[str]:
    """The lines with a match, as `path: text`."""
    return [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in TEXTS
        if path.name != "CHANGELOG.md"  # which says what was renamed
        for line in text_of(path).splitlines()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("a line says so", "It is small. A line\n    # says so.", 1),
        ("as it is", "leaves the file as\nit is", 1),
        ("as it is", "written as soon as it is measured", 0),
        ("asked", "What is asked for", 1),
        ("part", "takes part in it, in part", 1),
        ("part", "def test_every_part_of_it", 1),
        ("as it is", "stays_as_it_is", 1),
        ("a X a Y", "one folder a class", 1),
    ],
)
def test_it_finds_what_it_looks_for(
    word: str, text: str, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pattern, _, allowed = WORDS[word]
    (tmp_path / "page.md").write_text(text)
    (tmp_path / "book.ipynb").write_text(json.dumps({"cells": [{"source": text.splitlines(keepends=True)}]}))
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    monkeypatch.setattr(f"{__name__}.TEXTS", [tmp_path / "page.md", tmp_path / "book.ipynb"])
    assert len(lines_with(pattern, allowed)) == 2 * found
