"""Published recipes for ImageNet, as their training code has them; docs/recipes.md lists what differs.

None has been run to the end here: scores are those of the papers.
"""

from __future__ import annotations

from dataclasses import replace

from vitrail.data.augment import Augment
from vitrail.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from vitrail.sizes import SIZES, config_for
from vitrail.tasks.classify import Classification
from vitrail.train.optim import Optim
from vitrail.train.run import Run


def _steps(epochs: float, images: int, batch: int) -> int:
    """The steps of a run, as `Run.steps` counts them."""
    return max(1, round(epochs * max(1, images // batch)))


def _warmup(steps: int, total: int) -> float:
    """So many steps of warm-up as a fraction of all; at most half of a short run."""
    return min(0.5, steps / total)


def _big_vision_augment(level: int, mixup: float) -> Augment:
    """TensorFlow's random crop, flips, RandAugment (2, level) and mixup."""
    return Augment(
        crop="inception",
        scale=(0.05, 1.0),
        flip=True,
        policy="big-vision",
        policy_count=2,
        policy_strength=level,
        mixup=mixup,
    )


def _big_vision_optim(steps: int) -> Optim:
    """Adam with a weight decay of 1e-4 that is independent of the rate: AdamW's is scaled by it, so here it is 0.1."""
    return Optim(lr=1e-3, weight_decay=0.1, warmup=_warmup(10_000, steps), warmup_start=0.0, clip=1.0)


def vit_s16_90(images: int) -> Run:
    """ViT-S/16 in 90 epochs of *Better plain ViT baselines for ImageNet-1k* (arXiv 2205.01580), which reports 76.5 %.

    Command: vitrail train vit-s16-90 --data IMAGENET

    big_vision's configs/vit_s16_i1k.py: average pooling, fixed 2-D sines, a tanh layer before the head, mixup 0.2,
    RandAugment (2, 10), a batch of 1,024, 10,000 steps of warm-up.
    """
    epochs, batch = 90.0, 1024
    return Run(
        recipe="vit-s16-90",
        data="imagenet",
        model=config_for("S/16", class_token=False, pool="average", positions="sine", activation="gelu_tanh"),
        weights_init="big-vision",
        augment=_big_vision_augment(level=10, mixup=0.2),
        optim=_big_vision_optim(_steps(epochs, images, batch)),
        epochs=epochs,
        batch_size=batch,
        task=Classification(hidden=384),
        crop_fraction=224 / 256,
        interpolation="bilinear",
        compile=True,
        workers=16,
    )


def augreg_s16(images: int) -> Run:
    """ViT-S/16 of *How to train your ViT?* (arXiv 2106.10270) with medium augmentation, on ImageNet-1k from scratch.

    Command: vitrail train augreg-s16 --data IMAGENET

    big_vision's configs/vit_i1k.py for S/16 (its "medium2"): class token, mixup 0.5, RandAugment (2, 15), no dropout
    and no stochastic depth, weight decay 0.1 times the learning rate, 300 epochs, a batch of 4,096.
    """
    epochs, batch = 300.0, 4096
    return Run(
        recipe="augreg-s16",
        data="imagenet",
        model=config_for("S/16", activation="gelu_tanh", prefix_positions="none"),
        weights_init="big-vision",
        augment=_big_vision_augment(level=15, mixup=0.5),
        optim=_big_vision_optim(_steps(epochs, images, batch)),
        epochs=epochs,
        batch_size=batch,
        accumulate=4,
        task=Classification(hidden=384),
        crop_fraction=224 / 256,
        interpolation="bilinear",
        compile=True,
        workers=16,
    )


def deit3_s16(images: int) -> Run:
    """ViT-S/16 of DeiT-III (arXiv 2204.07118), 400 epochs on ImageNet-1k; the paper reports 80.4 %.

    Command: vitrail train deit3-s16 --data IMAGENET

    The command of its README_revenge.md, there for 800 epochs (81.4 %): LAMB, binary cross-entropy, three-augment,
    repeated augmentation, mixup 0.8 and cutmix 1, layer scale, a batch of 2,048. The clipping is LAMB's own.
    """
    lr, epochs = 4e-3, 400.0
    return Run(
        recipe="deit3-s16",
        data="imagenet",
        model=config_for("S/16", layer_scale=1e-4, drop_path=0.05, prefix_positions="none"),
        weights_init="deit",
        augment=Augment(crop="resized", flip=True, policy="three", mixup=0.8, cutmix=1.0, repeats=3),
        optim=Optim(
            optimizer="lamb",
            lr=lr,
            weight_decay=0.05,
            schedule="epochs",
            warmup=5 / epochs,
            warmup_start=1e-6 / lr,
            final=1e-5 / lr,
            clip=1.0,
        ),
        epochs=epochs,
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

    As google-research/vision_transformer has it: 20,000 steps, a cosine after 500 steps of warm-up from 0, clipping at
    1; evaluation squashes images to the input's size.
    """
    steps, batch = 20_000, 512
    return Run(
        recipe="finetune-b16-384",
        data="imagenet",
        model=replace(SIZES["B/16"], image_size=(384, 384)),
        augment=Augment(crop="inception", scale=(0.05, 1.0), flip=True),
        optim=Optim(optimizer="sgd", lr=0.03, weight_decay=0.0, warmup=_warmup(500, steps), warmup_start=0.0, clip=1.0),
        epochs=steps / max(1, images // batch),
        batch_size=batch,
        accumulate=4,
        resize="squash",
        crop_fraction=1.0,
        interpolation="bilinear",
        workers=16,
    )
