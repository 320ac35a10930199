"""What people said of like images: the scores against CIDEr written out, and captioners that remember."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks.caption.small import batch, captioner

import vitrail
from vitrail.data.text import END, PAD
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, Decoding
from vitrail.tasks.caption.consensus import Consensus
from vitrail.tasks.encoder import one_vector
from vitrail.tasks.values import Features

VOCABULARY = 9
sentences = st.lists(st.integers(4, VOCABULARY - 1), max_size=6)


def table(captions: list[list[list[int]]], words: int = 7) -> torch.Tensor:
    """Captions of images as labels [N, K, T], each ended."""
    most = max(len(own) for own in captions)
    rows = [[[*text, END] for text in own] + [[]] * (most - len(own)) for own in captions]
    return torch.tensor([[[*row, *[PAD] * (words - len(row))] for row in own] for own in rows])


def grams(text: list[int], size: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(text[i : i + size]) for i in range(len(text) - size + 1))


def cider(text: list[int], like: list[list[list[int]]], all_captions: list[list[list[int]]]) -> float:
    """Equations 1 to 3 of the paper, times 10, but without the n-grams of a single image in the products."""
    total = 0.0
    for size in range(1, 5):
        having = Counter(gram for own in all_captions for gram in {g for other in own for g in grams(other, size)})

        def vector(words: list[int], size: int = size, having: Counter[Any] = having) -> dict[Any, float]:
            rare = {gram: math.log(len(all_captions) / max(having[gram], 1)) for gram in grams(words, size)}
            return {gram: count * rare[gram] for gram, count in grams(words, size).items()}

        for own in like:
            for other in own:
                a, b = vector(text), vector(other)
                norm = math.hypot(*a.values()) * math.hypot(*b.values())
                products = sum(a[gram] * b[gram] for gram in a.keys() & b.keys() if having[gram] >= 2)
                total += products / norm / len(own) if norm else 0.0
    return 10 * total / 4 / len(like)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(sentences, min_size=1, max_size=3), min_size=3, max_size=6), st.lists(sentences, min_size=2))
def test_scores_are_ciders_with_the_nearest_images_captions(
    captions: list[list[list[int]]], candidates: list[list[int]]
) -> None:
    generator = torch.Generator().manual_seed(len(captions))
    vectors = F.normalize(torch.randn(len(captions), 5, generator=generator), dim=1).half().float()
    consensus = Consensus.of(vectors, table(captions), VOCABULARY)
    image = F.normalize(torch.randn(1, 5, generator=generator), dim=1)
    found = consensus(image, table([candidates]), 2)[0]
    nearest = (vectors @ image[0]).topk(2).indices.tolist()
    expected = [cider(text, [captions[i] for i in nearest], captions) for text in candidates]
    assert found.tolist() == pytest.approx(expected, rel=5e-3, abs=5e-3)  # what is stored is in half precision


def test_more_neighbours_than_images_are_all_of_them() -> None:
    captions = [[[4, 5, 6]], [[4, 5]], [[7, 8]]]
    consensus = Consensus.of(torch.eye(3), table(captions), VOCABULARY)
    image, some = torch.tensor([[1.0, 0.0, 0.0]]), table([[[4, 5]]])
    torch.testing.assert_close(consensus(image, some, 50), consensus(image, some, 3))


def test_a_vocabulary_whose_n_grams_are_no_numbers() -> None:
    with pytest.raises(UserError, match="a vocabulary of 60000 is too large for an index of n-grams"):
        Consensus.of(torch.eye(1), table([[[4]]]), 60_000)


def test_a_captioner_chooses_what_people_said_of_like_images(tmp_path: Path) -> None:
    """Scores have the weighted consensus on top, also from a checkpoint; continued training drops the index."""
    how = Decoding(max_length=8, beam=4, sample=True, temperature=3.0)
    task, made = captioner(contrastive=0.5, text_depth=1, decoding=how).eval(), batch()
    assert task.match is not None
    with torch.no_grad():
        vectors = one_vector(task.encoder.pool(task.features(made["image"])))
        labels = made["label"]
        task.solve("knn", Features(vectors, labels), lambda: Features(vectors, labels))
        assert task.consensus is not None
        plain = task.generate(made)
        task.option = Decoding(**{**vars(how), "consensus": 90.0, "neighbours": 1})
        found = task.generate(made)
        added = 90.0 * task.consensus(task.match(vectors), plain.words, 1)
    expected, order = (plain.score + added).sort(dim=1, descending=True)
    assert (order != torch.arange(4)).any()
    torch.testing.assert_close(found.score, expected)
    torch.testing.assert_close(found.words, plain.words.gather(1, order[:, :, None].expand_as(plain.words)))
    task.save(tmp_path / "m")
    again = vitrail.load(tmp_path / "m")
    assert isinstance(again, Caption)
    with torch.no_grad():
        torch.testing.assert_close(again.generate(made).score, found.score, atol=1e-4, rtol=1e-4)
    again.configure(Captioning(contrastive=0.5, text_depth=1))
    assert again.consensus is None and "consensus" not in again.config()
    again.option = task.option
    with pytest.raises(UserError, match="was not trained for consensus in decoding"):
        again.generate(made)
