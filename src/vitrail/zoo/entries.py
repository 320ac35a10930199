"""Find the entry of a checkpoint that holds the weights, and the prefix of their names.

Training code saves a model in an entry of a dictionary (`model`, `state.model`), as a field of another module (`net.`,
`encoder.`), in a wrapper (`module.`), or in a combination of these. A *place* is an entry and a prefix of the names in
it. One rule serves all: the weights are at the outermost place whose names, without the prefix, a source recognises. Of
several places an average is preferred, because its trainer evaluates it; different models are an error that names them.
Everything else in the file is left out for a reason in the certificate, or is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from vitrail.errors import UserError
from vitrail.zoo.pickles import NO_WEIGHT, UNNAMED
from vitrail.zoo.source import Files, Lazy

FEWEST = 6
"""minimum number of names under a prefix for a model; the smallest ViT has more"""
DEEPEST = 8
"""maximum number of words in a prefix"""

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""prefixes that torch.compile and other wrappers add to names, at any depth"""

AVERAGES = {"ema", "swa", "avg", "average", "averaged", "averaging", "shadow", "polyak", "teacher", "target_encoder"}
TRAINED = {"student", "online", "momentum", "current", "raw"}
"""words in names: averages are preferred; names with the other words yield to a copy without them"""
HEADS = {"head", "heads", "classifier"}

ASIDE: dict[str, set[str]] = {
    "thop's count of operations or parameters": {"total_ops", "total_params"},
    "the number of averaged models": {"n_averaged"},
    "of the loss": {"loss", "losses", "criterion", "criterions", "criteria", "class_weights", "pos_weight"},
    "of a metric": {"metric", "metrics", "acc", "accuracy", "auroc", "auc", "confmat", "f1", "f1score"},
}
"""words in names of tensors outside the model, at any depth"""
PRETRAINED = "the head of pre-training"
BESIDE: dict[str, set[str]] = {
    PRETRAINED: {"dino", "ibot", "projector", "projection", "prototypes", "queue"},
    "an average under other names than the model's": AVERAGES,
}
"""first words of names outside the model's prefix"""


@dataclass(frozen=True)
class Place:
    """The place of a model's weights."""

    entry: str
    prefix: str
    names: Mapping[str, str]
    """names without entry, prefix and wrappers, to names in the file"""

    def __str__(self) -> str:
        named = [f"the {kind} {name!r}" for kind, name in (("entry", self.entry), ("prefix", self.prefix)) if name]
        return " with ".join(named) or "the outermost names"

    def rank(self) -> int:
        """`average_rank` of the prefix if that decides, else of the entry: an entry called `ema` may hold both."""
        told = _words(self.prefix) & (AVERAGES | TRAINED)
        return average_rank(self.prefix if told else f"{self.entry}.{self.prefix}")


def choose(files: Files, known: Callable[[Files], bool]) -> Files:
    """The files with the weights of one model, under names that are `known` to a source.

    Returned unchanged if no place is recognised.

    Raises:
        UserError: there are several models, or unknown weights besides the model.
    """
    groups, aside = _groups(files)
    plain = not aside and groups.keys() == {""} and all(name == full for name, full in groups[""].items())
    if plain and known(files):
        return files
    places = [place for entry, names in groups.items() for place in _places(files, entry, names, known)]
    if not places:
        return files
    best = _best(files, places)
    names, notes = dict(best.names), _notes(best)
    _add_head(groups, best, names)
    left = {**aside, **_beside(files, groups[best.entry], places, best, names)}
    left.update(_entries_left(files, groups, places, best, names, notes))
    _complete(files, places, best, names, notes)
    if best.rank():
        notes += _passed_over(files, left, groups, places, best)
    return replace(renamed(files, names), notes=[*files.notes, *notes], left=left)


def renamed(files: Files, names: Mapping[str, str]) -> Files:
    """The files with some of their weights under new names; `names` gives the old ones."""
    weights = files.weights
    shapes = {new: files.shapes[old] for new, old in names.items()}
    if isinstance(weights, Lazy):
        lazy = weights
        view = Lazy(names, lambda name: lazy[names[name]], lambda name: lazy.passing(names[name]))
        return replace(files, weights=view, shapes=shapes, entries=("",))
    return replace(files, weights={new: weights[old] for new, old in names.items()}, shapes=shapes, entries=("",))


