"""`example.py` of an export: a short script without vitrail, of one text whose lines about engine and model differ."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from vitrail.zoo.exports import Meta
from vitrail.zoo.exports.engines import openvino_floats

TEXT = Path(__file__).parent / "example.txt"


class _Lines(NamedTuple):
    engine: str
    imports: str
    open: str
    """opens the file of a model with one program"""
    run: str
    """its outputs"""
    open_all: str
    """opens the files of a captioner, whose first program is `encoder`"""
    run_all: str
    """runs one of them on named arrays"""


ENGINES = {
    "pt2": _Lines(
        "PyTorch",
        ", torch, zipfile",
        """\
archive = zipfile.ZipFile(here / "{file}.pt2")
meta = json.loads(next(archive.read(name) for name in archive.namelist() if name.endswith("vitrail.json")))
program = torch.export.load(here / "{file}.pt2").module()""",
        "(found.detach().numpy() for found in program(torch.from_numpy(x)))",
        """\
archive = zipfile.ZipFile(here / "{file}.pt2")
meta = json.loads(next(archive.read(name) for name in archive.namelist() if name.endswith("vitrail.json")))
programs = {{"encoder": torch.export.load(here / "{file}.pt2").module()}}
programs["step"] = torch.export.load(here / "step.pt2").module()""",
        """\
    found = programs[name](*(torch.from_numpy(given[key]) for key in meta["programs"][name]["inputs"]))
    return dict(zip(meta["programs"][name]["outputs"], [tensor.detach().numpy() for tensor in found]))""",
    ),
    "onnx": _Lines(
        "ONNX Runtime",
        ", onnxruntime",
        """\
session = onnxruntime.InferenceSession(here / "{file}.onnx")
meta = json.loads(session.get_modelmeta().custom_metadata_map["vitrail"])""",
        'session.run(None, {"images": x})',
        """\
files = {{"encoder": "{file}.onnx", "step": "step.onnx"}}
programs = {{name: onnxruntime.InferenceSession(here / file) for name, file in files.items()}}
meta = json.loads(programs["encoder"].get_modelmeta().custom_metadata_map["vitrail"])""",
        """\
    inputs, outputs = [entry.name for entry in programs[name].get_inputs()], meta["programs"][name]["outputs"]
    return dict(zip(outputs, programs[name].run(outputs, {key: given[key] for key in inputs})))""",
    ),
    "openvino": _Lines(
        "OpenVINO",
        ", openvino",
        """\
model = openvino.Core().read_model(here / "{file}.xml")
meta = json.loads(model.get_rt_info("vitrail").astype(str))
run = openvino.compile_model(model, "CPU", {how})""",
        "run([x]).values()",
        """\
