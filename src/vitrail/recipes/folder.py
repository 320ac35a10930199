"""Any folder of images with one folder per class."""

from __future__ import annotations

from vitrail.data.augment import Augment
from vitrail.tasks.classify import Classification
from vitrail.train.optim import Optim
from vitrail.train.run import Run
from vitrail.variants import VariantConfig


def folder(images: int) -> Run:
    """Any folder of images. Model size and number of epochs depend on the number of images.

    Command: vitrail train folder --data FOLDER [--init classify]
    With --init it is the recipe `finetune`, which chooses a method by the size of the data.
    Cost and score on ants and bees (243 images): results/folder.json
    """
    large = images >= 20_000
    model = VariantConfig(
        width=384 if large else 192,
        depth=12 if large else 6,
        heads=6,
        patch=16,
        image_size=(224, 224) if large else (128, 128),
        class_token=False,
        pool="average",
        stem=(32, 64, 128, 192),
        drop_path=0.1,
        qk_norm=True,  # as in `recipes/small.py`: Muon does not bound queries and keys
    )
    # Small data sets need many epochs, large ones few: about 20,000 images in total.
    epochs = min(100.0, max(10.0, 20_000 / max(images, 1)))
    return Run(
        recipe="folder",
        data="folder",
        model=model,
        attention_init="mimetic",
        augment=Augment(crop="resized", scale=(0.25, 1.0), flip=True, policy="three"),
        optim=Optim(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.05, beta2=0.98, warmup=0.1, clip=1.0),
        epochs=epochs,
        batch_size=32 if images < 2_000 else 128,
        task=Classification(smoothing=0.1, balanced=True),
        crop_fraction=0.9,
        eval_every=max(1.0, epochs / 10),
    )
