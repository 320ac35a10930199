"""Every block of Python that README and docs show is run, page by page, with stand-ins for a reader's own files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stand_ins
import torch
from documented import PAGES
from PIL import Image

import vitrail
from vitrail import zoo
from vitrail.explain.packing import packed
from vitrail.recommended import bundled

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    "tasks.md": "test_docs.py trains its task, and compares the interface with the code's",
}
"""pages whose Python another test runs"""
SHOWN = {
    page.name: found for page in PAGES if (found := BLOCK.findall(page.read_text())) and page.name not in ELSEWHERE
}


def small(source: str, **options: Any) -> Any:
    """In the place of `vitrail.load` of other people's weights: a small model with the same options."""
    inspect.signature(zoo.load).bind(source, **options)
    if source in bundled():
        return zoo.load(source, **options)
    known = {name: options[name] for name in ("classes", "channels") if name in options}
    return vitrail.create("nano/2", **{"classes": 3, **known}).eval()


class Server:
    """In the place of a running server: the answers that the page reads."""

    def post(self, url: str, timeout: float, files: Any = None, json: Any = None, data: Any = None) -> Server:
        assert url in (f"http://127.0.0.1:8000/v1/{name}" for name in ("predict", "explain")) and (files or json)
        return self

    def json(self) -> dict[str, Any]:
        prediction = {"labels": [{"label": "cat", "score": 0.9}], "caption": "a cat ."}
        return {"predictions": [prediction], "explanation": {"arrays": {"relevance": packed(np.eye(2))}}}


@pytest.mark.parametrize("name", SHOWN)
def test_python_does_what_it_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("import httpx" in block for block in SHOWN[name]):
        pytest.importorskip("httpx", reason="needs pip install 'vitrail[dev]'")
        monkeypatch.setattr("httpx.post", Server().post)
    monkeypatch.chdir(tmp_path)
    for photo in ("photo.jpg", "cat.jpg", "captioned/train/images/a.jpg"):
        stand_ins.save(tmp_path / photo, stand_ins.pixels(0))
    (tmp_path / "captioned/train/captions.txt").write_text("image,caption\na.jpg,a dog runs .\n")
    monkeypatch.setattr(vitrail, "load", small, raising=False)
    image = Image.open(tmp_path / "photo.jpg")
    images = torch.zeros(2, 4 if name == "checkpoints.md" else 3, 8, 8)  # its last model has four channels
    names = {"vitrail": vitrail, "image": image, "images": images}
    for block in SHOWN[name]:
        exec(compile(block, name, "exec"), names)
