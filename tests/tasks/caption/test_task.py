"""Captioning: the losses against their formulas, what is drawn in training, and what a captioner answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vitrail
from vitrail.baselines import CNNConfig
from vitrail.data.captions import CaptionSet
from vitrail.data.decode import Preprocess
from vitrail.data.loader import Loader
from vitrail.data.text import END, PAD, START, UNKNOWN, Tokenizer
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.decoders import TransformerDecoder
from vitrail.tasks.encoder import encoder_for
from vitrail.tasks.matching import Match
from vitrail.tasks.search import Decoding, write
from vitrail.vit import ViTConfig

TEXTS = [["a red dog runs", "the dog"], ["two cats sit on a wall"], ["a man", "a man rides", "he rides a red bicycle"]]
WORDS = Tokenizer.train([text for texts in TEXTS for text in texts], "words", 40)
SMALL: dict[str, Any] = {"decoder_width": 16, "decoder_depth": 2, "decoder_heads": 2, "decoder_dropout": 0.0}
VIT = ViTConfig(width=24, depth=1, heads=2, patch=4, image_size=(8, 8))


def captioner(seed: int = 0, encoder: Any = VIT, **changes: Any) -> Caption:
    torch.manual_seed(seed)
    config = Captioning(**{**SMALL, "most_words": 12, "decoding": Decoding(max_length=10), **changes})
    return Caption(encoder_for(encoder), config, WORDS, Preprocess(size=(8, 8), resize="squash"))


def batch(texts: list[list[str]] = TEXTS, seed: int = 0) -> dict[str, Any]:
    images = torch.randn(len(texts), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "label": numbered(texts, WORDS, 12), "sample": torch.arange(len(texts)), "epoch": 0}


def test_numbers_of_captions() -> None:
    table = numbered(TEXTS, WORDS, 5)
    assert table.shape == (3, 3, 5)
    assert table[0, 0].tolist() == [*WORDS.encode("a red dog runs"), END]
    assert table[0, 1].tolist() == [*WORDS.encode("the dog"), END, PAD, PAD]
    assert not table[0, 2].any() and not table[1, 1:].any()
    # A caption that is too long is cut, and does not end where it was cut.
    assert table[1, 0].tolist() == WORDS.encode("two cats sit on a")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("decoder", ["recurrent", "attentive", "transformer"])
def test_loss_is_cross_entropy_written_out(decoder: str, smoothing: float) -> None:
    task, made = captioner(decoder=decoder, smoothing=smoothing, captions=3).eval(), batch()
    sums = task.loss(made)
    loss, count, right = 0.0, 0, 0
    for i, texts in enumerate(TEXTS):
        for text in texts:
            ids = [*WORDS.encode(text), END]
            with torch.no_grad():
                logits = task(made["image"][i : i + 1], torch.tensor([[[START, *ids[:-1]]]]))[0, 0]
            for p, wanted in zip(logits.softmax(dim=1), ids, strict=True):
                target = torch.full((WORDS.size,), smoothing / WORDS.size)
                target[wanted] += 1 - smoothing
                loss -= float((target * p.log()).sum())
                count, right = count + 1, right + int(p.argmax() == wanted)
    assert sums["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert (sums["count"].item(), sums["accuracy"].item()) == (count, right)


def test_no_word_repeats_that_begins_the_caption() -> None:
    """In byte-level BPE it has another number there, so that the numbers alone tell no repeat."""
    letters = Tokenizer.train(["a b c a b c"] * 3, "bpe", 270)
    task = captioner(decoding=Decoding(beam=1, no_repeat_ngram_size=1, max_length=10)).eval()
    task = Caption(task.encoder, task.captioning, letters, task.preprocess).eval()
    a, later = letters.encode("a"), letters.encode("b a")[1:]
    assert len(a) == len(later) == 1 and a != later
    with torch.no_grad():
        task.decoder.bias[[*a, *later]] = torch.tensor([40.0, 30.0])
    (answer,) = task.answer({"image": torch.randn(1, 3, 8, 8)})
    assert answer.caption.startswith("a") and " a" not in answer.caption
    task.option = Decoding(beam=1, no_repeat_ngram_size=0, max_length=10)
    (answer,) = task.answer({"image": torch.randn(1, 3, 8, 8)})
    assert answer.caption.startswith("aa")


@pytest.mark.parametrize("decoder", ["recurrent", "attentive", "transformer"])
def test_every_parameter_learns(decoder: str) -> None:
    for changes in ({}, {"contrastive": 0.5, "text_depth": 1} if decoder == "transformer" else {"cell": "rnn"}):
        task = captioner(decoder=decoder, **changes)
        task.loss(batch())["loss"].backward()
        without = {name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()}
        assert not without


def test_padding_and_more_images_change_nothing() -> None:
    task = captioner(captions=3).eval()
    alone = [task.loss(batch([texts], seed)) for seed, texts in enumerate(TEXTS)]
    images = torch.cat([batch([texts], seed)["image"] for seed, texts in enumerate(TEXTS)])
    wide = F.pad(numbered(TEXTS, WORDS, 12), (0, 5, 0, 2), value=PAD)
    together = task.loss({"image": images, "label": wide, "sample": torch.arange(3), "epoch": 0})
    for name in ("loss", "count", "accuracy"):
        assert together[name].item() == pytest.approx(sum(sums[name].item() for sums in alone), rel=1e-5)


def test_some_captions_of_each_image() -> None:
    task, seen = captioner(), set()
    for epoch in range(2):
        made = {**batch(), "epoch": epoch}
        chosen = task._some(made, 2)
        order = torch.tensor([2, 0, 1])
        there = {"label": made["label"][order], "sample": made["sample"][order], "epoch": epoch}
        turned = task._some(there, 2)
        assert torch.equal(turned, chosen[order]), "which captions are read depends on the image, not on its place"
        assert chosen.shape[:2] == (3, 2)
        rows = [[tuple(w for w in row if w) for row in rows if row[0]] for rows in chosen.tolist()]
        for i, texts in enumerate(TEXTS):
            own = [(*WORDS.encode(text), END) for text in texts]
            assert len(rows[i]) == min(2, len(texts)) and {*rows[i]} <= {*own} and len({*rows[i]}) == len(rows[i])
        seen |= {*rows[2]}
        assert chosen.shape[2] == max(len(row) for part in rows for row in part)
    assert len(seen) == 3, "two of three captions an epoch: after two of these each had its turn"


def test_word_dropout() -> None:
    task = captioner(word_dropout=0.4)
    words = torch.randint(0, WORDS.size, (50, 4, 30))
    words[..., 0] = START
    torch.manual_seed(0)
    dropped = task.train()._dropped(words)
    real, gone = words > UNKNOWN, dropped != words
    assert (dropped[gone] == UNKNOWN).all() and not gone[~real].any()
    assert float(gone[real].float().mean()) == pytest.approx(0.4, abs=0.03)
    assert torch.equal(task.eval()._dropped(words), words)
    assert torch.equal(captioner().train()._dropped(words), words)


@pytest.mark.parametrize("captions", [1, 2, 3])
def test_each_caption_has_its_turn_to_be_matched(captions: int) -> None:
    """However many a step reads: three captions of an image, three epochs."""
    task = captioner(contrastive=0.5, text_depth=1, captions=captions)
    matched: list[torch.Tensor] = []
    assert isinstance(task.match, Match)
    task.match.register_forward_pre_hook(lambda module, inputs: matched.append(inputs[2]))
    for epoch in range(3):
        task.loss({**batch(), "epoch": epoch})
    own = {(*WORDS.encode(text), END) for text in TEXTS[2]}
    assert {tuple(word for word in rows[2].tolist() if word != PAD) for rows in matched} == own


def test_coca_matches_images_with_their_captions() -> None:
    """Equation 2 of CoCa: normalised vectors, a learned temperature, cross-entropy both ways."""
    task, made = captioner(contrastive=0.5, text_depth=1, smoothing=0.0, captions=1).eval(), batch()
    texts = [[row[0]] for row in TEXTS]
    made["label"] = numbered(texts, WORDS, 12)
    sums = task.loss(made)
    assert isinstance(task.match, Match)
    with torch.no_grad():
        images = task.match.image(task.memory(made["image"]).pooled)
        vectors = []
        for (text,) in texts:
            ids = [START, *WORDS.encode(text)]
            vectors.append(task.match.text(task.decoder.read(torch.tensor([ids]))[0, -1]))  # type: ignore[operator]
        logits = torch.tensor([[float(F.cosine_similarity(i, t, dim=0)) / 0.07 for t in vectors] for i in images])
    both = [-logits.log_softmax(dim=d).diagonal().mean() for d in (0, 1)]
    expected = float(sum(both) / 2)
    count = sums["count"].item()
    assert sums["contrastive"].item() == pytest.approx(expected * count, rel=1e-4)
    plain = replace(task.captioning, contrastive=0.0)
    task.captioning = plain
    assert sums["loss"].item() == pytest.approx(task.loss(made)["loss"].item() + 0.5 * expected * count, rel=1e-5)


@pytest.mark.parametrize("sample", [False, True])
def test_captions_that_match_their_image_come_first(sample: bool) -> None:
    """The same captions, whose scores have the weighted logit of the contrastive loss on top, in the new order."""
    how = Decoding(max_length=8, beam=4, sample=sample, temperature=3.0, sampling_seed=5)
    task, made = captioner(contrastive=0.5, text_depth=1, decoding=how).eval(), batch()
    before = task.answer(made)
    task.option = replace(how, match=1.0)
    changed = False
    for i, (plain, found) in enumerate(zip(before, task.answer(made), strict=True)):
        with torch.no_grad():
            image = task.match.image(task.memory(made["image"][i : i + 1]).pooled)[0]
            expected = {}
            for row in plain.captions:
                ids = [START, *WORDS.encode(row["caption"])][
                    : how.max_length
                ]  # without the last of one that is cut off
                text = task.match.text(task.decoder.read(torch.tensor([ids]))[0, -1])
                logit = float(F.cosine_similarity(image, text, dim=0)) / 0.07
                expected[row["caption"]] = row["score"] + logit
        assert {row["caption"]: pytest.approx(row["score"], abs=1e-4) for row in found.captions} == expected
        scores = [row["score"] for row in found.captions]
        assert scores == sorted(scores, reverse=True) and found.caption == max(expected, key=expected.__getitem__)
        changed |= found.caption != plain.caption
    assert changed


@pytest.mark.parametrize("decoder", ["recurrent", "transformer"])
def test_bag_of_words_is_the_share_of_captions_that_use_a_word(decoder: str) -> None:
    task, made = captioner(decoder=decoder, bag_of_words=0.2).eval(), batch()
    sums = task.loss(made)
    with torch.no_grad():
        p = task.bag.linear(task.memory(made["image"]).pooled).sigmoid().double()
    expected = 0.0
    for i, texts in enumerate(TEXTS):
        for word in range(WORDS.size):
            share = sum(word in WORDS.encode(text) for text in texts) / len(texts)
            expected -= float(share * p[i, word].log() + (1 - share) * (1 - p[i, word]).log()) / len(TEXTS)
    count = sums["count"].item()
    assert sums["bag_of_words"].item() == pytest.approx(expected * count, rel=1e-4)
    task.captioning = replace(task.captioning, bag_of_words=0.0)
    assert sums["loss"].item() == pytest.approx(task.loss(made)["loss"].item() + 0.2 * expected * count, rel=1e-5)


def test_words_are_as_likely_at_first_as_in_the_captions() -> None:
    task = captioner(bag_of_words=0.1, text_depth=1)
    labels = numbered(TEXTS, WORDS, 12)
    task.expect(labels)
    words = [word for row in labels.flatten(0, 1).tolist() for word in row if word != PAD]
    first = task.decoder.bias.softmax(dim=0)
    for word in {*words}:
        assert first[word].item() == pytest.approx(words.count(word) / len(words), rel=0.1)
    never = {*range(WORDS.size)} - {*words}
    assert 0 < max(first[word].item() for word in never) < min(first[word].item() for word in {*words})
    rows = [[WORDS.encode(text) for text in texts] for texts in TEXTS]
    used = [[sum(word in row for row in some) / len(some) for word in range(WORDS.size)] for some in rows]
    share = torch.tensor(used).mean(dim=0)
    found = task.bag.linear.bias.sigmoid()
    torch.testing.assert_close(found, share.clamp(1e-5, 1 - 1e-3), rtol=1e-4, atol=1e-6)


def test_matching_is_learned() -> None:
    """The loss brings each caption next to its own image."""
    task, made = captioner(contrastive=1.0, text_depth=1), batch()
    optimizer = torch.optim.Adam(task.parameters(), lr=0.01)
    for epoch in range(60):
        sums = task.loss({**made, "epoch": epoch})
        optimizer.zero_grad()
        (sums["loss"] / sums["count"]).backward()
        optimizer.step()
    task.eval()
    assert isinstance(task.decoder, TransformerDecoder)
    with torch.no_grad():
        images = task.match.image_of(task.memory(made["image"]).pooled)
        texts = task.match.text_of(task.decoder, made["label"].flatten(0, 1))
        nearest = task.match.logits(images, texts).argmax(dim=0).view(made["label"].shape[:2])
    there = made["label"][..., 0] != PAD
    assert (nearest == torch.arange(len(images))[:, None])[there].all()


@pytest.mark.parametrize(("decoder", "heat"), [("recurrent", 1.0), ("attentive", 0.6), ("transformer", 0.6)])
def test_self_critical_gradient_is_the_formula(decoder: str, heat: float) -> None:
    """-(r - b) times the gradient of log p, with the mean of the image's other captions as the baseline b."""
    task, made = captioner(decoder=decoder, captions=3, self_critical=2.0, scst_temperature=heat), batch()
    given: list[tuple[list[int], list[str], list[float]]] = []

    def reward(keys: Iterable[int], texts: Iterable[str], ended: Iterable[bool]) -> list[float]:
        assert not all(ended), "some captions are cut off at the longest length"
        keys, texts = list(keys), list(texts)
        given.append((keys, texts, [len(text) % 7 + 0.1 * key for key, text in zip(keys, texts, strict=True)]))
        return given[-1][2]

    task.reward = reward
    torch.manual_seed(4)
    sums = task.loss(made)
    assert task.training
    sums["loss"].backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    ((keys, texts, rewards),) = given
    assert keys == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] and len({*texts}) > 6
    # The captions once more: they depend on the same draw.
    torch.manual_seed(4)
    draws = int(torch.randint(1 << 30, ()))
    how = Decoding(beam=4, sample=True, temperature=heat, sampling_seed=draws, no_repeat_ngram_size=0, max_length=10)
    with torch.no_grad():
        written = write(task.decoder, task.memory(made["image"]), how, made["sample"])
    objective, count = torch.zeros(()), 0
    for i in range(3):
        own = rewards[4 * i : 4 * i + 4]
        for k in range(4):
            ids = [w for w in written.words[i, k].tolist() if w != PAD]
            logits = task(made["image"][i : i + 1], torch.tensor([[[START, *ids[:-1]]]]))[0, 0] / heat
            logits[:, [PAD, START, UNKNOWN]] = -torch.inf  # as where they were drawn
            logp = logits.log_softmax(dim=1)[torch.arange(len(ids)), torch.tensor(ids)].sum()
            objective = objective - 2.0 * (own[k] - (sum(own) - own[k]) / 3) * logp
            count += len(ids)
    objective.backward()
    assert count == sums["count"].item() and sums["loss"].item() == pytest.approx(objective.item(), rel=1e-4, abs=1e-3)
    assert sums["reward"].item() == pytest.approx(sum(rewards) / 12 * count, rel=1e-5)
    scale = max(float(p.grad.abs().max()) for p in task.parameters() if p.grad is not None)
    for name, p in task.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-4 * scale, rtol=1e-3)


