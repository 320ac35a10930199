"""Published recipes for ImageNet, from their papers. None has been run to the end here: scores are theirs."""

from __future__ import annotations

from dataclasses import replace

from vitrail.data.augment import Augment
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.classify import Classification
from vitrail.train.optim import Optim
from vitrail.train.run import Run

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDAUGMENT = 30
"""big_vision's magnitude 10 of 10: rotation by 30 degrees, shear by 0.3, translation by 100 of 224 pixels, posterize to
4 bits. Differences: its list has Cutout and SolarizeAdd, and no identity; colour, contrast, brightness and sharpness
have the factor 1.9 there, 1.9 or 0.1 here; Solarize at this magnitude equals Invert here (which its list has as well)
and has no effect there"""


def vit_s16_90(images: int) -> Run:
    """ViT-S/16 in 90 epochs of *Better plain ViT baselines for ImageNet-1k* (arXiv 2205.01580), which reports 76.5 %.

    Command: vitrail train vit-s16-90 --data IMAGENET

    Average pooling, fixed 2-D sines, a tanh layer before the head, mixup 0.2, a batch of 1,024, 10,000 steps of
    warm-up, as big_vision's configs/vit_s16_i1k.py has it. Its weight decay of 1e-4 is independent of the learning
    rate; AdamW's is scaled by it, so here it is 0.1. Its RandAugment (2, 10) is about strength 30 here, see
    `RANDAUGMENT`.
    """
    epochs, batch = 90.0, 1024
    steps = max(1.0, epochs * images / batch)
    return Run(
        recipe="vit-s16-90",
        data="imagenet",
        model=replace(SIZES["S/16"], class_token=False, pool="average", positions="sine"),
        augment=Augment(
            crop="resized",
            scale=(0.05, 1.0),
            flip=True,
            policy="randaugment",
            policy_count=2,
            policy_strength=RANDAUGMENT,
            mixup=0.2,
        ),
        optim=Optim(lr=1e-3, weight_decay=0.1, warmup=min(0.5, 10_000 / steps), clip=1.0),
        epochs=epochs,
        batch_size=batch,
        task=Classification(hidden=384),
        crop_fraction=224 / 256,
        compile=True,
        workers=16,
    )


def augreg_s16(images: int) -> Run:
    """ViT-S/16 of *How to train your ViT?* (arXiv 2106.10270) with medium augmentation, on ImageNet-1k from scratch.

    Command: vitrail train augreg-s16 --data IMAGENET

    Class token, mixup 0.2, dropout and stochastic depth 0.1, weight decay 0.1 times the learning rate, 300 epochs, a
    batch of 4,096. The paper's RandAugment (2, 15) is 1.5 times as strong as (2, 10), where the scale here ends; see
    `RANDAUGMENT`.
    """
    epochs, batch = 300.0, 4096
    steps = max(1.0, epochs * images / batch)
    return Run(
        recipe="augreg-s16",
        data="imagenet",
        model=replace(SIZES["S/16"], dropout=0.1, drop_path=0.1),
        augment=Augment(
            crop="resized",
            scale=(0.05, 1.0),
            flip=True,
            policy="randaugment",
            policy_count=2,
            policy_strength=RANDAUGMENT,
            mixup=0.2,
        ),
        optim=Optim(lr=1e-3, weight_decay=0.1, warmup=min(0.5, 10_000 / steps), clip=1.0),
        epochs=epochs,
        batch_size=batch,
        accumulate=4,
        task=Classification(hidden=384),
        crop_fraction=224 / 256,
        compile=True,
        workers=16,
    )


def deit3_s16(images: int) -> Run:
    """ViT-S/16 of DeiT-III (arXiv 2204.07118), 400 epochs on ImageNet-1k; the paper reports 80.4 %.

    Command: vitrail train deit3-s16 --data IMAGENET

    Binary cross-entropy, three-augment, mixup 0.8 and cutmix 1, layer scale, a batch of 2,048. Two differences from the
    paper: AdamW instead of LAMB, with a learning rate for AdamW at this batch size, and no repeated augmentation.
    """
    return Run(
        recipe="deit3-s16",
        data="imagenet",
        model=config_for("S/16", layer_scale=1e-4, drop_path=0.05),
        augment=Augment(crop="resized", flip=True, policy="three", mixup=0.8, cutmix=1.0),
        optim=Optim(lr=2e-3, weight_decay=0.02, warmup=5 / 400, clip=1.0),
        epochs=400.0,
        batch_size=2048,
        accumulate=2,
        task=Classification(loss="sigmoid"),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        compile=True,
        workers=16,
    )


def finetune_b16_384(images: int) -> Run:
    """The paper's own fine-tuning (appendix B.1.1): SGD with momentum, batch size 512, no weight decay, 384 pixels.

    Command: vitrail train finetune-b16-384 --data IMAGENET --init CHECKPOINT --image-size 384 384
    """
    steps, batch = 20_000, 512
    return Run(
        recipe="finetune-b16-384",
        data="imagenet",
        model=replace(SIZES["B/16"], image_size=(384, 384)),
        augment=Augment(crop="resized", scale=(0.05, 1.0), flip=True),
        optim=Optim(optimizer="sgd", lr=0.03, weight_decay=0.0, warmup=500 / steps, clip=1.0),
        epochs=steps * batch / max(images, batch),
        batch_size=batch,
        accumulate=4,
        workers=16,
    )
