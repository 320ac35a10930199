"""Self-critical sequence training: train on CIDEr itself (arXiv 1612.00563)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail.data.text import END, PAD
from vitrail.errors import UserError
from vitrail.tasks.caption.cider import Cider, words
from vitrail.tasks.caption.decoders import Memory
from vitrail.tasks.caption.losses import log_probabilities
from vitrail.tasks.caption.search import generate
from vitrail.tasks.caption.settings import Decoding
from vitrail.tasks.values import Batch

if TYPE_CHECKING:
    from vitrail.tasks.caption.task import Caption

Reward = Callable[[Iterable[int], Iterable[str], Iterable[bool]], list[float]]
"""sample numbers of images, a caption of each and whether it is finished, to the captions' scores"""


def reward_of(captions: Sequence[Sequence[str]]) -> Reward:
    """CIDEr against the captions of the training images. UserError if it cannot distinguish captions."""
    if not any(words(text) for texts in captions for text in texts):
        raise UserError("no caption has a word of [a-z0-9'], which CIDEr counts: do not use self-critical training")
    cider = Cider(dict(enumerate(captions)), ends=True)
    if not any(cider.weights.values()):
        raise UserError(
            f"self-critical training rewards CIDEr, which weights words by their rarity among the {len(captions)} "
            "training images, but all have the same: add images, or do not use it"
        )
    return cider.rewards


def self_critical_loss(task: Caption, memory: Memory, batch: Batch) -> dict[str, Tensor]:
    """Reward a sampled caption by its score minus the mean of the image's other samples (arXiv 2003.09971).

    The samples depend only on the batch's `key` and the sample number, not on the rest of the batch.
    """
    assert task.reward is not None, "self-critical training needs a reward"
    samples, temperature = task.captioning.captions + 1, task.captioning.scst_temperature
    how = Decoding(
        beam=samples,
        sample=True,
        temperature=temperature,
        sampling_seed=int(batch["key"]),
        no_repeat_ngram_size=0,
        max_length=task.decoder.within_limit(task.option.max_length),
    )
    training = task.training
    task.eval()  # the decoder samples without dropout
    with torch.no_grad():
        state = task.decoder(memory=memory)
        chosen = generate(task.components()["step"], state, how, batch["sample"]).words
    # Autocast keeps the weights that it has cast. Until torch 2.10 these have no gradient, and would be used below too.
    torch.clear_autocast_cache()
    task.train(training)
    texts = [task.tokenizer.decode(row) for row in chosen.flatten(0, 1).tolist()]
    keys = batch["sample"].repeat_interleave(samples).tolist()
    ended = (chosen == END).any(dim=2).flatten().tolist()
    rewards = torch.tensor(task.reward(keys, texts, ended), device=chosen.device).float().view(-1, samples)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (samples - 1)
    count = (chosen != PAD).sum()
    loss = -((rewards - others)[..., None] * log_probabilities(task.decoder, memory, chosen, temperature)).sum()
    return {"loss": task.captioning.self_critical * loss, "count": count, "reward": rewards.mean() * count}