def some_images(count: int = 5) -> list[Image.Image]:
    draw = torch.Generator().manual_seed(0)
    sizes = [(8, 8), (40, 9), (9, 40), (31, 17), (8, 12)]
    return [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=draw, dtype=torch.uint8).numpy())
        for w, h in sizes[:count]
    ]


@pytest.mark.parametrize("how", [Decoding(max_length=10), Decoding(max_length=10, sample=True, beam=4)])
def test_answers_are_the_same_beside_other_images(how: Decoding) -> None:
    task = captioner(decoder="attentive")
    task.option = how
    together = task.predict(some_images())
    for image, answer in zip(some_images(), together, strict=True):
        (alone,) = task.predict([image])
        assert alone.caption == answer.caption
        assert [row["caption"] for row in alone.captions] == [row["caption"] for row in answer.captions]
    assert [row.caption for row in task.predict(some_images(), batch_size=2)] == [row.caption for row in together]
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
    part = CaptionSet("x", [file.name for file in files], files, [["a dog"]] * 5)
    (made,) = Loader(part, task.preprocess, batch_size=8, seed=0, train=False).evaluation()
    for i, image in enumerate(some_images()):
        torch.testing.assert_close(task.preprocess(image), made["image"][i])
    assert [a.caption for a in task.answer(made)] == [a.caption for a in task.predict(some_images())]