def _words(name: str) -> set[str]:
    """The words of a name: what stands between dots, and what underscores, capitals and digits separate of that."""
    words = [*name.split("."), *re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name), *re.findall(r"[a-z]+\d+", name)]
    return {word.lower() for word in words}


def average_rank(place: str) -> int:
    """0 for an average, 1 for a trained model, 2 for one that is trained with another or is averaged."""
    words = _words(place)
    return 0 if words & AVERAGES else 2 if words & TRAINED else 1


def _groups(files: Files) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Per entry, names without entry and wrappers to names in the file; and names outside any model, with reasons."""
    entries = set(files.entries)
    groups: dict[str, dict[str, str]] = {}
    aside: dict[str, str] = {}
    for full in files.weights:
        entry = next((place for place in _outer(full) if place in entries), "")
        name = full[len(entry) + 1 :] if entry else full
        words = _words(name)
        if reason := next((reason for reason, some in ASIDE.items() if words & some), None):
            aside[full] = reason
        else:
            short = WRAPPERS.sub("", name)
            group = groups.setdefault(entry, {})
            group[name if short in group else short] = full
    return groups, aside


def _outer(name: str) -> Iterator[str]:
    """The prefixes of a name that end at a dot, longest first."""
    end = name.rfind(".")
    while end > 0:
        yield name[:end]
        end = name.rfind(".", 0, end)


def _places(files: Files, entry: str, names: Mapping[str, str], known: Callable[[Files], bool]) -> Iterator[Place]:
    """The outermost places of an entry that are known."""
    inside: dict[str, int] = {"": len(names)}
    for name in names:
        for outer in _outer(name):
            if outer.count(".") < DEEPEST:
                inside[f"{outer}."] = inside.get(f"{outer}.", 0) + 1
    found: list[str] = []
    for prefix in sorted(inside, key=lambda prefix: prefix.count(".")):
        if (prefix and inside[prefix] < FEWEST) or prefix.startswith(tuple(found)):
            continue
        some = {name.removeprefix(prefix): full for name, full in names.items() if name.startswith(prefix)}
        if known(renamed(files, some)):
            found.append(prefix)
            yield Place(entry, prefix, some)


def _best(files: Files, places: list[Place]) -> Place:
    """The place to read; UserError if the user has to choose between two."""
    best, *others = sorted(places, key=Place.rank)
    for other in others:
        if other.rank() == best.rank() or not _alike(files, best, other):
            raise UserError(
                f"{files.path} holds several models, at {best} and at {other}: save the state dict of the right one "
                "to a separate file"
            )
    return best


def _alike(files: Files, one: Place, two: Place) -> bool:
    """Whether two places hold the same model: an average has the shapes of its model, a teacher has others."""
    common = one.names.keys() & two.names.keys()
    same = all(files.shapes[one.names[name]] == files.shapes[two.names[name]] for name in common)
    return same and 2 * len(common) >= min(len(one.names), len(two.names))


def _notes(best: Place) -> list[str]:
    notes = [f"weights from the entry {best.entry!r}"] if best.entry else []
    if best.prefix:
        notes.append(f"prefix {best.prefix!r} dropped from {len(best.names)} names")
    wrapped = sorted({found for full in best.names.values() for found in WRAPPERS.findall(full)})
    return notes + [f"wrapper {word!r} dropped from the names" for word in wrapped]


def _entries_left(
    files: Files,
    groups: Mapping[str, Mapping[str, str]],
    places: list[Place],
    best: Place,
    names: Mapping[str, str],
    notes: list[str],
) -> dict[str, str]:
    """Reasons for leaving out the other entries, by the first name segment that differs from the chosen one."""
    around = {"", best.entry, *_outer(best.entry)}
    left = {name: why for name, why in files.left.items() if next(_outer(name), "") in around}
    copies = {place.entry for place in places if place.entry != best.entry}
    used = set(names.values())
    for entry, group in groups.items():
        if entry == best.entry or used.issuperset(group.values()):
            continue
        if entry in around:
            left.update(dict.fromkeys(group.values(), NO_WEIGHT))
            continue
        top = [place for place in (entry, *_outer(entry)) if place not in around][-1]
        if entry in copies:
            left[top] = f"{best} is used"
        elif left.setdefault(top, NO_WEIGHT) == NO_WEIGHT and top.split(".")[-1] in HEADS:
            notes.append(f"the entry {top!r} is left out: it does not belong to {best}")
    return left


def _add_head(groups: Mapping[str, Mapping[str, str]], best: Place, names: dict[str, str]) -> None:
    """Add the names of a separate `head` to an encoder without one, from the same entry or another."""
    if any(name.startswith("head.") for name in names):
        return
    if best.prefix:
        start = f"{best.prefix[:-1].rpartition('.')[0]}.head.".removeprefix(".")
        found = {name[len(start) :]: full for name, full in groups[best.entry].items() if name.startswith(start)}
    else:
        found = dict(groups.get(f"{best.entry.rpartition('.')[0]}.head".removeprefix("."), {}))
    names.update({f"head.{name}": full for name, full in found.items()})


def _beside(
    files: Files, group: Mapping[str, str], places: list[Place], best: Place, names: Mapping[str, str]
) -> dict[str, str]:
    """Reasons for leaving out names outside the prefix; unknown names are refused."""
    copies = tuple(place.prefix for place in places if place.entry == best.entry and place is not best)
    used = set(names.values())
    outside = {name: full for name, full in group.items() if full not in used}
    firsts = {name: _words(_first_apart(name, best.prefix)) for name in outside}
    pretrained = copies or any(words & BESIDE[PRETRAINED] for words in firsts.values())
    left: dict[str, str] = {}
    for name, full in outside.items():
        reason = next((why for why, words in BESIDE.items() if firsts[name] & words), None)
        if copies and name.startswith(copies):
            left[full] = f"{best} is used"
        elif math.prod(files.shapes[full]) <= 1:
            left[full] = NO_WEIGHT  # a step, a decay
        elif reason:
            left[full] = reason
        elif pretrained and firsts[name] & (TRAINED | {"predictor", "prediction"}):
            left[full] = PRETRAINED
    if unknown := [full for full in outside.values() if full not in left]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{files.path} holds {unknown[0]}{more} besides the model at {best}, which vitrail does not "
            "recognise: save only the state dict of the model"
        )
    return left


def _first_apart(name: str, prefix: str) -> str:
    """The first segment of a name that differs from a prefix."""
    pieces, shared = name.split("."), prefix.split(".")
    return next((piece for piece, other in zip(pieces, shared, strict=False) if piece != other), pieces[-1])


def _complete(files: Files, places: list[Place], best: Place, names: dict[str, str], notes: list[str]) -> None:
    """Add tensors that an average of parameters lacks, such as buffers, from the averaged model."""
    model = next((place for place in places if place.rank() == 1), None)
    if best.rank() or model is None:
        return
    missing = [name for name in model.names if name not in names]
    if missing:
        notes.append(f"{len(missing)} weights that the average lacks, such as {missing[0]}, come from {model}")
        names.update({name: model.names[name] for name in missing})


def _passed_over(
    files: Files, left: Mapping[str, str], groups: Mapping[str, Mapping[str, str]], places: list[Place], best: Place
) -> list[str]:
    """Notes on averages that are not used."""
    used = {place.entry for place in places}
    lists = [name for name, why in files.left.items() if why == UNNAMED and _words(name) & AVERAGES]
    entries = [entry for entry in groups if entry not in used and _words(entry) & AVERAGES]
    beside = [name for name, why in left.items() if why in BESIDE and BESIDE[why] is AVERAGES][:1]
    return [
        *(f"the average in {name!r} is {UNNAMED}: {best} is used" for name in lists),
        *(f"the average in {name!r} makes no model: {best} is used" for name in (*entries, *beside)),
    ]
