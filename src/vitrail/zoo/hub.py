"""Checkpoints of the Hugging Face Hub, through huggingface_hub: its cache, its tokens, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

Only the files that a model needs are downloaded: its weights (safetensors first) and JSON files. If the Hub does not
answer within seconds, only the cache is used.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from vitrail.errors import UserError, first_line
from vitrail.hub_access import endpoint, refusal
from vitrail.zoo.files import ENDINGS, WEIGHTS, read_json

log = logging.getLogger("vitrail")

TEXTS = ("preprocessor_config.json", "generation_config.json")
WORDS = ("vocab_size", "text_config", "decoder")
"""config entries of models with text"""
OLD_TOKENIZERS = ("tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""files that replace `tokenizer.json` in older repositories"""


def is_id(source: str, beside_folders: bool = False) -> bool:
    """Whether `source` may name a repository: `owner/name` or `owner/name@revision`.

    A path that begins in the current folder does not, unless `beside_folders`.
    """
    name = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    fits = re.fullmatch(rf"{name}/{name}(@.+)?", source) is not None
    return fits and (beside_folders or not Path(source).parent.exists())


def fetch(source: str, revision: str | None = None) -> Path:
    """The path in the cache of a repository's files, downloaded if missing: a folder, or one file."""
    name, _, at = source.partition("@")
    repository = Repository(name, revision or at or "main")
    config = repository.get("config.json")
    for name in WEIGHTS:
        if weights := repository.get(name):
            break
        if weights := repository.get(f"{name}.index.json"):
            repository.get_shards(weights)
            break
    else:
        weights = repository.get_only_file()
        if config is None:
            return weights
    for name in TEXTS:
        repository.get(name)
    words = config is not None and read_json(config).keys() & set(WORDS)
    if words and repository.get("tokenizer.json") is None:
        for name in OLD_TOKENIZERS:
            repository.get(name)
    return weights.parent


class Repository:
    """A model on the Hub at one commit: the first file fixes it, so that a push in between cannot mix two versions."""

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self.endpoint = endpoint()
        self.away: Exception | None = None
        """why the Hub could not be reached; from then on only the cache is used"""
        self.reported = True
        """whether the user was told, or requested it"""
        self.ask()

    def ask(self) -> None:
        """Check whether the Hub answers, by one request of our own, because huggingface_hub may retry for minutes."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

        try:
            url = hf_hub_url(self.name, "config.json", revision=self.revision, endpoint=self.endpoint)
        except HFValidationError as error:
            raise self.refusal(error) from error
        if constants.HF_HUB_OFFLINE:
            self.away = OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
            return
        try:
            answer = get_session().head(url, headers=build_hf_headers(), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:  # the network libraries raise many types
            self.away, self.reported = error, False
            return
        code = answer.status_code
        if code in (408, 429) or code >= 500:  # for other codes, the download reports the error
            self.away, self.reported = ConnectionError(f"the Hub answers with {code}"), False

    def get(self, file: str) -> Path | None:
        """The path of a file in the cache. None if the repository does not have it."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        here = self.away is not None
        try:
            path = hf_hub_download(
                self.name, file, revision=self.revision, endpoint=self.endpoint, local_files_only=here
            )
        except LocalEntryNotFoundError as error:
            self.away = self.away or error
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise self.refusal(error) from error
        if not self.reported:
            log.warning("the Hub cannot be reached: %s comes from the cache", self.name)
            self.reported = True
        depth = len(Path(file).parts)
        self.revision = Path(path).parts[-depth - 1]
        return Path(path)

    def get_shards(self, index: Path) -> None:
        """The files that an index lists."""
        places = read_json(index).get("weight_map")
        for place in sorted({str(place) for place in places.values()} if isinstance(places, dict) else ()):
            if ".." in place or place.startswith("/") or self.get(place) is None:
                if self.away:
                    raise self.refusal(self.away)
                raise UserError(f"{self.name}: {index.name} names {place!r}, which is not in the repository")

    def get_only_file(self) -> Path:
        """The only checkpoint of a repository without the usual file names."""
        from huggingface_hub import HfApi, constants

        if self.away:
            raise self.refusal(self.away)
        patience = constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = HfApi(self.endpoint).model_info(self.name, revision=self.revision, timeout=patience)
        except Exception as error:
            raise self.refusal(error) from error
        names = [file.rfilename for file in info.siblings or ()]
        files = [name for name in names if name.endswith(ENDINGS) and "/" not in name]
        path = self.get(files[0]) if len(files) == 1 else None
        if path is None:
            what = f"{len(files)} checkpoints ({', '.join(files[:4])})" if files else "no weights that vitrail reads"
            raise UserError(f"{self.name} on the Hub holds {what}: download one file and give its path")
        return path

    def refusal(self, error: Exception) -> UserError:
        """One line for huggingface_hub's long errors."""
        from huggingface_hub import errors

        if (told := refusal(error, "model", self.name, self.revision)) is not None:
            there = isinstance(error, errors.GatedRepoError | errors.RevisionNotFoundError)
            return told if there else UserError(f"{self.name} is not a local file or folder, and {told}")
        if error is self.away or isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return UserError(
                f"{self.name} is not a local file or folder, and the Hub cannot be reached and it is not in the cache: "
                "check the path or the network, and HF_HUB_OFFLINE and HF_ENDPOINT where they are set"
            )
        return UserError(
            f"{self.name} could not be downloaded from the Hub ({first_line(error)[:160]}): try again later"
        )
