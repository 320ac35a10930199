"""A language model behind a prefix: its words against transformers' own, what learns, and what a checkpoint carries."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_captioners
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import vitrail
from vitrail.data.decode import Preprocess
from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.errors import UserError
from vitrail.tasks import language
from vitrail.tasks.caption import numbered
from vitrail.tasks.language import OWN, HFTokenizer, VocabMap
from vitrail.tasks.prefix import LanguageModel, PrefixCaption, Prefixed
from vitrail.tasks.search import Decoding, write
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


def captioner(folder: Path, **changes: Any) -> PrefixCaption:
    torch.manual_seed(0)
    config = Prefixed(language_model=str(folder), prefix_length=3, join_depth=2, **changes)
    task = PrefixCaption(
        VariantViT(EYES),
        config,
        *captioners.language_model(str(folder)),
        Preprocess(size=EYES.image_size, resize="squash"),
    )
    with torch.no_grad():
        for parameter in task.join.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # images that differ, differ in their words
    return task.eval()


IMAGES = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("join", JOINS)
def test_the_words_are_those_of_transformers_own_greedy_search(join: Any, folder: Path) -> None:
    task = captioner(folder, join=join)
    task.option = Decoding(beam=1, no_repeat_ngram_size=0, max_length=13)
    model = task.decoder.model
    with torch.no_grad():
        written = task.write({"image": IMAGES})
        prefix = task.memory(IMAGES).tokens
        start = model.get_input_embeddings()(torch.full((4, 1), task.numbers.start))
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
        memory = task.memory(IMAGES)
        cached, anew = (write(task.decoder, memory, how, samples, cache=cache) for cache in (True, False))
        drawn = [
            write(task.decoder, memory, Decoding(beam=2, sample=True, max_length=8), samples, cache=c)
            for c in (True, False)
        ]
    assert torch.equal(cached.words, anew.words) and torch.equal(drawn[0].words, drawn[1].words)
    there = cached.words > END
    assert torch.allclose(cached.logp[there], anew.logp[there], atol=1e-4)


def test_a_large_batch_is_written_in_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = captioner(folder)
    for how in (Decoding(beam=2, max_length=9), Decoding(beam=2, max_length=9, sample=True)):
        task.option = how
        with torch.no_grad():
            monkeypatch.setattr(language, "TOGETHER", 32)
            whole = task.write({"image": IMAGES})
            monkeypatch.setattr(language, "TOGETHER", 3)
            parts = task.write({"image": IMAGES})
        assert torch.equal(whole.words, parts.words) and torch.allclose(whole.score, parts.score, atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_the_captions_words(folder: Path) -> None:
    task = captioner(folder)
    texts = [["a dog runs over the grass ."], ["two children", "a light and noisy image"], ["naïve café ☕"], ["a"]]
    labels = numbered(texts, task.tokenizer, 20)
    parts = task.loss({"image": IMAGES, "label": labels[:, :1], "sample": torch.arange(4), "epoch": 0})
    expected = torch.zeros(())
    model = task.decoder.model
    for i, text in enumerate(texts):
        ids = tiny_captioners.byte_pairs().encode(text[0]).ids
        read = model.get_input_embeddings()(torch.tensor([[0, *ids]]))
        rows = torch.cat([task.memory(IMAGES[i : i + 1]).tokens, read], dim=1)
        logits = model(inputs_embeds=rows).logits[0, 3:]
        expected = expected + F.cross_entropy(logits, torch.tensor([*ids, 0]), reduction="sum")
    assert torch.allclose(parts["loss"], expected, rtol=1e-4)
    assert parts["count"] == sum(len(tiny_captioners.byte_pairs().encode(text[0]).ids) + 1 for text in texts)


def test_self_critical_training_is_finite_where_a_caption_ends(folder: Path) -> None:
    """What fills a caption up is a word that the language model cannot say."""
    task = captioner(folder, self_critical=1.0, captions=3, decoding=Decoding(max_length=6))
    task.reward = lambda keys, texts, ended: [float(len(text)) for text in texts]
    with torch.no_grad():  # an end is as likely as any word
        task.decoder.model.get_output_embeddings().weight[task.numbers.end] *= 0
    for seed in range(4):
        torch.manual_seed(seed)
        parts = task.loss({"image": IMAGES, "sample": torch.arange(4)})
        assert parts["loss"].isfinite() and parts["count"] <= 4 * 4 * 6
    parts["loss"].backward()
    assert all(p.grad.isfinite().all() for p in task.join.parameters() if p.grad is not None)


@pytest.mark.parametrize("tuned", [False, True])
def test_what_learns(folder: Path, tuned: bool) -> None:
    task = captioner(folder, tune_language=tuned).train()
    task.encoder.requires_grad_(False)
    assert task.decoder.training == tuned
    labels = numbered([["a dog"]] * 4, task.tokenizer, 20)
    task.loss({"image": IMAGES, "label": labels, "sample": torch.arange(4), "epoch": 0})["loss"].backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for n, p in task.join.named_parameters() if "norm" not in n
    )
    assert all((p.grad is not None) == tuned for p in task.decoder.parameters())
    assert task.decoder.model.lm_head.weight is task.decoder.model.transformer.wte.weight


def test_one_that_goes_on_keeps_what_it_began_with(folder: Path) -> None:
    kept = captioner(folder, most_words=60).kept(Prefixed(captions=3))
    assert (kept.most_words, kept.prefix_length, kept.join_depth, kept.captions) == (60, 3, 2, 3)


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
    assert isinstance(again, PrefixCaption) and again.decoding == task.option
    assert again.decoder.model.lm_head.weight is again.decoder.model.transformer.wte.weight
    with torch.no_grad():
        a, b = task.write({"image": IMAGES}), again.write({"image": IMAGES})
    assert torch.equal(a.words, b.words) and torch.equal(a.logp, b.logp)
    state = task.state_dict()
    assert not any(name.endswith("lm_head.weight") for name in state)
    again.load_state_dict({name: value + 1 for name, value in state.items()})
    assert torch.equal(again.decoder.model.lm_head.weight, task.decoder.model.lm_head.weight + 1)


def test_words_are_traced_to_places_where_the_prefix_has_some(folder: Path) -> None:
    for join in JOINS:
        task = captioner(folder, join=join)
        with torch.no_grad():
            state = task.decoder.start(task.memory(IMAGES), 2)
            _, state = task.decoder.step(torch.full((8,), START), state)
            _, state = task.decoder.step(torch.arange(8) + OWN, state)
        assert len(state.looked) == (join == "projection")
    (looked,) = state.looked
    assert looked.shape == (8, 2 + 6) and (looked > 0).all() and (looked.sum(dim=1) < 1).all()


def test_places_that_the_language_model_lacks_are_said(folder: Path) -> None:
    with pytest.raises(UserError, match="64 places: lower --prefix-length from 63"):
        PrefixCaption(
            VariantViT(EYES),
            Prefixed(prefix_length=63),
            *captioners.language_model(str(folder)),
            Preprocess(size=(16, 24)),
        )
    task = captioner(folder)
    with pytest.raises(UserError, match="62 words after 3 are more than the 64 places"):
        task(IMAGES, torch.full((4, 1, 62), 20))
    task.option = Decoding(max_length=1000, beam=1)
    assert task.write({"image": IMAGES[:1]}).words.shape[2] <= 61


def test_a_language_model_that_changes_its_logits_is_refused(folder: Path) -> None:
    model, *_ = captioners.language_model(str(folder))
    forward = model.forward

    def scaled(*args: Any, **named: Any) -> Any:
        out = forward(*args, **named)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    with pytest.raises(UserError, match="changes its logits"):
        LanguageModel.check(model, "some/model")


NUMBERS = VocabMap(size=9, start=7, end=4)


def test_their_numbers_and_ours() -> None:
    words = torch.tensor([[START, 5, OWN + 8, END, PAD, UNKNOWN]])
    assert NUMBERS.theirs(words).tolist() == [[7, 1, 8, 4, 4, 4]]
    logits = torch.randn(2, 9)
    ours = NUMBERS.ours(logits)
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
