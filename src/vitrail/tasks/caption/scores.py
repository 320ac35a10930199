"""Scores of captions as the field reports them: BLEU, METEOR, ROUGE-L and CIDEr, from pycocoevalcap's scorers.

They compare words, so they depend on the tokenisation. Here it is fixed: lower case, then `[a-z0-9']+`. If Java is
installed, scores on Stanford's Penn Treebank tokens are added, because papers on COCO use those. All are fractions, as
the scorers print them; a CIDEr of 0.42 is written as 42 in papers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from vitrail.errors import RunError, UserError, warn_once
from vitrail.tasks.caption.cider import ngrams, words
from vitrail.tasks.caption.java import MISSING, meteor, treebank
from vitrail.tasks.rows import require_rows

log = logging.getLogger("vitrail")

Key = TypeVar("Key", bound=Hashable)
Given = tuple[Mapping[Key, str], Mapping[Key, Sequence[str]]]
"""candidates, and the references of each"""
Cut = tuple[dict[Key, str], dict[Key, list[str]]]
"""the same in tokens, separated by spaces"""
Scores = dict[str, float | None]
"""by name; None for a score that is undefined for these images"""

COLLAPSED = 0.5
"""a model that gives more than this fraction of the images the same caption has collapsed;"""
FEWEST = 10
"""fewer images than this cannot show it, and CIDEr of fewer means little"""


def caption_scores(
    candidates: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    *,
    java: bool | None = None,
    seen: Iterable[str] | None = None,
) -> Scores:
    """`bleu1` to `bleu4`, `rouge_l`, `cider`; with Java `meteor`, and all of them on Treebank tokens as `ptb_...`.

    In addition: `length` (mean words), `vocabulary` (different words over all captions), `identical` (the fraction of
    images with the most common caption: 1 if the model has collapsed), `distinct` (different captions per image), with
    `seen`, the training captions, `new` (the fraction of captions that are not among these), and `count`.

    Each image needs a candidate and at least one reference. `java=None` uses Java if installed, True requires it. CIDEr
    weights n-grams by their rarity among the images' references: if all images have the same n-grams, as with a single
    image, `cider` is None; for few images it means little. Both log a warning. Captions without a word in the fixed
    tokenisation score 0; `length` and the other statistics then count words between spaces.
    """
    scores = _scored([(candidates, references)], java, seen)[0]
    _warn_of_cider(scores, len(candidates))
    return scores


def _warn_of_cider(scores: Scores, count: int) -> None:
    """Warn if CIDEr is undefined or means little."""
    images = f"{count} image{'s' * (count > 1)}"
    if scores["cider"] is None:
        warn_once(
            f"no CIDEr of {images}: it weights words by their rarity among the references of the images, but all "
            "here have the same; score more images"
        )
    elif count < FEWEST:
        warn_once(f"CIDEr of {images} means little: it weights words by their rarity among the images; score more")


def _scored(sets: Sequence[Given[Key]], java: bool | None, seen: Iterable[str] | None = None) -> list[Scores]:
    """`caption_scores` of several sets. Java takes many seconds to start, so it starts once for all."""
    if not all(given and given.keys() == texts.keys() and all(texts.values()) for given, texts in sets):
        raise ValueError("every image needs one candidate and at least one reference")
    cut = [_each(given, lambda text: " ".join(words(text))) for given in sets]
    scores = [
        {**_ngram_scores(*c), **statistics(given.values(), seen)} for c, (given, _) in zip(cut, sets, strict=True)
    ]
    if java is False or (java is None and not shutil.which("java")):
        return scores
    try:
        return [{**own, **more} for own, more in zip(scores, _java_scores(sets, cut), strict=True)]
    except (RunError, UserError) as error:
        if java:
            raise
        log.warning(f"METEOR and scores on Treebank tokens are skipped: {error}")
        return scores


def _each(given: Given[Key], change: Callable[[str], str]) -> Cut[Key]:
    """Candidates and references, each text changed: the image's candidate first, then its references."""
    candidates, references = given
    tokens, expected = {}, {}
    for key, text in candidates.items():
        tokens[key] = change(text)
        expected[key] = [change(reference) for reference in references[key]]
    return tokens, expected


def statistics(captions: Collection[str], seen: Iterable[str] | None = None) -> dict[str, float]:
    """Statistics of the captions, independent of the images: see `caption_scores`."""
    tokens = [_said(caption) for caption in captions]
    counts, total = Counter(tokens), len(tokens)
    found: dict[str, float] = {
        "length": sum(map(len, tokens)) / total,
        "vocabulary": float(len(set(chain.from_iterable(tokens)))),
        "identical": max(counts.values()) / total,
        "distinct": len(counts) / total,
        "count": total,
    }
    if seen is not None:
        known = {_said(caption) for caption in seen}
        found["new"] = sum(caption not in known for caption in tokens) / total
    return found


def _said(caption: str) -> tuple[str, ...]:
    """A caption's words; for alphabets outside the tokenisation, words between spaces."""
    return tuple(words(caption) or caption.lower().split())


