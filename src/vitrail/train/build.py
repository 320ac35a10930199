"""From a run's plain values to its parts: the task, and a loader for each part of the data."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from vitrail import zoo
from vitrail.data.augment import Augment
from vitrail.data.captions import open_captions
from vitrail.data.decode import Preprocess
from vitrail.data.groups import check_splits
from vitrail.data.loader import Loader, Tally
from vitrail.data.random import seed_for
from vitrail.data.sets import ImageSet, Splits, open_data, split_val
from vitrail.data.targets import Texts
from vitrail.data.text import Tokenizer
from vitrail.errors import UserError
from vitrail.tasks.caption import Caption, Captioning, numbered
from vitrail.tasks.caption_scores import Cider, check_scorers, words
from vitrail.tasks.classify import Classification, Classify
from vitrail.tasks.encoder import Encoder, encoder_for
from vitrail.tasks.knn import KNN
from vitrail.tasks.prefix import PrefixCaption, Prefixed
from vitrail.tasks.task import Task
from vitrail.train.loop import Components
from vitrail.train.optim import Optim
from vitrail.train.run import Run, TaskConfig, changed_fields
from vitrail.train.tune import FROZEN, tune
from vitrail.variants.mimetic import mimetic_init
from vitrail.vit import ViTConfig
from vitrail.zoo import captioners

log = logging.getLogger("vitrail")

VAL_FRACTION = 0.1
"""of the training part, where a set brings no validation part"""


def build(run: Run, splits: Splits, device: torch.device) -> tuple[Components, int]:
    """The parts of a run, and its number of steps."""
    train, val = (splits.train, splits.val) if splits.val else split_val(splits.train, VAL_FRACTION, run.group)
    if run.tune.frozen and isinstance(run.task, Classification):
        refuse_unused(run.task, run.tune.method)
    if not isinstance(run.task, Classification) and (run.augment.mixup or run.augment.cutmix):
        raise UserError("mixup and cutmix mix the labels of classes, and captions have none: leave them out")
    # A validation split that was cut from the training split shares its limit of bad images.
    tally = Tally(len(splits.train))
    val_tally = Tally(len(val)) if splits.val else tally
    test_tally = Tally(len(splits.test)) if splits.test else None
    train, val = train.spread(run.images), val.spread(run.images)
    test = splits.test.spread(run.images) if splits.test else None
    seed = seed_for(run.seed, -1)
    torch.manual_seed(seed)
    task = start(run, train)
    if run.init is not None:
        zoo.check_filled(task, run.init, seed)
        tune(task, run.tune)
    elif run.tune.method != "full":
        raise UserError(f"method {run.tune.method} adapts trained weights: name some with --init")
    task.to(device)
    loader = Loader(
        train,
        task.preprocess,
        batch_size=min(run.batch_size, len(train)),
        seed=run.seed,
        train=not run.tune.frozen,
        target=numbered_target(task, train) if isinstance(task, Caption) else None,
        augment=run.augment,
        device=device,
        workers=run.workers,
        memory=run.memory,
        balanced=isinstance(run.task, Classification) and run.task.balanced,
        max_bad=run.max_bad,
        tally=tally,
    )
    others = [
        evaluation_loader(task, part, device, run.workers, run.seed, run.max_bad, shared) if part else None
        for part, shared in ((val, val_tally), (test, test_tally))
    ]
    assert others[0] is not None
    return Components(task, loader, others[0], others[1]), run.steps(loader.steps_per_epoch)


def refuse_unused(task: Classification, method: str) -> None:
    """Refuse what a head that is solved for, or that remembers, makes no use of."""
    plain = Classification(smoothing=task.smoothing, balanced=task.balanced)  # the recipe's, for the other methods
    for entry in fields(plain):
        if getattr(task, entry.name) != getattr(plain, entry.name):
            raise UserError(f"method {method} makes no use of --{entry.name}: leave it out, or choose another --method")


IDLE = frozenset(
    [
        *(
            "epochs",
            "max_steps",
            "accumulate",
            "early_size",
            "early",
            "eval_every",
            "compile",
            "smoothing",
            "balanced",
            "drop_path",
        ),
        *("captions", "word_dropout", "contrastive", "bag_of_words", "self_critical", "scst_temperature"),
        *(entry.name for config in (Optim, Augment) for entry in fields(config)),
    ]
)
"""options that a frozen encoder makes no use of, which reads each image once, as it is"""


def warn_unused(recipe: Run, asked: Run, method: str) -> None:
    """Name what `asked` sets otherwise than the recipe, and what the method, which may follow the data, passes over."""
    used = {"lora": {"lora_rank", "lora_alpha"}, "last-blocks": {"last_blocks"}}
    idle = {name for other, names in used.items() if other != method for name in names}
    idle |= IDLE if method in FROZEN else set()
    names = [f"--{name.replace('_', '-')}" for name in changed_fields(recipe, asked) if name in idle]
    if names:
        log.warning("method %s makes no use of %s", method, ", ".join(names))


def open_for(task: TaskConfig, data: str | Path, name: str | None = None, group: str | None = None) -> Splits:
    """The splits of a set, as the task needs them; no `group` may lie in two of them."""
    if isinstance(task, Captioning | Prefixed):
        splits: Splits = open_captions(data, group=group)
    else:
        splits = open_data(data, name=name, grouped=group is not None)
    if group is not None:
        check_splits(splits, group)
    return splits


def evaluation_loader(
    task: Task,
    part: ImageSet,
    device: torch.device,
    workers: int = 0,
    seed: int = 0,
    max_bad: float = 0.01,
    tally: Tally | None = None,
) -> Loader:
    """A loader that reads a part once, in order, as the task prepares images; `tally` as in `Loader`."""
    return Loader(
        part,
        task.preprocess,
        batch_size=256,
        seed=seed,
        train=False,
        device=device,
        workers=workers,
        max_bad=max_bad,
        tally=tally,
    )


def start(run: Run, train: ImageSet) -> Task:
    """A fresh task, or one from the weights that `run.init` names, for the classes or captions of `train`."""
    if not isinstance(run.task, Classification):
        return captioner(run, train)
    if run.init is not None:
        loaded = zoo.load(run.init, channels=run.model.channels, image_size=run.model.image_size)
        task = zoo.change_classes(loaded, train.classes, run.task.loss)
        if isinstance(run.model, ViTConfig):
            zoo.change_drop_path(task, run.model.drop_path)
        task.preprocess = changed_preparation(run, task.preprocess)
        assert isinstance(task, Classify)
        if run.tune.method == "knn":
            task = KNN(task.encoder, task.classes, task.preprocess, len(train))
        elif isinstance(task, KNN):
            task = Classify(task.encoder, task.classes, task.preprocess, loss=run.task.loss)
        if run.task.hidden not in (None, task.hidden):
            task = Classify(task.encoder, task.classes, task.preprocess, hidden=run.task.hidden, loss=run.task.loss)
        task.loss_kind, task.smoothing = run.task.loss, run.task.smoothing
        task.class_weights = _class_weights(run.task, train)
        return task
    return Classify(
        fresh_encoder(run),
        train.classes,
        preparation(run),
        hidden=run.task.hidden,
        loss=run.task.loss,
        smoothing=run.task.smoothing,
        class_weights=_class_weights(run.task, train),
    )


def fresh_encoder(run: Run) -> Encoder:
    """The run's encoder with its first values."""
    encoder = encoder_for(run.model)
    if run.attention_init == "mimetic":
        mimetic_init(encoder)
    return encoder


