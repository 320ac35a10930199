"""Caption scores that need Java: Stanford's Penn Treebank tokenizer, and METEOR."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from vitrail.errors import RunError, UserError

Key = TypeVar("Key", bound=Hashable)

MISSING = "scores of captions need pycocoevalcap: pip install 'vitrail[caption]'"
JAVA_LIMIT = 600
"""timeout in seconds for Java per data set"""
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Treebank tokens that COCO's evaluation leaves out"""


def treebank(texts: Sequence[str]) -> list[str]:
    """Each text in Stanford's Penn Treebank tokens, lower case and without punctuation, as COCO's evaluation has it."""
    if not texts:
        return []
    jar = _jar("tokenizer/stanford-corenlp-3.4.1.jar")
    command = [*_java(), "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(f"{_one_line(text)}\n" for text in texts)
    try:
        done = subprocess.run(command, input=lines.encode(), capture_output=True, timeout=JAVA_LIMIT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise RunError(f"Java's tokenizer failed: {_reason(error)}") from None
    cut = done.stdout.decode("utf-8", "replace").removesuffix("\n").split("\n")
    if len(cut) != len(texts):
        raise RunError(f"Java's tokenizer gave {len(cut)} lines for {len(texts)}")
    return [" ".join(word for word in line.split() if word not in PUNCTUATION) for line in cut]


def meteor(*sets: tuple[Mapping[Key, str], Mapping[Key, Sequence[str]]]) -> list[float]:
    """METEOR 1.5 (Denkowski and Lavie 2014) of candidates and references, as in pycocoevalcap.

    Java loads a table of paraphrases for many seconds first, so several sets are scored in one run.
    """
    jar = _jar("meteor/meteor-1.5.jar")
    command = [*_java(), "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", bufsize=1
        )
        # Without a timeout, reading from a hanging Java process would block for ever.
        limit = threading.Timer(JAVA_LIMIT * len(sets), process.kill)
        limit.start()
        try:
            with process:
                return [_meteor_score(process, tokens, expected) for tokens, expected in sets]
        finally:
            limit.cancel()
    except (OSError, ValueError) as error:
        raise RunError(f"METEOR failed: {_reason(error)}") from None


def _meteor_score(
    process: subprocess.Popen[str], tokens: Mapping[Key, str], expected: Mapping[Key, Sequence[str]]
) -> float:
    """One set's score from a running METEOR."""
    assert process.stdin is not None and process.stdout is not None
    lines = process.stdout

    def answer() -> str:
        line = lines.readline()
        if not line:
            raise OSError(f"Java ended, or gave no answer within {JAVA_LIMIT} seconds")
        return line

    found = []
    for key, text in tokens.items():
        process.stdin.write(_meteor_line("SCORE", *expected[key], text))
        found.append(answer())
    process.stdin.write(_meteor_line("EVAL", *found))
    # The output is one line per image, then the overall score.
    return float([answer() for _ in range(len(found) + 1)][-1])


def _meteor_line(*fields: str) -> str:
    """A request: fields separated by `|||`, which no field may contain."""
    return " ||| ".join(_one_line(field.replace("|||", " ")) for field in fields) + "\n"


def _java() -> list[str]:
    java = shutil.which("java")
    if java is None:
        raise UserError("METEOR and Treebank tokens need Java: install a Java runtime, or do without them")
    # Before Java 18 the encoding follows the locale, which on servers is often ASCII.
    return [java, "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]


def _jar(name: str) -> Path:
    try:
        import pycocoevalcap.bleu.bleu
    except ImportError:
        raise UserError(MISSING) from None
    jar = Path(pycocoevalcap.bleu.bleu.__file__).parent.parent / name
    if not jar.is_file():
        raise UserError(f"pycocoevalcap came without {name}: install it again with pip install 'vitrail[caption]'")
    return jar


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _reason(error: Exception) -> str:
    stderr_bytes = getattr(error, "stderr", None) or b""
    return _one_line(stderr_bytes.decode("utf-8", "replace"))[-200:] or _one_line(str(error))
