"""Classes of a data set among those of a model: by name, WordNet id or number, and never by a guess."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from timm.data.imagenet_info import ImageNetInfo
from torchvision.models import ViT_B_16_Weights

from vitrail.data import imagenet
from vitrail.data.classes import outputs_of
from vitrail.errors import UserError

NAMES = imagenet.names()
WNIDS = [synset.wnid for synset in imagenet.synsets()]
LEMMAS = [", ".join(synset.synonyms) for synset in imagenet.synsets()]
IMAGENETTE = ["n01440764", "n02102040", "n02979186", "n03000684", "n03028079"]
IMAGENETTE += ["n03394916", "n03417042", "n03425413", "n03445777", "n03888257"]
AS_OUTPUTS = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


def test_the_table_is_timms_and_torchvisions() -> None:
    info: Any = ImageNetInfo()  # timm has no types for it
    assert info.label_names() == WNIDS and info.label_descriptions() == LEMMAS
    assert ViT_B_16_Weights.DEFAULT.meta["categories"] == NAMES and len(set(NAMES)) == 1000


LISTS = {
    "torchvision's": NAMES,
    "WordNet's": LEMMAS,
    "ids": WNIDS,
    "ids and words": list(map(" ".join, zip(WNIDS, LEMMAS, strict=True))),
}


@pytest.mark.parametrize("model", LISTS.values(), ids=LISTS)
def test_imagenette_is_found_in_every_list_of_imagenets_classes(model: list[str]) -> None:
    assert outputs_of(IMAGENETTE, model) == AS_OUTPUTS
    assert outputs_of([f"{wnid}-some_words" for wnid in IMAGENETTE], model) == AS_OUTPUTS
    assert outputs_of([NAMES[i] for i in AS_OUTPUTS], model) == AS_OUTPUTS
    assert outputs_of([LEMMAS[i] for i in AS_OUTPUTS], model) == AS_OUTPUTS
    given = ["Tench", "english_springer", "cassette-player", "CHAIN SAW", "church building", "French horn"]
    assert outputs_of(given, model) == AS_OUTPUTS[:6]


@pytest.mark.parametrize("model", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("data", LISTS.values(), ids=LISTS)
def test_all_of_imagenet_is_found_by_its_ids_in_whatever_order(data: list[str], model: list[str]) -> None:
    order = random.Random(0).sample(range(1000), 1000)
    if data in (NAMES, LEMMAS) and data != model:
        with pytest.raises(UserError, match="may be the model's"):  # a crane is a bird or a machine
            outputs_of([data[i] for i in order], model)
    elif len(set(data)) == 1000:
        assert outputs_of([data[i] for i in order], model) == order


@pytest.mark.parametrize("model", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("data", LISTS.values(), ids=LISTS)
def test_imagenet_in_its_own_order_is_itself_by_any_list(data: list[str], model: list[str]) -> None:
    assert outputs_of(data, model) == list(range(1000))


@pytest.mark.parametrize("name", ["crane", "maillot", "cardigan", "Cardigan", "panther", "horn"])
@pytest.mark.parametrize("model", LISTS.values(), ids=LISTS)
def test_a_name_of_two_classes_is_refused_with_their_ids(name: str, model: list[str]) -> None:
    with pytest.raises(UserError, match=f"the data's class '{name}' may be the model's .* or ") as caught:
        outputs_of(["tench", name], model)
    assert "\n" not in str(caught.value) and str(caught.value).count("(n0") == 2


def test_a_full_name_and_an_id_say_which_of_two() -> None:
    assert outputs_of(["crane bird", "maillot, tank suit", "n02963159"], NAMES) == [134, 639, 474]
    assert outputs_of(["n03126707", "maillot tank suit"], LEMMAS) == [517, 639]


@pytest.mark.parametrize(
    "data, unknown",
    [
        (["tench", "unicorn", "church"], "unicorn"),
        (["n01440764", "n99999999"], "n99999999"),
        (["n01440764", "n00007846"], "n00007846"),  # in ImageNet-21k alone
        (["0", "217"], "0"),
    ],
)
def test_an_unknown_class_among_known_ones_is_named(data: list[str], unknown: str) -> None:
    with pytest.raises(UserError, match=f"the model does not know '{unknown}'"):
        outputs_of(data, NAMES)


def test_another_id_is_another_class_though_it_has_the_same_words() -> None:
    with pytest.raises(UserError, match="does not know 'n03126707'"):  # the machine
        outputs_of(["n01440764", "n03126707"], ["n01440764", "n02012849", "n03000684"])
    assert outputs_of(["tench", "crane"], ["n02012849", "n01440764"]) == [1, 0]


def test_a_model_tuned_on_some_classes_in_its_own_order() -> None:
    model = ["church", "tench, Tinca tinca", "maillot, tank suit", "maillot"]
    assert outputs_of(["n01440764", "n03028079"], model) == [1, 0]
    assert outputs_of(["n03710637", "n03710721"], model) == [3, 2]


def test_a_list_in_another_order_is_not_taken_for_imagenets() -> None:
    order = random.Random(1).sample(range(1000), 1000)
    shuffled = [NAMES[i] for i in order]
    assert not imagenet.is_order_of(shuffled) and imagenet.is_order_of(LEMMAS)
    assert outputs_of(["n01440764", "n03028079"], shuffled) == [order.index(0), order.index(497)]


def test_two_classes_of_the_data_that_are_one_of_the_model() -> None:
    with pytest.raises(UserError, match="'tench' and 'n01440764' both match the model's class 'tench'"):
        outputs_of(["tench", "goldfish", "n01440764"], NAMES)
    with pytest.raises(UserError, match="'cat' and 'cat' both match"):  # a Parquet file may name two classes alike
        outputs_of(["cat", "cat"], ["cat", "dog", "elk"])


def test_the_names_of_a_models_own_data_are_just_those(caplog: pytest.LogCaptureFixture) -> None:
    own = ["C", "C#", "C++", "apple", "apple, green", "Cat", "cat"]
    assert outputs_of(own[::-1], own) == [6, 5, 4, 3, 2, 1, 0] and not caplog.messages
    assert outputs_of(["apple", "C++"], own) == [3, 2]
    assert "'apple' is taken for the model's class of exactly that name, not 'apple, green'" in caplog.text


def test_numbers_as_names_are_names(caplog: pytest.LogCaptureFixture) -> None:
    """A model of "1" to "11" knows them in another order than a folder lists them; one without names has 0 to 10."""
    natural = [str(i) for i in range(1, 12)]
    assert [natural[i] for i in outputs_of(sorted(natural), natural)] == sorted(natural)
    assert outputs_of(["007", "11"], [str(i) for i in range(12)]) == [7, 11]
    assert outputs_of(["1", "0"], ["LABEL_0", "LABEL_1", "LABEL_2"]) == [1, 0]
    assert not caplog.messages


@pytest.mark.parametrize("model", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_classes_without_names_stand_in_order_and_vitrail_warns(
    model: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert outputs_of(["ant", "cat", "dog"], model) == [0, 1, 2]
    assert "3 classes have no names: assuming the data's" in caplog.text
    with pytest.raises(UserError, match="2 classes and the model 3 without names; .* does not know 'ant'"):
        outputs_of(["ant", "cat"], model)


def test_a_thousand_classes_without_names_are_imagenets_for_its_ids(caplog: pytest.LogCaptureFixture) -> None:
    assert outputs_of(IMAGENETTE, [str(i) for i in range(1000)]) == AS_OUTPUTS
    assert "assuming ImageNet's" in caplog.text
    with pytest.raises(UserError, match="without names"):
        outputs_of(["tench", "church"], [str(i) for i in range(1000)])


@pytest.mark.parametrize(
    "data, model", [(["1", "2", "3"], ["0", "1", "2"]), (["ant", "cat", "dog"], ["2019", "2020", "2021"])]
)
def test_numbers_that_the_model_lacks(data: Sequence[str], model: Sequence[str]) -> None:
    with pytest.raises(UserError, match="does not know"):
        outputs_of(data, model)