@pytest.mark.parametrize("encoder", [VIT, CNNConfig(channels=3, image_size=(8, 8))])
def test_saved_and_loaded(tmp_path: Path, encoder: Any) -> None:
    task = captioner(encoder=encoder, word_dropout=0.1).eval()
    task.option = Decoding(beam=2, max_length=6, no_repeat_ngram_size=2)
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert isinstance(again, Caption) and again.decoding == task.option
    assert again.tokenizer.to_json() == WORDS.to_json()
    assert [a.captions for a in again.predict(some_images())] == [a.captions for a in task.predict(some_images())]
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


def test_going_on_keeps_the_decoder(tmp_path: Path) -> None:
    task = captioner()
    task.configure(Captioning(captions=4, self_critical=1.0, decoder_width=96, decoding=Decoding(max_length=7)))
    assert (task.captioning.captions, task.captioning.decoder_width, task.option.max_length) == (4, 16, 7)
    with pytest.raises(UserError, match="has the decoder transformer, and the recipe attentive lstm"):
        task.configure(Captioning(decoder="attentive"))
    with pytest.raises(UserError, match="has the decoder recurrent lstm, and the recipe recurrent gru"):
        captioner(decoder="recurrent").configure(Captioning(decoder="recurrent", cell="gru"))


def test_going_on_takes_the_losses_of_the_new_recipe(tmp_path: Path) -> None:
    task = captioner(text_depth=1)
    task.configure(replace(task.captioning, contrastive=0.5, bag_of_words=0.1))
    assert {"contrastive", "bag_of_words"} <= task.loss(batch()).keys()
    before = task.match.image.weight.clone()
    task.configure(replace(task.captioning, bag_of_words=0.0))
    assert torch.equal(task.match.image.weight, before) and not hasattr(task, "bag")
    task.save(tmp_path / "m")
    assert {"contrastive"} == {"contrastive", "bag_of_words"} & vitrail.load(tmp_path / "m").loss(batch()).keys()
    with pytest.raises(UserError, match="contrastive compares"):
        captioner().configure(Captioning(contrastive=0.5, text_depth=1))


