"""`example.py` of an export: at most 30 lines without vitrail, of one text whose lines about the engine differ."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vitrail.zoo.exports import Meta

TEXT = Path(__file__).parent / "example.txt"


class _Lines(NamedTuple):
    engine: str
    imports: str
    open: str
    run: str


ENGINES = {
    "pt2": _Lines(
        "PyTorch",
        ", torch, zipfile",
        'archive = zipfile.ZipFile(here / "{file}.pt2")\n'
        'entry = next(name for name in archive.namelist() if name.endswith("vitrail.json"))\n'
        'meta, program = json.loads(archive.read(entry)), torch.export.load(here / "{file}.pt2").module()',
        "program(torch.from_numpy(x))[0].detach().numpy()",
    ),
    "onnx": _Lines(
        "ONNX Runtime",
        ", onnxruntime",
        'session = onnxruntime.InferenceSession(here / "{file}.onnx")\n'
        'meta = json.loads(session.get_modelmeta().custom_metadata_map["vitrail"])',
        'session.run(None, {{"images": x}})[0]',
    ),
    "openvino": _Lines(
        "OpenVINO",
        ", openvino",
        'model = openvino.Core().read_model(here / "{file}.xml")\n'
        'meta = json.loads(model.get_rt_info("vitrail").astype(str))\n'
        'how = {{"INFERENCE_PRECISION_HINT": {{"bf16": "bf16"}}.get(meta["precision"], "f32")}}\n'
        'compiled = openvino.compile_model(model, "CPU", how)',
        "compiled([x])[0]",
    ),
}


def example(meta: Meta) -> str:
    """The file for an export, which reads the preprocessing and the class names from it."""
    lines = ENGINES[meta.format]
    program = next(iter(meta.programs))
    own = tuple(meta.config["preprocess"]["size"])
    size = None if not meta.sizes else own if own in meta.sizes else meta.sizes[0]
    file = meta.name_of(program, size)
    text = TEXT.read_text()
    open_ = lines.open.format(file=file)
    if size not in (None, own):  # the file's size, and not that of the checkpoint
        open_ += f'\nmeta["config"]["preprocess"]["size"] = {list(size or own)}'
    for name, value in (("engine", lines.engine), ("imports", lines.imports), ("open", open_)):
        text = text.replace(f"{{{name}}}", value)
    return text.replace("{run}", lines.run.format())