def continues_from(config: TaskConfig, weights: Task) -> bool:
    """Whether a run takes the whole captioner `weights`, and not its encoder alone."""
    if isinstance(config, Classification):
        return False
    return isinstance(weights, PrefixCaption if isinstance(config, Prefixed) else Caption)


def check_start(run: Run, weights: Task | None) -> None:
    """Refuse to begin from a captioner that lacks what the run builds upon, or from none."""
    config = run.task
    assert isinstance(config, Captioning | Prefixed)
    whole = weights if isinstance(weights, Caption) and continues_from(config, weights) else None
    if config.self_critical and whole is None:
        raise UserError("self-critical training goes on from a captioner: name one with --init")
    if run.tune.method == "knn" and not hasattr(whole, "match"):
        raise UserError(
            "method knn remembers images by what they match: with --init name a captioner that has learned to "
            "match, as with caption-match"
        )
    matches = isinstance(config, Captioning) and config.contrastive and not config.self_critical
    if matches and whole is not None and not whole.captioning.text_depth:
        raise UserError(
            "matching needs blocks that read words alone, which this captioner lacks: go on from one of caption-match"
        )


def captioner(run: Run, train: ImageSet) -> Caption:
    """A captioner whose vocabulary comes from `train`, or one to go on with.

    `run.init` may name a captioner, which keeps its decoder and vocabulary, or a model whose encoder is taken. The
    vocabulary of a language model is its own.
    """
    check_scorers()  # which are needed at the first evaluation
    train_captions = Texts.of(train).captions
    config = run.task
    assert isinstance(config, Captioning | Prefixed)
    if config.decoding.consensus and run.tune.method != "knn":
        raise UserError("consensus in decoding is for the recipe caption-rerank and its method knn: let it be 0")
    loaded = zoo.load(run.init, channels=run.model.channels, image_size=run.model.image_size) if run.init else None
    check_start(run, loaded)
    had_bag = hasattr(loaded, "bag")
    if loaded is not None and isinstance(run.model, ViTConfig):
        zoo.change_drop_path(loaded, run.model.drop_path)
    task: Caption
    if loaded is not None and continues_from(config, loaded):
        assert isinstance(loaded, Caption)
        task = loaded
        task.configure(config)
        task.preprocess = changed_preparation(run, task.preprocess)
    else:
        encoder = zoo.encoder_of(loaded) if loaded else fresh_encoder(run)
        prepared = changed_preparation(run, loaded.preprocess) if loaded else preparation(run)
        if isinstance(config, Prefixed):
            task = PrefixCaption(encoder, config, *captioners.language_model(config.language_model), prepared)
        else:
            texts = [caption for captions in train_captions for caption in captions]
            tokenizer = Tokenizer.train(texts, config.vocabulary, config.vocabulary_size, lower=config.lower)
            task = Caption(encoder, config, tokenizer, prepared)
    if config.self_critical:
        if not any(words(text) for texts in train_captions for text in texts):
            raise UserError(
                "no caption has a word of [a-z0-9'], which are what CIDEr rewards: leave self-critical training out"
            )
        cider = Cider(dict(enumerate(train_captions)), ends=True)
        if not any(cider.weights.values()):
            raise UserError(
                f"self-critical training rewards CIDEr, which weighs words by how few of the {len(train)} training "
                "images have them, and all have the same: add images, or leave it out"
            )
        task.reward = cider.rewards
    if isinstance(config, Captioning) and (loaded is None or not continues_from(config, loaded)):
        task.expect(numbers_of(task, train))
    elif isinstance(config, Captioning) and config.bag_of_words and not had_bag:
        task.bag.expect(numbers_of(task, train))
    return task