def test_a_critic_leaves_the_matching_as_it_is_where_there_is_any(tmp_path: Path) -> None:
    critic = Captioning(self_critical=1.0, contrastive=0.5, text_depth=1, decoding=Decoding(max_length=7, match=0.2))
    task = captioner(contrastive=0.5, text_depth=1)
    before = {name: value.clone() for name, value in task.match.state_dict().items()}
    task.configure(critic)
    task.reward = lambda keys, texts, ended: [float(len(text)) for text in texts]
    sums = task.loss(batch())
    assert "contrastive" not in sums
    sums["loss"].backward()
    assert all(parameter.grad is None for parameter in task.match.parameters())
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert again.decoding.match == 0.2
    for name, value in again.match.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-3, rtol=1e-2)  # weights are stored in half precision
    other = captioner()
    other.configure(critic)
    assert not hasattr(other, "match") and (other.captioning.contrastive, other.decoding.match) == (0.0, 0.0)


def test_configs_that_make_no_sense() -> None:
    wrong: dict[str, dict[str, Any]] = {
        "needs the decoder transformer with a text_depth of at least 1": {"contrastive": 1.0},
        "contrastive compares": {"contrastive": 0.5, "text_depth": 1, "decoder": "attentive"},
        "text_depth is from 0 to below the decoder's depth, got 3": {"text_depth": 3},
        "width 128 does not divide into 3 heads": {"decoder_width": 128, "decoder_heads": 3},
        "captions must be at least 1, got 0": {"captions": 0},
        "most_words must be at least 1": {"most_words": 0},
        "smoothing is a share": {"smoothing": 1.5},
        "contrastive is a weight, from 0, got -1": {"contrastive": -1.0},
        "bag_of_words is a weight": {"bag_of_words": math.inf},
        "self_critical is a weight": {"self_critical": math.nan},
        "scst_temperature must be above 0": {"scst_temperature": 0.0},
        "text_depth counts blocks of the Transformer": {"text_depth": 1, "decoder": "recurrent"},
        "learns from the reward alone": {"self_critical": 1.0, "bag_of_words": 0.1},
        "captioners with a contrastive loss": {"decoding": Decoding(match=0.2)},
    }
    for message, fields in wrong.items():
        with pytest.raises(UserError, match=message):
            Captioning(**fields)


