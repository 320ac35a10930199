"""Run docs/quickstart.ipynb from top to bottom, and store it with its outputs: `make notebook`.

Figures are stored as small PNGs. The notebook's metadata hold a digest of its code, by which a test sees whether the
outputs are those of the code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from vitrail.files import write_atomic

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"
COLOURS = 64
"""of a stored figure, which is a plot or a few grey images"""


def digest(notebook: Any) -> str:
    """A hash of the code of a notebook's cells."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def small(png: str) -> str:
    """A PNG in base64 with at most `COLOURS` colours."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(COLOURS).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def execute(notebook: Any, folder: str, timeout: int = 900) -> None:
    """Run all cells of a notebook in place, in the folder `folder`."""
    from nbclient import NotebookClient

    resources = {"metadata": {"path": folder}}
    NotebookClient(notebook, timeout=timeout, startup_timeout=180, resources=resources).execute()


def main() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder)
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
            data = output.get("data", {})
            if "image/png" in data:
                output.data = {"image/png": small(data["image/png"])}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}, "code": digest(notebook)}
    write_atomic(NOTEBOOK, nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
