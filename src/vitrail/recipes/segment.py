"""Semantic segmentation of images of any size."""

from __future__ import annotations

from dataclasses import replace

from vitrail.data.augment import Augment
from vitrail.tasks.segment import Segmentation
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.variants import VariantConfig


def segment(images: int) -> Run:
    """The class of every pixel, from a folder of images and masks, from scratch or from pretrained weights.

    Command: vitrail train segment --data camvid [--init caption] [--head mask-transformer]
    Training crops show about half of an image's side, at scales from 0.5 to 1.6. Rotary positions depend on offsets
    alone, so the whole image can be segmented at once though its grid is larger than that of the crops. Most blocks
    attend inside windows of 64 pixels, which halves the time of a step on a CPU. The dice loss counts rare classes as
    much as others.
    Cost and score on street scenes (367 images): results/camvid.json
    """
    return Run(
        recipe="segment",
        data="camvid",
        model=VariantConfig(
            width=192,
            depth=8,
            heads=4,
            patch=8,
            image_size=(192, 256),
            class_token=False,
            pool="average",
            positions="none",
            rotary="axial",
            rotary_temperature=100.0,
            window=8,
            global_blocks=(3, 6, 7),
            qk_norm=True,
            stem=(32, 64, 128),
            drop_path=0.1,
        ),
        task=Segmentation(head="linear", upscale=4, dice=1.0),
        augment=Augment(crop="jitter", jitter=(0.5, 1.6), flip=True),
        optim=Optim(optimizer="muon", lr=1e-3, muon_lr=6e-3, weight_decay=0.05, beta2=0.98, warmup=0.05, clip=1.0),
        resize="crop",
        crop_fraction=192 / 360,
        epochs=100,
        batch_size=8,
        eval_every=10,
    )


def segment_whole(images: int) -> Run:
    """Continues from `segment`: one pass over whole images in place of crops, with a fifth of the learning rate.

    Command: vitrail train segment-whole --data camvid --init segment
    `--init` is the run to continue, or as here the bundled weights. Crops never show the network as many patches as a
    whole image has. `--image-size` is the size of a whole image at the scale of the crops: for CamVid 360x480.
    Cost and score on street scenes: results/camvid.json
    """
    run = segment(images)
    return replace(
        run,
        recipe="segment-whole",
        model=replace(run.model, image_size=(360, 480)),
        augment=replace(run.augment, jitter=(0.8, 1.25)),
        optim=replace(run.optim, lr=run.optim.lr / 5, muon_lr=run.optim.muon_lr / 5),
        crop_fraction=1.0,
        epochs=1,
        batch_size=2,
        eval_every=1,
    )
