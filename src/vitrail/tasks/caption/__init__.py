"""Captioning: a task that outgrew one file. `task.py` has the task, `settings.py` what a recipe may set.

`decoders.py` write from scratch, `prefix.py` has a language model behind image tokens, and `hub.py` the captioners that
others trained. `search.py` writes with any of them, `scores.py` compares what they write with what people wrote.
"""

from vitrail.tasks.caption.answers import Captions
from vitrail.tasks.caption.settings import Captioning, Decoding
from vitrail.tasks.caption.task import Caption
from vitrail.tasks.caption.text import numbered

__all__ = ["Caption", "Captioning", "Captions", "Decoding", "numbered"]
