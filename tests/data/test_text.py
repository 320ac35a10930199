"""Any text comes back from its numbers, and a vocabulary is a function of its captions."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.data.text import END, LEAST_BPE, PAD, SPECIALS, START, UNKNOWN, Tokenizer
from vitrail.errors import UserError

CAPTIONS = [
    "A black dog runs across the grass .",
    "Two dogs run and play in the deep snow .",
    "A man's red bicycle, leaning on a wall!",
    "שני ילדים משחקים בחול",
    "كلب أسود يركض على العشب",
    "犬が草の上を走っている",
    "a café \N{FAMILY} 👩‍👩‍👧 smile 🙂🙂",
]
BPE = Tokenizer.train(CAPTIONS, "bpe", 400)
LOWER = Tokenizer.train(CAPTIONS, "bpe", 300, lower=True)
WORDS = Tokenizer.train(CAPTIONS, "words", 60, lower=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(["dog", " the", "e\u0301", "שָׁלוֹם", "‏مرحبا", "👩‍👧", "<end>", "<pad>", "\n", "  "]), max_size=8
).map("".join)


@given(texts)
def test_bpe_gives_any_text_back(text: str) -> None:
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text
    assert len(BPE.tokens(ids)) == len(ids) and "".join(BPE.tokens(ids)) == text
    assert all(UNKNOWN < i < BPE.size for i in ids)
    assert BPE.decode([START, *ids, END, *ids, PAD]) == text


@given(texts)
def test_lower_case_is_settled_after_one_pass(text: str) -> None:
    once = LOWER.decode(LOWER.encode(text))
    assert LOWER.decode(LOWER.encode(once)) == once


@given(st.lists(st.integers(UNKNOWN + 1, BPE.size - 1), max_size=20))
def test_any_numbers_have_a_text(ids: list[int]) -> None:
    assert "".join(BPE.tokens(ids)) == BPE.decode(ids)
    assert BPE.decode(ids) == BPE.inner.decode(ids)


@given(st.lists(st.integers(0, WORDS.size - 1), max_size=20))
def test_words_are_parted_by_spaces(ids: list[int]) -> None:
    assert len(WORDS.tokens(ids)) == len(ids)
    before_end = ids[: ids.index(END)] if END in ids else ids
    assert WORDS.decode(ids).split() == [WORDS.inner.id_to_token(i) for i in before_end if i > UNKNOWN]


def test_words() -> None:
    ids = WORDS.encode("The man's DOG, runs")
    assert WORDS.tokens(ids) == ["the", " man's", " dog", " ,", " runs"] and WORDS.decode(ids) == "the man's dog , runs"
    assert WORDS.encode("a zebra runs")[1] == UNKNOWN and WORDS.decode(WORDS.encode("a zebra runs")) == "a runs"
    assert WORDS.encode("<end>") == [UNKNOWN] * 3
    assert WORDS.decode(WORDS.encode("שני ילדים")) == "שני ילדים"
    few = Tokenizer.train(["b b b a a c"], "words", 6)
    assert few.size == 6 and few.tokens([4, 5]) == ["b", " a"] and few.encode("c") == [UNKNOWN]


def test_a_word_that_begins_a_caption_is_the_same_word_further_on() -> None:
    many = Tokenizer.train(["a dog and a dog"] * 3, "bpe", 300)
    first, *_, again, last = many.encode("a dog and a dog")
    assert first != again == many.spaced()[first] and many.spaced()[last] == last
    assert WORDS.spaced() == list(range(WORDS.size))


def test_specials_have_their_names_and_a_cut_character_shows() -> None:
    assert [BPE.inner.token_to_id(name) for name in SPECIALS] == [PAD, START, END, UNKNOWN]
    plain = Tokenizer.train(["a"], "bpe", LEAST_BPE)  # bytes alone
    smile = plain.encode("🙂🙂")
    assert plain.tokens([START, *smile, END]) == ["<start>", *("", "", "", "🙂") * 2, "<end>"]
    assert plain.tokens([*smile[:2], END]) == ["", "", "\N{REPLACEMENT CHARACTER}<end>"]
    assert plain.decode(smile[:6]) == "🙂\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="not in a vocabulary"):
        BPE.tokens([BPE.size])


@pytest.mark.parametrize("tokenizer", [BPE, LOWER, WORDS], ids=["bpe", "lower", "words"])
def test_json_and_copies_are_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    json.loads(tokenizer.to_json())
    for other in (
        Tokenizer.from_json(tokenizer.to_json()),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert other.kind == tokenizer.kind and other.size == tokenizer.size and other.to_json() == tokenizer.to_json()
        for caption in [*CAPTIONS, "<end> <pad>"]:
            assert other.encode(caption) == tokenizer.encode(caption)


def test_training_is_deterministic_in_every_process() -> None:
    code = """
import random, zlib
from vitrail.data.text import Tokenizer
draw = random.Random(0)
texts = [" ".join(draw.choices(["ab", "ba", "abc", "cab", "bca"], k=6)) for _ in range(300)]
print([zlib.crc32(Tokenizer.train(texts, *choice).to_json().encode()) for choice in (("bpe", 290), ("words", 8))])
"""
    command = [sys.executable, "-c", code]
    runs = {subprocess.run(command, capture_output=True, check=True, timeout=120).stdout for _ in range(3)}
    assert len(runs) == 1


def test_wrong_use() -> None:
    with pytest.raises(UserError, match="no captions"):
        Tokenizer.train(["", "  "], "bpe", 300)
    with pytest.raises(UserError, match="at least 260"):
        Tokenizer.train(CAPTIONS, "bpe", 200)
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_json("{}")
    with pytest.raises(UserError, match="does not begin with <pad>"):
        Tokenizer.from_json(BPE.to_json().replace("<start>", "<begin>"))
