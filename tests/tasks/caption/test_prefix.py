"""A language model behind a prefix: its words against transformers' own, what learns, and what a checkpoint carries."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vitrail
from vitrail.data.preprocess import Preprocess
from vitrail.data.random import draw_key
from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, Decoding, numbered
from vitrail.tasks.caption.components import NextWords
from vitrail.tasks.caption.language import OWN, HFTokenizer, LanguageDecoder, VocabMap
from vitrail.tasks.caption.prefix import PrefixDecoder
from vitrail.tasks.caption.search import generate
from vitrail.tasks.caption.settings import LanguageSettings, merge_settings
from vitrail.variants import VariantConfig, VariantViT
from vitrail.zoo import captioners

transformers = pytest.importorskip("transformers", reason="needs pip install 'vitrail[caption]'")

JOINS = ("mlp", "transformer", "projection")
EYES = VariantConfig(width=24, depth=2, heads=2, patch=8, image_size=(16, 24), registers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2."""
    place = tmp_path_factory.mktemp("language") / "lm"
    tiny_captioners.language_model(place)
    return place


def captioner(folder: Path, most_words: int = 40, **changes: Any) -> Caption:
    torch.manual_seed(0)
    own = {name: changes.pop(name) for name in ("join", "tune_language") if name in changes}
    language = LanguageSettings(language_model=str(folder), prefix_length=3, join_depth=2, **own)
    config = Captioning(
        decoder="language_model", smoothing=0.0, lower=False, most_words=most_words, language=language, **changes
    )
    model, vocabulary, words = captioners.language_model(str(folder))
    decoder = PrefixDecoder(model, vocabulary, language, EYES)
    task = Caption(VariantViT(EYES), config, words, Preprocess(size=EYES.image_size, resize="squash"), decoder)
    with torch.no_grad():
        for parameter in decoder.join.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # images that differ, differ in their words
    return task.eval()


def decoder_of(task: Caption) -> PrefixDecoder:
    assert isinstance(task.decoder, PrefixDecoder)
    return task.decoder


def tied(task: Caption) -> bool:
    """The language model reads and writes words with one matrix."""
    model = decoder_of(task).model
    return model.lm_head.weight is model.transformer.wte.weight


def anew(task: Caption, how: Decoding, samples: torch.Tensor) -> Any:
    """What `generate` gives by reading all words so far at each step."""
    memory = task.memory(IMAGES)

    def step(words: torch.Tensor, rows: torch.Tensor | None, state: torch.Tensor) -> Any:
        state = torch.cat([state if rows is None else state[rows], words[:, None]], dim=1)
        return task.decoder(state.view(len(IMAGES), -1, state.shape[1]), memory)[:, :, -1].flatten(0, 1), None, state

    return generate(step, torch.zeros(len(IMAGES), 0, dtype=torch.int64), how, samples)


