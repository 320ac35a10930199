"""The components of prediction: modules that export can write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vitrail.tasks.caption.consensus import Consensus
from vitrail.tasks.caption.decoders import Decoder, Memory, Step
from vitrail.tasks.caption.matching import Match, text_states
from vitrail.tasks.caption.settings import Decoding


class ReadImages(nn.Module):
    """The component `encoder`: normalised images [B, C, H, W] to their vectors [B, D] and the decoder's first state."""

    def __init__(self, network: Callable[[Tensor], Any], decoder: Decoder) -> None:
        """`network` maps images to the fields of a `Memory`."""
        super().__init__()
        self.network, self.decoder = network, decoder

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        memory = Memory(**self.network(images))
        return memory.pooled, self.decoder(memory=memory)


class NextWords(nn.Module):
    """The component `step`: next words [R], the rows of the state that they continue, and the state, to a `Step`.

    The state holds the cache of the words so far.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, words: Tensor, rows: Tensor | None, state: Any) -> Step:
        return self.decoder(words, rows=rows, state=state)


class Reranker(nn.Module):
    """The component `rerank`: scores of finished captions with match and consensus added, and what they are sure by."""

    def __init__(self, match: Match, decoder: Decoder, consensus: Consensus | None, how: Decoding) -> None:
        super().__init__()
        self.match, self.decoder, self.consensus, self.how = match, decoder, consensus, how

    def forward(self, pooled: Tensor, words: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images [B, D], captions [B, K, T] and their scores [B, K] to the arguments of `Generated.ranked`.

        These are the new scores [B, K], the logits of matching [B, K] and, with an index, the images' likeness [B].
        """
        texts = text_states(self.decoder, words.flatten(0, 1)).unflatten(0, scores.shape)
        logits = self.match(pooled[:, None], texts)[:, 0]
        return reranked(scores, words, logits, self.match(pooled), self.consensus, self.how)


def reranked(
    scores: Tensor, words: Tensor, logits: Tensor, vectors: Tensor, consensus: Consensus | None, how: Decoding
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `Reranker` returns, from the logits of matching [B, K] and the images' vectors [B, D] for the index."""
    if how.match:
        scores = scores + how.match * logits
    if consensus is None:
        return scores, logits, None
    if how.consensus:
        scores = scores + how.consensus * consensus(vectors, words, how.neighbours)
    return scores, logits, consensus.likeness(vectors)
