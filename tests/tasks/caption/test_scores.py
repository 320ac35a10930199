"""Scores of captions against pycocoevalcap's own, and against hand-made cases."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.errors import RunError, UserError
from vitrail.tasks.caption import java
from vitrail.tasks.caption.cider import Cider, words
from vitrail.tasks.caption.java import meteor, treebank
from vitrail.tasks.caption.scores import CaptionMetric, caption_scores, human_ceiling, statistics

pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider as TheirCider
from pycocoevalcap.rouge.rouge import Rouge

VOCABULARY = ["a", "the", "dog", "man", "boy", "runs", "jumps", "on", "in", "grass", "snow", "red", "black", "ball"]
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")


def captions(draw: random.Random) -> str:
    return " ".join(draw.choices(VOCABULARY, k=draw.randint(0, 14)))


def made_up(seed: int = 0, images: int = 60) -> tuple[dict[str, str], dict[str, list[str]]]:
    draw = random.Random(seed)
    references = {f"{i}.jpg": [captions(draw) for _ in range(draw.randint(1, 6))] for i in range(images)}
    # Some candidates are right, some empty, some from nowhere.
    return {key: draw.choice([draw.choice(texts), "", captions(draw)]) for key, texts in references.items()}, references


def test_the_tokenisation() -> None:
    assert words("A man's DOG, (2) runs -- fast!") == ["a", "man's", "dog", "2", "runs", "fast"]
    assert words("Café") == ["caf"] and words("שלום") == []


def test_scores_are_pycocoevalcaps(capsys: pytest.CaptureFixture[str]) -> None:
    candidates, references = made_up()
    dressed = {key: text.upper() + " !" for key, text in candidates.items()}
    scores = caption_scores(dressed, references, java=False)
    assert capsys.readouterr().out == ""
    given = {key: [text] for key, text in candidates.items()}
    bleu, _ = Bleu(4).compute_score(references, given, verbose=0)
    assert [scores[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(bleu, abs=1e-12)
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(references, given)[0], abs=1e-12)
    assert scores["cider"] == pytest.approx(TheirCider().compute_score(references, given)[0], abs=1e-12)
    assert all(type(score) in (int, float) for score in scores.values())
    assert next(iter(scores)) == "cider" and "meteor" not in scores


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_fast_cider_is_pycocoevalcaps_for_each_caption(seed: int, images: int) -> None:
    candidates, references = made_up(seed, images)
    _, each = TheirCider().compute_score(references, {key: [text] for key, text in candidates.items()})
    fast = Cider(references, kept=5)
    assert fast.rewards(candidates.keys(), candidates.values()) == pytest.approx(each.tolist(), abs=1e-9)


def test_fast_cider_may_count_ends_as_words() -> None:
    candidates, references = made_up()
    longer = {key: [f"{text} zzz" for text in texts] for key, texts in references.items()}
    _, each = TheirCider().compute_score(longer, {key: [f"{text} zzz"] for key, text in candidates.items()})
    ends = Cider(references, ends=True)
    assert ends.rewards(candidates.keys(), candidates.values()) == pytest.approx(each.tolist(), abs=1e-9)
    texts = {"x": ["a man sits in a boat"], "y": ["the black cat sleeps"]}
    assert Cider(texts, ends=True)("x", "a man sits in a boat") == pytest.approx(10)
    assert Cider(texts, ends=True)("x", "a man sits in a boat", ended=False) < 10
    assert Cider(texts, ends=True)("x", "a man sits in a") < Cider(texts)("x", "a man sits in a")


def test_fast_cider_weighs_by_its_references_alone() -> None:
    candidates, references = made_up()
    fast = Cider(references)
    some = list(candidates)[7:20]
    everything = dict(zip(candidates, fast.rewards(candidates, candidates.values()), strict=True))
    assert fast.rewards(some * 2, [candidates[key] for key in some] * 2) == [everything[key] for key in some] * 2
    assert fast(some[0], "") == 0 and fast(some[0], "zebra zebra") == 0
    perfect = Cider({"x": ["a red dog runs"], "y": ["the black cat sits"]})
    assert perfect("x", "a red dog runs") == pytest.approx(10)


def test_what_captions_are_like() -> None:
    found = statistics(["A dog runs.", "a dog runs", "two cats", ""], seen=["A  DOG runs !", "a bird"])
    assert found == {"length": 2.0, "vocabulary": 5, "identical": 0.5, "distinct": 0.75, "count": 4, "new": 0.5}
    assert "new" not in statistics(["a"])


def test_captions_without_words_of_the_tokenisation(caplog: pytest.LogCaptureFixture) -> None:
    """They score 0, and are counted by what spaces separate: so many captions are not one."""
    references = {i: [f"собака номер {'абвгдежзик'[i]}", "собака бежит"] for i in range(10)}
    candidates = {i: texts[0] for i, texts in references.items()}
    scores = caption_scores(candidates, references, java=False)
    assert [scores[name] for name in ("cider", "bleu1", "bleu4", "rouge_l")] == [0, 0, 0, 0]
    assert (scores["identical"], scores["distinct"], scores["length"], scores["vocabulary"]) == (0.1, 1.0, 3.0, 12)
    assert human_ceiling(references, java=False)["cider"] == 0
    metric = CaptionMetric()
    metric.update({"sample": torch.arange(10), "captions": [*references.values()]}, answers([*candidates.values()]))
    metric.compute()
    assert not [record for record in caplog.records if "the same caption" in record.message]


@pytest.mark.parametrize("images", [1, 2, 3])
def test_no_cider_where_it_cannot_tell_images_apart(
    images: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pycocoevalcap gives 0 for a caption that is right word for word."""
    monkeypatch.setattr("vitrail.errors._warned", set())
    references = {i: ["a red dog runs", "the dog"] for i in range(images)}
    candidates = dict.fromkeys(references, "a red dog runs")
    assert TheirCider().compute_score(references, {i: [text] for i, text in candidates.items()})[0] == 0
    for _ in range(2):
        scores = caption_scores(candidates, references, java=False)
        assert scores["cider"] is None and scores["bleu4"] == pytest.approx(1) and next(iter(scores)) == "cider"
        assert human_ceiling(references, java=False)["cider"] is None
    assert caplog.text.count(f"no CIDEr of {images} image") == 1
    other = caption_scores({**candidates, 9: "a cat"}, {**references, 9: ["a cat"]}, java=False)
    assert other["cider"] == pytest.approx(
        TheirCider().compute_score(
            {**references, 9: ["a cat"]}, {i: [t] for i, t in {**candidates, 9: "a cat"}.items()}
        )[0]
    )
    assert f"CIDEr of {images + 1} images means little" in caplog.text


