"""The attention of a captioner for each word, and the figure of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from vitrail.baselines import CNNConfig
from vitrail.data.preprocess import Preprocess
from vitrail.data.text import PAD, START, UNKNOWN, Tokenizer
from vitrail.explain.command import explain
from vitrail.explain.figures import draw_words, png
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.values import Batch, Piece, Prediction
from vitrail.variants import VariantConfig

VIT = VariantConfig(width=16, depth=2, heads=2, patch=4, image_size=(8, 12), registers=1)
CNN = CNNConfig(channels=3, image_size=(8, 12))
WORDS = Tokenizer.train(["a red dog runs on the green grass", "two <b> & cats $x^ jump"], "words", 40)
OF_TOKENS = {"relevance.png", "pca.png", "similarity.png"}
OF_THE_ENCODER = OF_TOKENS | {"rollout.png", "heads.png", "norms.png", "distance.png", "filters.png", "positions.png"}


def captioner(encoder: Any = VIT, **changes: Any) -> Caption:
    torch.manual_seed(0)
    config = Captioning(
        **{"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoding": Decoding(max_length=8), **changes}
    )
    task = Caption(encoder_for(encoder), config, WORDS, Preprocess(size=(8, 12), resize="squash"))
    with torch.no_grad():  # far from even
        for parameter in task.decoder.parameters():
            parameter.mul_(3.0)
    return task


def image_file(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("encoder", [VIT, CNN])
@pytest.mark.parametrize("decoder", ["attentive", "transformer"])
def test_each_word_has_its_attention(decoder: str, encoder: Any) -> None:
    task = captioner(encoder, decoder=decoder).eval()
    images = torch.randn(2, 3, 8, 12)
    (answer, other), (words, others) = task.answer({"image": images}), task.pieces({"image": images})
    assert words[-1].text == others[-1].text == "<end>"
    for own, row in ((words, answer.row()), (others, other.row())):
        assert "".join(word.text for word in own[:-1]).strip() == row["caption"]
        assert [{"text": word.text, "p": word.p} for word in own[:-1]] == row["captions"][0]["tokens"]
    tokens = task.features(images)
    prefix = tokens.prefix.shape[1]
    for word in (*words, *others):
        assert word.heat is not None and word.heat.shape == tokens.grid and 0 < word.p <= 1
        total = float(word.heat.sum())
        assert total == pytest.approx(1, abs=1e-5) if not prefix else 0 < total < 1
    heats = [word.heat for word in words if word.heat is not None]
    assert len(heats) == 1 or not torch.allclose(heats[0], heats[1])


@pytest.mark.parametrize("decoder", ["attentive", "transformer"])
@torch.no_grad()
def test_attention_is_that_of_the_step_that_chose_the_word(decoder: str) -> None:
    """Of the step whose logits give the word its probability, and of no other."""
    task = captioner(decoder=decoder, decoding=Decoding(max_length=8, no_repeat_ngram_size=0)).eval()
    images = torch.randn(1, 3, 8, 12)
    (words,) = task.pieces({"image": images})
    state, before = task.decoder(memory=task.memory(images)), START
    chosen = [word for word in task.generate({"image": images}).words[0, 0].tolist() if word != PAD]
    assert len(words) == len(chosen) > 2
    for word, number in zip(words, chosen, strict=True):
        (logits,), attention, state = task.decoder(torch.tensor([before]), state=state)
        logits[[PAD, START, UNKNOWN]] = -torch.inf
        assert word.p == pytest.approx(float(logits.softmax(dim=0)[number]), rel=1e-4)
        assert word.heat is not None
        torch.testing.assert_close(word.heat.flatten(), attention[0, 2:])
        before = number
    heats = [word.heat for word in words if word.heat is not None]
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(heats))


def test_a_decoder_without_attention() -> None:
    (words,) = captioner(decoder="recurrent").eval().pieces({"image": torch.randn(1, 3, 8, 12)})
    assert words and all(word.heat is None for word in words)


class Spelled(Embed):
    """A task that answers piece by piece: what `explain` asks of any."""

    attends = True

    def answer(self, batch: Batch) -> list[Prediction]:
        return [Said("two words") for _ in batch["image"]]

    def pieces(self, batch: Batch) -> list[list[Piece]]:
        heat = torch.rand(2, 3) if self.attends else None
        return [[Piece("two", 0.5, heat), Piece(" words", 0.25, heat)] for _ in batch["image"]]


@dataclass(frozen=True)
class Said(Prediction):
    said: str

    def row(self) -> dict[str, Any]:
        return {"said": self.said, "by": [{"name": "<i>", "share": 0.123456, "hidden": [1]}]}

    def text(self) -> str:
        return self.said


@pytest.mark.parametrize(
    "encoder, attends, drawn, note",
    [
        pytest.param(VIT, True, {"words.png", *OF_THE_ENCODER}, None, marks=pytest.mark.slow),
        pytest.param(VIT, False, OF_THE_ENCODER, "reads the image once", marks=pytest.mark.slow),
        (CNN, True, {"words.png", *OF_TOKENS}, "no figures of the encoder: explain reads the attention of a Vision"),
    ],
)
def test_explain_a_task_that_answers_in_pieces(
    tmp_path: Path, encoder: Any, attends: bool, drawn: set[str], note: str | None
) -> None:
    task = Spelled(encoder_for(encoder), Preprocess(size=(8, 12), resize="squash"))
    task.attends = attends
    result = explain(task, image_file(tmp_path / "a <b>.png"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == drawn
    assert (note is None and not result["notes"]) or note in result["notes"][0]
    assert result["said"] == "two words"
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;.png" in page and all(f'data-file="{name}"' in page for name in drawn)
    assert '<td dir=auto>&lt;i&gt;</td><td class="number">0.1235</td>' in page and "<th>hidden" not in page
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["pieces"][1] == {"text": " words", "p": 0.25}
    assert numbers["by"] == task.predict([Image.new("RGB", (9, 9))])[0].row()["by"]
    assert np.shape(numbers.get("words", [])) == ((2, 2, 3) if attends else (0,))
    if attends:
        with Image.open(tmp_path / "out" / "words.png") as image:
            assert len(set(image.convert("L").tobytes())) > 50


@pytest.mark.parametrize(
    "encoder, decoder, drawn, note",
    [
        pytest.param(VIT, "transformer", {"words.png", *OF_THE_ENCODER}, None, marks=pytest.mark.slow),
        pytest.param(VIT, "recurrent", OF_THE_ENCODER, "reads the image once", marks=pytest.mark.slow),
        (
            CNN,
            "attentive",
            {"words.png", *OF_TOKENS},
            "no figures of the encoder: explain reads the attention of a Vision",
        ),
    ],
)
def test_explain_a_captioner(tmp_path: Path, encoder: Any, decoder: str, drawn: set[str], note: str | None) -> None:
    task = captioner(encoder, decoder=decoder)
    source = image_file(tmp_path / "a <b>.png")
    result = explain(task, source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == drawn
    assert (note is None and not result["notes"]) or note in result["notes"][0]
    with Image.open(source) as opened:
        assert result["caption"] == task.predict([opened])[0].row()["caption"]
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["caption"] == result["caption"]
    assert "".join(numbers.get("outputs", [])).strip() == result["caption"]
    assert len(numbers.get("relevance_outputs", [])) == len(numbers.get("outputs", []))
    if "words.png" in drawn:
        assert len(numbers["words"]) == len(numbers["pieces"])


def test_letters_that_no_font_has_are_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]  # without Chinese
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    photo, heat = np.zeros((16, 16, 3), dtype=np.float32), torch.rand(2, 2)
    for word, said in (("dog", 0), ("狗", 1), ("狗 狗", 1)):
        assert png(draw_words(photo, (0, 0, 1, 1), [(word, 0.5, heat)])).startswith(b"\x89PNG")
        assert len([record for record in caplog.records if "are boxes in the figures" in record.message]) == said
