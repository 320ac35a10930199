"""Models by name, checkpoints in and out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.baselines import CNN, ResNet
from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError, warn_once
from vitrail.files import refuse_existing, refuse_url
from vitrail.recommended import BUNDLED, bundled
from vitrail.sizes import config_for
from vitrail.tasks import task_class
from vitrail.tasks.encoder import Encoder, encoder_for, encoder_of
from vitrail.tasks.exported import refuse
from vitrail.tasks.task import Task
from vitrail.variants import as_variant, resize, simplest
from vitrail.vit import ViT, ViTConfig
from vitrail.zoo import exports, hub
from vitrail.zoo.assemble import assemble, recognise, source_named, task_around
from vitrail.zoo.certificate import Certificate, certify
from vitrail.zoo.certificate import verify as compare
from vitrail.zoo.exports import is_export
from vitrail.zoo.filled import check_encoder

log = logging.getLogger("vitrail")

TARGETS = {"vitrail": "native", "timm": "timm", "hf": "huggingface", "google": "google"}
"""the formats that `convert` writes, and their modules"""


def create(
    size: str | ViTConfig,
    classes: int | Sequence[str] | None = None,
    *,
    hidden: int | None = None,
    preprocess: Preprocess | None = None,
    **changes: Any,
) -> Task:
    """A new model: `create("S/16", classes=5, channels=4, image_size=(96, 128))`.

    `size` names one of `vitrail.sizes.SIZES`; `changes` are fields of `ViTConfig` or `VariantConfig`. `classes` is a
    number or the names; without it the model is an encoder that gives pooled vectors [B, D]. `hidden` is the width of
    the paper's pre-training head.
    """
    config = config_for(size, **changes)
    encoder = encoder_for(config)
    if preprocess is None:
        half = (0.5,) * config.channels
        preprocess = Preprocess(size=config.image_size, mean=half, std=half, channels=config.channels)
    return task_around(encoder, preprocess, None if classes is None else _names(classes), hidden=hidden)


def load(
    source: str | Path,
    classes: int | Sequence[str] | None = None,
    channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    task: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    verify: bool = False,
    merge: int | Sequence[int] | None = None,
) -> Task:
    """The model of a run folder, a checkpoint in any layout, an export, bundled weights or a Hub id; in eval mode.

    Another number of `classes` gets a new head (0: no head, pooled vectors); another number of `channels` adapts the
    patch filters; another `image_size`, a number or (height, width), interpolates the positions. `task="embed"` drops
    the head. Weights are float32 by default (`dtype`). `revision` is a branch, tag or commit on the Hub. `verify` logs
    the certificate, with the differences from the source library's own model where it is installed. `merge` is how many
    patch tokens merge in each block (one number, or one per block; 0 for none): faster, and less accurate.
    """
    wanted = None if task is None else task_class(task)
    if wanted is not None and wanted.headless and classes:
        raise UserError(f"task={task!r} has no head for {classes} classes: give one of the two")
    headless = classes == 0 or (wanted is not None and wanted.headless)
    if is_export(path := find(source, revision)):
        if verify or any(change is not None for change in (classes, channels, image_size, dtype, merge)):
            raise UserError(f"{source} is an export, which cannot be changed: load the checkpoint it was made from")
        return _as_task(exports.read(path, device), source, task)
    model, certificate = _certified(source, path, dtype, verify)
    notes = certificate.notes
    if channels not in (None, model.preprocess.channels):
        notes.append(f"the first filters adapted from {model.preprocess.channels} to {channels} channels")
        change_channels(model, channels)
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size != model.preprocess.size:
            notes.append("positions interpolated from {}x{} pixels to {}x{}".format(*model.preprocess.size, *size))
        change_size(model, size)
    if merge is not None:
        change_merge(model, merge)
    if headless:
        notes.append("the head dropped")
        model = model.with_classes([])
    elif classes is not None and classes != len(model.classes):
        changed = model.with_classes(_names(classes))
        if changed is not model:
            notes.append(f"a new head for {len(changed.classes)} classes")
        model = changed
    if verify:
        for line in certificate.as_text().splitlines():
            log.warning(line.rstrip())
    return _as_task(model, source, task).to(device=device, dtype=dtype).eval()


def _as_task(model: Task, source: str | Path, task: str | None) -> Task:
    """The model, if it has the requested task."""
    if task not in (None, model.name):
        head = "; classes=N gives it a new head for N classes" * (model.portable is not None)
        raise UserError(f"{source} has the task {model.name} and cannot be loaded as {task}{head}")
    return model


def load_certified(
    source: str | Path, dtype: torch.dtype | None = None, revision: str | None = None, verify: bool = False
) -> tuple[Task, Certificate]:
    """The model without changes, and the certificate of its weights."""
    if is_export(path := find(source, revision)):
        refuse(source)
    return _certified(source, path, dtype, verify)


def _certified(source: str | Path, path: Path, dtype: torch.dtype | None, verify: bool) -> tuple[Task, Certificate]:
    """The same for a source that was found at a path: what a Hub id means may change at any time."""
    files, module, found = recognise(path)
    for note in found.notes:
        warn_once(f"{source}: {note}")
    model = assemble(files, found, dtype)
    certificate = certify(files, found, model)
    if verify:
        compare(certificate, files, module, model)
    return model, certificate


def find(source: str | Path, revision: str | None = None) -> Path:
    """The file or folder of a source. An existing path has priority over a bundled name, a name over a Hub id.

    timm's notation for sources works too: `hf-hub:OWNER/NAME` and `local-dir:FOLDER`.
    """
    refuse_url(str(source))
    scheme, _, rest = str(source).partition(":")
    if scheme in ("hf-hub", "hf_hub") and not Path(source).exists():
        if not hub.is_id(rest, beside_folders=True):
            raise UserError(f"{source} does not name a model of the Hub: write hf-hub:OWNER/NAME")
        return hub.fetch(rest, revision)
    if scheme == "local-dir" and not Path(source).exists():
        source = rest
    path = Path(source)
    if revision is not None and (path.exists() or str(source) in bundled()):
        raise UserError(f"{source} is not a Hub id, so revision {revision!r} does not apply: remove the revision")
    for folder in (path, path / "best", path / "last"):
        if (folder / "config.json").is_file():
            return folder
    if path.exists():
        return path
    names = bundled()
    if str(source) in names:
        return BUNDLED / str(source)
    if isinstance(source, str) and hub.is_id(source):
        return hub.fetch(source, revision)
    from vitrail.zoo.timm.arguments import table as timm_architectures  # slow to import, so only for a wrong name

    if str(source).removeprefix("timm/").partition(".")[0] in timm_architectures():
        raise UserError(
            f"no model {str(source)!r} here, and timm's architecture names are not weights: on the Hub those are "
            "timm/NAME.TAG, such as timm/vit_base_patch16_224.augreg_in21k"
        )
    near = get_close_matches(str(source), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give a file or folder, a Hub id, or one of {', '.join(names)}"
    raise UserError(f"no model {str(source)!r}: {hint}")


def convert(
    source: str | Path, out: str | Path, to: str = "vitrail", revision: str | None = None, verify: bool = False
) -> Certificate:
    """Write the model of `source` to the folder or file `out` in a library's own layout, and return its certificate.

    With `verify`, the output is read back: its weights must be bit-identical, and its outputs are compared with the
    target library's own model if that is installed.
    """
    if to not in TARGETS:
        raise UserError(f"no format {to!r}: choose from {', '.join(TARGETS)}")
    out = Path(out)
    refuse_existing(out)
    task, certificate = load_certified(source, revision=revision, verify=verify)
    if to != "vitrail" and task.portable is None:
        raise UserError(
            f"{to} cannot store this model of the task {task.name!r}: its checkpoints hold encoders, "
            "alone or with a linear head"
        )
    if to != "vitrail" and task.preprocess.resize == "letterbox":
        raise UserError(
            f"{to} cannot store that this model's images are letterboxed: convert it to vitrail's own format"
        )
    writer: Any = source_named(TARGETS[to])
    writer.write(task, out)
    if verify:
        certificate.written = _read_again(task, out, task.state_dict() if to == "vitrail" else task.portable_state())
    return certificate


def _read_again(task: Task, out: Path, weights: Mapping[str, Tensor]) -> Certificate:
    """The certificate of the checkpoint that was written of `task`, which has these `weights` bit for bit."""
    files, module, found = recognise(find(out))
    again = assemble(files, found)
    there = again.state_dict()
    wrong = [name for name, value in weights.items() if name not in there or not there[name].equal(value)]
    if wrong:
        raise UserError(f"{out} does not read back to the same {wrong[0]}: do not use it, and please report this model")
    certificate = certify(files, found, again)
    compare(certificate, files, module, again)
    return certificate


def change_channels(task: Task, channels: int) -> None:
    """Adapt the first filters to another number of channels: repeated in turn, scaled to keep their sums."""
    encoder = encoder_of(task)
    old = encoder.config.channels
    if channels == old:
        return
    seeing = encoder.patches if isinstance(encoder, ViT) else encoder
    first = next((module for module in seeing.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise UserError(
            f"the {type(encoder).__name__} of task {task.name} works only with {old} channels: train a new one"
        )
    places = torch.arange(channels) % old
    # For one channel the filters are summed: a grey image gives the same result as with its channel repeated.
    weight = first.weight.sum(1, keepdim=True) if channels == 1 else first.weight[:, places] * old / channels
    first.weight = nn.Parameter(weight.detach().clone())
    first.in_channels = channels
    encoder.config = replace(encoder.config, channels=channels)
    preprocess = task.preprocess
    mean, std = ([statistics[i % old] for i in range(channels)] for statistics in (preprocess.mean, preprocess.std))
    if channels == 1:
        mean, std = [math.fsum(preprocess.mean) / old], [math.fsum(preprocess.std) / old]
    task.preprocess = replace(preprocess, channels=channels, mean=tuple(mean), std=tuple(std))


def change_size(task: Task, size: tuple[int, int]) -> None:
    """Interpolate learned positions for images of `size` (height, width), and set the preprocessing to it."""
    encoder = encoder_of(task)
    if isinstance(encoder, ViT):
        resize(encoder, size)
    elif isinstance(encoder, CNN | ResNet):  # these work with any size
        encoder.config = replace(encoder.config, image_size=size)
    elif size != encoder.config.image_size:
        fixed = "x".join(map(str, encoder.config.image_size))
        raise UserError(
            f"the {type(encoder).__name__} of task {task.name} works only with images of {fixed}: keep this size"
        )
    task.preprocess = replace(task.preprocess, size=size)


def change_merge(task: Task, merge: int | Sequence[int]) -> None:
    """Merge so many patch tokens in each block (`VariantConfig.merge`). It involves no weights."""
    encoder = encoder_of(task)
    if not isinstance(encoder, ViT):
        raise UserError(f"the {type(encoder).__name__} of task {task.name} has no tokens that merge: leave out merge")
    config = as_variant(encoder.config)
    changed = replace(config, merge=(merge,) if isinstance(merge, int) else tuple(merge))
    if changed == config:
        return
    with torch.device("meta"):
        task.encoder = encoder_for(simplest(changed))
    task.encoder.load_state_dict(encoder.state_dict(keep_vars=True), assign=True)


def change_drop_path(task: Task, drop_path: float) -> None:
    """Change the stochastic depth rate. It involves no weights."""
    encoder = encoder_of(task)
    if isinstance(encoder, ViT):
        encoder.config = replace(encoder.config, drop_path=drop_path)


def check_filled(task: Task, source: str, seed: int) -> None:
    """Refuse a task whose encoder still has random initial weights, although it starts from the weights of `source`.

    `seed` is the random seed with which the task was built.
    """
    encoder = task.encoder
    if not isinstance(encoder, Encoder):
        return
    config = encoder.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = encoder_for(config)

    def given() -> Mapping[str, Tensor]:
        return encoder_of(load(source, channels=config.channels, image_size=config.image_size)).state_dict()

    check_encoder(encoder, fresh, given, source)


def _names(classes: int | Sequence[str]) -> list[str]:
    if isinstance(classes, int):
        if classes < 1:
            raise UserError(f"a classifier needs at least one class, got {classes}")
        return [str(i) for i in range(classes)]
    return list(classes)