IMAGES = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("join", JOINS)
def test_the_words_are_those_of_transformers_own_greedy_search(join: Any, folder: Path) -> None:
    task = captioner(folder, join=join)
    task.option = Decoding(beam=1, no_repeat_ngram_size=0, max_length=13)
    model, decoder = decoder_of(task).model, decoder_of(task)
    with torch.no_grad():
        written = task.generate({"image": IMAGES})
        prefix = decoder.join(task.memory(IMAGES))
        start = model.get_input_embeddings()(torch.full((4, 1), decoder.vocabulary.start))
        rows = torch.cat([prefix, start], dim=1)
        theirs = model.generate(
            inputs_embeds=rows,
            attention_mask=torch.ones(rows.shape[:2], dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=0,
        )
    assert prefix.shape == (4, 8 if join == "projection" else 3, tiny_captioners.WIDTH)
    ours = torch.where(written.words[:, 0] == END, 0, written.words[:, 0] - OWN)[:, :12]
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        length = b.index(0) if 0 in b else len(b)
        assert a[:length] == b[:length]
    assert len({tuple(row) for row in theirs.tolist()}) > 1


@pytest.mark.parametrize("join", JOINS)
def test_with_cache_and_without_the_same(join: Any, folder: Path) -> None:
    task, how, samples = captioner(folder, join=join), Decoding(beam=3, max_length=10), torch.arange(4)
    with torch.no_grad():
        memory, step = task.memory(IMAGES), NextWords(task.decoder)
        for way in (how, Decoding(beam=2, sample=True, max_length=8)):
            cached, slow = generate(step, task.decoder(memory=memory), way, samples), anew(task, way, samples)
            assert torch.equal(cached.words, slow.words)
            there = cached.words > END
            assert torch.allclose(cached.logp[there], slow.logp[there], atol=1e-4)


def test_a_large_batch_is_written_some_images_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = captioner(folder)
    for how in (Decoding(beam=2, max_length=9), Decoding(beam=2, max_length=9, sample=True)):
        task.option = how
        with torch.no_grad():
            monkeypatch.setattr(LanguageDecoder, "images_at_once", 32)
            whole = task.generate({"image": IMAGES})
            monkeypatch.setattr(LanguageDecoder, "images_at_once", 3)
            chunked = task.generate({"image": IMAGES})
        assert torch.equal(whole.words, chunked.words) and torch.allclose(whole.score, chunked.score, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_captions_words(folder: Path) -> None:
    task = captioner(folder)
    texts = [["a dog runs over the grass ."], ["two children", "a light and noisy image"], ["naïve café ☕"], ["a"]]
    labels = numbered(texts, task.tokenizer, 20)
    sums = task.loss({"image": IMAGES, "label": labels[:, :1], "sample": torch.arange(4), "epoch": 0})
    expected = torch.zeros(())
    model, join = decoder_of(task).model, decoder_of(task).join
    for i, text in enumerate(texts):
        ids = tiny_captioners.byte_pairs().encode(text[0]).ids
        read = model.get_input_embeddings()(torch.tensor([[0, *ids]]))
        rows = torch.cat([join(task.memory(IMAGES[i : i + 1])), read], dim=1)
        logits = model(inputs_embeds=rows).logits[0, 3:]
        expected = expected + F.cross_entropy(logits, torch.tensor([*ids, 0]), reduction="sum")
    assert torch.allclose(sums["loss"], expected, rtol=1e-4)
    assert sums["count"] == sum(len(tiny_captioners.byte_pairs().encode(text[0]).ids) + 1 for text in texts)


def test_self_critical_training_is_finite_where_a_caption_ends(folder: Path) -> None:
    """What fills a caption up is a word that the language model cannot say."""
    task = captioner(folder, self_critical=1.0, captions=3, decoding=Decoding(max_length=6))
    task.reward = lambda keys, texts, ended: [float(len(text)) for text in texts]
    with torch.no_grad():  # an end is as likely as any word
        decoder = decoder_of(task)
        decoder.model.get_output_embeddings().weight[decoder.vocabulary.end] *= 0
    for seed in range(4):
        sums = task.loss({"image": IMAGES, "sample": torch.arange(4), "key": draw_key(seed, 0)})
        assert sums["loss"].isfinite() and sums["count"] <= 4 * 4 * 6
    sums["loss"].backward()
    assert all(p.grad.isfinite().all() for p in decoder.join.parameters() if p.grad is not None)


@pytest.mark.parametrize("tuned", [False, True])
def test_what_learns(folder: Path, tuned: bool) -> None:
    task = captioner(folder, tune_language=tuned).train()
    task.encoder.requires_grad_(False)
    decoder = decoder_of(task)
    assert decoder.model.training == tuned and decoder.join.training
    labels = numbered([["a dog"]] * 4, task.tokenizer, 20)
    task.loss({"image": IMAGES, "label": labels, "sample": torch.arange(4), "epoch": 0})["loss"].backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in decoder.join.named_parameters() if "norm" not in n
    )
    assert all((p.grad is not None) == tuned for p in decoder.model.parameters())
    assert tied(task)


def test_continued_training_keeps_the_language_model_and_its_join(folder: Path) -> None:
    own = captioner(folder, most_words=60).captioning
    kept = merge_settings(own, Captioning(decoder="language_model", smoothing=0.0, lower=False, captions=3))
    assert kept == replace(own, captions=3)
    # The recipe of self-critical training is for any captioner.
    scst = Captioning(
        captions=4, self_critical=1.0, contrastive=0.5, text_depth=1, decoding=Decoding(beam=9, match=0.2)
    )
    assert merge_settings(own, scst) == replace(own, captions=4, self_critical=1.0, decoding=Decoding(beam=9))
    with pytest.raises(UserError, match="has the decoder language_model, but the recipe has transformer"):
        merge_settings(own, Captioning())


@pytest.mark.parametrize("join", JOINS)
def test_a_checkpoint_carries_the_language_model(join: Any, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "lm")
    task = captioner(tmp_path / "lm", join=join)
    task.option = Decoding(beam=2, max_length=9)
    task.save(tmp_path / "own")
    shutil.rmtree(tmp_path / "lm")
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    again = vitrail.load(tmp_path / "own")
    assert (
        isinstance(again, Caption)
        and again.option == task.option
        and again.captioning == replace(task.captioning, decoding=task.option)
    )
    assert tied(again)
    with torch.no_grad():
        a, b = task.generate({"image": IMAGES}), again.generate({"image": IMAGES})
    assert torch.equal(a.words, b.words) and torch.equal(a.logp, b.logp)
    state = task.state_dict()
    assert not any(name.endswith("lm_head.weight") for name in state)
    again.load_state_dict({name: value + 1 for name, value in state.items()})
    assert torch.equal(decoder_of(again).model.lm_head.weight, decoder_of(task).model.lm_head.weight + 1)


def test_words_are_traced_to_places_where_the_prefix_has_some(folder: Path) -> None:
    for join in JOINS:
        task, rows = captioner(folder, join=join), torch.arange(4).repeat_interleave(2)
        with torch.no_grad():
            state = task.decoder(memory=task.memory(IMAGES))
            _, _, state = task.decoder(torch.full((8,), START), rows=rows, state=state)
            _, attention, _ = task.decoder(torch.arange(8) + OWN, state=state)
        pieces = task.pieces({"image": IMAGES[:1]})[0]
        assert (attention is not None) == (join == "projection") == (pieces[0].heat is not None)
    assert attention.shape == (8, 2 + 6) and (attention > 0).all() and (attention.sum(dim=1) < 1).all()
    assert pieces[0].heat is not None and pieces[0].heat.shape == (2, 3)


def test_places_that_the_language_model_lacks_are_named(folder: Path) -> None:
    model, vocabulary, _ = captioners.language_model(str(folder))
    with pytest.raises(UserError, match="64 positions: lower --prefix-length from 63"):
        PrefixDecoder(model, vocabulary, LanguageSettings(prefix_length=63), EYES)
    task = captioner(folder)
    with pytest.raises(UserError, match="62 words after 3 exceed the 64 positions"):
        task(IMAGES, torch.full((4, 1, 62), 20))
    task.option = Decoding(max_length=1000, beam=1)
    assert task.generate({"image": IMAGES[:1]}).words.shape[2] <= 61


def test_a_language_model_that_changes_its_logits_is_refused(folder: Path) -> None:
    model, *_ = captioners.language_model(str(folder))
    forward = model.forward

    def scaled(*args: Any, **named: Any) -> Any:
        out = forward(*args, **named)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    with pytest.raises(UserError, match="changes its logits"):
        PrefixDecoder.check(model, "some/model")


NUMBERS = VocabMap(size=9, start=7, end=4)


def test_their_numbers_and_ours() -> None:
    words = torch.tensor([[START, 5, OWN + 8, END, PAD, UNKNOWN]])
    assert NUMBERS.to_model(words).tolist() == [[7, 1, 8, 4, 4, 4]]
    logits = torch.randn(2, 9)
    ours = NUMBERS.from_model(logits)
    assert ours.shape == (2, 13) and torch.equal(ours[:, END], logits[:, 4])
    assert torch.isneginf(ours[:, [PAD, START, UNKNOWN, OWN + 4]]).all()
    assert torch.allclose(ours.softmax(1).sum(1), torch.ones(2)) and torch.equal(ours[:, OWN], logits[:, 0])
    with pytest.raises(UserError, match="outside of 3 words"):
        VocabMap(size=3, start=0, end=3)


WORDS = tiny_captioners.word_pieces().get_vocab_size()
PIECES = HFTokenizer(tiny_captioners.word_pieces(), VocabMap(WORDS, 4, 3))
THEIRS = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tiny_captioners.word_pieces(), clean_up_tokenization_spaces=True
)
BYTES = HFTokenizer(tiny_captioners.byte_pairs(), VocabMap(320, 0, 0))


@given(st.lists(st.integers(0, WORDS - 1), max_size=12))
def test_pieces_join_to_the_text_whatever_the_decoder_cleans_up(ids: list[int]) -> None:
    numbers = [i + OWN for i in ids if i != 3]
    pieces = PIECES.tokens(numbers)
    assert len(pieces) == len(numbers)
    assert "".join(pieces) == THEIRS.decode([i - OWN for i in numbers], skip_special_tokens=True)


@given(st.text(max_size=20))
def test_bytes_give_any_text_back(text: str) -> None:
    ids = BYTES.encode(text)
    assert "".join(BYTES.tokens(ids)) == text and END not in ids
    assert all(OWN <= i < BYTES.size for i in ids)


def test_words_that_look_like_specials_are_text() -> None:
    assert END not in BYTES.encode("the <|endoftext|> of it")
    copied = pickle.loads(pickle.dumps(BYTES))
    assert copied.encode("a man's hat") == BYTES.encode("a man's hat") and copied.size == BYTES.size
    assert "".join(PIECES.tokens(PIECES.encode("a man ' s hat isn ' t red ."))) == "a man's hat isn't red."
