"""Captioning: what a captioner answers, its components, its files."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tasks.caption.small import (
    TEXTS,
    VIT,
    WORDS,
    batch,
    bias,
    captioner,
    captions,
    match_of,
    said,
    some_images,
    text_vector,
)
from torch.overrides import TorchFunctionMode

import vitrail
from vitrail.baselines import CNNConfig
from vitrail.data.loader import Loader
from vitrail.data.sets import ImageSet
from vitrail.data.targets import Texts
from vitrail.data.text import END, PAD, START, Tokenizer
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, Captions, Decoding, numbered
from vitrail.tasks.caption.answers import Thresholds
from vitrail.tasks.caption.consensus import Consensus
from vitrail.tasks.exported import run_by

TWO = [("a dog", -0.5), ("a cat", -1.5)]


def test_numbers_of_captions() -> None:
    table = numbered(TEXTS, WORDS, 5)
    assert table.shape == (3, 3, 5)
    assert table[0, 0].tolist() == [*WORDS.encode("a red dog runs"), END]
    assert table[0, 1].tolist() == [*WORDS.encode("the dog"), END, PAD, PAD]
    assert not table[0, 2].any() and not table[1, 1:].any()
    # A caption that is too long is cut, and does not end where it was cut.
    assert table[1, 0].tolist() == WORDS.encode("two cats sit on a")


def test_a_csv_file_has_the_captions_without_their_tokens() -> None:
    listed = [{"caption": text, "score": score, "tokens": [{"text": text, "p": 0.5}]} for text, score in TWO]
    (record,) = Captions("a dog", listed, match=1.5, sure=True).records()
    shorter = [{"caption": text, "score": score} for text, score in TWO]
    assert record == {"caption": "a dog", "match": 1.5, "sure": True, "captions": shorter}


def test_no_word_repeats_that_begins_the_caption() -> None:
    """In byte-level BPE it has another number there, so that the numbers alone tell no repeat."""
    letters = Tokenizer.train(["a b c a b c"] * 3, "bpe", 270)
    task = captioner(decoding=Decoding(beam=1, no_repeat_ngram_size=1, max_length=10)).eval()
    task = Caption(task.encoder, task.captioning, letters, task.preprocess).eval()
    a, later = letters.encode("a"), letters.encode("b a")[1:]
    assert len(a) == len(later) == 1 and a != later
    with torch.no_grad():
        bias(task)[[*a, *later]] = torch.tensor([40.0, 30.0])
    (answer,) = captions(task, {"image": torch.randn(1, 3, 8, 8)})
    assert answer.caption.startswith("a") and " a" not in answer.caption
    task.option = Decoding(beam=1, no_repeat_ngram_size=0, max_length=10)
    (answer,) = captions(task, {"image": torch.randn(1, 3, 8, 8)})
    assert answer.caption.startswith("aa")


@pytest.mark.parametrize("sample", [False, True])
def test_captions_that_match_their_image_come_first(sample: bool) -> None:
    """The same captions, whose scores have the weighted logit of the contrastive loss on top, in the new order."""
    how = Decoding(max_length=8, beam=4, sample=sample, temperature=3.0, sampling_seed=5)
    task, made = captioner(contrastive=0.5, text_depth=1, decoding=how).eval(), batch()
    before = captions(task, made)
    task.option = replace(how, match=1.0)
    changed = False
    for i, (plain, found) in enumerate(zip(before, captions(task, made), strict=True)):
        with torch.no_grad():
            image = match_of(task).image(task.memory(made["image"][i : i + 1]).pooled)[0]
            expected = {}
            for row in plain.captions:
                # Without the last word of one that is cut off.
                text = text_vector(task, [START, *WORDS.encode(row["caption"])][: how.max_length])
                logit = float(F.cosine_similarity(image, text, dim=0)) / 0.07
                expected[row["caption"]] = row["score"] + logit
        assert {row["caption"]: pytest.approx(row["score"], abs=1e-4) for row in found.captions} == expected
        scores = [row["score"] for row in found.captions]
        assert scores == sorted(scores, reverse=True) and found.caption == max(expected, key=expected.__getitem__)
        changed |= found.caption != plain.caption
    assert changed


def test_a_caption_tells_its_match_and_below_a_threshold_that_it_is_not_sure(tmp_path: Path) -> None:
    """The captions stay the same, with and without; a checkpoint keeps the thresholds, further training drops them."""
    task, made = captioner(contrastive=0.5, text_depth=1).eval(), batch()
    plain = captions(task, made)
    assert "match" not in captions(captioner(), made)[0].row(), "it has not learned to match"
    assert [row.text() for row in plain] == [row.caption for row in plain] and "sure" not in plain[0].row()
    for i, answer in enumerate(plain):
        with torch.no_grad():
            image = match_of(task).image(task.memory(made["image"][i : i + 1]).pooled)[0]
            text = text_vector(task, [START, *WORDS.encode(answer.caption)][: task.option.max_length])
        assert answer.match == pytest.approx(float(F.cosine_similarity(image, text, dim=0)) / 0.07, abs=1e-4)
    matches = [answer.match or 0.0 for answer in plain]
    middle = sorted(matches)[1]
    task.sure_from = Thresholds(middle)
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert isinstance(again, Caption)
    for each in (task, again):
        found = captions(each, made)
        assert [row.sure for row in found] == [match >= middle for match in matches]
        for row, before in zip(found, plain, strict=True):
            assert row.row() == {**before.row(), "sure": row.sure}
            assert row.text() == (row.caption if row.sure else f"not sure: {row.caption}")
    again.configure(Captioning(contrastive=0.5, text_depth=1))
    assert "sure" not in captions(again, made)[0].row() and "sure_from" not in again.config()


def test_an_image_unlike_all_training_images_is_not_sure() -> None:
    task, made = captioner(contrastive=0.5, text_depth=1).eval(), batch()
    with torch.no_grad():
        vectors = match_of(task)(task.memory(made["image"]).pooled)
        task.consensus = Consensus.of(vectors[:1], made["label"][:1], task.tokenizer.size)
        cosines = (vectors @ vectors[0]).tolist()
    assert cosines[0] == pytest.approx(1.0) and max(cosines[1:]) < 0.999
    task.sure_from = Thresholds(-100.0, 0.999)
    assert [row.sure for row in captions(task, made)] == [True, False, False]
    task.sure_from = Thresholds(100.0, -1.0)
    assert [row.sure for row in captions(task, made)] == [False, False, False]


@pytest.mark.parametrize("value", ["high", None, math.nan])
def test_a_threshold_that_is_no_number(value: Any) -> None:
    with pytest.raises(UserError, match="the threshold match must be a number"):
        Thresholds(value)


@pytest.mark.parametrize("how", [Decoding(max_length=10), Decoding(max_length=10, sample=True, beam=4)])
def test_answers_are_the_same_beside_other_images(how: Decoding) -> None:
    task = captioner(decoder="attentive")
    task.option = how
    together = said(task, some_images())
    for image, answer in zip(some_images(), together, strict=True):
        (alone,) = said(task, [image])
        assert alone.caption == answer.caption
        assert [row["caption"] for row in alone.captions] == [row["caption"] for row in answer.captions]
    assert [row.caption for row in said(task, some_images(), batch_size=2)] == [row.caption for row in together]
    first = together[0]
    assert len(first.captions) == how.beam and first.caption == first.captions[0]["caption"]
    for row in first.captions:
        assert "".join(token["text"] for token in row["tokens"]).strip() == row["caption"]
        assert all(0 < token["p"] <= 1 for token in row["tokens"]) and row["score"] <= 0


def test_images_of_all_shapes_are_prepared_as_in_training(tmp_path: Path) -> None:
    for i, image in enumerate(some_images()):
        image.save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    task = captioner()
    five = ImageSet("x", [file.name for file in files], files, Texts([["a dog"]] * 5))
    (made,) = Loader(five, task.preprocess, batch_size=8, seed=0, train=False).evaluation()
    for i, image in enumerate(some_images()):
        torch.testing.assert_close(task.preprocess(image), made["image"][i])
    assert [a.caption for a in captions(task, made)] == [a.caption for a in said(task, some_images())]


@pytest.mark.parametrize("encoder", [VIT, CNNConfig(channels=3, image_size=(8, 8))])
def test_saved_and_loaded(tmp_path: Path, encoder: Any) -> None:
    task = captioner(encoder=encoder, word_dropout=0.1).eval()
    task.option = Decoding(beam=2, max_length=6, no_repeat_ngram_size=2)
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert isinstance(again, Caption) and again.option == task.option
    assert again.tokenizer.to_json() == WORDS.to_json()
    assert [a.row() for a in again.predict(some_images())] == [a.row() for a in task.predict(some_images())]
    images, words = torch.randn(2, 3, 8, 8), torch.randint(4, WORDS.size, (2, 3, 5))
    assert torch.equal(task(images, words), again(images, words))


def test_a_tokenizer_of_another_checkpoint(tmp_path: Path) -> None:
    captioner().save(tmp_path / "m")
    other = Tokenizer.train(["some other words altogether", "and more of them"], "words", 40)
    (tmp_path / "m" / "tokenizer.json").write_text(other.to_json())
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        vitrail.load(tmp_path / "m")
    assert "\n" not in str(caught.value) and f"{other.size}" in str(caught.value)
    # As large, and with other words.
    (tmp_path / "m" / "tokenizer.json").write_text(WORDS.to_json().replace('"red"', '"tin"'))
    with pytest.raises(UserError, match=r"tokenizer\.json belongs to another checkpoint"):
        vitrail.load(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        vitrail.load(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        vitrail.load(tmp_path / "m")


def test_weights_that_are_no_numbers_are_named() -> None:
    task = captioner()
    with torch.no_grad():
        bias(task).fill_(torch.nan)
    with pytest.raises(UserError, match="word probabilities are nan"):
        task.predict(some_images(2))


def test_the_network_is_used_through_calls_alone() -> None:
    """Hooks on calls, such as FSDP's, run for the task, its decoder, its blocks and heads, for every method."""
    task = captioner(contrastive=0.5, bag_of_words=0.1, text_depth=1, decoding=Decoding(max_length=6, match=0.1))
    own = ("", "encoder", "decoder", "match", "bag")
    units = {name: m for name, m in task.named_modules() if name in own or re.fullmatch(r".*blocks\.\d+", name)}
    running: list[str] = []
    for name, module in units.items():
        module.register_forward_pre_hook(lambda module, inputs, name=name: running.append(name))
        module.register_forward_hook(lambda module, inputs, output, name=name: running.remove(name))
    owner = {
        id(parameter): max((unit for unit in units if name.startswith(unit)), key=len)
        for name, parameter in task.named_parameters()
    }
    used = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for tensor in args:
                if id(tensor) in owner and getattr(func, "__name__", "__get__") != "__get__":
                    used.add(owner[id(tensor)])
                    assert owner[id(tensor)] in running, f"{owner[id(tensor)]!r} is used outside of its call"
            return func(*args, **(kwargs or {}))

    made = batch()
    with Watch():
        task.loss(made)
        task.eval()
        task.answer(made)
        task.explained(made)
        task.pieces(made)
        task.configure(replace(task.captioning, self_critical=1.0, bag_of_words=0.0))
        task.reward = lambda keys, texts, ended: [float(len(text)) for text in texts]
        task.train().loss(made)
    assert used == {*units} - {""}


