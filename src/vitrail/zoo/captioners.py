"""Models that are loaded through transformers: captioners of the Hub, and language models for captioning.

`vitrail.zoo.files` opens the files first and refuses anything that could run code. Nothing is read from the network
here: files of the Hub are in its cache by then. Our own checkpoints contain the config of such a model, so its task
builds it without the original folder or a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitrail.data.preprocess import Preprocess
from vitrail.errors import UserError, first_line
from vitrail.hf import CAPTIONERS, library, quiet
from vitrail.zoo.files import open_files
from vitrail.zoo.huggingface.kinds import CLIP, CROPPED, IMAGENET, KINDS, OPENAI, Kind
from vitrail.zoo.huggingface.processor import default_settings, preprocess, settings
from vitrail.zoo.source import Files, Found, Weight

if TYPE_CHECKING:  # any checkpoint asks here whether it is a captioner: the imports below wait until one is
    from vitrail.tasks.caption.hub import HubCaption
    from vitrail.tasks.caption.language import HFTokenizer, VocabMap

NAME = "transformers"

OTHER = Kind((CLIP,), ("",), {}, {**IMAGENET, "resample": 3})
"""preprocessing for an unknown encoder"""
IMAGES = {
    "blip": Kind((CLIP,), ("",), {}, {**OPENAI, "resample": 3}),
    "git": Kind((CLIP,), ("",), {}, {**OPENAI, **CROPPED}, square=False),
}
"""preprocessing for the two types with their own encoder"""
DEFAULT_LENGTH = 20
"""transformers' default maximum length, including the start token"""


def recognise(files: Files) -> bool:
    """Whether `config.json` names one of the types."""
    return files.json.get("config.json", {}).get("model_type") in CAPTIONERS


def read(files: Files) -> Found:
    """The captioner as transformers loads it."""
    text = files.json["config.json"]
    kind = text["model_type"]
    name = (text.get("architectures") or [CAPTIONERS[kind]])[0]
    if name != CAPTIONERS[kind]:
        raise UserError(f"{files.path} is a {name}, which does not generate captions: choose a {CAPTIONERS[kind]}")
    notes: list[str] = []
    prepared = _preprocess(files, kind, notes)
    return Found(
        source=f"Hugging Face {kind} ({name}), through transformers",
        encoder=None,
        classes=None,
        preprocess=prepared,
        weights={name: Weight((name,)) for name in files.weights},
        left={},
        notes=notes,
        ready=lambda: _load(_folder(files.path), kind, prepared),
    )


def reference(files: Files) -> Callable[[Tensor], dict[str, Tensor]] | None:
    """The image encoder of transformers' whole model on normalised images."""
    from vitrail.tasks.caption.hub import vision_tower

    model = _pretrained(getattr(library(), CAPTIONERS[files.json["config.json"]["model_type"]]), _folder(files.path))
    encoder = vision_tower(model)
    return lambda images: {"tokens": encoder(pixel_values=images).last_hidden_state}


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _preprocess(files: Files, kind: str, notes: list[str]) -> Preprocess:
    transformers = library()
    with _one_line(files.path):
        config = transformers.AutoConfig.from_pretrained(
            _folder(files.path), local_files_only=True, trust_remote_code=False
        )
    eyes = config.encoder if kind == "vision-encoder-decoder" else config.vision_config
    images = IMAGES.get(kind) or KINDS.get(eyes.model_type, OTHER)
    side = getattr(eyes, "image_size", 224)
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    found = settings(files.json)
    if found is None:
        notes.append("no preprocessor_config.json: using the preprocessing of published checkpoints of its type")
        found = default_settings(images, size)
    return preprocess(found, images, size, getattr(eyes, "num_channels", 3))


