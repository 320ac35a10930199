"""Where a captioner looked for each word, and the image of it."""

from __future__ import annotations

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
from vitrail.data.decode import Preprocess
from vitrail.data.text import Tokenizer
from vitrail.explain import explain
from vitrail.explain.figures import draw_words, png
from vitrail.tasks.caption import Caption, Captioning, Captions
from vitrail.tasks.embed import Embed
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.search import Decoding
from vitrail.tasks.task import Batch, Piece, Prediction
from vitrail.variants import VariantConfig

VIT = VariantConfig(width=16, depth=2, heads=2, patch=4, image_size=(8, 12), registers=1)
CNN = CNNConfig(channels=3, image_size=(8, 12))
WORDS = Tokenizer.train(["a red dog runs on the green grass", "two <b> & cats $x^ jump"], "words", 40)
OF_THE_ENCODER = {"rollout.png", "heads.png", "distance.png", "filters.png", "positions.png"}


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
    images = torch.randn(1, 3, 8, 12)
    (pieces,) = task.pieces({"image": images})
    (answer,) = task.answer({"image": images})
    assert isinstance(answer, Captions) and pieces[-1].text == "<end>"
    assert "".join(piece.text for piece in pieces[:-1]).strip() == answer.caption
    assert [{"text": piece.text, "p": piece.p} for piece in pieces[:-1]] == answer.captions[0]["tokens"]
    tokens = task.features(images)
    prefix = tokens.prefix.shape[1]
    for piece in pieces:
        assert piece.heat is not None and piece.heat.shape == tokens.grid and 0 < piece.p <= 1
        total = float(piece.heat.sum())
        assert total == pytest.approx(1, abs=1e-5) if not prefix else 0 < total < 1
    assert len(pieces) == 1 or not torch.allclose(pieces[0].heat, pieces[1].heat)  # type: ignore[arg-type]


def test_a_decoder_that_does_not_look_again() -> None:
    (pieces,) = captioner(decoder="recurrent").eval().pieces({"image": torch.randn(1, 3, 8, 12)})
    assert pieces and all(piece.heat is None for piece in pieces)


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
        (VIT, True, {"words.png", *OF_THE_ENCODER}, None),
        (VIT, False, OF_THE_ENCODER, "reads the image once"),
        (CNN, True, {"words.png"}, "no figures of the encoder: explain reads the attention of a Vision"),
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
    assert result["said"] == "two words" and result["pieces"][1] == {"text": " words", "p": 0.25}
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;.png" in page and all(f'src="{name}"' in page for name in drawn)
    assert "<td dir=auto>&lt;i&gt;<td dir=auto>0.1235" in page and "[1]" not in page
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["by"] == task.predict([Image.new("RGB", (9, 9))])[0].row()["by"]
    assert ("attention" in numbers) == attends and np.shape(numbers.get("attention", [])) == (
        (2, 2, 3) if attends else (0,)
    )
    if attends:
        with Image.open(tmp_path / "out" / "words.png") as image:
            assert len(set(image.convert("L").tobytes())) > 50


@pytest.mark.parametrize(
    "encoder, decoder, drawn, note",
    [
        (VIT, "transformer", {"words.png", *OF_THE_ENCODER}, None),
        (VIT, "recurrent", OF_THE_ENCODER, "reads the image once"),
        (CNN, "attentive", {"words.png"}, "no figures of the encoder: explain reads the attention of a Vision"),
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
    assert numbers["caption"] == result["caption"] and numbers["pieces"] == result["pieces"]
    if "words.png" in drawn:
        assert len(numbers["attention"]) == len(numbers["pieces"])


def test_letters_that_no_font_has_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]  # without Chinese
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    image, heat = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(2, 2)
    for word, said in (("dog", 0), ("狗", 1), ("狗 狗", 1)):
        assert png(draw_words(image, [(word, 0.5, heat)])).startswith(b"\x89PNG")
        assert len([record for record in caplog.records if "are boxes in the images" in record.message]) == said
