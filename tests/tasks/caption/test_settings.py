"""Settings that go together, and what weights keep of them when training continues."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks.caption.small import (
    batch,
    captioner,
    match_of,
)

import vitrail
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.caption.settings import LanguageSettings


def test_continued_training_keeps_the_decoder() -> None:
    task = captioner()
    task.configure(Captioning(captions=4, self_critical=1.0, decoder_width=96, decoding=Decoding(max_length=7)))
    assert (task.captioning.captions, task.captioning.decoder_width, task.option.max_length) == (4, 16, 7)
    with pytest.raises(UserError, match="has the decoder transformer, but the recipe has attentive lstm"):
        task.configure(Captioning(decoder="attentive"))
    with pytest.raises(UserError, match="has the decoder recurrent lstm, but the recipe has recurrent gru"):
        captioner(decoder="recurrent").configure(Captioning(decoder="recurrent", cell="gru"))


def test_continued_training_takes_the_losses_of_the_new_recipe(tmp_path: Path) -> None:
    task = captioner(text_depth=1)
    task.configure(replace(task.captioning, contrastive=0.5, bag_of_words=0.1))
    assert {"contrastive", "bag_of_words"} <= task.loss(batch()).keys()
    before = match_of(task).image.weight.clone()
    task.configure(replace(task.captioning, bag_of_words=0.0))
    assert torch.equal(match_of(task).image.weight, before) and task.bag is None
    task.save(tmp_path / "m")
    assert {"contrastive"} == {"contrastive", "bag_of_words"} & vitrail.load(tmp_path / "m").loss(batch()).keys()
    with pytest.raises(UserError, match="contrastive compares"):
        captioner().configure(Captioning(contrastive=0.5, text_depth=1))


def test_self_critical_training_leaves_the_matching_unchanged_where_there_is_any(tmp_path: Path) -> None:
    critic = Captioning(self_critical=1.0, contrastive=0.5, text_depth=1, decoding=Decoding(max_length=7, match=0.2))
    task = captioner(contrastive=0.5, text_depth=1)
    before = {name: value.clone() for name, value in match_of(task).state_dict().items()}
    task.configure(critic)
    task.reward = lambda keys, texts, ended: [float(len(text)) for text in texts]
    sums = task.loss(batch())
    assert "contrastive" not in sums
    sums["loss"].backward()
    assert all(parameter.grad is None for parameter in match_of(task).parameters())
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert isinstance(again, Caption) and again.option.match == 0.2
    for name, value in match_of(again).state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-3, rtol=1e-2)  # weights are stored in half precision
    other = captioner()
    other.configure(critic)
    assert other.match is None and (other.captioning.contrastive, other.option.match) == (0.0, 0.0)


PREFIX = {"decoder": "language_model", "smoothing": 0.0, "lower": False}


def test_configs_that_make_no_sense() -> None:
    wrong: dict[str, dict[str, Any]] = {
        "needs the decoder transformer with a text_depth of at least 1": {"contrastive": 1.0},
        "contrastive compares": {"contrastive": 0.5, "text_depth": 1, "decoder": "attentive"},
        "text_depth must be at least 0 and below the decoder's depth, got 3": {"text_depth": 3},
        "width 128 does not divide into 3 heads": {"decoder_width": 128, "decoder_heads": 3},
        "captions must be at least 1, got 0": {"captions": 0},
        "most_words must be at least 1": {"most_words": 0},
        "smoothing must be at least 0 and below 1": {"smoothing": 1.5},
        "contrastive must be a weight of at least 0, got -1": {"contrastive": -1.0},
        "bag_of_words must be a weight": {"bag_of_words": math.inf},
        "self_critical must be a weight": {"self_critical": math.nan},
        "scst_temperature must be above 0": {"scst_temperature": 0.0},
        "text_depth is for the Transformer decoder": {"text_depth": 1, "decoder": "recurrent"},
        "does not use --lower: leave it out, and use the recipe caption-prefix": {"decoder": "language_model"},
        "does not use --vocabulary-size": {**PREFIX, "vocabulary_size": 400},
        "does not use --bag-of-words": {**PREFIX, "bag_of_words": 0.5},
        "--join is for a language model, but the decoder is transformer": {"language": LanguageSettings(join="mlp")},
        "trains on the reward only": {"self_critical": 1.0, "bag_of_words": 0.1},
        "match and consensus need a contrastive loss": {"decoding": Decoding(match=0.2)},
    }
    for message, fields in wrong.items():
        with pytest.raises(UserError, match=message):
            Captioning(**fields)