@pytest.mark.parametrize("decoder", ["recurrent", "attentive", "transformer"])
def test_what_is_explained_is_the_log_probability_of_the_best_caption(decoder: str) -> None:
    task, made = captioner(decoder=decoder, decoding=Decoding(max_length=8, no_repeat_ngram_size=0)).eval(), batch()
    made["image"].requires_grad_()
    found = task.explained(made)
    with torch.no_grad():
        expected = task.generate(made).logp[:, 0].sum(dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert made["image"].grad.abs().sum() > 0


@pytest.mark.parametrize("decoder", ["recurrent", "attentive", "transformer", "match"])
@pytest.mark.parametrize("beam", [1, 3])
def test_programs_write_the_same_captions(decoder: str, beam: int) -> None:
    """What export writes of a captioner gives its captions, also those of one word."""
    matching: Any = {"contrastive": 0.5, "text_depth": 1} if decoder == "match" else {"decoder": decoder}
    for length in (1, 6):
        how = Decoding(beam=beam, max_length=length, match=1.0 if decoder == "match" else 0.0)
        task, made = captioner(**matching, decoding=how).eval(), batch()
        with torch.inference_mode():
            programs = task.programs(made)
            assert ("match" in programs) == (decoder == "match")
            engines = {name: program.module for name, program in programs.items()}
            outputs = {name: program.outputs for name, program in programs.items()}
            again = run_by(copy.deepcopy(task), engines, outputs, "an export")
            assert [one.row() for one in again.answer(made)] == [one.row() for one in task.answer(made)]


def test_texts_become_numbers() -> None:
    target = captioner().encode_target(Texts(TEXTS))
    fields = target.collate([None, None], torch.tensor([2, 0]), training=True)
    assert torch.equal(fields["label"], numbered(TEXTS, WORDS, 12)[[2, 0]])


def test_an_answer_is_drawn_below_its_image() -> None:
    image = some_images(1)[0]
    (answer,) = captioner().predict([image])
    assert answer.draw(image).height > image.height


def test_the_bundled_captioner_is_not_sure_of_noise() -> None:
    noise = Image.effect_noise((112, 112), 120).convert("RGB")
    (answer,) = said(vitrail.load("caption"), [noise])  # type: ignore[arg-type]
    assert answer.sure is False and answer.text() == f"not sure: {answer.caption}"
