"""The losses of captioning against their formulas, and what is drawn in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tasks.caption.small import (
    TEXTS,
    WORDS,
    bag_of,
    batch,
    bias,
    captioner,
    match_of,
    text_vector,
)

from vitrail.data.random import draw_key
from vitrail.data.text import END, PAD, START, UNKNOWN
from vitrail.tasks.caption import Decoding, numbered
from vitrail.tasks.caption.losses import captions_of_epoch, drop_words
from vitrail.tasks.caption.matching import contrastive_loss, text_states
from vitrail.tasks.caption.search import generate
from vitrail.tasks.values import Batch


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
    seen: set[tuple[int, ...]] = set()
    for epoch in range(2):
        made = {**batch(), "epoch": epoch}
        chosen = captions_of_epoch(made, 2)
        order = torch.tensor([2, 0, 1])
        there = {"label": made["label"][order], "sample": made["sample"][order], "epoch": epoch}
        turned = captions_of_epoch(there, 2)
        assert torch.equal(turned, chosen[order]), "which captions are read depends on the image, not on its place"
        assert chosen.shape[:2] == (3, 2)
        rows = [[tuple(w for w in row if w) for row in rows if row[0]] for rows in chosen.tolist()]
        for i, texts in enumerate(TEXTS):
            own = [(*WORDS.encode(text), END) for text in texts]
            assert len(rows[i]) == min(2, len(texts)) and {*rows[i]} <= {*own} and len({*rows[i]}) == len(rows[i])
        seen |= {*rows[2]}
        assert chosen.shape[2] == max(len(row) for sample in rows for row in sample)
    assert len(seen) == 3, "two of three captions an epoch: after two of these each had its turn"


def test_word_dropout() -> None:
    words = torch.randint(0, WORDS.size, (50, 4, 30))
    words[..., 0] = START
    torch.manual_seed(0)
    dropped = drop_words(words, 0.4)
    real, gone = words > UNKNOWN, dropped != words
    assert (dropped[gone] == UNKNOWN).all() and not gone[~real].any()
    assert float(gone[real].float().mean()) == pytest.approx(0.4, abs=0.03)
    # In training alone, and only what is read: every word is still to be said.
    task, made = captioner(word_dropout=0.9), batch()
    given: list[Any] = []
    task.decoder.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    counts = [task.train(mode).loss(made)["count"] for mode in (True, False)]
    unknown = [int((read == UNKNOWN).sum()) for read in given]
    assert unknown[0] > unknown[1] == 0 and counts[0] == counts[1]


@pytest.mark.parametrize("captions", [1, 2, 3])
def test_each_caption_has_its_turn_to_be_matched(captions: int) -> None:
    """However many a step reads: three captions of an image, three epochs."""
    task = captioner(contrastive=0.5, text_depth=1, captions=captions)
    matched: list[torch.Tensor] = []

    def note(module: Any, inputs: Any) -> None:
        if len(inputs) == 1:  # words alone
            matched.append(inputs[0])

    task.decoder.register_forward_pre_hook(note)
    for epoch in range(3):
        task.loss({**batch(), "epoch": epoch})
    own = {(START, *WORDS.encode(text)) for text in TEXTS[2]}
    assert {tuple(word for word in rows[2].tolist() if word not in (PAD, END)) for rows in matched} == own


def test_coca_matches_images_with_their_captions() -> None:
    """Equation 2 of CoCa: normalised vectors, a learned temperature, cross-entropy both ways."""
    task, made = captioner(contrastive=0.5, text_depth=1, smoothing=0.0, captions=1).eval(), batch()
    texts = [[row[0]] for row in TEXTS]
    made["label"] = numbered(texts, WORDS, 12)
    sums = task.loss(made)
    with torch.no_grad():
        images = match_of(task).image(task.memory(made["image"]).pooled)
        vectors = [text_vector(task, [START, *WORDS.encode(text)]) for (text,) in texts]
        logits = torch.tensor([[float(F.cosine_similarity(i, t, dim=0)) / 0.07 for t in vectors] for i in images])
    both = [-logits.log_softmax(dim=d).diagonal().mean() for d in (0, 1)]
    expected = float(sum(both) / 2)
    count = sums["count"].item()
    assert sums["contrastive"].item() == pytest.approx(expected * count, rel=1e-4)
    plain = replace(task.captioning, contrastive=0.0)
    task.captioning = plain
    assert sums["loss"].item() == pytest.approx(task.loss(made)["loss"].item() + 0.5 * expected * count, rel=1e-5)


@pytest.mark.parametrize("decoder", ["recurrent", "transformer"])
def test_bag_of_words_is_the_share_of_captions_that_use_a_word(decoder: str) -> None:
    task, made = captioner(decoder=decoder, bag_of_words=0.2).eval(), batch()
    sums = task.loss(made)
    with torch.no_grad():
        p = bag_of(task).linear(task.memory(made["image"]).pooled).sigmoid().double()
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
    task.init_word_bias(labels)
    words = [word for row in labels.flatten(0, 1).tolist() for word in row if word != PAD]
    first = bias(task).softmax(dim=0)
    for word in {*words}:
        assert first[word].item() == pytest.approx(words.count(word) / len(words), rel=0.1)
    never = {*range(WORDS.size)} - {*words}
    assert 0 < max(first[word].item() for word in never) < min(first[word].item() for word in {*words})
    rows = [[WORDS.encode(text) for text in texts] for texts in TEXTS]
    used = [[sum(word in row for row in some) / len(some) for word in range(WORDS.size)] for some in rows]
    share = torch.tensor(used).mean(dim=0)
    found = bag_of(task).linear.bias.sigmoid()
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
    with torch.no_grad():
        texts = text_states(task.decoder, made["label"].flatten(0, 1))
        nearest = match_of(task)(task.memory(made["image"]).pooled, texts).argmax(dim=0).view(made["label"].shape[:2])
    there = made["label"][..., 0] != PAD
    assert (nearest == torch.arange(len(TEXTS))[:, None])[there].all()


@pytest.mark.parametrize("decoder", ["recurrent", "attentive", "transformer"])
def test_self_critical_training_in_bf16_gives_every_weight_a_gradient(decoder: str) -> None:
    """The weights that autocast has cast for the samples, which need no gradient, are not those of the loss."""
    task, made = captioner(decoder=decoder, captions=3, self_critical=1.0), batch()
    task.reward = lambda keys, texts, ended: [len(text) % 7 for text in texts]

    def learned(bf16: bool) -> set[str]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task.loss(made)["loss"]
        gradients = torch.autograd.grad(loss, [*task.parameters()], allow_unused=True)
        return {name for (name, _), one in zip(task.named_parameters(), gradients, strict=True) if one is not None}

    assert learned(bf16=True) == learned(bf16=False) > {"decoder.embedding.weight"}


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
    sums = task.loss(made)
    assert task.training
    sums["loss"].backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    ((keys, texts, rewards),) = given
    assert keys == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2] and len({*texts}) > 6
    # The captions once more: they depend on the same draw.
    seed = int(made["key"])
    how = Decoding(beam=4, sample=True, temperature=heat, sampling_seed=seed, no_repeat_ngram_size=0, max_length=10)
    with torch.no_grad():
        state = task.decoder(memory=task.memory(made["image"]))
        written = generate(task.components()["step"], state, how, made["sample"])
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


def test_matching_keeps_its_precision_under_autocast() -> None:
    """At a scale of 100, bf16's rounding of the products would be as large as a fair difference between captions."""
    task = captioner(contrastive=0.5, text_depth=1).eval()
    with torch.no_grad():
        match_of(task).scale.fill_(math.log(100))
    pooled, labels = torch.randn(3, 24), numbered([[row[0]] for row in TEXTS], WORDS, 12)[:, 0]
    given: list[torch.Tensor] = []
    for layer in (match_of(task).image, match_of(task).text):
        layer.register_forward_hook(lambda module, inputs, output: given.append(output.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(match_of(task)(pooled, text_states(task.decoder, labels)))
        text, image = (F.normalize(vectors, dim=1).float() for vectors in given)
    logits, own = 100 * image @ text.T, torch.arange(3)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found.item() == pytest.approx(expected.item(), abs=1e-3)


def test_contrastive_vectors_do_not_depend_on_what_fills_up() -> None:
    task = captioner(contrastive=0.5, text_depth=1).eval()
    pooled = torch.randn(3, 24)
    labels = numbered([[row[0]] for row in TEXTS], WORDS, 12)[:, 0]
    one = match_of(task)(pooled, text_states(task.decoder, labels))
    two = match_of(task)(pooled, text_states(task.decoder, F.pad(labels, (0, 4), value=PAD)))
    torch.testing.assert_close(one, two)


def test_what_needs_the_whole_batch_says_so() -> None:
    matching: dict[str, Any] = {"contrastive": 0.5, "text_depth": 1}
    assert not captioner().whole_batch and captioner(bag_of_words=0.1).whole_batch
    assert captioner(**matching).whole_batch and not captioner(**matching, self_critical=1.0).whole_batch


def some_of(made: Batch, rows: list[int]) -> Batch:
    return {name: v[rows] if isinstance(v, torch.Tensor) and v.ndim else v for name, v in made.items()}


def test_two_processes_that_gather_learn_as_one() -> None:
    """The losses of two halves of a batch, each with the other half's rows joined to its own, make the whole's."""
    task = captioner(contrastive=0.5, bag_of_words=0.2, text_depth=1, captions=1).eval()
    made = batch(TEXTS * 2)
    halves = [
        {name: v[i::2] if isinstance(v, torch.Tensor) and v.ndim else v for name, v in made.items()} for i in (0, 1)
    ]
    whole = task.loss({name: torch.cat([h[name] for h in halves]) if torch.is_tensor(v) and v.ndim else v
                       for name, v in made.items()})  # fmt: skip
    whole["loss"].backward()
    expected = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    rows: list[list[torch.Tensor]] = [[], []]

    def noted(given: torch.Tensor, mine: list[torch.Tensor]) -> torch.Tensor:
        mine.append(given)
        return given

    def joined(given: torch.Tensor, others: Iterator[torch.Tensor], order: int) -> torch.Tensor:
        return torch.cat([given, next(others)][::order])

    for mine, half in zip(rows, halves, strict=True):
        task.loss(half, partial(noted, mine=mine))
    total, count = torch.zeros(()), 0.0
    for i, half in enumerate(halves):
        sums = task.loss(half, partial(joined, others=iter(rows[1 - i]), order=1 - 2 * i))
        total, count = total + sums["loss"], count + float(sums["count"])
    assert count == float(whole["count"])
    assert float(total) == pytest.approx(float(whole["loss"]), rel=1e-5)
    total.backward()
    for name, p in task.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], atol=1e-4, rtol=1e-3)


def test_self_critical_samples_are_an_images_own() -> None:
    """Whatever else is in the batch, and others each epoch."""
    task, made = captioner(decoder="attentive", captions=2, self_critical=1.0), batch()
    seen: list[list[str]] = []

    def reward(keys: Iterable[int], texts: Iterable[str], ended: Iterable[bool]) -> list[float]:
        seen.append([*texts])
        return [0.0] * len(seen[-1])

    task.reward = reward
    for some in ([0, 1, 2], [2], [1, 0]):
        task.loss(some_of(made, some))
    whole, third, turned = ([texts[i : i + 3] for i in range(0, len(texts), 3)] for texts in seen)
    assert [whole[2]] == third and whole[:2] == turned[::-1]
    task.loss({**made, "key": draw_key(0, 1)})
    assert seen[-1] != seen[0]
