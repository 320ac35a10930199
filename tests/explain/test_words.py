"""Where a captioner looked for each word, and the picture of it."""

from __future__ import annotations

import json
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
from vitrail.explain import explain, words_looked
from vitrail.explain.pictures import draw_words, png
from vitrail.tasks.caption import Caption, Captioning
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.search import Decoding
from vitrail.vit import ViTConfig

VIT = ViTConfig(width=16, depth=2, heads=2, patch=4, image_size=(8, 12), registers=1)
CNN = CNNConfig(channels=3, image_size=(8, 12))
WORDS = Tokenizer.train(["a red dog runs on the green grass", "two <b> & cats $x^ jump"], "words", 40)
OF_THE_ENCODER = {"rollout.png", "heads.png", "distance.png", "filters.png", "positions.png"}


def captioner(encoder: Any = VIT, **changes: Any) -> Caption:
    torch.manual_seed(0)
    config = Captioning(
        **{"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoding": Decoding(longest=8), **changes}
    )
    task = Caption(encoder_for(encoder), config, WORDS, Preprocess(size=(8, 12), resize="squash"))
    with torch.no_grad():  # far from even
        for parameter in task.decoder.parameters():
            parameter.mul_(3.0)
    return task


def picture(path: Path, size: tuple[int, int] = (20, 30)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("encoder", [VIT, CNN])
@pytest.mark.parametrize("decoder", ["attentive", "transformer"])
def test_each_word_has_its_attention(decoder: str, encoder: Any) -> None:
    task = captioner(encoder, decoder=decoder).eval()
    images = torch.randn(1, 3, 8, 12)
    caption, words = words_looked(task, images)
    (answer,) = task.answer({"image": images})
    assert caption == answer.caption and words[-1].text == "<end>"
    assert [{"text": word.text, "p": word.p} for word in words[:-1]] == answer.captions[0]["tokens"]
    tokens = task.features(images)
    prefix = tokens.prefix.shape[1]
    for word in words:
        assert word.heat is not None and word.heat.shape == tokens.grid and 0 < word.p <= 1
        total = float(word.heat.sum())
        assert total == pytest.approx(1, abs=1e-5) if not prefix else 0 < total < 1
    assert len(words) == 1 or not torch.allclose(words[0].heat, words[1].heat)


def test_attention_is_that_of_the_step_that_chose_the_word() -> None:
    """Blind the decoder to all patches but one: each word looks there."""
    task = captioner(decoder="attentive").eval()
    images = torch.randn(1, 3, 8, 12)
    with torch.no_grad():
        keys = task.decoder.keys(task.memory(images).tokens)[0]  # type: ignore[operator]
        task.decoder.score.weight.copy_(1e4 * torch.sign(keys[5] - keys.mean(dim=0)))  # type: ignore[union-attr]
        task.decoder.query.weight.zero_()  # type: ignore[union-attr]
        task.decoder.query.bias.zero_()  # type: ignore[union-attr]
        best = int((torch.tanh(keys) @ task.decoder.score.weight[0]).argmax())  # type: ignore[index]
    _, words = words_looked(task, images)
    for word in words:
        share = torch.cat([torch.zeros(2), word.heat.flatten()])
        assert best >= 2 and float(share[best]) == pytest.approx(1, abs=1e-3)


def test_a_decoder_that_does_not_look_again() -> None:
    _, words = words_looked(captioner(decoder="recurrent").eval(), torch.randn(1, 3, 8, 12))
    assert words and all(word.heat is None for word in words)


@pytest.mark.parametrize(
    "encoder, decoder, drawn, note",
    [
        (VIT, "transformer", {"words.png", *OF_THE_ENCODER}, None),
        (VIT, "recurrent", OF_THE_ENCODER, "sees the picture once"),
        (CNN, "attentive", {"words.png"}, "the decoder's attention alone: explain reads the attention of a Vision"),
    ],
)
def test_explain_a_captioner(tmp_path: Path, encoder: Any, decoder: str, drawn: set[str], note: str | None) -> None:
    task = captioner(encoder, decoder=decoder)
    source = picture(tmp_path / "a <b>.png")
    result = explain(task, source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == drawn
    assert (note is None and not result["notes"]) or note in result["notes"][0]
    assert result["caption"] == task.predict([Image.open(source)])[0].caption
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;.png" in page and all(f'src="{name}"' in page for name in drawn)
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["caption"] == result["caption"] and len(numbers["words"]) == len(result["words"])
    if "words.png" in drawn:
        assert len(numbers["looked"]) == len(numbers["words"])
        with Image.open(tmp_path / "out" / "words.png") as image:
            assert len(set(image.convert("L").tobytes())) > 50


def test_letters_that_no_font_has_are_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]  # without Chinese
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    picture, heat = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(2, 2)
    for word, said in (("dog", 0), ("狗", 1), ("狗 狗", 1)):
        assert png(draw_words(picture, [(word, 0.5, heat)])).startswith(b"\x89PNG")
        assert len([record for record in caplog.records if "are boxes in the pictures" in record.message]) == said