def numbers_of(task: Caption, train: ImageSet) -> Tensor:
    """The captions of a set in the numbers of the task's tokenizer, [N, K, T]."""
    return numbered(Texts.of(train).captions, task.tokenizer, task.captioning.most_words)


def numbered_target(task: Caption, train: ImageSet) -> Texts:
    """What a captioner learns from."""
    return Texts.of(train).numbered(numbers_of(task, train))


PREPARATION = ("mean", "std", "resize", "crop_fraction", "interpolation")
"""fields of a run that say how images are prepared; what is None is the checkpoint's, or `Preprocess`'s own"""


def preparation(run: Run) -> Preprocess:
    """How images are prepared for a model that starts from scratch."""
    return _prepared(run, Preprocess(size=run.model.image_size, channels=run.model.channels))


def changed_preparation(run: Run, own: Preprocess) -> Preprocess:
    """How a checkpoint prepares images, with what the run changes of it, which is said once."""
    new = _prepared(run, own)
    changed = [name for name in PREPARATION if getattr(new, name) != getattr(own, name)]
    if changed:
        log.warning(
            "%s as %s was not trained with: that costs accuracy at first",
            " and ".join(f"{name.replace('_', ' ')} {getattr(new, name)}" for name in changed),
            run.init,
        )
    return new


def _prepared(run: Run, own: Preprocess) -> Preprocess:
    wanted = {name: getattr(run, name) for name in PREPARATION}
    try:
        return replace(own, **{name: value for name, value in wanted.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{error}: change the option, or leave it out") from None


def _class_weights(config: Classification, train: ImageSet) -> Tensor | None:
    if not config.weighted:
        return None
    counts = torch.bincount(train.labels, minlength=len(train.classes)).clamp(min=1)
    return len(train.labels) / (len(train.classes) * counts.float())
