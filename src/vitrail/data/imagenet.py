"""ImageNet-1k's classes: WordNet ids, names and synonyms, in the order of its models' outputs (`imagenet.tsv`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Synset(NamedTuple):
    """A class."""

    wnid: str
    """`n01440764`"""
    name: str
    """as torchvision has it: `tench`"""
    synonyms: tuple[str, ...]
    """WordNet's words for it: `tench`, `Tinca tinca`"""

    def titles(self) -> set[str]:
        """Its full names in published class lists, `plain`."""
        return {plain(self.name), plain(", ".join(self.synonyms))}

    def words(self) -> set[str]:
        """Its synonyms and titles, `plain`."""
        return self.titles() | {plain(word) for word in self.synonyms}


@cache
def synsets() -> tuple[Synset, ...]:
    """The 1,000 classes, in order."""
    lines = Path(__file__).with_name("imagenet.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple(Synset(wnid, name, tuple(words.split(", "))) for wnid, name, words in rows)


@cache
def numbers() -> dict[str, int]:
    """The output of each WordNet id."""
    return {synset.wnid: i for i, synset in enumerate(synsets())}


def names() -> list[str]:
    """The classes' names, in order."""
    return [synset.name for synset in synsets()]


def wnid_of(name: str) -> str | None:
    """The WordNet id in a class name: `n01440764`, possibly with words, as in `n02085620-Chihuahua`; else None."""
    found = re.match(r"n\d{8}(?![^\W_])", name.strip().lower())
    return found[0] if found else None


def is_order_of(classes: Sequence[str]) -> bool:
    """Whether the outputs `classes` are ImageNet's in its order. Lists use different words for a class.

    A list in another order agrees almost nowhere, so agreement for half of the classes is proof.
    """
    if len(classes) != len(synsets()):
        return False
    agreeing = (
        wnid_of(name) == synset.wnid or not words(name).isdisjoint(synset.words())
        for name, synset in zip(classes, synsets(), strict=True)
    )
    return sum(agreeing) > len(classes) / 2


def words(name: str) -> set[str]:
    """The name and each synonym of a name such as `tench, Tinca tinca`, all of them `plain`."""
    return {plain(word) for word in (name, *name.split(","))} - {""}


def plain(name: str) -> str:
    """The name in lower case, one space for all but letters and digits; unchanged if nothing would be left."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold())) or name
