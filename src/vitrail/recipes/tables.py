"""Several labels per image, or numbers, from a table: trained from scratch, or from pretrained weights."""

from __future__ import annotations

from dataclasses import replace

from vitrail.data.augment import Augment
from vitrail.recipes.finetune import finetune
from vitrail.recipes.folder import folder
from vitrail.tasks.regress import Regression
from vitrail.tasks.tag import Tagging
from vitrail.train.run import Run

STILL = Augment(crop="shift", shift=8)
"""augmentation that keeps what a number may be about: a flip turns angles, a crop changes sizes, colours brightness"""


def tag(images: int) -> Run:
    """Any number of labels per image, from a table with the columns image and label. Otherwise as the recipe `folder`.

    Command: vitrail train tag --data tags.csv [--init classify]
    With --init it is the recipe `finetune-tag`, which chooses a method by the size of the data.
    """
    return replace(folder(images), recipe="tag", task=Tagging())


def finetune_tag(images: int) -> Run:
    """Fine-tune pretrained weights to give an image any number of labels. Otherwise as the recipe `finetune`.

    Command: vitrail train finetune-tag --data tags.csv [--init SOURCE] [--method lora]
    With few images the head alone is trained (`frozen`), since no method solves for several labels at once.
    """
    return replace(finetune(images), recipe="finetune-tag", task=Tagging())


def regress(images: int) -> Run:
    """Numbers, such as an age, from a table with the column image and columns of numbers. Otherwise as `folder`.

    Command: vitrail train regress --data ages.csv [--values age height] [--init classify]
    With --init it is the recipe `finetune-regress`. Images are only shifted, by up to 8 pixels. If a mirror image has
    the same numbers, add --flip; if sizes do not matter, add --crop resized.
    """
    return replace(folder(images), recipe="regress", task=Regression(), augment=STILL)


def finetune_regress(images: int) -> Run:
    """Fine-tune pretrained weights to predict numbers. Otherwise as `finetune`; augmentation as in `regress`.

    Command: vitrail train finetune-regress --data ages.csv [--values age height] [--init SOURCE] [--method lora]
    """
    return replace(finetune(images), recipe="finetune-regress", task=Regression(), augment=STILL)
