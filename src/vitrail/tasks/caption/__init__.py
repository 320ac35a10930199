"""Captioning. `task.py` has the task, `settings.py` the fields that a recipe may set.

`decoders.py` has decoders trained from scratch, `prefix.py` a language model with image tokens as its prefix, and
`hub.py` pretrained captioners of the Hub. `search.py` generates captions with any of them, and `scores.py` compares
captions with those of people.
"""

from typing import TYPE_CHECKING

from vitrail.tasks.caption.settings import Captioning, Decoding
from vitrail.tasks.lazy import lazy

if TYPE_CHECKING:
    from vitrail.tasks.caption.answers import Captions
    from vitrail.tasks.caption.task import Caption
    from vitrail.tasks.caption.text import numbered

__getattr__ = lazy(__name__, {"Caption": "task", "Captions": "answers", "numbered": "text"})

__all__ = ["Caption", "Captioning", "Captions", "Decoding", "numbered"]