files = {{"encoder": "{file}.xml", "step": "step.xml"}}
core = openvino.Core()
models = {{name: core.read_model(here / file) for name, file in files.items()}}
meta = json.loads(models["encoder"].get_rt_info("vitrail").astype(str))
how = {how}  # snippets fail at some lengths
programs = {{name: core.compile_model(model, "CPU", how) for name, model in models.items()}}""",
        """\
    found = programs[name]({key: given[key] for entry in programs[name].inputs for key in entry.names if key in given})
    return {output: found[output].copy() for output in meta["programs"][name]["outputs"]}""",
    ),
}
SETUP = 'p, config = meta["config"]["preprocess"], meta["config"]'
FIT = {
    "crop": "    h, w = (h, max(w, int(h * W / H))) if h * W >= w * H else (int(w * H / W), w)  # to cover the input",
    "letterbox": "    h, w = (max(1, round(w * H / W)), w) if h * W >= w * H else (h, max(1, round(h * W / H)))",
}
"""the size that an image is resized to; for any other `resize` that of the input, whose lines are there already"""
CUT = '    pixels = pixels[top : top + p["size"][0], left : left + p["size"][1]]'
BARS = """\
    whole = np.tile((np.array(p["mean"]) * 255).round().clip(0, 255), (*p["size"], 1))  # bars around the image
    whole[-top:, -left:][:h, :w] = pixels"""
ANSWER = """\
    outputs = [array[0] for array in {run}]
{answer}
    print(path, answer, sep="\\t")"""
CAPTION = """\
    state, words = run("encoder", {"images": x}), [1]  # <pad>, <start>, <end> and <unknown> are 0, 1, 2 and 3
    while words[-1] != 2 and len(words) < most:
        given = {"next": np.array([[words[-1]]]), "rows": np.zeros((1, 1), np.int64), **state}
        found = run("step", given)
        state |= {name.removesuffix(".after"): array for name, array in found.items() if name.endswith(".after")}
        logits, seen = found["logits"][0], [spaced(word) if i == 0 else word for i, word in enumerate(words[1:])]
        logits[[0, 1, 3]] = -np.inf
        for i in range(len(seen) - n + 1 if n else 0):  # no sequence of n words twice
            if seen[i : i + n - 1] == seen[len(seen) - n + 1 :] and seen[i + n - 1] != 2:
                logits[seen[i + n - 1]] = -np.inf
        words.append(int(logits.argmax()))
    pieces = [names[word] for word in words[1:] if word != 2]
    print(path, {text}, sep="\\t")"""
CAPTION_SETUP = """\
p = meta["config"]["preprocess"]
vocabulary = json.loads(meta["files"]["tokenizer.json"])["model"]["vocab"]
names, captioning = {i: name for name, i in vocabulary.items()}, meta["config"]["captioning"]
n, most = captioning["decoding"]["no_repeat_ngram_size"], captioning["decoding"]["max_length"]
if captioning["decoder"] == "transformer":  # whose table of positions is as long as this
    most = min(most, captioning["most_words"])
{bytes}

def spaced(word):  # the number of the same piece after a space
    return {spaced}

def run(name, given):
{run}
"""
BYTES = """\
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves
byte = {chr(b): b for b in plain}
byte |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in plain)}"""


def example(meta: Meta, answer: str) -> str:
    """The file for an export, which reads the preprocessing and the class names, or the words, from it.

    `answer` is that of the first `Program`.
    """
    lines, preprocess = ENGINES[meta.format], meta.config["preprocess"]
    program, captions = next(iter(meta.programs)), "step" in meta.programs
    size = tuple(preprocess["size"]) if meta.sizes else None
    bars = preprocess["resize"] == "letterbox"
    how = {**openvino_floats(meta.precision, quantised=not captions), "SNIPPETS_MODE": "DISABLE"}
    opens = (lines.open_all if captions else lines.open).format(file=meta.name_of(program, size), how=json.dumps(how))
    values = {
        "engine": lines.engine,
        "imports": lines.imports,
        "open": opens,
        "setup": _captioning(meta, lines) if captions else SETUP,
        "fit": FIT.get(preprocess["resize"], ""),
        "place": BARS if bars else CUT,
        "pixels": "whole" if bars else "pixels",
        "answer": _replaced(CAPTION, {"text": _text(meta)}) if captions else _answer(lines, answer),
    }
    text = _replaced(TEXT.read_text(encoding="utf-8"), values)
    return text if values["fit"] else text.replace("\n\n    image", "\n    image")


def _replaced(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _answer(lines: _Lines, answer: str) -> str:
    return _replaced(ANSWER, {"run": lines.run, "answer": indent(answer, "    ").rstrip()})


def _in_bytes(meta: Meta) -> bool:
    """Whether the words are pieces in bytes, and not whole words."""
    return bool(json.loads(meta.files["tokenizer.json"])["model"]["type"] == "BPE")


def _captioning(meta: Meta, lines: _Lines) -> str:
    pieces = _in_bytes(meta)
    spaced = 'vocabulary.get("\u0120" + names[word], word)' if pieces else "word"
    text = CAPTION_SETUP if pieces else CAPTION_SETUP.replace("{bytes}\n", "")
    return _replaced(text, {"bytes": BYTES, "spaced": spaced, "run": lines.run_all})


def _text(meta: Meta) -> str:
    if not _in_bytes(meta):
        return '" ".join(pieces)'
    return 'bytes(byte[c] for piece in pieces for c in piece).decode("utf-8", "replace").strip()'
