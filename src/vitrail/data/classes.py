"""Match the classes of a data set with a model's: by name, WordNet id or number."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from vitrail.data import imagenet
from vitrail.data.imagenet import plain, wnid_of, words
from vitrail.errors import UserError

log = logging.getLogger("vitrail")


def outputs_of(data: Sequence[str], model: Sequence[str]) -> list[int]:
    """For each class of `data` the number of the model's output for it. `model` are the names of the model's classes.

    Case, underscores and hyphens make no difference, and a name such as `tench, Tinca tinca` is a list of synonyms.
    ImageNet's WordNet ids (`n01440764`, also with words beside them) are recognised. If a model's classes are only
    numbered, and there are as many, they are taken in the order of the data's.

    Raises:
        UserError: a class is unknown to the model, matches several of its classes, or the same one as another class.
    """
    exact = {name: i for i, name in enumerate(model)}
    if list(data) == list(model):
        return list(range(len(model)))
    if len(exact) == len(model) and exact.keys() == set(data):
        return [exact[name] for name in data]
    if [_number(name) for name in model] == list(range(len(model))):
        places = _numbered(data, len(model))
    else:
        names = _Names(model)
        if imagenet.is_order_of(data):  # names repeat in this list, ids do not
            data = [synset.wnid for synset in imagenet.synsets()]
        places = [names.find(name, data) for name in data]
    first: dict[int, int] = {}
    for i, place in enumerate(places):
        if (other := first.setdefault(place, i)) != i:
            raise UserError(
                f"the data's classes {data[other]!r} and {data[i]!r} both match the model's class {model[place]!r}: "
                "merge the two"
            )
    return places


def _number(name: str) -> int | None:
    """The number in a placeholder for a class name: `7`, or transformers' `LABEL_7`."""
    found = re.fullmatch(r"(?:LABEL_)?([0-9]{1,9})", name)
    return int(found[1]) if found else None


def _numbered(data: Sequence[str], count: int) -> list[int]:
    """The outputs of a model whose `count` classes have no names."""
    own = [_number(name) for name in data]
    if None not in own:
        for name, number in zip(data, own, strict=True):
            if number is None or number >= count:
                raise unknown(name, data, count)
        return [number for number in own if number is not None]
    ids = [wnid_of(name) for name in data]
    if count == len(imagenet.synsets()) and all(wnid in imagenet.numbers() for wnid in ids):
        log.warning(f"the model's {count:,} classes have no names: assuming ImageNet's, in its order")
        return [imagenet.numbers()[wnid] for wnid in ids if wnid is not None]
    if len(data) == count:
        log.warning(f"the model's {count:,} classes have no names: assuming the data's, in their order")
        return list(range(count))
    named = next(name for name, number in zip(data, own, strict=True) if number is None)
    raise UserError(
        f"the data has {len(data):,} classes and the model {count:,} without names; the model does not know {named!r}: "
        "name the data's classes by their numbers in the model, or train it on this data with --init"
    )


class _Names:
    """The classes of a model, indexed by every name that each may have."""

    def __init__(self, model: Sequence[str]) -> None:
        self.model = model
        self.ordered = imagenet.is_order_of(model)
        """whether these are ImageNet's classes in its order, so that each has an id"""
        ids = [synset.wnid for synset in imagenet.synsets()] if self.ordered else [wnid_of(name) for name in model]
        self.ids: dict[str, list[int]] = {}
        self.words: dict[str, list[int]] = {}
        self.titles: dict[str, list[int]] = {}
        self.without_id = {i for i, wnid in enumerate(ids) if wnid is None}
        for i, (name, wnid) in enumerate(zip(model, ids, strict=True)):
            if wnid is not None:
                self.ids.setdefault(wnid, []).append(i)
            for word in words(name) | _words_of_id(wnid):
                self.words.setdefault(word, []).append(i)
            self.titles.setdefault(plain(name), []).append(i)

    def find(self, name: str, data: Sequence[str]) -> int:
        """The output for a class of `data`."""
        found = self._candidates(name)
        if not found:
            raise unknown(name, data, len(self.model))
        if len(found) > 1 and not self.ordered and list(self.model).count(name) == 1:
            others = ", ".join(repr(self.model[i]) for i in found if self.model[i] != name)
            log.warning(f"the data's class {name!r} is taken for the model's class of exactly that name, not {others}")
            return list(self.model).index(name)
        if len(found) > 1:
            raise self._ambiguous(name, found)
        return found[0]

    def _candidates(self, name: str) -> list[int]:
        wnid = wnid_of(name)
        if wnid is None:
            # The full name first: "maillot, tank suit" is one class, though "maillot" may be two.
            return self.words.get(plain(name)) or self._of(words(name), self.words)
        if wnid in self.ids:
            return self.ids[wnid]
        place = imagenet.numbers().get(wnid)
        titles = imagenet.synsets()[place].titles() if place is not None else set()
        # An id outside ImageNet-1k is matched by the words beside it only.
        found = self._of(titles, self.titles) or self._of(_words_of_id(wnid) or words(name[len(wnid) :]), self.words)
        return [i for i in found if i in self.without_id]  # with another id it is another class, whatever its name

    @staticmethod
    def _of(keys: set[str], table: dict[str, list[int]]) -> list[int]:
        return sorted({place for key in keys for place in table.get(key, ())})

    def _ambiguous(self, name: str, found: Sequence[int]) -> UserError:
        if self.ordered:
            which = " or ".join(f"{self.model[i]!r} ({imagenet.synsets()[i].wnid})" for i in found)
            return UserError(f"the data's class {name!r} may be the model's {which}: name it by the id in brackets")
        which = " or ".join(f"{self.model[i]!r} (number {i})" for i in found)
        return UserError(f"the data's class {name!r} may be the model's {which}: use the model's name")


def _words_of_id(wnid: str | None) -> set[str]:
    """ImageNet's words for a WordNet id; none for an id outside ImageNet-1k."""
    place = None if wnid is None else imagenet.numbers().get(wnid)
    return set() if place is None else imagenet.synsets()[place].words()


def unknown(name: str, data: Sequence[str], count: int) -> UserError:
    """The error for a class that the model lacks."""
    return UserError(
        f"the data has {len(data):,} classes and the model {count:,}; the model does not know {name!r}: leave it out, "
        "train the model on this data with --init, or choose other data"
    )