def _load(folder: Path, kind: str, prepared: Preprocess) -> HubCaption:
    """The model with its weights, its tokenizer, and its authors' decoding settings."""
    from vitrail.tasks.caption.hub import HubCaption
    from vitrail.tasks.caption.settings import Decoding

    maker = getattr(library(), CAPTIONERS[kind])
    model = _pretrained(maker, folder)
    writer = {"vision-encoder-decoder": "decoder", "blip": "text_decoder"}.get(kind)
    text = getattr(model, writer) if writer else model
    chosen = (text if kind == "blip" else model).generation_config
    start: tuple[Any, ...] = (chosen.bos_token_id, text.config.bos_token_id)
    if kind == "vision-encoder-decoder":
        start = (chosen.decoder_start_token_id, getattr(model.config, "decoder_start_token_id", None), *start)
    end: tuple[Any, ...] = (chosen.eos_token_id, text.config.eos_token_id)
    if kind == "blip":
        end = (text.config.sep_token_id,)
    vocabulary = _vocabulary(folder, text.config.vocab_size, start, end)
    tokenizer = _their_tokenizer(folder, vocabulary)
    max_length = min(_max_length(chosen), getattr(text.config, "max_position_embeddings", None) or 1024)
    how = Decoding(
        beam=chosen.num_beams or 1,
        length_penalty=1.0 if chosen.length_penalty is None else chosen.length_penalty,
        no_repeat_ngram_size=chosen.no_repeat_ngram_size or 0,
        max_length=max_length,
    )
    return HubCaption(model, vocabulary, tokenizer, prepared, how)


def _max_length(chosen: Any) -> int:
    """Maximum caption length, including the end token. transformers' length counts the start token, not the end."""
    return (chosen.max_new_tokens or (chosen.max_length or DEFAULT_LENGTH) - 1) + 1


def _vocabulary(folder: Path, size: int, start: tuple[Any, ...], end: tuple[Any, ...]) -> VocabMap:
    """The first given number for each; of several end tokens, the first."""
    from vitrail.tasks.caption.language import VocabMap

    firsts = [next((i for i in given if i is not None), None) for given in (start, end)]
    first, last = (i[0] if isinstance(i, list) else i for i in firsts)
    if last is None:
        raise UserError(f"{folder} has no eos_token_id, so captions would never end: choose another model")
    return VocabMap(size, last if first is None else first, last)


def _their_tokenizer(folder: Path, vocabulary: VocabMap) -> HFTokenizer:
    """The tokenizer of a folder of transformers'; UserError, with the folder, if it does not fit its model."""
    from vitrail.tasks.caption.language import HFTokenizer

    text = _tokenizer_text(folder)
    try:
        return HFTokenizer.from_text(text, vocabulary)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _tokenizer_text(folder: Path) -> str:
    """The content of `tokenizer.json`, converted if a folder has only the older files."""
    try:
        if (folder / "tokenizer.json").is_file():
            return (folder / "tokenizer.json").read_text(encoding="utf-8")
        with quiet():
            tokenizer = library().AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return tokenizer.backend_tokenizer.to_str()
    except UserError:
        raise
    except Exception as error:  # a missing file raises various errors there
        raise UserError(
            f"{folder} has no readable tokenizer ({first_line(error)[:100]}): it needs tokenizer.json"
        ) from error


def language_model(source: str) -> tuple[Any, VocabMap, HFTokenizer]:
    """A causal language model of transformers by Hub id or folder, its vocabulary and its tokenizer."""
    from vitrail.tasks.caption.prefix import PrefixDecoder
    from vitrail.zoo import find

    transformers = library()
    path = find(source)
    files = open_files(path)
    folder = _folder(path)
    kind = files.json.get("config.json", {}).get("model_type")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not isinstance(kind, str) or kind not in known or kind in CAPTIONERS:
        raise UserError(f"{source} is not a causal language model: choose one such as openai-community/gpt2")
    model = _pretrained(transformers.AutoModelForCausalLM, folder)
    config = model.config.get_text_config()
    start, end = (config.bos_token_id,), (config.eos_token_id,)
    vocabulary = _vocabulary(folder, config.vocab_size, start, end)
    PrefixDecoder.check(model, source)
    return model, vocabulary, _their_tokenizer(folder, vocabulary)


def _pretrained(maker: Any, folder: Path) -> Any:
    """A model with its weights in float32. A missing weight would be random, so it is an error."""
    with _one_line(folder), quiet():
        model, report = maker.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    lacks = sorted(map(str, report["missing_keys"])) or sorted(map(str, report["mismatched_keys"]))
    if lacks:
        raise UserError(f"{folder} lacks {lacks[0]}, or its shape contradicts the config: download it again")
    return model.float().eval()


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn transformers' errors, of many types and lines, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded by transformers ({first_line(error)[:160]}): choose another checkpoint, or "
            "upgrade transformers"
        ) from error
