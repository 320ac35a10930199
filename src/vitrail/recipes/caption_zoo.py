"""Captioning with pretrained models: any encoder of the zoo, and any language model of the Hub.

They are the rows of docs/captioning.md with pretrained weights; docs/captioning_hub.md has details. They need a
network, so the scores below are those that papers report for similar models, each with its source.
"""

from __future__ import annotations

from vitrail.data.augment import Augment
from vitrail.tasks.caption import Captioning
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.train.tune import Tune

AUGMENT = Augment(crop="resized", scale=(0.5, 1.0), flip=True)


def caption_zoo(images: int) -> Run:
    """A pretrained encoder and a new Transformer decoder with cross-attention.

    Command: vitrail train caption-zoo --init facebook/dinov2-small --data flickr8k

    --init accepts any encoder that vitrail loads: DINOv2, CLIP or SigLIP by Hub id, a folder, or a run, also of a CNN
    or a ResNet of baselines/. The captioner keeps its preprocessing. The encoder is frozen. --method trains it, as in
    the recipe finetune: `--method lora`, `--method last-blocks`, or `--method full --lr 1e-4 --layer-decay 0.75`,
    because pretrained weights need a lower rate than a new decoder.

    Expected: on Flickr8k's test split, published captioners with a frozen encoder, trained on ImageNet's million
    images, have a BLEU-4 of 0.195 with soft attention and 0.213 with hard attention (arXiv 1502.03044, table 1).
    """
    return Run(
        recipe="caption-zoo",
        data="flickr8k",
        init="facebook/dinov2-small",
        task=Captioning(decoder_dropout=0.2, word_dropout=0.1),
        tune=Tune(method="frozen"),
        augment=AUGMENT,
        optim=Optim(lr=5e-4, weight_decay=0.05, beta2=0.98, clip=1.0, ema=0.998),
        epochs=12,
        batch_size=64,
        eval_every=2,
    )


def caption_prefix(images: int) -> Run:
    """A pretrained encoder and a pretrained language model, joined by a learned prefix (ClipCap, arXiv 2111.09734).

    Command: vitrail train caption-prefix --init openai/clip-vit-base-patch32 --data flickr8k

    --language-model names another model than GPT-2, by Hub id or folder; its own tokenizer comes with it. Encoder and
    language model are frozen, and a Transformer between them is trained. With `--join mlp --tune-language` an MLP and
    the language model are trained. These are the two ways of the paper (sections 3.2 and 3.3). With `--join projection`
    the language model reads every patch, and `vitrail explain` draws its attention for each word. The learning rate is
    higher than the paper's 2e-5, which suits a trained language model (add `--lr 2e-5` then).

    Expected: CLIP with a tuned GPT-2 has a BLEU-4 of 0.257 and a ROUGE-L of 0.569 on Flickr8k
    (doi 10.1007/978-3-031-67357-3_14). On COCO's Karpathy split the paper has CIDEr 1.131 and BLEU-4 0.335 with the
    language model frozen, 1.084 and 0.322 with it tuned (table 1).
    """
    return Run(
        recipe="caption-prefix",
        data="flickr8k",
        init="openai/clip-vit-base-patch32",
        task=Captioning(decoder="language_model", most_words=40, smoothing=0.0, lower=False),
        tune=Tune(method="frozen"),
        augment=AUGMENT,
        optim=Optim(lr=2e-4, weight_decay=0.01, beta2=0.98, warmup=0.1, clip=1.0),
        epochs=10,
        batch_size=40,
        eval_every=1,
    )
