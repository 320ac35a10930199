"""Captioners through the commands: scores and their control, decodings, answers, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.cli import main
from vitrail.data.captions import open_captions
from vitrail.data.decode import decode
from vitrail.data.preprocess import Preprocess
from vitrail.data.sets import split_val
from vitrail.data.targets import Texts
from vitrail.data.text import Tokenizer
from vitrail.tasks.answers import numbered_by_pixels
from vitrail.tasks.caption import Caption, Captioning, Decoding, numbered
from vitrail.tasks.caption.scores import caption_scores, human_ceiling
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.values import Batch
from vitrail.train.build import VAL_FRACTION
from vitrail.vit import ViTConfig

pytest.importorskip("pycocoevalcap", reason="needs pip install 'vitrail[caption]'")

HEBREW, ARABIC = "כלב שחור רץ על הדשא", "كلب أسود يركض"
THINGS = ("dog", "cat", "man", "child", "bird", "horse")
TINY = [
    "--device",
    "cpu",
    "--workers",
    "0",
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--image-size",
    "16",
    "16",
]
TINY += ["--stem", "--patch", "8", "--decoder-width", "16", "--decoder-depth", "2", "--decoder-heads", "2"]
TINY += ["--vocabulary", "words", "--vocabulary-size", "60", "--batch-size", "8", "--epochs", "1", "--max-length", "8"]


@pytest.fixture(autouse=True)
def _no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Java takes many seconds; `test_scores.py` has what it adds."""
    monkeypatch.setattr(shutil, "which", lambda name: None)


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (12 + 3 * (seed % 5), 30 - seed % 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images to train on and eight for validation."""
    root = tmp_path_factory.mktemp("captioned")
    for split, count in (("train", 12), ("val", 8)):
        lines = ["image,caption"]
        for i in range(count):
            image(root / split / "images" / f"{split}{i}.png", 100 * count + i)
            lines += [f"{split}{i}.png,A {thing} runs on the grass ." for thing in (THINGS[i % 6], THINGS[i % 5])]
            lines += [f"{split}{i}.png,the {THINGS[i % 6]} is number {i}"]
        (root / split / "captions.txt").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner with weights that nobody trained: it has much to say, and looks at the image."""
    torch.manual_seed(0)
    texts = [text for texts in Texts.of(open_captions(data).train).captions for text in texts]
    how = Decoding(beam=3, max_length=8, no_repeat_ngram_size=2)
    config = Captioning(decoder_width=16, decoder_depth=1, decoder_heads=2, most_words=12, decoding=how)
    encoder = encoder_for(ViTConfig(width=16, depth=1, heads=2, patch=8, image_size=(16, 16)))
    tokenizer = Tokenizer.train(texts, "words", 60, lower=True)
    task = Caption(encoder, config, tokenizer, Preprocess(size=(16, 16), resize="squash"))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(3.0)
    folder = tmp_path_factory.mktemp("runs") / "captioner"
    task.save(folder)
    return folder


def printed(capsys: pytest.CaptureFixture[str], *args: Any) -> list[dict[str, Any]]:
    """The rows of a command that works."""
    capsys.readouterr()
    assert main([*map(str, args), "--json", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    """The one line of a command that stops."""
    capsys.readouterr()
    assert main([*map(str, args), "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("vitrail: ") and said.err.count("\n") == 1
    return said.err


def test_eval_scores_what_predict_says(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed(capsys, "eval", run, "--data", data)
    splits = open_captions(data)
    assert splits.val is not None and (row["split"], row["count"], row["data"]) == ("val", 8, str(data))
    rows = printed(capsys, "predict", data / "val" / "images", "--model", run)
    said = {Path(r["image"]).name: r["caption"] for r in rows}
    references = {
        Path(key).name: texts for key, texts in zip(splits.val.keys, Texts.of(splits.val).captions, strict=True)
    }
    seen = [text for texts in Texts.of(splits.train).captions for text in texts]
    expected = caption_scores(said, references, java=False, seen=seen)
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert {"cider", "bleu1", "bleu4", "rouge_l", "length", "vocabulary", "identical", "new"} <= row.keys()
    # The control: the same captions, and other images' references.
    (control,) = printed(capsys, "eval", run, "--data", data, "--shuffle-images")
    other = dict(zip(references, Texts.of(splits.val.shuffled()).captions, strict=True))
    assert control["shuffled"] and control["cider"] == pytest.approx(caption_scores(said, other, java=False)["cider"])
    assert control["length"] == row["length"]
    (train,) = printed(capsys, "eval", run, "--data", data, "--split", "train")
    assert train["count"] == 12 and "new" not in train
    assert main(["eval", str(run), "--data", str(data), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "val: 8 images" in text and f"  cider       {row['cider']:.4f}" in text and "vocabulary" in text


def test_without_scorers_no_caption_is_written(
    data: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever waits for a thousand captions should not learn then that nothing can score them."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setattr(Caption, "answer", lambda *args: pytest.fail("a caption is written"))
    assert "pip install 'vitrail[caption]'" in refused(capsys, "eval", run, "--data", data)


def test_what_people_score(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = printed(capsys, "eval", "caption", "--human", "--data", data)
    val = open_captions(data).val
    assert val is not None and row["source"] == "human" and row["count"] == 8
    assert row["cider"] == pytest.approx(human_ceiling(dict(enumerate(Texts.of(val).captions)), java=False)["cider"])


@pytest.mark.parametrize("images", [1, 3])
def test_cider_of_few_images(
    images: int,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one there is none, and the other scores stay; a training then keeps its newest checkpoint as the best."""
    monkeypatch.setattr("vitrail.errors._warned", set())
    for split, count in (("train", 8), ("val", images)):
        lines = ["image,caption"]
        for i in range(count):
            image(tmp_path / "data" / split / "images" / f"{split}{i}.png", 100 * count + i)
            lines += [f"{split}{i}.png,A {THINGS[i % 6]} runs .", f"{split}{i}.png,the {THINGS[i % 6]} on the grass"]
        (tmp_path / "data" / split / "captions.txt").write_text("\n".join(lines))
    data = tmp_path / "data"
    words = "no CIDEr of 1 image:" if images == 1 else "CIDEr of 3 images means little"
    for args in (["eval", run], ["eval", "caption", "--human"]):
        (row,) = printed(capsys, *args, "--data", data)
        assert (row["cider"] is None) == (images == 1) and row["bleu1"] >= 0 and row["count"] == images
        assert caplog.text.count(words) == 1
        capsys.readouterr()
        assert main([*map(str, args), "--data", str(data), "--device", "cpu"]) == 0
        assert ("cider" in capsys.readouterr().out) == (images > 1)
    out = tmp_path / "run"
    options = [*TINY, "--epochs", "2"]
    assert main(["train", "caption-vit", "--data", str(data), "--out", str(out), *options, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["cider"] is None) == (images == 1) and scores["bleu1"] >= 0
    if images == 1:
        assert "no cider: the newest checkpoint counts as the best" in caplog.text
        best, last = (vitrail.load(out / name).state_dict() for name in ("best", "last"))
        assert all(torch.equal(best[name], value) for name, value in last.items())
        assert "<html" in (out / "report.html").read_text()
        assert main(["compare", str(out), "--out", str(tmp_path / "plot.png")]) == 0


def test_decodings(data: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "val" / "images"
    first = printed(capsys, "predict", folder, "--model", run)
    assert all(len(row["captions"]) == 3 for row in first)
    greedy = printed(capsys, "predict", folder, "--model", run, "--beam", "1", "--no-repeat-ngram-size", "0")
    assert all(len(row["captions"]) == 1 for row in greedy)
    short = printed(capsys, "predict", folder, "--model", run, "--max-length", "3")
    assert all(len(c["tokens"]) <= 2 for row in short for c in row["captions"])
    plain = printed(capsys, "predict", folder, "--model", run, "--length-penalty", "0")
    for row in plain:
        for caption in row["captions"]:  # the score is then the log-probability, less that of the end
            assert caption["score"] <= sum(np.log(token["p"]) for token in caption["tokens"]) + 1e-4
    draws = ["--sample", "--beam", "2", "--top-p", "0.95", "--temperature", "2"]
    drawn = printed(capsys, "predict", folder, "--model", run, *draws, "--sampling-seed", "5")
    assert drawn == printed(capsys, "predict", folder, "--model", run, *draws, "--sampling-seed", "5")
    assert drawn != printed(capsys, "predict", folder, "--model", run, *draws, "--sampling-seed", "6")
    # An image's draws are its own, whichever other images are in the call.
    (alone,) = printed(capsys, "predict", drawn[3]["image"], "--model", run, *draws, "--sampling-seed", "5")
    assert [c["caption"] for c in alone["captions"]] == [c["caption"] for c in drawn[3]["captions"]]
    (scores,) = printed(capsys, "eval", run, "--data", data, "--beam", "1", "--max-length", "3")
    assert scores["length"] <= 2


def test_wrong_options(data: Path, run: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    one = data / "val" / "images" / "val0.png"
    assert "--top-p applies to sampling: add --sample" in refused(
        capsys, "predict", one, "--model", run, "--top-p", "0.5"
    )
    assert "--sampling-seed applies to sampling" in refused(capsys, "eval", run, "--data", data, "--sampling-seed", "1")
    assert "--beam must be from 1 to 10,000, got 0" in refused(capsys, "predict", one, "--model", run, "--beam", "0")
    line = refused(capsys, "predict", one, "--model", "classify", "--beam", "2")
    assert "--beam is" in line and "this model's task" in line and "classify" in line
    control = ("--data", data, "--shuffle-images")
    assert "--shuffle-images is a control for predictions, but --probe scores features" in refused(
        capsys, "eval", run, *control, "--probe"
    )
    assert "--shuffle-images applies to a model's predictions, but --human" in refused(
        capsys, "eval", "caption", "--human", *control
    )
    assert "--match needs a captioner with a contrastive loss" in refused(
        capsys, "predict", one, "--model", run, "--match", "0.2"
    )
    assert "--consensus and --neighbours need a captioner of caption-rerank" in refused(
        capsys, "predict", one, "--model", run, "--neighbours", "3"
    )
    assert "--length-penalty applies to a model's predictions" in refused(
        capsys, "eval", "caption", "--human", "--data", data, "--length-penalty", "1"
    )
    for bad in ("0", "0.5"):
        assert "--max-bad applies to a model's predictions, but --human" in refused(
            capsys, "eval", "caption", "--human", "--data", data, "--max-bad", bad
        )
    for wrong in (["--length-penalty", "nan"], ["--length-penalty", "500"], ["--sample", "--temperature", "nan"]):
        assert f"{wrong[-2]} must be from 0" in refused(capsys, "predict", one, "--model", run, *wrong)
    assert "arguments are required: source" in refused(capsys, "eval", "--human", "--data", data)
    assert "the data has no test" in refused(capsys, "eval", run, "--data", data, "--split", "test")
    printed(capsys, "predict", one, "--model", run, "--max-length", "500")
    assert "this model writes at most 12 tokens per caption: --max-length is 12" in caplog.text


def test_predict_prints_the_caption_and_errors_row_by_row(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path / "a.png", 3)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    Image.new("L", (200, 7)).save(tmp_path / "c.png")
    capsys.readouterr()
    assert main(["predict", str(tmp_path), "--model", str(run), "--json", "--device", "cpu"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(row) for row in rows] == [
        {"image", "task", "caption", "captions"},
        {"image", "task", "error"},
        {"image", "task", "caption", "captions"},
    ]
    for row in (rows[0], rows[2]):
        assert row["task"] == "caption" and row["captions"][0]["caption"] == row["caption"]
        (again,) = vitrail.load(run).predict([decode(Path(row["image"]))])
        assert again.row()["caption"] == row["caption"]
    assert main(["predict", str(tmp_path / "a.png"), "--model", str(run), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: {rows[0]['caption']}\n"


def test_a_captioner_with_nothing_to_say(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = vitrail.load(run)
    with torch.no_grad():
        task.get_parameter("decoder.bias")[2] = 1e4
    task.save(tmp_path / "silent")
    image(tmp_path / "a.png", 3)
    (row,) = printed(capsys, "predict", tmp_path / "a.png", "--model", tmp_path / "silent", "--beam", "1")
    assert row["caption"] == "" and row["captions"][0]["tokens"] == []
    assert main(["predict", str(tmp_path / "a.png"), "--model", str(tmp_path / "silent"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}: \n"


def test_what_is_left_out_is_named_once_and_counted(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing images, empty and endless captions, mixed encodings, images without a caption: training continues."""
    lines = (data / "train" / "captions.txt").read_bytes().split(b"\n")
    for i in range(12):
        image(tmp_path / "images" / f"train{i}.png", i)
    image(tmp_path / "images" / "alone.png", 50)
    lines += [
        b"gone.png,A dog .",
        b"train0.png,",
        b"train1.png," + b"word " * 10_000,
        "train2.png,Un café".encode("latin-1"),
    ]
    lines += [f"train3.png,{HEBREW}".encode(), f"train4.png,{ARABIC}".encode(), b"only a name"]
    (tmp_path / "captions.txt").write_bytes(b"\n".join(lines))
    out = tmp_path / "run"
    assert main(["train", "caption-vit", "--data", str(tmp_path), "--out", str(out), *TINY]) == 0
    said = [record.getMessage() for record in caplog.records]
    for place, words in [
        ("line 38", "'gone.png' is not found"),
        ("line 39", "the caption is empty"),
        ("line 40", "the caption has 10,000 words"),
        ("line 41", "not UTF-8, read as Latin-1"),
        ("line 44", "no caption after the image's name"),
        ("alone.png", "has no caption for it"),
    ]:
        assert len([line for line in said if place in line and words in line]) == 1, (words, said)
    (summary,) = [line for line in said if f"{tmp_path}: left out" in line]
    for kind in ("missing images", "empty captions", "captions of more than 1,000 words"):
        assert f"{kind}: 1" in summary
    words = json.loads((out / "best" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"dog", "grass"} <= words.keys() and "word" not in words


@pytest.mark.parametrize(
    "text, message",
    [
        ("photo,words\n1.png,a dog\n", "line 1: the columns are photo, words, and none is called caption"),
        ("image,caption\ngone.png,a dog\n", "line 2: 'gone.png' is not found, nor any other of 1 images"),
        ("image,caption\ntrain0.png,\ntrain1.png,\n", "holds no image with a caption"),
        ("image,caption\n", "holds no image with a caption"),
        ("only one column\n", "line 1: one column only"),
    ],
)
def test_what_is_enough_to_stop(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    for i in range(2):
        image(tmp_path / "data" / "images" / f"train{i}.png", i)
    file = tmp_path / "data" / "captions.txt"
    file.write_text(text)
    for args in (["train", "caption-vit", "--out", tmp_path / "run"], ["eval", run], ["eval", "caption", "--human"]):
        capsys.readouterr()
        assert main([*map(str, args), "--data", str(tmp_path / "data"), "--device", "cpu"]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert message in last and str(tmp_path / "data") in last
    assert not (tmp_path / "run").exists()


def test_what_training_does_not_take(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(recipe: str, *options: object) -> str:
        return refused(capsys, "train", recipe, *options, "--data", data, "--out", tmp_path / "run")

    assert "captions have none" in said("caption-vit", *TINY, "--mixup", "0.5")
    assert "name one with --init" in said("caption-vit", *TINY, "--self-critical", "1")
    other = "continues training the task caption, and classify holds the task classify"
    assert f"caption-scst {other}" in said("caption-scst", "--init", "classify", "--max-length", "8")
    assert "text-only blocks, which this captioner lacks" in said("caption-rerank", "--init", run)
    assert f"caption-coca {other}" in said("caption-coca", "--init", "classify")
    assert "text-only blocks, which this captioner lacks" in said("caption-coca", "--init", run)
    assert "method linear is not for the task caption" in said("caption-vit", "--init", run, "--method", "linear")
    (tmp_path / "far" / "images").mkdir(parents=True)
    for i in range(4):
        image(tmp_path / "far" / "images" / f"{i}.png", i)
    (tmp_path / "far" / "captions.txt").write_text("".join(f"{i}.png,{HEBREW}\n" for i in range(4)))
    options = ["--data", tmp_path / "far", "--init", run, "--out", tmp_path / "run"]
    assert "no caption has a word of [a-z0-9']" in refused(capsys, "train", "caption-scst", *options)
    (tmp_path / "far" / "captions.txt").write_text("".join(f"{i}.png,a dog runs\n" for i in range(4)))
    line = refused(capsys, "train", "caption-scst", *options)
    assert "rewards CIDEr" in line and "all have the same" in line
    assert "has the decoder transformer, but the recipe has attentive lstm" in said("caption-vit-lstm", "--init", run)
    # Also where it is what the recipe would have: the weights have another.
    task = vitrail.load(run)
    assert isinstance(task, Caption)
    depth = task.captioning.decoder_depth
    assert "--decoder-depth is fixed by the weights" in said("caption-vit", "--init", run, "--decoder-depth", depth + 1)
    assert not (tmp_path / "run").exists()


def test_what_training_held_back_is_scored(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    shutil.copytree(data / "train", tmp_path / "set" / "train")
    options = ["--data", tmp_path / "set"]
    printed(capsys, "train", "caption-vit", *TINY, *options, "--out", tmp_path / "run")
    held = split_val(open_captions(tmp_path / "set").train, VAL_FRACTION)[1]
    (row,) = printed(capsys, "eval", tmp_path / "run", *options)
    (scores,) = printed(capsys, "eval", tmp_path / "run", *options, "--split", "val")
    assert row == scores and (row["split"], row["count"]) == ("val", len(held)) and len(held) < 12
    (everything,) = printed(capsys, "eval", "caption", *options, "--max-length", "3")
    assert (everything["split"], everything["count"]) == ("train", 12)
    # So it is where the data names no split at all.
    options = ["--data", tmp_path / "set" / "train"]
    printed(capsys, "train", "caption-vit", *TINY, *options, "--out", tmp_path / "whole")
    (row,) = printed(capsys, "eval", tmp_path / "whole", *options)
    assert (row["split"], row["count"]) == ("val", len(held))
    (everything,) = printed(capsys, "eval", "caption", *options, "--max-length", "3")
    assert (everything["split"], everything["count"]) == ("train", 12)


def test_explain_draws_the_caption_that_predict_says(data: Path, run: Path) -> None:
    task, image = vitrail.load(run), decode(data / "val" / "images" / "val1.png", 3)
    prepared = task.preprocess(image)
    batch = {"image": prepared[None], "sample": torch.tensor([numbered_by_pixels(prepared)])}
    for seed in range(5):
        task.option = Decoding(sample=True, temperature=3.0, beam=1, max_length=8, sampling_seed=seed)
        (pieces,) = task.pieces(batch)
        caption = "".join(piece.text for piece in pieces if piece.text != "<end>").strip()
        assert caption == task.predict([image])[0].row()["caption"]


def test_a_tokenizer_that_does_not_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vitrail.load(run).save(tmp_path / "m")
    image(tmp_path / "a.png", 3)
    (tmp_path / "m" / "tokenizer.json").write_text(Tokenizer.train(["some other words"], "words", 9).to_json())
    line = refused(capsys, "predict", tmp_path / "a.png", "--model", tmp_path / "m")
    assert str(tmp_path / "m" / "tokenizer.json") in line and "has 7 entries, but the weights have" in line


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_scripts_from_right_to_left_come_back(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned by heart, a caption comes back as it was written, and is drawn."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([HEBREW, ARABIC], kind, 300 if kind == "bpe" else 30)
    config = Captioning(decoder_width=32, decoder_depth=1, decoder_heads=2, decoder_dropout=0.0, vocabulary=kind)
    encoder = encoder_for(ViTConfig(width=16, depth=1, heads=2, patch=8, image_size=(16, 16)))
    task = Caption(encoder, config, tokenizer, Preprocess(size=(16, 16), resize="squash"))
    for i in range(2):
        Image.new("RGB", (20 + i, 16), "black" if i else "white").save(tmp_path / f"{i}.png")
    images = torch.stack([task.preprocess(decode(tmp_path / f"{i}.png")) for i in range(2)])
    batch: Batch = {"image": images, "label": numbered([[HEBREW], [ARABIC]], tokenizer, 64)}
    batch |= {"sample": torch.arange(2), "epoch": 0}
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(batch)["loss"].backward()
        optimizer.step()
    task.save(tmp_path / "m")
    rows = printed(capsys, "predict", tmp_path / "0.png", tmp_path / "1.png", "--model", tmp_path / "m")
    assert [row["caption"] for row in rows] == [HEBREW, ARABIC]
    assert "".join(token["text"] for token in rows[0]["captions"][0]["tokens"]) == HEBREW
    out = tmp_path / "out"
    assert main(["explain", str(tmp_path / "0.png"), "--model", str(tmp_path / "m"), "--out", str(out)]) == 0
    assert HEBREW in (out / "index.html").read_text(encoding="utf-8") and (out / "words.png").stat().st_size > 5000


def test_a_captioner_is_bundled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes about images of any shape and mode, and not the same about all of them."""
    samples = Path(vitrail.__file__).parent / "zoo" / "samples"
    with Image.open(samples / "dog.png") as dog:
        dog.convert("L").resize((200, 90)).save(tmp_path / "wide.png")
    assert main(["predict", str(samples), str(tmp_path / "wide.png"), "--model", "caption", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 11 and all(len(row["caption"].split()) > 3 for row in rows)
    assert len({row["caption"] for row in rows}) > 3


def test_the_bundled_captioner_looks_at_the_image() -> None:
    """On a hundred validation images it does far better than with each image's caption on another."""
    data = Path(os.environ.get("VITRAIL_DATA", "")) / "flickr8k"
    if not data.is_dir():
        pytest.skip("VITRAIL_DATA names no folder that holds flickr8k")
    val = open_captions(data).val
    assert val is not None
    images, references = [val.image(i, 3) for i in range(100)], dict(enumerate(Texts.of(val).captions[:100]))
    with torch.inference_mode():
        written = [answer.row()["caption"] for answer in vitrail.load("caption").predict(images)]
    own = caption_scores(dict(enumerate(written)), references, java=False)["cider"]
    moved = caption_scores(dict(enumerate(written[1:] + written[:1])), references, java=False)["cider"]
    assert own is not None and moved is not None
    assert own > 0.2 and moved < own / 2