def human_ceiling(references: Mapping[Key, Sequence[str]], *, java: bool | None = None) -> Scores:
    """The scores of people: the mean over turns in which one reference is the candidate against the others.

    Turns are weighted by their number of images, because few images have a sixth reference; turns without a CIDEr are
    left out of its mean. Images with fewer than two references are left out; `count` is the number of the others.
    People are compared with one reference less than models, so their scores are slightly too low in comparison.
    """
    several = {key: list(texts) for key, texts in references.items() if len(texts) > 1}
    if not several:
        raise UserError("a human ceiling needs images with at least two captions")
    sets: list[Given[Key]] = []
    for turn in range(max(map(len, several.values()))):
        those = {key: texts for key, texts in several.items() if len(texts) > turn}
        others = {key: texts[:turn] + texts[turn + 1 :] for key, texts in those.items()}
        sets.append(({key: texts[turn] for key, texts in those.items()}, others))
    turns, sizes = _scored(sets, java), [len(texts) for texts, _ in sets]
    means = {
        name: _mean([(turn[name], counts) for turn, counts in zip(turns, sizes, strict=True)]) for name in turns[0]
    }
    _warn_of_cider(means, len(several))
    return {**means, "count": len(several)}


def _mean(turns: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean over the turns that have this score, weighted by their number of images."""
    scored = [(score, count) for score, count in turns if score is not None]
    return sum(score * count for score, count in scored) / sum(count for _, count in scored) if scored else None


def check_scorers() -> None:
    """Raise UserError if pycocoevalcap is missing."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(MISSING)


def _ngram_scores(tokens: Mapping[Key, str], expected: Mapping[Key, list[str]]) -> Scores:
    """The scores that need no Java, on text with words separated by spaces."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider as Theirs
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        raise UserError(MISSING) from None
    given = {key: [text] for key, text in tokens.items()}
    if not any(chain.from_iterable(expected.values())):  # CIDEr's scorer fails on these
        warn_once("no caption of the data has a word of [a-z0-9']: CIDEr, BLEU and ROUGE-L are 0 and meaningless")
        return dict.fromkeys(("cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # BLEU's scorer prints to standard output
        bleu, _ = Bleu(4).compute_score(expected, given)
        rouge, _ = Rouge().compute_score(expected, given)
        cider, _ = Theirs().compute_score(expected, given)
    return {
        "cider": float(cider) if _tell_apart(expected.values()) else None,
        **{f"bleu{n}": float(score) for n, score in enumerate(bleu, 1)},
        "rouge_l": float(rouge),
    }


def _tell_apart(references: Iterable[Sequence[str]]) -> bool:
    """Whether some n-gram is only in the references of some images: CIDEr's weight is 0 for n-grams of all images."""
    found = ({ngram for text in texts for ngram in ngrams(text.split())} for texts in references)
    first = next(found)
    return any(ngrams != first for ngrams in found)


def _java_scores(sets: Sequence[Given[Key]], cut: Sequence[Cut[Key]]) -> list[Scores]:
    """The scores that need Java, for each set and its fixed tokens."""
    texts = [text for given, references in sets for key in given for text in (given[key], *references[key])]
    lines = iter(treebank(texts))
    ptb = [_each(given, lambda text: next(lines)) for given in sets]
    meteors = meteor(*cut, *ptb)
    return [
        {"meteor": own, **{f"ptb_{name}": score for name, score in {**_ngram_scores(*each), "meteor": theirs}.items()}}
        for each, own, theirs in zip(ptb, meteors[: len(sets)], meteors[len(sets) :], strict=True)
    ]


class CaptionMetric:
    """The scores of an evaluation, `cider` first, from answers with a `.caption`. State is kept by sample.

    The references are in the batch under `captions`, one list per image. Warns if the model has collapsed to one
    caption.
    """

    def __init__(self, *, seen: Iterable[str] | None = None, java: bool | None = False) -> None:
        """`seen` and `java` as in `caption_scores`. Java takes seconds, so it is off by default."""
        self.seen = None if seen is None else list(seen)
        self.java = java
        self.rows: dict[int, tuple[str, list[str]]] = {}

    def update(self, batch: dict[str, Any], answers: Sequence[Any]) -> None:
        """Add the caption of each sample; repeated samples count once."""
        for sample, answer, texts in zip(batch["sample"].tolist(), answers, batch["captions"], strict=True):
            self.rows[sample] = (answer.caption, list(texts))

    def state(self) -> dict[str, Tensor]:
        """The rows as bytes of JSON."""
        data = json.dumps([self.rows[sample] for sample in sorted(self.rows)]).encode()
        return {"sample": torch.tensor(sorted(self.rows)), "text": torch.tensor(list(data), dtype=torch.uint8)}

    def merge(self, state: dict[str, Tensor]) -> None:
        rows = json.loads(bytes(state["text"].tolist()))
        for sample, (caption, texts) in zip(state["sample"].tolist(), rows, strict=True):
            self.rows[sample] = (caption, texts)

    def compute(self) -> dict[str, Any]:
        """The scores of `caption_scores`."""
        require_rows(self.rows)
        candidates = {sample: self.rows[sample][0] for sample in sorted(self.rows)}
        references = {sample: self.rows[sample][1] for sample in candidates}
        scores = caption_scores(candidates, references, java=self.java, seen=self.seen)
        identical = scores["identical"]
        if len(candidates) >= FEWEST and identical is not None and identical > COLLAPSED:
            common, _ = Counter(candidates.values()).most_common(1)[0]
            log.warning(
                f"{identical:.0%} of {len(candidates):,} images have the same caption ({common!r:.80}): "
                "the model ignores the images, or needs longer training"
            )
        return scores