def test_matching_keeps_its_precision_under_autocast() -> None:
    """At a scale of 100, bf16's rounding of the products would be as large as a fair difference between captions."""
    task = captioner(contrastive=0.5, text_depth=1).eval()
    with torch.no_grad():
        task.match.scale.fill_(math.log(100))
    pooled, labels = torch.randn(3, 24), numbered([[row[0]] for row in TEXTS], WORDS, 12)[:, 0]
    given: list[torch.Tensor] = []
    for layer in (task.match.image, task.match.text):
        layer.register_forward_hook(lambda module, inputs, output: given.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        found = task.match(pooled, task.decoder, labels)
        text, image = (F.normalize(vectors, dim=1).float() for vectors in given)
    logits, own = 100 * image @ text.T, torch.arange(3)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found.item() == pytest.approx(expected.item(), abs=1e-3)


def test_weights_that_are_no_numbers_are_named() -> None:
    task = captioner()
    with torch.no_grad():
        task.decoder.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="gives no probabilities of words"):
        task.predict(some_images(2))


def test_contrastive_vectors_do_not_depend_on_what_fills_up() -> None:
    task = captioner(contrastive=0.5, text_depth=1).eval()
    pooled = torch.randn(3, 24)
    labels = numbered([[row[0]] for row in TEXTS], WORDS, 12)[:, 0]
    one = task.match(pooled, task.decoder, labels)
    two = task.match(pooled, task.decoder, F.pad(labels, (0, 4), value=PAD))
    torch.testing.assert_close(one, two)