def test_human_ceiling_is_each_reference_against_the_others() -> None:
    references = {"a": ["a red dog", "a dog runs", "the dog"], "b": ["two cats", "a cat sits"], "c": ["alone"]}
    ceiling = human_ceiling(references, java=False)
    first = {"a": "a red dog", "b": "two cats"}, {"a": ["a dog runs", "the dog"], "b": ["a cat sits"]}
    second = {"a": "a dog runs", "b": "a cat sits"}, {"a": ["a red dog", "the dog"], "b": ["two cats"]}
    third = {"a": "the dog"}, {"a": ["a red dog", "a dog runs"]}
    turns: list[dict[str, Any]] = [caption_scores(*turn, java=False) for turn in (first, second, third)]
    for name in ("bleu1", "bleu4", "rouge_l", "length"):
        assert ceiling[name] == pytest.approx((2 * turns[0][name] + 2 * turns[1][name] + turns[2][name]) / 5)
    assert turns[2]["cider"] is None  # of one image
    assert ceiling["cider"] == pytest.approx((turns[0]["cider"] + turns[1]["cider"]) / 2)
    assert ceiling["count"] == 2
    with pytest.raises(UserError, match="at least two captions"):
        human_ceiling({"a": ["one"]})


@needs_java
@pytest.mark.slow
def test_a_human_ceiling_starts_java_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables take many seconds to be read: once to cut all turns into tokens, and once for METEOR."""
    references = {"a": ["a red dog", "a dog runs", "the dog"], "b": ["two cats", "a cat sits"]}
    first = {"a": "a red dog", "b": "two cats"}, {"a": ["a dog runs", "the dog"], "b": ["a cat sits"]}
    second = {"a": "a dog runs", "b": "a cat sits"}, {"a": ["a red dog", "the dog"], "b": ["two cats"]}
    third = {"a": "the dog"}, {"a": ["a red dog", "a dog runs"]}
    one, two, three = meteor(first, second, third)
    started: list[list[str]] = []
    popen = subprocess.Popen

    def noted(command: list[str], **options: Any) -> subprocess.Popen[str]:
        started.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    ceiling = human_ceiling(references, java=True)
    assert len(started) == 2
    for name in ("meteor", "ptb_meteor"):  # the same words by either rule
        assert ceiling[name] == pytest.approx((2 * one + 2 * two + three) / 5, abs=1e-9)


@needs_java
def test_treebank_tokens() -> None:
    texts = ["A Dog's toy, (red)\n-- don't!", "", "Un café … “so”", "a\u2028b\rc"]
    # What pycocoevalcap's PTBTokenizer 1.2 gives for the first and third.
    assert treebank(texts) == ["a dog 's toy -lrb- red -rrb- do n't", "", "un café so", "a b c"]
    assert treebank([]) == []


@needs_java
def test_java_scores_are_pycocoevalcaps() -> None:
    candidates = {"a": "A dog runs on the grass.", "b": "two children's toys -- in a café", "c": ""}
    references = {
        "a": ["A black dog is running across grass .", "The dog runs."],
        "b": ["Children play with toys (red), don't they?", "\u201cTwo kids\u2019 toys\u201d in a café"],
        "c": ["Somebody ..."],
    }
    scores = caption_scores(candidates, references, java=True)
    # Printed by pycocoevalcap 1.2's Meteor for the fixed tokens, and for those of its PTBTokenizer.
    assert scores["meteor"] == pytest.approx(0.40146439534049805, abs=1e-9)
    assert scores["ptb_meteor"] == pytest.approx(0.3987998086457602, abs=1e-9)
    assert {f"ptb_{name}" for name in ("cider", "bleu1", "bleu4", "rouge_l", "meteor")} <= scores.keys()


def fake_java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("script", ["echo it broke >&2; exit 1", "cat > /dev/null"])
def test_a_java_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str
) -> None:
    fake_java(tmp_path, monkeypatch, script)
    monkeypatch.setattr(java, "JAVA_LIMIT", 1)  # the second takes its input and never answers
    candidates, references = made_up(images=4)
    assert "meteor" not in caption_scores(candidates, references)
    assert "METEOR and scores on Treebank tokens are skipped" in caplog.text
    with pytest.raises(RunError, match="Java's tokenizer"):
        caption_scores(candidates, references, java=True)
    with pytest.raises(RunError, match="METEOR failed"):
        meteor((candidates, references))


def test_no_java_and_no_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, references = made_up(images=4)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "meteor" not in caption_scores(candidates, references)
    with pytest.raises(UserError, match="install a Java runtime"):
        caption_scores(candidates, references, java=True)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(UserError, match=r"pip install 'vitrail\[caption\]'"):
        caption_scores(candidates, references)


@pytest.mark.parametrize("references", [{}, {"a": []}, {"b": ["x"]}, {"a": ["x"], "b": ["y"]}])
def test_candidates_without_their_references(references: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="one candidate and at least one reference"):
        caption_scores({"a": "x"}, references)


def answers(texts: list[str]) -> list[SimpleNamespace]:
    return [SimpleNamespace(caption=text) for text in texts]


def test_metric_counts_a_sample_once_and_merges() -> None:
    candidates, references = made_up()
    texts, expected = list(candidates.values()), list(references.values())
    texts[3] = "שלום \N{GRINNING FACE}"
    one, two = CaptionMetric(seen=["a dog"]), CaptionMetric(seen=["a dog"])
    one.update({"sample": torch.arange(40), "captions": expected[:40]}, answers(texts[:40]))
    one.update({"sample": torch.arange(30, 40), "captions": expected[30:40]}, answers(texts[30:40]))
    two.update({"sample": torch.arange(35, 60), "captions": expected[35:]}, answers(texts[35:]))
    one.merge(two.state())
    assert [one.rows[i] for i in range(60)] == list(zip(texts, expected, strict=True))
    scores = one.compute()
    whole = caption_scores(dict(enumerate(texts)), dict(enumerate(expected)), java=False, seen=["a dog"])
    assert scores == pytest.approx(whole) and scores["count"] == 60


def test_metric_warns_of_a_collapse(caplog: pytest.LogCaptureFixture) -> None:
    expected = [[f"caption {i}"] for i in range(20)]
    metric = CaptionMetric()
    metric.update(
        {"sample": torch.arange(20), "captions": expected}, answers(["a dog runs"] * 9 + [f"a {i}" for i in range(11)])
    )
    metric.compute()
    assert not caplog.records
    metric.update({"sample": torch.arange(16), "captions": expected[:16]}, answers(["a dog runs"] * 16))
    assert metric.compute()["identical"] == 0.8
    (record,) = caplog.records
    assert (
        record.levelno == logging.WARNING and "80% of 20 images have the same caption ('a dog runs')" in record.message
    )
