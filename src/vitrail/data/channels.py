"""How many channels the images of a set have, judged by a sample."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from vitrail.data.decode import BadImage, EncodedImage
from vitrail.data.pixels import Doubts

if TYPE_CHECKING:
    from vitrail.data.sets import ImageSet

log = logging.getLogger("vitrail")

SAMPLED = 16
"""images of a split that are sampled for its channels and the range of its values"""


def stored_channels(images: ImageSet) -> int:
    """The number of channels that all sampled images of a split can be read as: 1 if they are grey; 3 if none fits.

    Warns if the images look as if their values were stored in a way other than they are read.
    """
    if (streamed := images.streamed) is not None:  # others would have to be downloaded
        images = images.subset((streamed.block == streamed.block[0]).nonzero()[:, 0])
    counts: list[tuple[int, ...]] = []
    sources = []
    for i in torch.linspace(0, len(images) - 1, min(len(images), SAMPLED)).long().tolist():
        try:
            image = images.open(i)
            if isinstance(image, EncodedImage):
                counts.append(image.readable_as())
                sources.append(image.source)
        except BadImage:
            continue  # the loader logs it and leaves it out
    channels = next((count for count in counts[0] if all(count in other for other in counts)), 3) if counts else 3
    if channels not in (1, 3):  # then each band is a channel
        sources = [source._replace(masked="") for source in sources]
    if (found := Doubts(sources).text()) is not None:
        log.warning(f"{images.name}: {found}")
    return channels
